"""Train a LEGO stack on one GPU or CPU: `python train_tiny.py` draws landscapes; --help lists the rest.

The file has three parts: data sets (built-in landscapes, CIFAR-10, Fashion-MNIST, any folder or zip of images), pictures and
command line (shared with sample_tiny.py), and training. Every random draw comes from (seed, step), so a resumed run is the
run that never stopped (bit for bit on a CPU), and the ranks of `torchrun` share one global batch.

SPDX-License-Identifier: MIT
"""

import argparse
import copy
import ctypes
import gzip
import hashlib
import io
import itertools
import math
import os
import signal
import stat
import struct
import sys
import tarfile
import time
import traceback
import urllib.request
import zipfile
import zlib
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from lego import OBJECTIVES, PRESETS, Lego, LegoConfig, generator, read_checkpoint, save_checkpoint, write_aside

# ---- Data sets: landscapes -------------------------------------------------------------------------------------------

LANDSCAPES = ["day", "sunset", "night", "winter"]
PALETTES = np.array([   # sky above, sky below, sun or moon, far ridge, near ridge: RGB in [0, 1], a row for each class
    [(.22, .47, .88), (.76, .89, 1.), (1., .96, .74), (.52, .64, .76), (.13, .38, .16)],
    [(.27, .20, .50), (1., .55, .27), (1., .87, .50), (.60, .32, .40), (.14, .07, .16)],
    [(.01, .02, .09), (.09, .14, .32), (.96, .95, .86), (.12, .16, .30), (.02, .03, .07)],
    [(.50, .63, .80), (.90, .93, .96), (1., .98, .88), (.60, .68, .79), (.27, .35, .44)]], np.float32)
PERIOD = 8              # a scene repeats sideways after this many times its height
WAVES = [n / PERIOD for n in (2, 4, 7, 12, 20, 32, 50, 76)]   # ridge frequencies, per height


def landscapes(seed, indices, H, W):
    """Scenes `indices` of the endless data set `seed`: uint8 (n, H, W, 3) and labels (n,), which are index modulo 4.

    Distances are in units of the height, so a scene has the same content at any H, and a larger W shows more of it. Every two
    heights have their sun or moon, which keeps clear of their ends. Edges are antialiased by coverage: a pixel is covered in
    proportion to its distance from the edge."""
    labels = np.asarray(indices) % 4
    random = np.stack([np.random.default_rng([seed, i]).random(400) for i in indices]).astype(np.float32)[:, :, None]   # (n, 400, 1)
    used = itertools.count()
    draw = lambda low=0., high=1.: low + (high - low) * random[:, next(used)]                         # (n, 1)
    y = (1 - (np.arange(H)[None, :, None] + .5) / H).astype(np.float32)                               # (1, H, 1), up
    x = ((np.arange(W)[None, :] + .5) / H).astype(np.float32)                                         # (1, W)
    covers = lambda distance: np.clip(distance * H + .5, 0, 1)[..., None]                             # to (n, H, W, 1)

    colours = PALETTES[labels] + .07 * (np.concatenate([draw() for _ in range(15)], 1).reshape(-1, 5, 3) - .5)
    colours = (colours * (.85 + .3 * draw()[:, :, None]))[:, :, None, None]                            # (n, 5, 1, 1, 3)
    above, below, disc, far, near = colours.transpose(1, 0, 2, 3, 4)
    image = below + (above - below) * (y[..., None] * draw(1., 1.4)[..., None, None] - .25).clip(0, 1)

    blur = math.hypot(.012, .4 / H)                                                                    # stars, at night
    sx, sy, glow = random[:, 160:240, 0] * PERIOD, random[:, 240:320, 0], random[:, 320:400]           # (n, 80)
    apart = (x[:, None] - sx[:, :, None] + PERIOD / 2) % PERIOD - PERIOD / 2                           # (n, 80, W)
    rows = np.exp(-(y[:, None, :, 0] - sy[:, :, None]) ** 2 / (2 * blur ** 2)) * glow                  # (n, 80, H)
    stars = rows.transpose(0, 2, 1) @ np.exp(-apart ** 2 / (2 * blur ** 2)) * (1.6 * (.012 / blur) ** 2)
    image = image + (1 - image) * np.clip(stars, 0, 1)[..., None] * (labels == 2)[:, None, None, None]
    for cell in range(4):                                                       # a sun or moon for every 2 heights sideways
        sx, sy, radius = (cell + draw(.15, .85)) * 2, draw(.55, .9), draw(.07, .12)
        apart = (x - sx + PERIOD / 2) % PERIOD - PERIOD / 2
        distance = np.hypot(apart[:, None], y - sy[:, :, None])                                        # (n, H, W)
        image = image + (disc - image) * np.exp(-(distance / .22) ** 2)[..., None] * .45
        image = image + (disc - image) * covers(radius[:, :, None] - distance)

    for layer, (base, height) in enumerate([(.48, .24), (.32, .17), (.15, .08)]):                     # ridges, far to near
        base, ridge, line = draw(base - .05, base + .05), 0, 0
        for f in WAVES:
            strength, phase = draw(.4, 1.) * (f * PERIOD / 2) ** -.75, draw()
            wave = np.abs(np.sin(np.pi * (f * x + phase))) if layer < 2 else .5 * np.sin(2 * np.pi * (f * x + phase)) + .5
            ridge = ridge + strength * (.5 - wave)                            # |sin| turned over: pointed peaks
            line = line + strength * (.5 - wave) * np.cos(7 * phase)          # a second, related line: where snow begins
        ridge = base + height * ridge
        colour = far + (near - far) * layer / 2
        haze = np.clip((ridge[:, None] - y) * 1.5, 0, .5)[..., None] * (1 - layer / 3)
        ground = colour + (below - colour) * haze
        snow = covers(y - (base - .02 + .5 * height * line)[:, None]) * (labels == 3)[:, None, None, None] * (layer < 2)
        ground = ground + (.97 - ground) * snow
        image = image + (ground - image) * covers(ridge[:, None] - y)
    return (image.clip(0, 1) * 255 + .5).astype(np.uint8), labels


# ---- Data sets: files ------------------------------------------------------------------------------------------------

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR10_FILE = ("cifar-10-binary.tar.gz", "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9dddda3db29a59bca1dd")     # sha256
CIFAR10_URLS = ["https://www.cs.toronto.edu/~kriz/", "https://cave.cs.toronto.edu/kriz/"]
FASHION = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
FASHION_FILES = {           # sha256 of what the .gz files hold, since Debian's are compressed anew
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"}
FASHION_URLS = ["https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"]
FASHION_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
LARGEST_FILE = 1 << 28      # bytes that any one download, archive member or image file may have


@dataclass(eq=False)
class Data:
    """A data set in memory: uint8 images (n, S, S, C) and labels (n,) to train on, the same held out, and whether a mirror
    image is as likely as the image. Built-in landscapes have no arrays: they are drawn when asked for."""
    name: str
    classes: list
    channels: int
    flip: bool
    size: int
    train: tuple | None = None
    held_out: tuple | None = None

    def batch(self, seed, step, count, mine=slice(None), flip=False):
        """Global batch number `step` of `count` images, of which `mine` are returned: float images (n, C, H, W) in [-1, 1] and
        labels (n,). The same for the same (seed, step), in epochs of a shuffled data set."""
        number = np.arange(step * count, (step + 1) * count)[mine]
        if self.train is None:
            images, labels = landscapes(seed, number, self.size, self.size)
        else:
            images, labels = self.train
            order = np.array([self.shuffled(seed, i // len(images))[i % len(images)] for i in number])
            images, labels = images[order], labels[order]
        if flip:
            flipped = np.random.default_rng([seed, step, 1]).random(count)[mine] < .5
            images = np.where(flipped[:, None, None, None], images[:, :, ::-1], images)
        return to_float(images), torch.from_numpy(labels.astype(np.int64))

    @lru_cache(maxsize=2)
    def shuffled(self, seed, epoch):
        return np.random.default_rng([seed, epoch]).permutation(len(self.train[0]))

    def held(self, count):
        """`count` held-out images, the same in every run, and their labels, as `batch` gives them."""
        if self.held_out is None:
            images, labels = landscapes(2 ** 32, range(count), self.size, self.size)     # no --seed is that large
        else:
            chosen = np.random.default_rng(0).permutation(len(self.held_out[0]))[:count]
            images, labels = (part[chosen] for part in self.held_out)
        return to_float(images), torch.from_numpy(labels.astype(np.int64))


def to_float(images):
    """uint8 (n, H, W, C) to float32 (n, C, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_bytes(images):
    """float (n, C, H, W) in [-1, 1] to uint8 (n, H, W, C)."""
    return (images.clamp(-1, 1) * 127.5 + 128).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def fetch(name, sha256, urls, folder, opener=open):
    """The path of file `name` in `folder`, downloaded from one of `urls` if need be (a broken download goes on where it
    stopped) and checked: sha256 is that of the bytes that `opener` reads. ValueError, saying where to put the file, if it
    cannot be had."""
    path, reasons = Path(folder) / name, []
    part = path.with_name(name + ".part")

    def matches(file):
        try:
            with opener(file, "rb") as content:
                return hashlib.sha256(content.read(LARGEST_FILE)).hexdigest() == sha256
        except (gzip.BadGzipFile, EOFError, zlib.error):
            return False

    if part.exists() and matches(part):             # a download that was stopped between its last byte and the check
        return part.replace(path)
    if path.exists():
        if matches(path):
            return path
        raise ValueError(f"{path} is damaged (its checksum is wrong): delete it, to download it again")
    for url in urls:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            have = part.stat().st_size if part.exists() else 0
            request = urllib.request.Request(url + name, headers={"Range": f"bytes={have}-", "User-Agent": "lego-tiny"})
            with urllib.request.urlopen(request, timeout=30) as reply:
                have = have if reply.status == 206 else 0                       # 200: the server sends it all again
                whole = have + int(reply.headers.get("Content-Length") or 0)
                with (part.open("ab" if have else "wb") as file,
                      tqdm(initial=have, total=whole, unit="B", unit_scale=True, desc=name) as bar):
                    while (block := reply.read(1 << 16)) and file.tell() < LARGEST_FILE:
                        bar.update(file.write(block))
            if part.stat().st_size < whole:
                raise OSError("the connection broke off")
            if matches(part):
                return part.replace(path)
            part.unlink()
            reasons.append(f"{url}: wrong checksum")
        except (OSError, ValueError, HTTPException) as error:                   # URLError is an OSError
            if getattr(error, "code", None) == 416:                             # nothing comes after this part: it is too long
                part.unlink(missing_ok=True)
            reasons.append(f"{url}: {error}")
    raise ValueError(f"cannot download {name} ({'; '.join(reasons)}). Get it elsewhere and put it at {path}")


def read_cifar10(path):
    """Train and test (images, labels) from the official binary archive, which is read member by member."""
    def records(archive, member):
        try:
            info = archive.getmember(f"cifar-10-batches-bin/{member}")
        except KeyError:
            raise ValueError(f"{path}: member cifar-10-batches-bin/{member} is missing: get the *binary* version")
        if not info.isfile() or info.size % 3073 or not 0 < info.size <= LARGEST_FILE:
            raise ValueError(f"{path}: {member} has {info.size} bytes, not whole records of 3073")
        rows = np.frombuffer(archive.extractfile(info).read(info.size), np.uint8).reshape(-1, 3073)
        if rows[:, 0].max() > 9:
            raise ValueError(f"{path}: {member} has label {rows[:, 0].max()}, but labels go from 0 to 9")
        return rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]

    try:
        with tarfile.open(path, "r:gz") as archive:
            parts = [records(archive, f"data_batch_{i}.bin") for i in range(1, 6)]
            return tuple(np.concatenate(p) for p in zip(*parts)), records(archive, "test_batch.bin")
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a readable .tar.gz archive ({error})") from error


def read_idx(images_path, labels_path):
    """(images (n, H, W, 1), labels (n,)) from a pair of gzipped idx files."""
    def read(path, dims):
        try:
            with gzip.open(path) as file:
                data = file.read(LARGEST_FILE)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a readable .gz file ({error})") from error
        head = 4 + 4 * dims
        shape = struct.unpack(f">{dims}I", data[4:head]) if len(data) >= head else ()
        if data[:4] != bytes([0, 0, 8, dims]) or len(data) != head + math.prod(shape):
            raise ValueError(f"{path} is not a whole idx file of unsigned bytes in {dims} dimensions")
        return np.frombuffer(data, np.uint8, offset=head).reshape(shape)

    images, labels = read(images_path, 3), read(labels_path, 1)
    if len(images) != len(labels) or labels.max(initial=0) > 9:
        raise ValueError(f"{labels_path}: {len(labels)} labels up to {labels.max(initial=0)} for {len(images)} images of 10 "
                         "classes")
    return images[..., None], labels


def resized(images, size):
    """uint8 (n, H, W, C) centre-cropped and resized to (n, size, size, C)."""
    if images.shape[1:3] == (size, size):
        return images
    fit = lambda image: np.asarray(ImageOps.fit(Image.fromarray(image.squeeze()), (size, size))).reshape(size, size, -1)
    return np.stack([fit(image) for image in images])


def read_image(data, size):
    """(size, size, 1 or 3) uint8 from an image file's bytes of any mode: turned upright, laid on white, centre-cropped."""
    with Image.open(io.BytesIO(data)) as image:
        if image.width * image.height > 1 << 26:
            raise ValueError(f"{image.width}x{image.height} is too large")
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):                                            # 16 bits a pixel
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    gray = image.mode in ("1", "L", "LA", "La", "F")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(image.convert("L" if gray else "RGB"), (size, size))
    return np.asarray(image).reshape(size, size, -1)


def read_folder(path, size):
    """A Data set from a folder or a zip of images: the class is the name of the folder an image lies in. The last tenth of each
    class is held out; with fewer than ten images in every class nothing is, which is said, and the training images stand in.
    Files that cannot be read are skipped and counted; the images are never written anywhere."""
    def files():                                                              # (name, function that opens the file)
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                if file.is_file():
                    yield file.relative_to(path.parent), partial(file.open, "rb")
        else:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
                if sum(info.file_size for info in members) > 100 * path.stat().st_size + LARGEST_FILE:
                    raise ValueError(f"{path} unpacks to more than a hundred times its size: not a zip of images")
                for info in sorted(members, key=lambda i: i.filename):
                    link = stat.S_ISLNK(info.external_attr >> 16)
                    if link or ".." in Path(info.filename).parts or info.filename.startswith(("/", "\\")):
                        raise ValueError(f"{path}: member {info.filename!r} points out of the archive: do not trust this file")
                    yield Path(path.stem) / info.filename, partial(archive.open, info)

    images, skipped = {}, 0
    try:
        for name, opened in tqdm(files(), desc=f"reading {path.name}", unit=" files", leave=False):
            if name.suffix.lower() not in SUFFIXES or any(part.startswith((".", "__MACOSX")) for part in name.parts[1:]):
                continue
            try:
                with opened() as file:
                    image = read_image(file.read(LARGEST_FILE), size)
            except Exception:           # readers of archives and images meet hostile bytes with errors of almost any type
                skipped += 1
            else:
                images.setdefault(name.parent.name, []).append(image)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a readable zip archive ({error})") from error
    found = sum(map(len, images.values()))
    print(f"{path}: {found} images in {len(images)} classes" + (f", {skipped} unreadable files skipped" if skipped else ""))
    if found < 2:
        raise ValueError(f"{path}: {found} readable images found; put images into one folder per class")
    channels = max(image.shape[2] for group in images.values() for image in group)
    classes, parts = sorted(images), ([], [])                                 # train, held out
    for label, name in enumerate(classes):
        group = np.stack([np.broadcast_to(image, (size, size, channels)) for image in images.pop(name)])
        cut = len(group) - len(group) // 10
        for part, chosen in zip(parts, (group[:cut], group[cut:])):
            part.append((chosen, np.full(len(chosen), label)))
    train, held_out = (tuple(np.concatenate(p) for p in zip(*part)) for part in parts)
    if not len(held_out[0]):
        print("no class has ten images, so that none is held out: held-out losses are those of training images")
        held_out = train
    return Data(path.stem, classes, channels, True, size, train, held_out)


def load_data(name, folder, size):
    """The Data set `name` (landscapes, cifar10, fashion-mnist, or a path) at size x size; files are kept in `folder`."""
    if name == "landscapes":
        return Data(name, LANDSCAPES, 3, False, size)
    if name == "cifar10":
        train, test = read_cifar10(fetch(*CIFAR10_FILE, CIFAR10_URLS, folder))
        return Data(name, CIFAR10, 3, True, size, (resized(train[0], size), train[1]), (resized(test[0], size), test[1]))
    if name == "fashion-mnist":                                               # never mirrored: all shoes point to the left
        folder = FASHION_DEBIAN if FASHION_DEBIAN.exists() and not (Path(folder) / next(iter(FASHION_FILES))).exists() else folder
        paths = [fetch(file, sha256, FASHION_URLS, folder, gzip.open) for file, sha256 in FASHION_FILES.items()]
        train, test = read_idx(*paths[:2]), read_idx(*paths[2:])
        return Data(name, FASHION, 1, False, size, (resized(train[0], size), train[1]), (resized(test[0], size), test[1]))
    if not Path(name).exists():
        raise ValueError(f"no data set {name!r}: take landscapes, cifar10, fashion-mnist, or an existing folder or zip of images")
    return read_folder(Path(os.path.abspath(name)), size)


# ---- Pictures and command line, shared with sample_tiny.py -----------------------------------------------------------


def picture(images, columns, enlarge=True):
    """One Pillow image of uint8 images (n, H, W, C) in rows of `columns`, with a thin white line between them; `enlarge`
    repeats pixels until an image is at least 96 high."""
    n, H, W, C = images.shape
    rows = math.ceil(n / columns)
    sheet = np.full((rows * columns, H + 1, W + 1, C), 255, np.uint8)
    sheet[:n, :H, :W] = images
    sheet = sheet.reshape(rows, columns, H + 1, W + 1, C).swapaxes(1, 2).reshape(rows * (H + 1), -1, C)[:-1, :-1]
    sheet = Image.fromarray(sheet.squeeze(2) if C == 1 else sheet)
    times = math.ceil(96 / H) if enlarge else 1
    return sheet.resize((sheet.width * times, sheet.height * times), Image.NEAREST)


def sheet_columns(classes):
    """A class in every column, where that makes 5 to 16 of them, else 8."""
    return classes if 5 <= classes <= 16 else 8


def save_picture(sheet, path):
    write_aside(path, lambda file: sheet.save(file, "png"))


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line and leaves with exit code 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists all flags)\n")


def flag(parser, name, default, help, **settings):
    parser.add_argument(name, default=default, help=help + ("" if default is None else f" (default: {default})"), **settings)


def command(main):
    """Run `main`, turning what a user can cause into one line and exit code 2."""
    keep_memory()
    code = 0
    try:
        main()
    except KeyboardInterrupt:
        code = "interrupted"
    except Exception as error:
        no_memory = isinstance(error, (MemoryError, RuntimeError)) and "memory" in f"{error!r}".lower()
        if no_memory or isinstance(error, (ValueError, OSError)):
            hint = "take a smaller batch, size or width: " if no_memory else ""
            sys.stderr.write(f"{Path(sys.argv[0]).name}: {hint}{' '.join(str(error).split())[:500]}\n")
            code = 2
        else:                           # a mistake of ours
            traceback.print_exc()
            code = 1
    sys.exit(code)                      # out here, where the error no longer keeps the run, and so its data worker, alive


def pick_device(name):
    """torch.device of "auto", "cpu", "cuda", "cuda:1", ...; ValueError if it is not there."""
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error


def keep_memory():
    """Tell glibc to keep what is freed. It returns large blocks to the system by default, only to fetch them again, zeroed page
    by page, for the next tensor: 21,000 page faults in a training step of the default stack."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 1 << 30), mallopt(-3, 1 << 25)          # M_TRIM_THRESHOLD, and M_MMAP_THRESHOLD as high as it goes
    except (AttributeError, OSError, TypeError):            # another C library, macOS, Windows
        pass


def pick_precision(name, device):
    """An autocast context, made anew by every call of the function returned. "auto" is bfloat16 where the hardware multiplies
    it natively (CUDA from Ampere on, CPUs with AMX) and float32 elsewhere."""
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else \
        device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    bf16 = name == "bf16" or name == "auto" and native
    print(f"device {device}, precision {'bf16' if bf16 else 'fp32'}" + (" (chosen by hardware)" if name == "auto" else ""))
    return lambda: torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def timed(work, device):
    """Seconds that work() takes, including what it leaves to the accelerator."""
    wait = int if device.type == "cpu" else torch.accelerator.synchronize
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def peak_memory(device):
    """The most memory used so far, in MB: the process's resident set (NaN on Windows), or what torch took on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return math.nan
    import resource                     # which Windows lacks
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


# ---- Training --------------------------------------------------------------------------------------------------------

FREE = {"bench", "resume", "steps", "minutes", "device", "data_dir", "save_minutes"}     # may differ when a run is resumed
LOG_EVERY = 20          # steps
CHOICES = "local_mlp", "residual", "detach", "supervision"      # what --without leaves out: see LegoConfig and Diffusion.loss


def read_flags():
    """The settings of this run: flags given, else those stored in the run to resume, else the defaults."""
    p = Parser(description="Train a LEGO diffusion stack.")
    flag(p, "--dataset", "landscapes", "landscapes, cifar10, fashion-mnist, or a folder or zip of images (class = folder name)")
    flag(p, "--data-dir", "data", "where data sets are looked for and downloaded to")
    stack, budget = p.add_mutually_exclusive_group(), p.add_mutually_exclusive_group()
    flag(stack, "--preset", None, "a stack by name: " + ", ".join(n for n in PRESETS if n[0] in "td")
         + ", or one of the authors' (default: tiny)")
    flag(stack, "--bricks", None, 'a stack of your own, region/patch x depth, such as "32/4x6 8/2x2"; replaces --preset')
    flag(p, "--width", None, "width of the Transformer blocks (default: the preset's)", type=int)
    flag(p, "--heads", None, "attention heads (default: the preset's)", type=int)
    flag(p, "--without", "", "to compare, train without some of our choices, comma separated: " + ", ".join(CHOICES))
    flag(p, "--size", 32, "height and width of the training images", type=int)
    flag(p, "--objective", "edm", "edm or ddpm", choices=list(OBJECTIVES))
    flag(budget, "--steps", None, "budget in optimizer steps, those before --resume included", type=int)
    flag(budget, "--minutes", None, "budget in minutes, likewise (default: 10, when --steps is not given either)", type=float)
    flag(p, "--batch", 32, "images per step, over all processes", type=int)
    flag(p, "--lr", 4e-3, "peak learning rate", type=float)
    flag(p, "--region-fraction", None, "share of its regions that a brick trains on in a step: one number, or one per brick, comma "
         "separated (default: what makes as many tokens as the largest patch makes of the image)")
    flag(p, "--brick-drop", None, "chance of leaving a brick out of a step: one number, or one per brick (default: 0, but 0.75 for a "
         "brick with neither smaller patches nor a larger region than one before it)")
    flag(p, "--label-drop", 0.1, "chance of hiding an image's label, for guidance", type=float)
    flag(p, "--flip", None, "mirror images at random (default: yes but for landscapes and fashion-mnist)",
         action=argparse.BooleanOptionalAction)
    flag(p, "--ema-images", 500_000, "half-life of the weight average in images; early on at most 5%% of those seen", type=int)
    flag(p, "--out", None, "folder for checkpoint, log and pictures (default: runs/DATASET, numbered if taken)")
    flag(p, "--resume", None, "folder of a run to continue")
    flag(p, "--save-minutes", 2.0, "minutes between checkpoints with a sample picture", type=float)
    flag(p, "--device", "auto", "auto, cpu, cuda, mps")
    flag(p, "--precision", "auto", "auto, fp32 or bf16", choices=["auto", "fp32", "bf16"])
    flag(p, "--compile", False, "compile the Transformer blocks with torch.compile", action="store_true")
    flag(p, "--seed", 0, "seed of everything random", type=int)
    flag(p, "--bench", False, "only measure the speed of a step", action="store_true")
    s, state = p.parse_args(), None
    if s.resume:
        state = read_checkpoint(path := Path(s.resume) / "checkpoint.pt")
        if "train" not in state or not isinstance(state["info"].get("settings"), dict):
            raise ValueError(f"{path} holds weights to sample from, but no run to resume")
        stored = vars(s) | state["info"]["settings"] | dict(out=s.resume)
        if s.steps or s.minutes:                                    # a new budget replaces the stored one
            stored |= dict(steps=None, minutes=None)
        s = p.parse_args(namespace=argparse.Namespace(**stored))    # the flags given again, now over the stored ones
        for name, value in vars(s).items():
            if name not in FREE and value != stored[name]:
                raise ValueError(f"--{name.replace('_', '-')} {value} contradicts the run to resume, which has {stored[name]}")
    if s.steps is None and s.minutes is None:
        s.minutes = 10.0
    tiny, whole = 1e-9, 2 ** 32 - 1
    for name, (least, most) in dict(size=(1, 4096), steps=(1, whole), batch=(1, 1 << 16), ema_images=(1, whole), seed=(0, whole),
                                    minutes=(tiny, 1e6), lr=(tiny, 1), label_drop=(0, 1),
                                    save_minutes=(0, 1e6)).items():
        value = getattr(s, name)
        if value is not None and not least <= value <= most:
            p.error(f"--{name.replace('_', '-')} must lie between {least} and {most}, found {value}")
    return s, state


def make_config(s, data):
    """The LegoConfig that the flags ask for, for the images of `data`."""
    if s.preset and s.preset not in PRESETS:
        raise ValueError(f"unknown preset {s.preset!r}: take one of {', '.join(PRESETS)}")
    preset = PRESETS[s.preset or "tiny"]
    changes = dict(channels=data.channels, classes=len(data.classes) if len(data.classes) > 1 else 0, size=s.size,
                   width=preset.width if s.width is None else s.width, heads=preset.heads if s.heads is None else s.heads)
    without = set(filter(None, s.without.split(",")))
    if not without <= set(CHOICES):
        raise ValueError(f"--without {s.without}: take some of {', '.join(CHOICES)}")
    changes |= {name: False for name in without - {"supervision"}}
    if s.bricks:
        changes["bricks"] = LegoConfig.parse(s.bricks, width=4, heads=1).bricks
    return replace(preset, **changes)


def image_tokens(config):
    """How many tokens each brick makes of a training image."""
    return [math.prod(b.grid(config.size, config.size)) * b.tokens for b in config.bricks]


def shares(s, config):
    """How much each brick trains: the shares of its regions that a step sees, and the chances that a step leaves it out.

    By default every brick trains on as many tokens of an image as the largest patch makes of it, and a brick that brings
    neither smaller patches nor a larger region than one before it is left out of three steps in four: see the README."""
    def numbers(name, text, least, most):
        try:
            values = [float(word) for word in text.split(",")]
        except ValueError:
            values = []
        values *= K if len(values) == 1 else 1
        if len(values) != K or not all(least <= value <= most for value in values):
            raise ValueError(f"--{name} {text}: give one number from {least} to {most}, or {K} of them, comma separated")
        return values

    bricks, tokens, K = config.bricks, image_tokens(config), len(config.bricks)
    repeats = [any(b.patch <= brick.patch and b.region >= brick.region for b in bricks[:k]) for k, brick in enumerate(bricks)]
    return ([min(tokens) / n for n in tokens] if s.region_fraction is None else numbers("region-fraction", s.region_fraction, .001, 1),
            [.75 * again for again in repeats] if s.brick_drop is None else numbers("brick-drop", s.brick_drop, 0, .9))


# Odd polynomials of degree 5 that together take [0.01, 1] as near to 1 as three of them can (0.73 to 1.27), found greedily
# by linear programming as in Amsel et al. 2025.
POLYNOMIALS = [(8.0934, -23.6204, 17.4462), (3.6366, -2.7219, .5365), (2.6613, -1.9772, .4526)]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): torch.optim.Muon with steps of AdamW's size (a test compares them), but all matrices of one
    shape are orthogonalised in one batch, which is three times faster on 2 CPU cores: 15 ms a step, not 52."""

    def __init__(self, parameters, lr, momentum=0.95):
        super().__init__(parameters, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, same in shapes.items():
                grads = [p.grad for p in same]
                for p in same:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                averages = [self.state[p]["momentum_buffer"] for p in same]
                torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
                x = torch.stack(torch._foreach_lerp(grads, averages, group["momentum"])).bfloat16()      # (n, rows, columns)
                x = x.mT if shape[0] > shape[1] else x
                x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
                for linear, cubic, quintic in POLYNOMIALS:                      # singular values go to about 1
                    a = x @ x.mT
                    x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=cubic, alpha=quintic), x, beta=linear)
                x = (x.mT if shape[0] > shape[1] else x).float()
                torch._foreach_sub_(same, list(x.unbind()), alpha=0.2 * math.sqrt(max(shape)) * group["lr"])


def make_optimizers(model, lr):
    """Muon for the matrices inside the Transformer blocks, AdamW for all else, with one learning rate."""
    inner = [p for name, p in model.named_parameters() if ".blocks." in name and p.ndim == 2 and "adaln" not in name]
    outer = [p for p in model.parameters() if all(p is not q for q in inner)]
    return [Muon(inner, lr),
            torch.optim.AdamW(outer, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=outer[0].device.type != "mps")]


def share(parameters, extra, world):
    """Average all gradients, and the few numbers `extra`, over the processes, in one message. Returns the average of extra.

    DistributedDataParallel would need to search for the parameters of dropped bricks in every step; here they are simply
    the ones without a gradient, which are the same in every process."""
    if world == 1:
        return extra
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads] + [torch.tensor(extra, device=grads[0].device)])
    dist.all_reduce(flat)
    flat /= world
    torch.nn.utils.vector_to_parameters(flat, grads)
    return flat[-len(extra):].tolist()


@torch.no_grad()
def held_out_loss(model, diffusion, data, autocast, count=512, batch=128):
    """Loss of every brick on held-out images, at fixed noise: the quantiles of the training distribution of sigma. Returns the
    losses (count, K) and sigma (count,)."""
    images, labels = data.held(count)
    g = generator("held-out")
    sigma = diffusion.sigma_at((torch.randperm(len(images), generator=g) + .5) / len(images))
    noise = torch.randn(images.shape, generator=g)
    device, losses = next(model.parameters()).device, []
    for part in torch.arange(len(images)).split(batch):
        x0, y, s, n = (t[part].to(device) for t in (images, labels, sigma, noise))
        with autocast():
            losses.append(diffusion.loss(model, x0, y if model.config.classes else None, sigma=s, noise=n)[1])
    return torch.cat(losses).cpu(), sigma


def useful_levels(losses, sigma, tolerance=0.002):
    """For every brick the lowest and highest sigma at which it is worth running, for `sample_tiny.py --skip auto`: leaving it out
    below, and likewise above, raises the sum of the losses (n, K) by no more than `tolerance` of the last brick's. The first
    brick is always worth it; a brick that never is gets (0, 0)."""
    sigma, order = sigma.sort()
    gains = (losses[:, :-1] - losses[:, 1:])[order] / losses[:, -1].sum()         # (n, K - 1): what each brick takes off
    levels = [(0.0, math.inf)]
    for gain in gains.T:
        below, above = gain.cumsum(0), gain.flip(0).cumsum(0).flip(0)
        worth = sigma[(below > tolerance) & (above > tolerance)].tolist() or [0.0]
        levels.append((worth[0], worth[-1]))
    return levels


def sample_sheet(model, diffusion, autocast):
    """A picture of samples, a class in every column."""
    config, n = model.config, 4 * sheet_columns(model.config.classes)
    labels = torch.arange(n, device=next(model.parameters()).device) % config.classes if config.classes else None
    with autocast():
        images = diffusion.sample(model, (n, config.channels, config.size, config.size), labels,
                                  generator=[generator(0, i) for i in range(n)], clip=True)
    return picture(to_bytes(images), n // 4)


def ignore_signals(worker):
    for number in (signal.SIGINT, signal.SIGTERM):      # they often reach the whole group; the trainer decides what they mean
        signal.signal(number, signal.SIG_IGN)


class Trainer:
    """A run: network, weight average, optimizers and counters, made from the settings `s` and the checkpoint to resume."""

    def __init__(self, s, state, rank, world):
        self.s, self.rank, self.world = s, rank, world
        self.device = pick_device(s.device)
        self.autocast = pick_precision(s.precision, self.device)
        if world > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        first = os.environ.get("LOCAL_RANK", "0") == "0"        # on this machine: it downloads, the others then find the files
        if world > 1 and not first:
            dist.barrier()
        self.data = load_data(s.dataset, s.data_dir, s.size)
        if world > 1 and first:
            dist.barrier()
        self.config = state["config"] if state else make_config(s, self.data)
        self.fractions, self.drops = shares(s, self.config)
        self.diffusion = OBJECTIVES[s.objective]()
        torch.manual_seed(s.seed)
        self.model = Lego(self.config).to(self.device)
        self.model.info = dict(objective=s.objective, dataset=self.data.name, classes=self.data.classes)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.parameters, self.averages = list(self.model.parameters()), list(self.ema.parameters())
        self.optimizers = make_optimizers(self.model, s.lr)
        self.step, self.seconds, self.unsound, K = 0, 0.0, 0, len(self.config.bricks)
        self.sums = torch.zeros(2, 1 + K + 3, device=self.device)               # sums and counts since the log's last line
        self.edges = self.diffusion.sigma_at(torch.tensor([1 / 3, 2 / 3])).to(self.device)
        if state:
            if state["info"]["classes"] != self.data.classes:
                raise ValueError(f"the run to resume knows the classes {state['info']['classes']}, found {self.data.classes}")
            try:
                self.ema.load_state_dict(state["weights"])
                self.model.load_state_dict(state["train"]["weights"])
                for optimizer, stored in zip(self.optimizers, state["train"]["optimizers"], strict=True):
                    optimizer.load_state_dict(stored)
                self.step, self.seconds, self.unsound = (state["info"][key] for key in ("step", "seconds", "unsound"))
                self.sums = state["train"]["sums"].to(self.device)
            except (RuntimeError, KeyError, TypeError) as error:
                raise ValueError(f"the checkpoint in {s.resume} does not hold a whole run of this stack ({error})") from error
        if s.compile:               # the blocks only: they share their code, which is then compiled once, not once a brick
            for block in itertools.chain.from_iterable(brick.blocks for brick in self.model.bricks):
                block.compile()
        self.began, self.stop = time.perf_counter() - self.seconds, False       # stop: a signal asked for it
        print(self.model.table())
        words = [", ".join(f"{value:.3g}" for value in values) for values in (self.fractions, self.drops)]
        print(f"training on the share {words[0]} of each brick's regions, leaving bricks out with chance {words[1]}")

    def batches(self):
        """This process's batches from the current step on, without end, made ahead of time by worker processes: one keeps a CPU
        busy, but a GPU is faster than one can draw landscapes."""
        mine = slice(self.rank * self.s.batch // self.world, (self.rank + 1) * self.s.batch // self.world)
        flip = self.data.flip if self.s.flip is None else self.s.flip
        batch = partial(self.data.batch, self.s.seed, count=self.s.batch, mine=mine, flip=flip)     # a function of the step
        return torch.utils.data.DataLoader(range(self.step, 1 << 60), batch_size=None, collate_fn=batch,
                                           num_workers=1 if self.device.type == "cpu" else min(8, os.cpu_count() or 1),
                                           prefetch_factor=8, worker_init_fn=ignore_signals,
                                           pin_memory=self.device.type == "cuda")

    def gradients(self, x0, labels):
        """Forward and backward pass; returns the losses (B, K) and the noise levels (B,)."""
        s = self.s
        x0, labels = x0.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        with self.autocast():
            loss, losses, sigma = self.diffusion.loss(
                self.model, x0, labels if self.config.classes else None, region_fraction=self.fractions, brick_drop=self.drops,
                label_drop=s.label_drop, supervise_all="supervision" not in s.without,
                generator=generator(s.seed, "noise", self.step), shard=(self.rank, self.world))
        loss.backward()
        return losses, sigma

    @torch.no_grad()                        # else the average would carry the graph of all steps before
    def update(self, progress):
        """One step of both optimizers and of the weight average. Returns whether any process was asked to stop."""
        s = self.s
        # The processes follow one clock and stop together: their average rides along with the gradients.
        self.seconds, stop = share(self.parameters, [time.perf_counter() - self.began, float(self.stop)], self.world)
        sound = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0).isfinite().item()
        self.unsound += not sound
        warm_up, decay = (progress + 1e-3) / 0.02, (1 - progress) / 0.4         # rises for a fiftieth, falls for the last 0.4
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = s.lr * max(0.01, min(1, warm_up, decay))
            if sound:                   # else some number overflowed: this batch teaches nothing and must poison nothing
                optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        half_life = min(s.ema_images, 0.05 * self.step * s.batch)               # as in the released code
        if sound:
            torch._foreach_lerp_(self.averages, self.parameters, 1 - 0.5 ** (s.batch / half_life))
        return stop > 0

    def advance(self, x0, labels, progress):
        """A whole step, added to the sums for the log. Returns whether to stop."""
        losses, sigma = self.gradients(x0, labels)
        stop = self.update(progress)
        each = losses.nanmean(1, keepdim=True)                                  # (B, 1)
        level = (sigma[:, None] > self.edges).sum(1, keepdim=True)              # (B, 1): 0 low, 1 middle, 2 high noise
        cells = torch.cat([each, losses, each.where(level == torch.arange(3, device=self.device), torch.nan)], 1)
        self.sums += torch.stack([cells.nansum(0), (~cells.isnan()).sum(0)])
        return stop

    def open_logs(self, out):
        """Write the head of both logs, keeping the lines of the run to resume up to its checkpoint."""
        bricks = [f"brick{k}" for k in range(len(self.config.bricks))]
        for name, columns in {"log.csv": ["loss", *bricks, "low", "middle", "high"], "held_out.csv": bricks}.items():
            old = (out / name).read_text().splitlines()[1:] if self.step and (out / name).exists() else []
            lines = [",".join(["step", "images", "seconds", *columns])]
            lines += [line for line in old if line.count(",") == lines[0].count(",") and int(line.split(",")[0]) <= self.step]
            write_aside(out / name, lambda file: file.write("\n".join(lines + [""]).encode()))

    def log(self, path, numbers):
        if self.rank == 0:
            with open(path, "a") as file:
                file.write(f"{self.step},{self.step * self.s.batch},{self.seconds:.1f},"
                           + ",".join(f"{n:.5f}" for n in numbers) + "\n")

    def save(self, out):
        """Checkpoint, held-out loss and sample picture, by the first process."""
        if self.rank == 0:
            losses, sigma = held_out_loss(self.ema, self.diffusion, self.data, self.autocast)
            self.model.info |= dict(step=self.step, images=self.step * self.s.batch, seconds=self.seconds,
                                    settings=vars(self.s), unsound=self.unsound, useful=useful_levels(losses, sigma))
            held_out = losses.mean(0).tolist()
            self.log(out / "held_out.csv", held_out)            # first: what is ahead of the checkpoint is cut when resumed
            save_checkpoint(out / "checkpoint.pt", self.model, weights=self.ema.state_dict(), train=dict(
                weights=self.model.state_dict(), optimizers=[o.state_dict() for o in self.optimizers], sums=self.sums))
            save_picture(sample_sheet(self.ema, self.diffusion, self.autocast), out / f"samples-{self.step:07d}.png")
            tqdm.write(f"step {self.step}, {self.seconds / 60:.1f} min: held-out loss " + ", ".join(f"{h:.4f}" for h in held_out))

    def fit(self, out):
        """Train until the budget is spent or a signal comes."""
        s, saved, saved_step, stopped = self.s, self.seconds, self.step, False
        if self.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            self.open_logs(out)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: setattr(self, "stop", True))
        with tqdm(initial=self.step, total=s.steps, unit="step", disable=self.rank > 0) as bar:
            for x0, labels in self.batches():
                progress = self.step / s.steps if s.steps else self.seconds / (60 * s.minutes)
                if progress >= 1 or stopped:
                    break
                stopped = self.advance(x0, labels, progress)
                bar.update()
                if self.step % LOG_EVERY == 0:
                    mean = (self.sums[0] / self.sums[1]).tolist()               # nan where a brick or noise level did not occur
                    self.sums.zero_()
                    self.log(out / "log.csv", mean)
                    left = (s.steps - self.step) * self.seconds / self.step if s.steps else 60 * s.minutes - self.seconds
                    bar.set_postfix_str(f"loss {mean[0]:.4f}, {self.step * s.batch / self.seconds:.0f} images/s, "
                                        f"{left / 60:.1f} min left")
                if self.seconds - saved > 60 * s.save_minutes:
                    self.save(out)
                    saved, saved_step = time.perf_counter() - self.began, self.step         # counted from the end of this one
        if self.step > saved_step:
            self.save(out)
        rate = self.step * s.batch / max(self.seconds, 1e-9)
        print(f"{'stopped' if stopped else 'done'} at step {self.step} after {self.seconds:.0f} s, {rate:.0f} images/s, peak memory "
              f"{peak_memory(self.device):.0f} MB"
              + (f"; {self.unsound} steps had gradients that were not finite and were left out" if self.unsound else ""))
        print(f"go on with: python train_tiny.py --resume {out}" if stopped else
              f"sample with: python sample_tiny.py --ckpt {out / 'checkpoint.pt'}")

    def bench(self, rounds=20):
        """A table of the time of a step, by precision, by share of regions, and without the bricks that most steps leave out. All
        cases take turns in random order, so that a slow moment of the machine is slow for all, and each step is followed by a
        matrix product of 2048^3, the best of three, of whose speed it reaches a share."""
        batches, own, tokens, every = iter(self.batches()), self.fractions, image_tokens(self.config), [0.] * len(self.drops)
        cases = [("bf16", own, [float(chance > 0) for chance in self.drops])] if any(self.drops) else []
        cases += [("bf16", own, every), ("fp32", own, every)]
        cases += [("bf16", [min(1, times * min(tokens) / n) for n in tokens], every) for times in (2, 4)]
        contexts = {p: pick_precision(p, self.device) for p in ("bf16", "fp32")}
        square = torch.randn(2048, 2048, device=self.device)
        squares, flops, rows = dict(bf16=square.bfloat16(), fp32=square), [], [[] for _ in cases]
        for i in range(rounds + 2):                                             # the first two count FLOPs and warm up
            for k in np.random.default_rng(i).permutation(len(cases)) if i else range(len(cases)):
                (precision, self.fractions, self.drops), row, images = cases[k], rows[k], next(batches)
                self.autocast, square = contexts[precision], squares[precision]
                with nullcontext() if i else FlopCounterMode(display=False) as counter:
                    compute = timed(lambda: self.gradients(*images), self.device)
                update = timed(lambda: self.update(.5), self.device)
                peak = 2 * 2048 ** 3 / min(timed(lambda: square @ square, self.device) for _ in range(3))
                flops += [] if i else [counter.get_total_flops()]
                row += [(compute, update, compute + update, peak)] if i > 1 else []
        print(f"\nmilliseconds a step of {self.s.batch} images: median (10% to 90%) of {rounds}, in random turns; share of the speed of a "
              "matrix product of 2048^3 in the same precision\n"
              "precision  regions          forward, backward     optimizers   whole step   images/s   GFLOP/s   share")
        for (precision, fractions, drops), count, row in zip(cases, flops, rows):
            compute, update, whole, peak = np.array(row).T
            low, middle, high = np.quantile(1000 * compute, [.1, .5, .9])
            regions = " ".join("-" if drop else f"{f:.3g}" for f, drop in zip(fractions, drops))
            print(f"{precision:<9}  {regions:<15}  {middle:6.0f} ({low:.0f} to {high:.0f})"
                  f"{1000 * np.median(update):>13.0f}{1000 * np.median(whole):>13.0f}{self.s.batch / np.median(whole):>11.0f}"
                  f"{count * self.world / np.median(whole) / 1e9:>10.0f}{np.median(count / whole / peak):>8.1%}")
        print(f"{4 * sum(p.numel() for p in self.parameters) / 1e6:.1f} MB of gradients to average between processes; peak memory "
              f"{peak_memory(self.device):.0f} MB")


def main():
    s, state = read_flags()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if s.batch % world:
        raise ValueError(f"--batch {s.batch} cannot be shared by {world} processes: take a multiple of {world}")
    if world > 1 and s.device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))        # "cuda" now means this one
    if rank:
        sys.stdout = open(os.devnull, "w")              # one process speaks
    if s.out is None:
        name = Path(os.path.abspath(s.dataset)).stem                # so that "." and ".." have one
        runs = (Path("runs", name + f"-{i}" * (i > 1)) for i in itertools.count(1))
        s.out = str(next(run for run in runs if not (run / "checkpoint.pt").exists()))
    if not state and (Path(s.out) / "checkpoint.pt").exists():
        raise ValueError(f"{s.out} holds a run already: continue it with --resume {s.out}, or choose another --out")
    trainer = Trainer(s, state, rank, world)
    try:
        trainer.bench() if s.bench else trainer.fit(Path(s.out))
    except OSError as error:
        raise ValueError(f"cannot write to {s.out} ({error}). A checkpoint saved before is whole: make room and go on with "
                         f"--resume {s.out}") from error
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    command(main)
