"""Train a LEGO stack on one GPU or CPU: `python train_tiny.py`; --help lists the flags.

The file has three parts: data sets, pictures and the command line (which sample_tiny.py
shares), and training. Every random draw comes from (seed, step). A resumed run is therefore
the run that never stopped (bit for bit on a CPU), and processes can share a batch.

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
import multiprocessing
import os
import signal
import stat
import sys
import tarfile
import time
import traceback
import urllib.request
import zipfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from http.client import HTTPException
from pathlib import Path
from typing import Callable

# Threads that wait for each other spin for a while before they sleep. By default that while is so
# long that on two cores, one of them busy with other work, a step took 29 s rather than 0.25 s.
# With this it takes 1.3 s there, and no longer than before on an idle machine.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")        # read when torch is imported

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from lego import (EDM, OBJECTIVES, PRESETS, RELEASED, Block, Lego, LegoConfig, generator,
                  read_checkpoint, save_checkpoint, write_aside)

# ---- Built-in landscapes -------------------------------------------------------------

LANDSCAPES = ["day", "sunset", "night", "winter"]
# RGB for each class: the sky above and below, the sun or moon, the far and the near ridge.
PALETTES = np.array([
    [(.22, .47, .88), (.76, .89, 1.), (1., .96, .74), (.52, .64, .76), (.13, .38, .16)],
    [(.27, .20, .50), (1., .55, .27), (1., .87, .50), (.60, .32, .40), (.14, .07, .16)],
    [(.01, .02, .09), (.09, .14, .32), (.96, .95, .86), (.12, .16, .30), (.02, .03, .07)],
    [(.50, .63, .80), (.90, .93, .96), (1., .98, .88), (.60, .68, .79), (.27, .35, .44)],
], np.float32)
PERIOD = 8      # A scene repeats sideways after this many times its height.
WAVES = np.array([2, 4, 7, 12, 20, 32, 50, 76], np.float32)[:, None]    # per period
RIDGES = [(.48, .24), (.32, .17), (.15, .08)]       # altitude and height, from far to near


def landscapes(seed, indices, H, W):
    """Draw the scenes `indices` of the endless data set `seed`: uint8 images (n, H, W, 3) and
    labels (n,). A scene has the same content at any height, and a larger width shows more."""
    images = np.stack([landscape(seed, index, H, W) for index in indices])
    return images, np.asarray(indices) % 4


def landscape(seed, index, H, W):
    numbers = np.random.default_rng([seed, index]).random(400).astype(np.float32)
    kind = LANDSCAPES[index % 4]
    y = (1 - (np.arange(H)[:, None] + .5) / H).astype(np.float32)       # upwards, in heights
    x = ((np.arange(W) + .5) / H).astype(np.float32)
    colours = PALETTES[index % 4] + .07 * (numbers[:15].reshape(5, 3) - .5)
    colours = colours * (.85 + .3 * numbers[15])
    above, below, disc, far, near = colours[:, :, None, None]           # (3, 1, 1) each

    image = blend(below, above, (y * (1 + .4 * numbers[16]) - .25).clip(0, 1))
    if kind == "night":
        image = blend(image, 1, stars(numbers[160:], x, y))
    image = add_suns(image, numbers[17:29], disc, x, y)
    for layer, ridge in enumerate(numbers[29:80].reshape(3, 17)):
        top, snow_line = outlines(ridge, layer, x)
        haze = np.clip((top - y) * 1.5, 0, .5) * (1 - layer / 3)
        ground = blend(far + (near - far) * layer / 2, below, haze)
        if kind == "winter" and layer < 2:
            ground = blend(ground, .97, coverage(y - snow_line, H))
        image = blend(image, ground, coverage(top - y, H))
    return (image.clip(0, 1) * 255 + .5).astype(np.uint8).transpose(1, 2, 0)


def blend(image, colour, amount):
    return image + (colour - image) * amount


def coverage(depth, H):
    """How much of a pixel a shape covers, given how deep the pixel lies inside its edge."""
    return np.clip(depth * H + .5, 0, 1)


def sideways(x, place):
    """How far x lies to the right of a place, the short way round."""
    return (x - place + PERIOD / 2) % PERIOD - PERIOD / 2


def stars(numbers, x, y):
    """The light (H, W) of 80 stars. Coarse pixels make them wider and fainter."""
    across, up, glow = numbers.reshape(3, 80, 1)
    blur = math.hypot(.012, .4 / len(y))
    columns = np.exp(-sideways(x, across * PERIOD) ** 2 / (2 * blur ** 2))      # (80, W)
    rows = np.exp(-(y.T - up) ** 2 / (2 * blur ** 2)) * glow                    # (80, H)
    return np.clip(rows.T @ columns * (1.6 * (.012 / blur) ** 2), 0, 1)


def add_suns(image, numbers, colour, x, y):
    """Every two heights of the width have a sun or moon, which keeps clear of their ends."""
    for cell, (across, up, size) in enumerate(numbers.reshape(4, 3)):
        apart = sideways(x, (cell + (.15 + .7 * across)) * 2)
        distance = np.hypot(apart, y - (.55 + .35 * up))
        image = image + (colour - image) * np.exp(-(distance / .22) ** 2) * .45
        image = blend(image, colour, coverage(.07 + .05 * size - distance, len(y)))
    return image


def outlines(numbers, layer, x):
    """The heights (W,) of a ridge and of the snow line on it, which resembles the ridge."""
    altitude, height = RIDGES[layer]
    altitude = altitude - .05 + .1 * numbers[0]
    strength, phase = numbers[1:].reshape(8, 2).T[:, :, None]
    turns = WAVES / PERIOD * x + phase                                  # (8, W)
    wave = .5 * np.sin(2 * np.pi * turns) + .5
    if layer < 2:
        wave = np.abs(np.sin(np.pi * turns))        # Turned over, it has pointed peaks.
    waves = (.4 + .6 * strength) * (WAVES / 2) ** -.75 * (.5 - wave)
    snow = (waves * np.cos(7 * phase)).sum(0)
    return altitude + height * waves.sum(0), altitude - .02 + .5 * height * snow


# ---- Data sets -----------------------------------------------------------------------

LARGEST_FILE = 1 << 28                  # bytes of a download or of a file in an archive
Image.MAX_IMAGE_PIXELS = 1 << 25        # Pillow refuses images of twice as many.
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"]      # EPS would start a program.
DAMAGED = (gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, EOFError,
           NotImplementedError)         # what zipfile says of a version it does not know


@dataclass(eq=False)
class Data:
    """A data set of uint8 images (n, size, size, channels) and labels (n,), which are places in
    `classes`. It has a pair of these to train on and one held out, or, if it is endless, a
    function draw(seed, indices, H, W) that returns such a pair of any size. `flip` tells that
    a mirror image is as likely as the image."""
    name: str
    classes: list
    channels: int
    flip: bool
    size: int
    train: tuple | None = None
    held_out: tuple | None = None
    draw: Callable | None = None

    def batch(self, seed, step, count, rank=0, world=1, flip=False):
        """The part of process `rank` of `world` of batch number `step` of `count` images: float
        images (n, C, H, W) in [-1, 1] and labels (n,). Batches go through shuffled epochs."""
        # Training sorts the noise levels of a batch. Without a random order, classes that take
        # turns, as in the landscapes, would each see only some of the levels.
        random = np.random.default_rng([seed, step, 1])
        order = random.permutation(count)[rank::world]
        numbers = step * count + order
        if self.draw:
            images, labels = self.draw(seed, numbers, self.size, self.size)
        else:
            n = len(self.train[0])
            chosen = [self.shuffled(seed, i // n)[i % n] for i in numbers]
            images, labels = (part[chosen] for part in self.train)
        if flip:
            mirrored = random.random(count)[order] < .5
            images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
        return to_float(images), torch.as_tensor(labels).long()

    @lru_cache(maxsize=8)
    def shuffled(self, seed, epoch):
        return np.random.default_rng([seed, epoch]).permutation(len(self.train[0]))

    def held(self, count):
        """At most `count` held-out images and their labels, the same in every run."""
        if self.draw:
            seed = 2 ** 32              # No --seed is that large.
            images, labels = self.draw(seed, range(count), self.size, self.size)
        else:
            chosen = np.random.default_rng(0).permutation(len(self.held_out[0]))[:count]
            images, labels = (part[chosen] for part in self.held_out)
        return to_float(images), torch.as_tensor(labels).long()


def to_float(images):
    """Convert uint8 (n, H, W, C), an array or a tensor, to float (n, C, H, W) in [-1, 1]."""
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(np.ascontiguousarray(images))
    return images.permute(0, 3, 1, 2) / 127.5 - 1


def to_bytes(images):
    """Convert float (n, C, H, W) in [-1, 1] to uint8 (n, H, W, C)."""
    return (images.clamp(-1, 1) * 127.5 + 128).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def lock(folder, wait=False):
    """Make a folder, and keep other processes out that ask for it, until the open file that this
    returns is closed. If another process has it, wait or raise a ValueError."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    with suppress(ImportError, OSError):        # Windows and some network disks have no locks.
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ValueError(f"another process is at work in {folder}: wait until it is done, or "
                             f"name another folder") from None
    return file


def fetch(name, sha256, urls, folder, opener=open):
    """The path of a file in `folder`, downloaded from one of `urls` if it is not there. sha256 is
    that of the bytes that `opener` reads from it. ValueError if the right file cannot be had."""
    path, part = Path(folder, name), Path(folder, name + ".part")

    def is_right(file):
        with suppress(*DAMAGED), opener(file, "rb") as content:
            return hashlib.sha256(content.read(LARGEST_FILE)).hexdigest() == sha256

    def is_there():
        if path.exists() and not is_right(path):
            raise ValueError(f"{path} is damaged: delete it, to download it again")
        return path.exists()

    if is_there():
        return path
    try:
        alone = lock(path.parent, wait=True)
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error}): name another folder with "
                         f"--data-dir") from error
    reasons = []
    with alone:
        if is_there():              # Another process had the folder.
            return path
        for url in urls:
            try:
                download(url + name, part)
            except (OSError, ValueError, HTTPException) as error:
                reasons.append(f"{url}: {error}")
                if getattr(error, "code", None) != 416:     # 416: the part is as long as the file.
                    continue
            if is_right(part):
                return part.replace(path)
            part.unlink()
            reasons.append(f"{url}: wrong checksum")
    raise ValueError(f"cannot download {name} ({'; '.join(reasons)}). "
                     f"Get it elsewhere and put it at {path}")


def download(url, part):
    """Download to the path `part`, going on after the bytes that it holds already."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-", "User-Agent": "lego-tiny"}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=30) as reply:
        if reply.status != 206:         # The server sends the whole file again.
            have = 0
        whole = have + int(reply.headers.get("Content-Length", 0))
        bar = tqdm(initial=have, total=whole, unit="B", unit_scale=True)
        with part.open("ab" if have else "wb") as file, bar:
            while (block := reply.read(1 << 16)) and file.tell() < LARGEST_FILE:
                bar.update(file.write(block))
            if file.tell() < whole:
                raise OSError("the connection broke off")


CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9dddda3db29a59bca1dd"
CIFAR10_URLS = ["https://www.cs.toronto.edu/~kriz/", "https://cave.cs.toronto.edu/kriz/"]


def cifar10(folder, size):
    path = fetch("cifar-10-binary.tar.gz", CIFAR10_SHA256, CIFAR10_URLS, folder)
    return in_memory("cifar10", CIFAR10, True, size, *read_cifar10(path))


def read_cifar10(path):
    """Two pairs of uint8 images (n, 32, 32, 3) and labels (n,) from the official archive, the one
    to train on and the one to test with."""
    pairs = []
    with tarfile.open(path, "r:gz") as archive:
        for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
            file = archive.extractfile(f"cifar-10-batches-bin/{name}.bin")
            records = np.frombuffer(file.read(LARGEST_FILE), np.uint8).reshape(-1, 3073)
            images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            pairs.append((images, records[:, 0]))
    images, labels = zip(*pairs[:5])
    return (np.concatenate(images), np.concatenate(labels)), pairs[5]


FASHION = ["T-shirt", "trouser", "pullover", "dress", "coat",
           "sandal", "shirt", "sneaker", "bag", "ankle boot"]
FASHION_SHA256 = {      # These are of what the .gz files hold, since copies are packed anew.
    "train-images-idx3": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"}
FASHION_URLS = [
    "file:///usr/share/datasets/fashion-mnist/",        # Debian's package dataset-fashion-mnist
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"]


def fashion_mnist(folder, size):
    arrays = []
    for name, sha256 in FASHION_SHA256.items():
        arrays.append(read_idx(fetch(name + "-ubyte.gz", sha256, FASHION_URLS, folder, gzip.open)))
    images, labels, test_images, test_labels = arrays
    train, test = (images[..., None], labels), (test_images[..., None], test_labels)
    flip = False        # All shoes point to the left.
    return in_memory("fashion-mnist", FASHION, flip, size, train, test)


def read_idx(path):
    """The array of a gzipped idx file of bytes."""
    with gzip.open(path) as file:
        data = np.frombuffer(file.read(LARGEST_FILE), np.uint8)
    head = 4 + 4 * int(data[3])             # The fourth byte is the number of axes.
    return data[head:].reshape(data[4:head].view(">u4"))


def in_memory(name, classes, flip, size, *pairs):
    """The Data of two pairs (images, labels), one to train on and one held out."""
    train, held_out = [(resized(images, size), labels) for images, labels in pairs]
    return Data(name, classes, train[0].shape[-1], flip, size, train, held_out)


def resized(images, size):
    """Crop uint8 images (n, H, W, C) around their centre and resize them to size x size."""
    if images.shape[1:3] == (size, size):
        return images
    fitted = [ImageOps.fit(Image.fromarray(image.squeeze()), (size, size)) for image in images]
    return np.stack(fitted).reshape(len(images), size, size, -1)


def read_image(file, size):
    """An image as uint8 (size, size, 3): upright, on white, cropped around its centre. ValueError
    for 32 bits a channel, whose range nobody knows. Pillow's errors pass through."""
    image = ImageOps.exif_transpose(Image.open(file, formats=FORMATS))
    if image.mode in ("I", "F"):
        raise ValueError("an image of 32 bits a channel")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size)))


def read_folder(path, size):
    """The Data of a folder or zip of images, with the last tenth of each class held out. The class
    of an image is its folder's name. ValueError for fewer than two images or a hostile zip."""
    groups = read_images(path, size)
    classes = sorted(groups)
    counts = [len(groups[name]) for name in classes]
    if sum(counts) < 2:
        raise ValueError(f"{path}: {sum(counts)} readable images found; "
                         f"put images into one folder per class")
    images = np.concatenate([groups[name] for name in classes])
    labels = np.repeat(np.arange(len(classes)), counts)
    held = np.concatenate([np.arange(n) >= n - n // 10 for n in counts])
    if (images == images[..., :1]).all():
        images = images[..., :1]            # All of them are gray.
    train = held_out = images[~held], labels[~held]
    if held.any():
        held_out = images[held], labels[held]
    else:
        print("no class has ten images, so held-out losses will be those of training images")
    return in_memory(path.stem, classes, True, size, train, held_out)


def read_images(path, size):
    """A dictionary from each class in a folder or zip to a list of uint8 (size, size, 3)."""
    groups, skipped = {}, 0
    for name, opened in tqdm(files_in(path), f"reading {path.name}", unit=" files", leave=False):
        hidden = any(part.startswith(".") for part in name.parts[1:])
        if hidden or name.suffix.lower() not in SUFFIXES:
            continue
        try:
            with opened() as file:
                image = read_image(io.BytesIO(file.read(LARGEST_FILE)), size)
            groups.setdefault(name.parent.name, []).append(image)
        except Exception:       # Hostile bytes make Pillow raise errors of almost any type.
            skipped += 1
    found = sum(map(len, groups.values()))
    print(f"{path}: {found} images in {len(groups)} classes, {skipped} unreadable files skipped")
    return groups


def files_in(path):
    """Yield the path of every file in a folder or zip, and a function that opens the file.
    ValueError if the zip is damaged or not to be trusted."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            yield file.relative_to(path.parent), partial(file.open, "rb")
        return
    try:
        archive = zipfile.ZipFile(path)
    except (ValueError, *DAMAGED) as error:
        raise ValueError(f"{path} is no zip of images that can be read: {error}") from error
    with archive:
        members = archive.infolist()
        if sum(info.file_size for info in members) > 100 * path.stat().st_size + LARGEST_FILE:
            raise ValueError(f"{path} unpacks to more than a hundred times its size")
        for info in sorted(members, key=lambda info: info.filename):
            name, link = Path(info.filename), stat.S_ISLNK(info.external_attr >> 16)
            if link or ".." in name.parts or info.filename.startswith(("/", "\\")):
                raise ValueError(f"{path}: member {info.filename!r} points out of the archive")
            yield path.stem / name, partial(archive.open, info)


def built_in(folder, size):
    return Data("landscapes", LANDSCAPES, 3, False, size, draw=landscapes)


# To add a data set, add its name and a function (download folder, image size) -> Data here.
DATASETS = {"landscapes": built_in, "cifar10": cifar10, "fashion-mnist": fashion_mnist}


def load_data(name, folder, size):
    """The Data of a name in DATASETS, or of a folder or zip of images, at size x size. Downloads
    are kept in `folder`. ValueError if there is no such data set."""
    if name in DATASETS:
        return DATASETS[name](folder, size)
    if not Path(name).exists():
        raise ValueError(f"no data set {name!r}: take {', '.join(DATASETS)}, "
                         f"or an existing folder or zip of images")
    return read_folder(Path(name).resolve(), size)


# ---- Pictures and command line, shared with sample_tiny.py ---------------------------


def picture(images, columns, enlarge=True):
    """A Pillow image of uint8 images (n, H, W, C) in rows of `columns`, with thin white lines
    between them. `enlarge` repeats pixels until an image is at least 96 high."""
    n, H, W, C = images.shape
    size = columns * (W + 1) - 1, math.ceil(n / columns) * (H + 1) - 1
    sheet = Image.new("L" if C == 1 else "RGB", size, "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        tile = Image.fromarray(image[..., 0] if C == 1 else image)
        sheet.paste(tile, (column * (W + 1), row * (H + 1)))
    times = math.ceil(96 / H) if enlarge else 1
    return sheet.resize((sheet.width * times, sheet.height * times), Image.NEAREST)


def sheet_columns(classes):
    """A picture has a column for each class, where that makes 5 to 16 columns, else 8."""
    return classes if 5 <= classes <= 16 else 8


def save_picture(sheet, path):
    write_aside(path, partial(sheet.save, format="png"))


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line and leaves with exit code 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists all flags)\n")


def flag(parser, name, default, help, **settings):
    """Add a flag whose help names the default, unless it is None."""
    if default is not None:
        help += f" (default: {default})"
    parser.add_argument(name, default=default, help=help, **settings)


def check_limits(parser, settings, limits):
    """Leave with an error if a flag lies outside its (least, most)."""
    for name, (least, most) in limits.items():
        value = getattr(settings, name)
        if value is not None and not least <= value <= most:
            parser.error(f"--{name.replace('_', '-')} must lie between {least} and {most}, "
                         f"found {value}")


def command(main):
    """Run main() and leave. What a user can cause makes one line and exit code 2."""
    keep_memory()
    code = 0
    try:
        main()
    except KeyboardInterrupt:
        code = "interrupted"
    except Exception as error:
        full = isinstance(error, (MemoryError, RuntimeError)) and "memory" in repr(error).lower()
        if full or isinstance(error, (ValueError, OSError)):
            hint = "take a smaller batch, size or width: " if full else ""
            message = str(error)
            if "Traceback" in message:          # That of a worker ends with what was wrong.
                message = message.strip().splitlines()[-1]
            message = " ".join(message.split())[:500]
            print(f"{Path(sys.argv[0]).name}: {hint}{message}", file=sys.stderr)
            code = 2
        else:               # It is a mistake of ours.
            traceback.print_exception(error)
            code = 1
    # Python waits at its end for workers, which ignore softer signals. (If they are killed, torch
    # raises an error wherever the program is, which is of no use here.)
    if workers := multiprocessing.active_children():
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in workers:
            worker.kill()
    sys.exit(code)


def pick_device(name):
    """The torch.device of a name, which may be "auto". ValueError if it is not there."""
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        one = torch.ones(1, device=name)
        one.item()                              # which the device "meta" cannot do
        if one.is_cuda:
            torch.cuda.set_device(one.device)   # on which graphs are recorded
        return one.device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here: {reason}") from error


def keep_memory():
    """Tell glibc to keep what is freed. By default it returns large blocks to the system and
    fetches them again for the next tensor, which costs 21,000 page faults a training step."""
    with suppress(AttributeError, OSError, TypeError):      # There are other C libraries.
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 1 << 30)        # M_TRIM_THRESHOLD
        mallopt(-3, 1 << 25)        # M_MMAP_THRESHOLD can be no higher.


def pick_precision(name, device):
    """A function that makes autocast contexts for "fp32", "bf16" or "auto", which is bf16 where
    the hardware multiplies it natively: CUDA from Ampere on, CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    else:
        native = False
    bf16 = name == "bf16" or name == "auto" and native
    print(f"device {device}, precision {'bf16' if bf16 else 'fp32'}")
    cache = device.type != "cuda"       # a graph would replay weights that were cast before it
    return partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16, cache_enabled=cache)


def compile_blocks(model, **settings):
    """Compile the Transformer blocks. They share their code, so that one compilation does."""
    for brick in model.bricks:
        for block in brick.blocks:
            block.compile(**settings)


def timed(work, device):
    """The seconds that work() takes, including what it leaves to the accelerator."""
    wait = getattr(torch, device.type).synchronize
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def in_turns(cases, rounds):
    """Yield (round, case), the cases of every round in another random order, so that a slow moment
    of the machine is slow for all."""
    for i in range(rounds):
        for k in np.random.default_rng(i).permutation(len(cases)):
            yield i, cases[k]


def peak_memory(device):
    """The most memory used so far in MB, by torch on a GPU or else by the process, which is NaN
    on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return math.nan
    import resource                 # Windows does not have it.
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def table(model, sigmas, skip=()):
    """The stack in words. The share of FLOPs is that of a sampling walk whose evaluations are at
    the noise levels `sigmas`."""
    config, size = model.config, model.config.size
    flops = np.sum([model.flops(size, size, sigma=sigma) for sigma in sigmas], 0)
    count = sum(p.numel() for p in model.parameters())
    lines = [f"width {config.width}, {count / 1e6:.2f}M parameters, {flops.sum() / 1e9:.2f} GFLOPs "
             f"for an image of {size}x{size} in {len(sigmas)} evaluations",
             "brick  region  patch  depth  noise sigma  tokens  parameters  FLOPs"]
    for k, (spec, brick) in enumerate(zip(config.bricks, model.bricks)):
        count = sum(p.numel() for p in brick.parameters())
        lines.append(f"{k:>5}  {spec.region:>6}  {spec.patch:>5}  {spec.depth:>5}  "
                     f"{spec.noise_range:>11}  {spec.tokens:>6}  {count:>10}  "
                     f"{flops[k] / flops.sum():>5.1%}" + "  skipped" * (k in skip))
    return "\n".join(lines)


# ---- Training ------------------------------------------------------------------------

LOG_EVERY = 20                          # steps
# Of ln(sigma) in training. Karras et al. 2022 take -1.2 and 1.2, which rarely visits the high
# levels, where the colours of a sample are decided.
P_MEAN, P_STD = -0.8, 1.4
LABEL_DROP = 0.1                        # chance to hide a label, which guidance needs
EMA_IMAGES = 500_000                    # half-life of the weight average, in images
# What may differ when a run goes on. (The data set may have moved.)
FREE = {"bench", "resume", "steps", "minutes", "device", "dataset", "data_dir", "save_minutes"}

SIGNALS = [signal.SIGINT, signal.SIGTERM]       # that ask a run to stop
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    SIGNALS.append(signal.SIGHUP)               # A terminal is closed, and there is no nohup.


def read_flags(arguments=None):
    """The settings of a run and the checkpoint to resume, if any. A flag that is given counts,
    else what is stored in the run to resume, else the default."""
    p = Parser(description="Train a LEGO diffusion stack.")
    flag(p, "--dataset", "landscapes", f"{', '.join(DATASETS)}, or a folder or zip of images "
         "(class = folder name)")
    flag(p, "--data-dir", "data", "where data sets are looked for and downloaded to")
    stack, budget = p.add_mutually_exclusive_group(), p.add_mutually_exclusive_group()
    flag(stack, "--preset", "tiny", "a stack by name: tiny, dit-4, dit-2, or one of the authors', "
         "such as S-PG-64", choices=PRESETS, metavar="NAME")
    flag(stack, "--bricks", None, "a stack of your own, region/patch x depth, such as "
         "\"32/4x6 16/2x4@:0.4\"; an @ and low:high in sigma give a brick a noise range")
    flag(p, "--width", None, "width of the Transformer blocks (default: the preset's)", type=int)
    flag(p, "--heads", None, "attention heads (default: the preset's)", type=int)
    flag(p, "--size", 32, "height and width of the training images", type=int)
    flag(p, "--objective", "edm", "edm, or ddpm for noise prediction", choices=OBJECTIVES)
    flag(p, "--p-mean", None, f"mean of ln(sigma) in training, for edm (default: {P_MEAN})",
         type=float)
    flag(p, "--p-std", None, f"its standard deviation, for edm (default: {P_STD})", type=float)
    flag(budget, "--steps", None, "budget in steps, those before --resume included", type=int)
    flag(budget, "--minutes", None, "budget in minutes, likewise (default: 10)", type=float)
    flag(p, "--batch", 32, "images a step, over all processes", type=int)
    flag(p, "--lr", 4e-3, "peak learning rate", type=float)
    flag(p, "--region-fraction", None, "share of its regions that a brick trains on in a step: one "
         "number, or one per brick, comma separated (default: 1 / sqrt(n) for a brick with n times "
         "the fewest tokens)")
    flag(p, "--brick-drop", "0.2", "chance that a brick's result for an image stays hidden from "
         "later bricks, which so learn to do without it: one number, or one per brick")
    flag(p, "--flip", None, "mirror images at random (default: yes, but for landscapes and "
         "fashion-mnist)", action=argparse.BooleanOptionalAction)
    flag(p, "--out", None, "folder of the run (default: runs/DATASET, numbered if taken)")
    flag(p, "--resume", None, "folder of a run to go on with")
    flag(p, "--save-minutes", 2.0, "minutes between checkpoints", type=float)
    flag(p, "--device", "auto", "auto, cpu, cuda, mps")
    flag(p, "--precision", "auto", "number format of the network", choices=["auto", "fp32", "bf16"])
    flag(p, "--compile", False, "compile the Transformer blocks", action="store_true")
    flag(p, "--seed", 0, "seed of everything random", type=int)
    flag(p, "--bench", False, "only measure the speed of a step", action="store_true")
    s = p.parse_args(arguments)
    state = None
    if s.resume:
        state = read_checkpoint(path := Path(s.resume) / "checkpoint.pt")
        if "train" not in state or not isinstance(state["info"].get("settings"), dict):
            raise ValueError(f"{path} holds weights to sample from, but no run to resume")
        unknown = sorted(vars(s).keys() - state["info"]["settings"].keys())
        if unknown:
            raise ValueError(f"{path} was written by another version of train_tiny.py, which did "
                             f"not know {', '.join(unknown)}: go on with that one")
        stored = state["info"]["settings"] | dict(out=s.resume)
        if s.steps or s.minutes:                        # a new budget replaces the stored one
            stored |= dict(steps=None, minutes=None)
        s = p.parse_args(arguments, argparse.Namespace(**stored))
        for name, value in vars(s).items():
            if name not in FREE and value != stored[name]:
                raise ValueError(f"--{name.replace('_', '-')} {value} contradicts the run to "
                                 f"resume, which has {stored[name]}")
    if "" in (s.out, s.resume):
        p.error("--out and --resume must name a folder, found none")
    if s.steps is None and s.minutes is None:
        s.minutes = 10.0
    if s.objective == "edm":
        s.p_mean = P_MEAN if s.p_mean is None else s.p_mean
        s.p_std = P_STD if s.p_std is None else s.p_std
    elif (s.p_mean, s.p_std) != (None, None):
        raise ValueError("--p-mean and --p-std are for --objective edm")
    check_limits(p, s, dict(
        size=(1, 4096), steps=(1, 2 ** 32), minutes=(1e-9, 1e6), batch=(1, 65536), lr=(1e-9, 1),
        p_mean=(-10, 10), p_std=(.01, 10), save_minutes=(0, 1e6), seed=(0, 2 ** 32 - 1)))
    return s, state


def make_config(s, data):
    """The LegoConfig that the flags ask for, for the images of `data`."""
    classes = len(data.classes) if len(data.classes) > 1 else 0
    config = replace(PRESETS[s.preset], channels=data.channels, classes=classes, size=s.size)
    changes = dict(width=s.width, heads=s.heads)
    if s.bricks is not None:
        changes["bricks"] = LegoConfig.parse(s.bricks, width=4, heads=1).bricks
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(config, **given)


def numbers(name, text, count, least, most):
    """`count` numbers between least and most from a flag: one for all, or comma separated."""
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        values = []
    values *= count if len(values) == 1 else 1
    if len(values) != count or not all(least <= value <= most for value in values):
        raise ValueError(f"--{name} {text}: give one number from {least} to {most}, or {count} of "
                         f"them, comma separated")
    return values


def default_fractions(config):
    """The share of its regions that each brick trains on in a step: 1 / sqrt(n) for a brick with n
    times the tokens of the cheapest, but one region at least. Small patches cost more, and fewer
    of their regions leave time for more steps. Half of them for n = 4 did better than all and
    than a quarter."""
    regions = [math.ceil(config.size / b.region) ** 2 for b in config.bricks]
    tokens = [n * b.tokens for n, b in zip(regions, config.bricks)]
    wanted = [n * math.sqrt(min(tokens) / some) for n, some in zip(regions, tokens)]
    return [max(1, round(few)) / n for few, n in zip(wanted, regions)]


# Odd polynomials of degree 5 that together take [0.01, 1] as near to 1 as three of them can
# (0.73 to 1.27), found greedily by linear programming as in Amsel et al. 2025.
POLYNOMIALS = [(8.0934, -23.6204, 17.4462), (3.6366, -2.7219, .5365), (2.6613, -1.9772, .4526)]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): torch.optim.Muon with steps of the size of AdamW's (a test
    compares them). All matrices of one shape are orthogonalised in one batch, which takes a third
    of the time on 2 CPU cores."""

    def __init__(self, parameters, lr, momentum=0.95):
        super().__init__(parameters, dict(lr=lr, momentum=momentum))
        self.found_inf = torch.zeros(())        # 1 leaves all as it is, as in torch's AdamW

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for same in shapes.values():
                self.update(same, group["lr"], group["momentum"])

    def update(self, same, lr, momentum):
        """A step for matrices of the same shape."""
        for p in same:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        averages = [self.state[p]["momentum_buffer"] for p in same]
        kept = torch.stack(averages)                                     # (n, rows, columns)
        grads = torch.stack([p.grad for p in same])
        grads = torch.where(self.found_inf > 0, kept, grads)
        kept = kept.lerp(grads, 1 - momentum)
        torch._foreach_copy_(averages, list(kept.unbind()))
        x = grads.lerp(kept, momentum).bfloat16()                        # Nesterov's look ahead
        tall = x.shape[1] > x.shape[2]
        x = x.mT if tall else x
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        for linear, cubic, quintic in POLYNOMIALS:                       # singular values go to 1
            a = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=cubic, alpha=quintic), x, beta=linear)
        x = (x.mT if tall else x).float()
        size = 0.2 * math.sqrt(max(same[0].shape))                       # that of AdamW's steps
        x = x * (lr * size * (1 - self.found_inf))
        torch._foreach_sub_(same, list(x.unbind()))


def make_optimizers(model, lr):
    """Muon for the matrices of the blocks and the second one of the enrichment MLP, AdamW for
    all else, with one learning rate."""
    inner, outer = [], []
    for name, p in model.named_parameters():
        hidden = ".blocks." in name or ".local_mlp." in name
        (inner if hidden and p.ndim == 2 and "adaln" not in name else outer).append(p)
    on_gpu = outer[0].device.type == "cuda"
    adamw = torch.optim.AdamW(
        outer, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True, capturable=on_gpu)
    return [Muon(inner, lr), adamw] if inner else [adamw]


def average_gradients(parameters, world):
    """Average all gradients over the processes, in one message. A gradient that this process
    lacks counts as zero: its part of the batch may hold no image for some brick."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    grads = [p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    torch.nn.utils.vector_to_parameters(flat / world, grads)


# ---- Images on the device ------------------------------------------------------------


def drawn_ahead(draw, first, device):
    """An iterator over draw(first), draw(first + 1) and so on, called ahead by workers. One
    keeps a CPU busy, but a GPU is faster than one can draw landscapes."""
    # What is ahead lies in shared memory, of which a container may have as little as 64 MB.
    on_gpu = device.type == "cuda"
    return iter(torch.utils.data.DataLoader(
        range(first, 1 << 60), batch_size=None, collate_fn=draw, prefetch_factor=4,
        num_workers=min(8, os.cpu_count() or 1) if on_gpu else 1, pin_memory=on_gpu,
        worker_init_fn=ignore_signals))


def ignore_signals(worker):
    """A signal often reaches the whole group of processes, but the trainer alone decides."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Stream:
    """The batches of training, where the host is fast enough to send each to the device."""

    def __init__(self, data, s, device, rank=0, world=1, step=0):
        draw = partial(data.batch, s.seed, count=s.batch, rank=rank, world=world, flip=data.flip)
        self.device, self.source = device, drawn_ahead(draw, step, device)

    def renew(self, step):
        """What the host does before a step."""
        self.images, self.labels = next(self.source)

    def batch(self):
        """This process's part of a batch: images (n, C, H, W) in [-1, 1] and labels (n,)."""
        return self.images.to(self.device), self.labels.to(self.device)


class Pool:
    """The images of training as uint8 on a GPU, where a step draws its batch at random.

    Of a procedural data set it holds the newest scenes. Blocks of a batch's size are drawn
    ahead, and one replaces the oldest before every fourth step, since the GPU is faster than
    the workers."""

    def __init__(self, data, s, device, rank=0, world=1, step=0, scenes=8192, every=4):
        self.size, self.device, self.part = s.batch, device, slice(rank, None, world)
        self.flip, self.every, self.source = data.flip, every, None
        blocks = math.ceil(scenes / s.batch)
        empty = np.zeros((blocks * s.batch, s.size, s.size, data.channels), np.uint8)
        images, labels = data.train or (empty, np.zeros(len(empty)))
        self.images = torch.tensor(images, device=device)
        self.labels = torch.tensor(labels, dtype=torch.long, device=device)
        if data.draw:
            draw = partial(self.draw, data.draw, s)
            self.source = drawn_ahead(draw, math.ceil(step / every), device)
            for _ in range(blocks):
                self.replace()

    @staticmethod
    def draw(scenes, s, block):
        """The scenes of a block, their labels, and its number."""
        numbers = range(block * s.batch, (block + 1) * s.batch)
        images, labels = scenes(s.seed, numbers, s.size, s.size)
        return torch.from_numpy(images), torch.from_numpy(labels), block

    def replace(self):
        """Put the next block in the place of the oldest one."""
        images, labels, block = next(self.source)
        start = block * self.size % len(self.labels)
        here = slice(start, start + self.size)
        self.images[here].copy_(images, non_blocking=True)
        self.labels[here].copy_(labels, non_blocking=True)

    def renew(self, step):
        """What the host does before a step."""
        if self.source and step % self.every == 0:
            self.replace()

    def batch(self):
        """This process's part of a batch: images (n, C, H, W) in [-1, 1] and labels (n,)."""
        n, device = self.size, self.device
        chosen = torch.randint(len(self.labels), (n,), device=device)[self.part]
        mirrored = torch.rand(n, device=device)[self.part] < .5
        x0 = to_float(self.images[chosen])
        if self.flip:
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(3), x0)
        return x0, self.labels[chosen]


# ---- Held-out images -----------------------------------------------------------------


@torch.no_grad()
def losses_at(model, diffusion, images, labels, sigma, noise, autocast, skip=(), batch=128):
    """The losses (n, K) of every brick at given noise levels (n,) and noise: the squared error
    of x0_hat with the weight of EDM, so that EDM and DDPM can be compared."""
    device, losses = next(model.parameters()).device, []
    for part in torch.arange(len(images)).split(batch):
        x0, y, s, eps = (t[part].to(device) for t in (images, labels, sigma, noise))
        y = y if model.config.classes else None
        with autocast():
            losses.append(diffusion.loss(model, x0, y, sigma=s, noise=eps, skip=skip)[1].cpu())
    ours, edm = diffusion.coefficients(sigma)[1], EDM().coefficients(sigma)[1]        # c_out
    return torch.cat(losses) * ((ours / edm) ** 2)[:, None]


def last_brick(losses):
    """The loss (n,) of the last brick that ran for each image, from losses (n, K) with NaN."""
    last = losses.isnan().logical_not().cumsum(1).argmax(1, keepdim=True)
    return losses.gather(1, last)[:, 0]


def quantile_levels(n):
    """n noise levels in random order, at the quantiles of EDM's training distribution."""
    order = torch.randperm(n, generator=generator("levels"))
    return EDM().sigma_at((order + .5) / n)


def held_out_batch(data, count):
    """At most `count` held-out images, labels, noise levels and noise, the same in every run."""
    images, labels = data.held(count)
    noise = torch.randn(images.shape, generator=generator("held-out"))
    return images, labels, quantile_levels(len(images)), noise


def held_out_losses(model, diffusion, data, autocast, count=512):
    """The held-out loss as named columns: of every brick in its noise range, of the last brick,
    the same by quarter of noise level, and at the high levels that decide the colours."""
    images, labels, sigma, noise = held_out_batch(data, count)
    losses = losses_at(model, diffusion, images, labels, sigma, noise, autocast)
    last = last_brick(losses)
    columns = {f"brick{k}": loss for k, loss in enumerate(losses.nanmean(0))}
    columns["last"] = last.mean()
    for i, quarter in enumerate(last[sigma.argsort()].tensor_split(4)):
        columns[f"quarter{i + 1}"] = quarter.mean()
    some = slice(128)
    for level in (5.0, 10.0, 20.0):
        sigma = torch.full((len(images[some]),), level)
        losses = losses_at(
            model, diffusion, images[some], labels[some], sigma, noise[some], autocast)
        columns[f"sigma{level:g}"] = last_brick(losses).mean()
    return {name: float(loss) for name, loss in columns.items()}


@torch.no_grad()
def useful_levels(model, diffusion, data, autocast, count=128, tolerance=0.0005):
    """For every brick the range [low, high) of sigma, with None for an open end, in which it is
    worth running, for `sample_tiny.py --skip auto`. Bricks are left out, the most costly one
    first, at the low and the high end of their range, as long as this adds little to the squared
    error of x0_hat: at either end `tolerance` of it for the most costly brick, and for the others
    less, in proportion to their FLOPs. (By the loss, errors at low noise would count for more
    than can be seen in a sample.)"""
    device, K = next(model.parameters()).device, len(model.config.bricks)
    x0, labels, sigma, noise = (part.to(device) for part in held_out_batch(data, count))
    labels = labels if model.config.classes else None
    s = sigma.sort()[0].view(-1, 1, 1, 1)
    c_skip, c_out, c_in, c_noise = diffusion.coefficients(s)
    x = x0 + s * noise
    sigma = s.flatten().cpu()

    def error(runs):
        """The squared error (n,) if bricks run as `runs` (K, n) says, infinite where none does."""
        bare = ~runs.any(0)
        with autocast():
            F = model(c_in * x, c_noise.flatten(), labels, rows=runs | bare)
        off = c_skip * x + c_out * F - x0
        return off.square().mean((1, 2, 3)).cpu().masked_fill(bare, math.inf)

    runs = model.config.active(sigma.log() / 4)                                  # (K, n)
    now = error(runs)                                                            # (n,)
    total, levels = now.sum(), [None] * K
    borders = [None, *(sigma[1:] * sigma[:-1]).sqrt().tolist(), None]
    flops = model.flops(model.config.size, model.config.size)
    for k in sorted(range(K), key=lambda k: -flops[k]):
        others = runs.clone()
        others[k] = False
        then = error(others)
        added = then - now
        allowed = tolerance * total * flops[k] / max(flops)
        below, above = added.cumsum(0), added.flip(0).cumsum(0).flip(0)
        needed = ((below > allowed) & (above > allowed)).nonzero().flatten().tolist() or [0, -1]
        first, end = needed[0], needed[-1] + 1
        runs[k, :first] = runs[k, end:] = False
        now[:first], now[end:] = then[:first], then[end:]
        levels[k] = [borders[first], borders[end]] if end else [0.0, 0.0]
    return levels


# ---- The run -------------------------------------------------------------------------


def sheet_of_samples(model, diffusion, autocast):
    """A picture of samples, with a class in every column."""
    config, device = model.config, next(model.parameters()).device
    columns = sheet_columns(config.classes)
    n = 4 * columns
    labels = torch.arange(n, device=device) % config.classes if config.classes else None
    generators = [generator(0, i) for i in range(n)]
    with autocast():
        shape = n, config.channels, config.size, config.size
        images = diffusion.sample(model, shape, labels, generator=generators, clip=True)
    return picture(to_bytes(images), columns)


def captured(compute):
    """compute() as a CUDA graph, which the host starts at once rather than kernel by kernel. The
    first three calls run on a stream of their own, as capture demands, and the fourth records."""
    calls, graph, stream = 0, torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def run():
        nonlocal calls
        calls += 1
        if calls < 4:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                compute()
            return torch.cuda.current_stream().wait_stream(stream)
        if calls == 4:
            # Another thread may copy images to the GPU meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                compute()
        graph.replay()

    return run


@contextmanager
def writing(out):
    """Say of an error of the disk what can be done about it."""
    try:
        yield
    except OSError as error:
        advice = "name another folder with --out"
        if Path(out, "checkpoint.pt").exists():
            advice = (f"a checkpoint saved before is whole, so make room and go on with --resume "
                      f"{out}")
        raise ValueError(f"cannot write to {out} ({error}): {advice}") from error


class Trainer:
    """A run: network, weight average, optimizers and counters, made from the settings `s` and the
    checkpoint `state` to resume, for process `rank` of `world`."""

    def __init__(self, s, state=None, rank=0, world=1, block=Block, config=None, data=None):
        self.s, self.rank, self.world = s, rank, world
        self.device = pick_device(s.device)
        self.autocast = pick_precision(s.precision, self.device)
        self.data = data or self.load_data()
        noise = dict(P_mean=s.p_mean, P_std=s.p_std) if s.objective == "edm" else {}
        self.diffusion = OBJECTIVES[s.objective](**noise)
        self.config = state["config"] if state else config or make_config(s, self.data)
        self.diffusion.rows(self.config, s.batch)       # a ValueError if a brick gets no images
        K = len(self.config.bricks)
        self.fractions = default_fractions(self.config)
        if s.region_fraction is not None:
            self.fractions = numbers("region-fraction", s.region_fraction, K, .001, 1)
        drops = numbers("brick-drop", s.brick_drop, K, 0, .9)
        self.drops = torch.tensor(drops, device=self.device)
        torch.manual_seed(s.seed)
        self.model = Lego(self.config, block).to(self.device)
        info = dict(objective=s.objective, dataset=self.data.name, classes=self.data.classes)
        self.model.info = info
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.parameters = list(self.model.parameters())
        self.averages = list(self.average.parameters())
        # What the host sets before a step and what a step leaves for it are tensors on the device.
        self.rate, self.blend, self.found_inf, self.left_out = torch.zeros(4, device=self.device)
        self.sums = torch.zeros(2, K + 4, device=self.device)   # and counts since a log line
        self.optimizers = make_optimizers(self.model, self.rate)
        self.step, self.saved_step, self.seconds = 0, 0, 0.0
        thirds = self.diffusion.sigma_at(torch.tensor([1 / 3, 2 / 3]))
        self.thirds = thirds.to(self.device)
        if state:
            self.restore(state, block)
        if s.compile:
            compile_blocks(self.model)
        on_gpu = self.device.type == "cuda"
        for optimizer in self.optimizers:
            optimizer.found_inf = self.found_inf
            for group in optimizer.param_groups:            # A restored one has its own tensor,
                group["lr"] = self.rate                     # and may come from another device.
                if "capturable" in group:
                    group["capturable"] = on_gpu
        source = Pool if on_gpu else Stream
        self.source = source(self.data, s, self.device, rank, world, self.step)
        self.graph = captured(self.compute) if on_gpu else None
        self.began = time.perf_counter() - self.seconds
        self.lock = None            # of the folder of the run
        self.stop = False           # whether a signal asked for it

    def load_data(self):
        """The data set. On each machine the first process downloads, then the others look."""
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        if self.world > 1 and not first:
            dist.barrier()
        data = load_data(self.s.dataset, self.s.data_dir, self.s.size)
        if self.world > 1 and first:
            dist.barrier()
        if self.s.flip is not None:
            data.flip = self.s.flip
        return data

    def restore(self, state, block):
        """Go on from a checkpoint. ValueError if it does not hold a run of this stack and data."""
        info, train = state["info"], state["train"]
        known, found = info["classes"], self.data.classes
        same = known == found if self.config.classes else len(found) == 1    # and any name will do
        if not same or self.config.channels != self.data.channels:
            raise ValueError(f"the run to resume knows the classes {known} and "
                             f"{self.config.channels} channels, found {found} and "
                             f"{self.data.channels}")
        if state["block"] != block.__name__:
            raise ValueError(f"the run to resume has blocks of the class {state['block']}, not "
                             f"{block.__name__}: pass that class as `block`")
        try:
            self.average.load_state_dict(state["weights"])
            self.model.load_state_dict(train["weights"])
            for optimizer, stored in zip(self.optimizers, train["optimizers"], strict=True):
                optimizer.load_state_dict(stored)
            self.step, self.seconds = info["step"], info["seconds"]
            self.left_out.fill_(info["left_out"])
            self.sums.copy_(train["sums"])
            self.saved_step, self.model.info = self.step, info
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the checkpoint in {self.s.resume} does not hold a whole run of this "
                             f"stack ({error})") from error

    def compute(self):
        """A step, from the draw of its batch to the average of the weights. It only touches
        tensors on the device, so that a GPU can replay it as one graph. What differs from step
        to step is in the random generator, the source of images, `rate` and `blend`."""
        losses, sigma = self.gradients()
        self.update()
        self.add_up(losses, sigma)

    def gradients(self):
        """A forward and a backward pass. Returns the losses (B, K) and the noise levels (B,)."""
        x0, labels = self.source.batch()
        for p in self.parameters:
            p.grad = None
        with self.autocast():           # batches come in random order, so no shuffling in the loss
            loss, losses, sigma = self.diffusion.loss(
                self.model, x0, labels if self.config.classes else None, shuffle=False,
                region_fraction=self.fractions, brick_drop=self.drops, label_drop=LABEL_DROP,
                shard=(self.rank, self.world))
        loss.backward()
        return losses, sigma

    @torch.no_grad()
    def update(self):
        """A step of both optimizers and of the weight average. Gradients that are not finite
        leave all weights as they are."""
        if self.world > 1:
            average_gradients(self.parameters, self.world)
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        torch.nn.utils.clip_grads_with_norm_(self.parameters, 1.0, norm)
        self.found_inf.copy_(~norm.isfinite())
        self.left_out += self.found_inf
        for optimizer in self.optimizers:
            optimizer.step()
        weight = self.blend * (1 - self.found_inf)
        for average, p in zip(self.averages, self.parameters):
            average.lerp_(p, weight)

    @torch.no_grad()
    def add_up(self, losses, sigma):
        """Add losses (B, K) at levels (B,) to the sums that the log shows."""
        mean = losses.nanmean(1, keepdim=True)                           # (B, 1), over the bricks
        third = (sigma[:, None] > self.thirds).sum(1, keepdim=True)      # 0 low, 1 middle, 2 high
        by_level = mean.where(third == torch.arange(3, device=self.device), torch.nan)
        cells = torch.cat([mean, losses, by_level], 1)                   # (B, 1 + K + 3)
        self.sums += torch.stack([cells.nansum(0), (~cells.isnan()).sum(0)])

    def advance(self, progress):
        """Do the next step of the run, which has come so far from 0 to 1."""
        s = self.s
        warm_up, decay = (progress + 1e-3) / 0.02, (1 - progress) / 0.4
        self.rate.fill_(s.lr * max(0.01, min(1, warm_up, decay)))
        half_life = min(EMA_IMAGES, 0.05 * (self.step + 1) * s.batch)    # as in the released code
        self.blend.fill_(1 - 0.5 ** (s.batch / half_life))
        self.source.renew(self.step)
        torch.manual_seed(generator(s.seed, "noise", self.step).initial_seed())
        self.graph() if self.graph else self.compute()
        self.step += 1

    def agree(self):
        """Read the clock. Several processes follow one clock and stop together. Returns whether
        some process was asked to stop."""
        message = torch.tensor([time.perf_counter() - self.began, float(self.stop)])
        if self.world > 1:
            dist.all_reduce(message)
        self.seconds, stop = (message / self.world).tolist()
        return stop > 0

    def open_log(self, path, columns):
        """Write the head of a log; a run that is resumed keeps its lines up to the checkpoint."""
        lines = [",".join(["step", "images", "seconds", *columns])]
        if self.step and path.exists():
            for line in path.read_text().splitlines()[1:]:
                whole = line.count(",") == lines[0].count(",")
                if whole and int(line.split(",")[0]) <= self.step:
                    lines.append(line)
        write_aside(path, lambda file: file.write("\n".join(lines + [""]).encode()))

    def log(self, path, values):
        """Add a line to a log."""
        head = f"{self.step},{self.step * self.s.batch},{self.seconds:.1f},"
        with open(path, "a") as file:
            file.write(head + ",".join(f"{value:.5f}" for value in values) + "\n")

    def save(self, out, last):
        """Held-out loss, checkpoint and a picture of samples, and at the `last` save of a run
        also where each brick is useful."""
        measured = self.average, self.diffusion, self.data, self.autocast
        columns = held_out_losses(*measured)
        info = self.model.info
        info.update(step=self.step, images=self.step * self.s.batch, seconds=self.seconds,
                    settings=vars(self.s), left_out=int(self.left_out))
        info.pop("useful", None)            # that of a run which was resumed
        if last:
            info["useful"] = useful_levels(*measured)
        if self.step > self.saved_step:     # Lines beyond a checkpoint are cut off later.
            self.log(out / "held_out.csv", columns.values())
        self.saved_step = self.step
        save_checkpoint(out / "checkpoint.pt", self.model, self.average.state_dict(), train=dict(
            weights=self.model.state_dict(), sums=self.sums,
            optimizers=[optimizer.state_dict() for optimizer in self.optimizers]))
        sheet = sheet_of_samples(self.average, self.diffusion, self.autocast)
        save_picture(sheet, out / f"samples-{self.step:07d}.png")
        bricks = ", ".join(f"{columns[f'brick{k}']:.4f}" for k in range(len(self.config.bricks)))
        tqdm.write(f"step {self.step}, {self.seconds / 60:.1f} min: held-out loss "
                   f"{columns['last']:.4f}; each brick in its range {bricks}")

    def fit(self, out):
        """Train until the budget is spent or a signal comes."""
        ask = lambda *_: setattr(self, "stop", True)
        before = [(number, signal.signal(number, ask)) for number in SIGNALS]
        try:
            if self.rank == 0:
                with writing(out):
                    self.open_logs(out)
            stopped = self.loop(out)
            if self.rank == 0 and (self.step > self.saved_step or "useful" not in self.model.info):
                with writing(out):
                    self.save(out, last=True)
        finally:
            for number, handler in before:
                signal.signal(number, handler)
        self.say_goodbye(out, stopped)

    def open_logs(self, out):
        """Make the folder of the run and its logs, or cut those of a resumed run. ValueError if
        another process trains there, or did so since this one began."""
        bricks = [f"brick{k}" for k in range(len(self.config.bricks))]
        levels = [f"quarter{i}" for i in (1, 2, 3, 4)] + ["sigma5", "sigma10", "sigma20"]
        self.lock, path = lock(out), out / "checkpoint.pt"
        if path.exists() and read_checkpoint(path)["info"]["step"] != self.step:
            raise ValueError(f"another process has written to {out} meanwhile: go on with --resume "
                             f"{out}")
        for part in out.glob(".samples-*.part"):            # A kill may have left it.
            part.unlink()
        self.open_log(out / "log.csv", ["loss", *bricks, "low", "middle", "high"])
        self.open_log(out / "held_out.csv", [*bricks, "last", *levels])

    def loop(self, out):
        """The steps of `fit`, with log lines and saves. Returns whether a signal came."""
        s, speaks, stopped, saved = self.s, self.rank == 0, False, self.seconds
        with tqdm(initial=self.step, total=s.steps, unit="step", disable=not speaks) as bar:
            while not stopped:
                progress = self.step / s.steps if s.steps else self.seconds / (60 * s.minutes)
                if progress >= 1:
                    break
                self.advance(progress)
                stopped = self.agree()
                bar.update()
                if self.step % LOG_EVERY == 0:
                    if speaks:
                        means = (self.sums[0] / self.sums[1]).tolist()
                        bar.set_postfix_str(f"loss {means[0]:.4f}, "
                                            f"{self.step * s.batch / self.seconds:.0f} images/s")
                        with writing(out):
                            self.log(out / "log.csv", means)
                    self.sums.zero_()
                if self.seconds - saved > 60 * s.save_minutes:
                    if speaks:
                        with writing(out):
                            self.save(out, last=False)
                    saved = time.perf_counter() - self.began
        return stopped

    def say_goodbye(self, out, stopped):
        """What was done, and the command that comes next."""
        rate = self.step * self.s.batch / max(self.seconds, 1e-9)
        print(f"{'stopped' if stopped else 'done'} at step {self.step} after {self.seconds:.0f} s, "
              f"{rate:.0f} images/s, peak memory {peak_memory(self.device):.0f} MB")
        if self.left_out:
            print(f"{int(self.left_out)} steps had gradients that were not finite: left out")
        print(f"go on with: python train_tiny.py --resume {out}" if stopped else
              f"sample with: python sample_tiny.py --ckpt {out / 'checkpoint.pt'}")


def bench(trainer, rounds=20):
    """A table of the time of a step. All cases take turns, and each turn is followed by a matrix
    product of 2048^3, the best of three, of whose speed the step reaches a share."""
    s, device, config = trainer.s, trainer.device, trainer.config
    bricks = tuple(replace(b, noise=(None, None)) for b in config.bricks)

    def case(config=config, **changes):
        settings = argparse.Namespace(**vars(s) | dict(precision="bf16") | changes)
        return Trainer(settings, None, trainer.rank, trainer.world, trainer.model.block, config,
                       trainer.data)

    cases = {
        "as trained, bf16": case(),
        "as trained, fp32": case(precision="fp32"),
        "all regions, bf16": case(region_fraction="1"),
        "all regions and noise levels, bf16": case(
            replace(config, bricks=bricks), region_fraction="1"),
        "the same, released network, fp32": case(
            replace(config, bricks=bricks, **RELEASED), region_fraction="1", precision="fp32")}
    if device.type == "cuda":
        cases["as trained, bf16, eager"] = eager = case()
        eager.graph = None
    squares = {"fp32": torch.randn(2048, 2048, device=device)}
    squares["bf16"] = squares["fp32"].bfloat16()
    flops, times = {}, {name: [] for name in cases}
    for i, name in in_turns(list(cases), rounds + 4):   # the first four count FLOPs and warm up
        if i == 0:
            cases[name].source.renew(0)
            with FlopCounterMode(display=False) as counter:
                cases[name].gradients()
            flops[name] = counter.get_total_flops()
        step = timed(lambda: cases[name].advance(.5), device)
        square = squares[cases[name].s.precision]
        product = min(timed(lambda: square @ square, device) for _ in range(3))
        times[name].append((step, 2 * 2048 ** 3 / product))
    print(f"\na step of {s.batch} images in ms, median (10% to 90%) of {rounds}, cases in random "
          f"turns; share of the speed of a matrix product of 2048^3\n"
          f"{'case':<37}{'ms':<25}images/s   GFLOPs   GFLOP/s   share")
    for name, rows in times.items():
        step, peak = np.array(rows[4:]).T
        low, middle, high = np.quantile(1000 * step, [.1, .5, .9])
        speed = flops[name] / step
        print(f"{name:<36}{middle:>6.1f} {f'({low:.1f} to {high:.1f})':<19}"
              f"{1000 * s.batch / middle:>9.0f}{flops[name] / 1e9:>9.4g}"
              f"{np.median(speed) / 1e9:>10.0f}{np.median(speed / peak):>8.1%}")
    first = cases["as trained, bf16"]
    update = np.median([timed(first.update, device) for _ in range(rounds)])
    print(f"of it, optimizers and average take {1000 * update:.1f} ms; peak memory of all cases "
          f"together {peak_memory(device):.0f} MB")
    for each in cases.values():
        each.source = None                  # This ends the workers.


def claim_folder(dataset):
    """A folder under runs/ for a new run on a data set, made with an empty log, by which other
    runs see that it is taken."""
    name = Path(os.path.abspath(dataset)).stem                           # so that "." has one
    for number in itertools.count(1):
        out = Path(f"runs/{name}" + (f"-{number}" if number > 1 else ""))
        out.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            if not (out / "checkpoint.pt").exists():
                (out / "log.csv").touch(exist_ok=False)
                return str(out)


def main(arguments=None, block=Block):
    """Train as the command line says, or as a list of `arguments` does. From Python, a stack of
    your own blocks is trained by main(["--minutes", "1"], block=MyBlock), under
    if __name__ == "__main__", since Python may start the workers by importing your file."""
    s, state = read_flags(arguments)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if s.batch % world:
        raise ValueError(f"--batch {s.batch} cannot be shared by {world} processes: take a "
                         f"multiple of {world}")
    if world > 1 and s.device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))             # what "cuda" now means
    if rank:
        sys.stdout = open(os.devnull, "w")                               # one process speaks
    if not state and s.out and Path(s.out, "checkpoint.pt").exists():
        raise ValueError(f"{s.out} holds a run already: go on with it by --resume {s.out}, or "
                         f"choose another --out")
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    trainer = Trainer(s, state, rank, world, block)
    if s.out is None and not s.bench:
        with writing("runs"):
            s.out = "" if rank else claim_folder(s.dataset)              # one process writes
    sigmas = [sigma for _, sigma in trainer.diffusion.evaluations()]
    print(table(trainer.model, sigmas))
    fractions = ", ".join(f"{fraction:.3g}" for fraction in trainer.fractions)
    print(f"each brick trains on this share of its regions: {fractions}")
    try:
        bench(trainer) if s.bench else trainer.fit(Path(s.out))
    finally:
        trainer.source = trainer.lock = None    # This ends the workers, and frees the folder.
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    command(main)
