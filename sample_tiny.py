"""Sample from a trained LEGO stack: `python sample_tiny.py --skip 2,3 --size 64`; --help lists the rest.

Image i of a seed has its own random generator, so it is the same picture, but for rounding, whatever the number of images or
the batch.

SPDX-License-Identifier: MIT
"""

import itertools
import math
import re
import time
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate
from tqdm import tqdm

from lego import OBJECTIVES, SAMPLERS, BrickSpec, Diffusion, Lego, generator, load_checkpoint, write_aside
from train_tiny import (Parser, command, flag, landscapes, load_data, peak_memory, pick_device, pick_precision, picture,
                        save_picture, sheet_columns, timed, to_bytes, to_float)

LARGEST_SHEET = 1 << 26         # pixels of a picture that holds all samples


def read_flags():
    p = Parser(description="Sample from a LEGO diffusion stack.")
    flag(p, "--ckpt", None, "checkpoint file (default: the newest under runs/, else assets/landscapes.pt)")
    flag(p, "--skip", "", "bricks to leave out: 2,3 at every step; 2,3@0-0.5 in the first, noisy half of the steps; several "
         "such parts separated by semicolons; auto: every brick where it hardly matters, as training measured")
    flag(p, "--size", None, "SIDE or HEIGHTxWIDTH in pixels: height decides the resolution, and width beyond that widens the "
         "scene (default: the training size)")
    flag(p, "--canvas", "ours", "how a canvas beyond the training size is made: our way; regions side by side, as in the "
         "released code; or with image-level regions as large as the canvas", choices=["ours", "tiled", "one"])
    flag(p, "--n", 32, "number of images", type=int)
    flag(p, "--batch", 32, "images computed at a time", type=int)
    flag(p, "--steps", None, "noise levels walked (default: 18 for edm, 100 for ddpm)", type=int)
    flag(p, "--sampler", None, "ddim is another name of euler (default: the objective's: heun for edm, ancestral for ddpm)",
         choices=[*SAMPLERS, "ddim"])
    flag(p, "--churn", 0.0, "S_churn of Karras et al.: noise added at each step of heun and euler", type=float)
    flag(p, "--guidance", 1.0, "classifier-free guidance scale; 1 is off", type=float)
    flag(p, "--label", None, "class name or index for all images, or none (default: every class in turn)")
    flag(p, "--seed", 0, "seed; image i of a seed is always the same", type=int)
    flag(p, "--out", "runs/samples.png", "FILE.png (one sheet), FILE.npz (arr_0, uint8 NHWC) or a folder of PNG files")
    other = p.add_mutually_exclusive_group()
    flag(other, "--stages", False, "instead show how one image forms: a column per noise level, the noisy image in the first "
         "row, every brick's estimate of x0 below", action="store_true")
    flag(other, "--bench", False, "instead time canvases of several sizes, and every subset of bricks against its share of "
         "FLOPs", action="store_true")
    flag(other, "--eval", None, "instead compare the samples with as many images of a data set, as train_tiny.py names it: "
         "distance at every scale, and how visible the borders of regions are", metavar="DATASET")
    flag(p, "--device", "auto", "auto, cpu, cuda, mps")
    flag(p, "--precision", "auto", "number format of the network", choices=["auto", "fp32", "bf16"])
    a = p.parse_args()
    for name, (least, most) in dict(n=(1, 1 << 32), batch=(1, 1 << 16), steps=(1, 10_000), seed=(0, 1 << 64), guidance=(0, 1000),
                                    churn=(0, 1000)).items():
        if getattr(a, name) is not None and not least <= getattr(a, name) <= most:
            p.error(f"--{name} must lie between {least} and {most}, found {getattr(a, name)}")
    return a


def find_checkpoint(name):
    if name:
        return Path(name)
    found = list(Path(__file__).parent.glob("assets/landscapes.pt"))
    found += sorted(Path("runs").glob("**/checkpoint.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ValueError("no checkpoint under runs/ or assets/: train one with python train_tiny.py, or name one with --ckpt")
    return found[-1]


def parse_size(text, size):
    """(height, width) of "64" or "32x128"; None is the training size."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text or str(size))
    if not match or 0 in (sides := [int(side) for side in match.groups() if side]):
        raise ValueError(f"--size {text}: write SIDE or HEIGHTxWIDTH in pixels, such as 64 or 32x128")
    if sides[0] * sides[-1] > LARGEST_SHEET:
        raise ValueError(f"--size {text}: {LARGEST_SHEET} pixels are the most")
    return sides[0], sides[-1]


def parse_skip(text, model, sigmas):
    """The brick indices to skip as a function of the sampler's progress, checked for every step of the noise levels `sigmas`."""
    steps, parts = len(sigmas) - 1, []
    if text == "auto":
        try:
            useful = [(float(low), float(high)) for low, high in model.info["useful"]]
        except (KeyError, TypeError, ValueError):
            raise ValueError("--skip auto: training has not measured where the bricks of this checkpoint matter") from None
        return lambda progress: {k for k, (low, high) in enumerate(useful) if not low <= sigmas[round(progress * steps)] <= high}
    for part in filter(None, text.replace(" ", "").split(";")):
        match = re.fullmatch(r"(\d+(?:,\d+)*)(?:@(\d*\.?\d+)-(\d*\.?\d+))?", part)
        if not match:
            raise ValueError(f"--skip {part}: write brick indices such as 2,3, or for a part of the steps 2,3@0-0.5")
        start, end = (0.0, 1.0) if match[2] is None else (float(match[2]), float(match[3]))
        if not start < end <= 1:
            raise ValueError(f"--skip {part}: the range must rise within 0 (noise) to 1 (image)")
        parts.append(({int(k) for k in match[1].split(",")}, start, end))
    at = lambda progress: set().union(*(bricks for bricks, start, end in parts if start <= progress < end))
    for i in range(steps):
        model.kept(at(i / steps))
    return at


def parse_label(text, model):
    """A function from image number to label index, or None for unconditional samples."""
    names = model.info.get("classes", [])
    if not model.config.classes:
        if text not in (None, "none"):
            raise ValueError(f"--label {text}: this model has no classes")
        return None
    if text is None:
        return lambda i: i % model.config.classes
    if text == "none":
        return lambda i: model.config.classes
    if text not in names and not (text.isdigit() and int(text) < model.config.classes):
        raise ValueError(f"--label {text}: take none, 0 to {model.config.classes - 1}, or one of {', '.join(names)}")
    return lambda i: names.index(text) if text in names else int(text)


def stretched(model, span):
    """The same network as the released code runs it on any canvas, coordinates stretched over it: what ours is compared with.
    Its image-level bricks get regions of at least `span` pixels."""
    size, grow = model.config.size, lambda b: replace(b, region=max(b.region, math.ceil(span / b.patch) * b.patch))
    bricks = tuple(grow(b) if b.region >= size else b for b in model.config.bricks)
    other = Lego(replace(model.config, bricks=bricks, stretch=True))
    other.load_state_dict(model.state_dict())
    other.info = model.info
    return other


class Sampler:
    """Everything that the flags decide, ready to give images by number."""

    def __init__(self, a):
        path = find_checkpoint(a.ckpt)
        self.device = pick_device(a.device)
        self.autocast = pick_precision(a.precision, self.device)
        self.model = load_checkpoint(path)
        objective = self.model.info.get("objective", "edm")
        self.diffusion, self.seed, self.batch = OBJECTIVES[objective](), a.seed, a.batch
        steps = a.steps or self.diffusion.steps
        self.size = parse_size(a.size, self.model.config.size)
        self.label = parse_label(a.label, self.model)
        if a.canvas != "ours":
            self.model = stretched(self.model, max(self.size) if a.canvas == "one" else 0)
        name = "euler" if a.sampler == "ddim" else a.sampler or self.diffusion.sampler
        self.settings = dict(steps=steps, sampler=name, churn=a.churn, clip=True, plain=a.canvas != "ours", guidance=a.guidance,
                             skip=parse_skip(a.skip, self.model, self.diffusion.levels(steps)))
        self.flops = 0
        self.model.to(self.device)
        self.model.register_forward_pre_hook(self.count, with_kwargs=True)
        skipped = [self.settings["skip"](i / steps) for i in range(steps)]
        print(f"{path}: {objective}, trained on {self.model.info.get('dataset', '?')}")
        print(self.model.table(set.intersection(*skipped)))
        if a.skip:
            run = [sum(k not in now for now in skipped) for k in range(len(self.model.bricks))]
            print(f"skipping {a.skip}: of {steps} steps the bricks run in {', '.join(map(str, run))}")

    def count(self, model, arguments, settings):
        x = arguments[0]
        self.flops += len(x) * sum(model.flops(*x.shape[2:], settings["skip"], settings["offset"], settings["wrap"]))

    def images(self, numbers, **settings):
        """float images (n, C, H, W) of these numbers."""
        labels = None if self.label is None else torch.tensor([self.label(i) for i in numbers], device=self.device)
        shape = len(numbers), self.model.config.channels, *self.size
        with self.autocast():
            return self.diffusion.sample(self.model, shape, labels, generator=[generator(self.seed, i) for i in numbers],
                                         **self.settings | settings)

    def batches(self, n):
        """uint8 images (b, H, W, C), a batch at a time, n in all."""
        with tqdm(total=n, unit="image") as bar:
            for start in range(0, n, self.batch):
                numbers = range(start, min(n, start + self.batch))
                yield to_bytes(self.images(numbers))
                bar.update(len(numbers))


def write_npz(batches, shape, file):
    """An ADM sample file, written as the batches come: `arr_0`, uint8 of `shape` (n, H, W, C)."""
    with zipfile.ZipFile(file, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, dict(descr="|u1", fortran_order=False, shape=shape))
        for images in batches:
            member.write(images.tobytes())


def stages(sampler, columns=9):
    """A picture of image 0 on its way: x_t in the first row, every brick's estimate of x0 in the rows below."""
    seen = {}

    def watch(x0, x, sigma):                    # the guide hook sees every evaluation; the last at a level is the step's own
        labels = None if sampler.label is None else torch.tensor([sampler.label(0)], device=x.device)
        if x.shape[2:] == sampler.size:
            every = Diffusion.denoise(sampler.diffusion, sampler.model, x, sigma, labels, return_all=True)
            seen[sigma] = torch.cat([x * .5 / math.hypot(.5, sigma), *every])
        return x0

    sampler.images([0], guide=watch)
    if not seen:
        raise ValueError("--stages: no step works on {}x{} pixels, which are cut or enlarged from another canvas: take "
                         "--size {}".format(*sampler.size, sampler.model.config.size))
    levels = sorted(seen, reverse=True)
    levels = [levels[round(i * (len(levels) - 1) / (columns - 1))] for i in range(columns)]
    print("noise levels " + ", ".join(f"{s:.3g}" for s in levels))
    rows = torch.stack([seen[level] for level in levels], 1).flatten(0, 1)
    return picture(to_bytes(rows), columns)


def bench(sampler, rounds=8):
    """Tables of what pixels and bricks cost. Cases take random turns, so that a slow moment of the machine is slow for all."""
    model, config, device, n = sampler.model, sampler.model.config, sampler.device, sampler.batch
    spread = lambda times, per: "{1:.4g} ({0:.4g} to {2:.4g})".format(*1000 / per * np.quantile(times, [.1, .5, .9]))

    patch, depth, sides = max(b.patch for b in config.bricks), sum(b.depth for b in config.bricks), (32, 64, 128, 256)
    nets = {("this stack", side): model for side in sides} | {
        ("one region", side): Lego(replace(config, bricks=(BrickSpec(side, patch, depth),), size=side)).to(device) for side in sides}
    times, memory = {case: [] for case in nets}, {}
    with torch.no_grad(), sampler.autocast():
        for _, ((name, side), net) in itertools.product(range(rounds + 1), nets.items()):
            x = torch.zeros(65536 // side ** 2, config.channels, side, side, device=device)
            times[name, side].append(timed(lambda: Diffusion.denoise(sampler.diffusion, net, x, 1.0), device))
            memory.setdefault((name, side), peak_memory(device))
    print(f"\none evaluation of 65,536 pixels in images of several sizes: ms per 1,024 pixels (10% to 90% of {rounds}), and peak memory "
          f"up to then;\n'one region' is a single brick of {patch}-pixel patches, {depth} blocks deep, whose region is the canvas\n"
          "canvas     this stack                 MB     one region                 MB")
    for side in sides:
        print(f"{side:>3}x{side:<3}" + "".join(f"    {spread(times[name, side][1:], 64):<26} {memory[name, side]:.0f}"
                                             for name in ("this stack", "one region")))

    K, steps = len(config.bricks), sampler.settings["steps"]
    subsets = [(skip, 4) for k in range(K) for skip in itertools.combinations(range(K), k)]
    subsets += [((), steps), (tuple(range(max(1, K // 2), K)), steps)]          # and whole samples, all bricks and half of them
    times, flops = [[] for _ in subsets], [0] * len(subsets)
    for i in range(rounds + 1):                                                 # the first round warms up
        for k in np.random.default_rng(i).permutation(len(subsets)):
            (skip, steps), sampler.flops = subsets[k], 0
            times[k].append(timed(lambda: sampler.images(range(n), skip=skip, steps=steps), device))
            flops[k] = sampler.flops / n
    print(f"\n{n} images of {sampler.size[0]}x{sampler.size[1]}, {sampler.settings['sampler']}: ms per image (10% to 90% of {rounds})\n"
          "skipped   steps  GFLOPs  time per image              FLOPs    time   time saved / FLOPs saved")
    for (skip, steps), row, count in zip(subsets, times, flops):
        whole = subsets.index(((), steps))
        saved, share = 1 - count / flops[whole], np.median(np.divide(row, times[whole])[1:])
        print(f"{','.join(map(str, skip)) or 'nothing':<8} {steps:>6} {count / 1e9:>7.2f}  {spread(row[1:], n):<26} {1 - saved:>6.1%}  "
              f"{share:>6.1%}   " + (f"{(1 - share) / saved:.2f}" if saved else ""))


def seam_ratio(images, true, region, axis):
    """Mean absolute difference across region borders over that elsewhere, divided by the same for true images; axis 1 or 2 of
    (n, H, W, C)."""
    def ratio(batch):
        across = np.abs(np.diff(batch.astype(np.float32), axis=axis)).mean(tuple({0, 1, 2, 3} - {axis}))       # (side - 1,)
        border = np.arange(1, len(across) + 1) % region == 0
        return across[border].mean() / across[~border].mean()
    return ratio(images) / ratio(true)


def pyramid(images):
    """The Laplacian pyramid of float (n, C, H, W): the detail lost by each halving down to 16 pixels, and what is left."""
    levels = []
    while min(images.shape[2:]) >= 32:
        low = interpolate(images, scale_factor=.5, mode="bilinear", antialias=True)
        levels.append(images - interpolate(low, images.shape[2:], mode="bilinear"))
        images = low
    return levels + [images]


def distances(a, b):
    """Sliced Wasserstein distance times 1000 at every level of the pyramids of uint8 images a and b (n, H, W, C), finest first
    (Karras et al. 2018): between 128 patches of 7 x 7 pixels from every image, along 512 random directions."""
    result = []
    for level in zip(*(pyramid(to_float(images)) for images in (a, b))):
        random, projected = generator("distances", len(result)), []
        C, H, W = level[0].shape[1:]
        directions = torch.randn(C * 49, 512, generator=random)
        directions = (directions / directions.norm(dim=0)).numpy()
        for images in level:
            corner = [torch.randint(side - 6, (len(images), 128, 1, 1), generator=random) for side in (H, W)]
            rows, columns = corner[0] + torch.arange(7)[:, None], corner[1] + torch.arange(7)     # (n, 128, 7, 1), (n, 128, 1, 7)
            patches = images[torch.arange(len(images))[:, None, None, None], :, rows, columns]    # (n, 128, 7, 7, C)
            std, mean = torch.std_mean(patches, (0, 1, 2, 3))
            rows = ((patches - mean) / std).flatten(2).flatten(0, 1)                              # (n * 128, 49 C)
            # numpy sorts eight times faster than torch, which keeps indices, and knows no autocast
            projected.append(np.sort((rows.numpy() @ directions).T))                              # (512, n * 128)
        result.append(1000 * float(np.abs(projected[0] - projected[1]).mean()))
    return result


def evaluate(sampler, name, n):
    """Compare n samples with n images of a data set, and those with n others of it: nothing can be told closer than that."""
    if min(sampler.size) < 7:
        raise ValueError(f"--eval compares patches of 7x7 pixels: images of {sampler.size[0]}x{sampler.size[1]} are too small")
    if name == "landscapes":
        true, other = (landscapes(2 ** 32 + 1 + i, range(n), *sampler.size)[0] for i in range(2))
    else:
        data = load_data(name, "data", sampler.size[0])
        n = min(n, len(data.held_out[0]))
        true, other = (np.random.default_rng(0).permutation(images)[:n] for images in (data.held_out[0], data.train[0]))
    shape = n, *sampler.size, sampler.model.config.channels
    if shape != true.shape:
        raise ValueError(f"samples are {shape[1:]}, but images of {name} {true.shape[1:]} (height, width, channels)")
    images = np.concatenate(list(sampler.batches(n)))
    print(f"{n} samples against {n} images (in brackets: images against others of the data set)\nsliced Wasserstein distance x 1000, "
          "from the finest level to the coarsest, and their mean")
    ours, floor = (d + [sum(d) / len(d)] for d in (distances(images, true), distances(other, true)))
    print("   ".join(f"{a:.1f} ({b:.1f})" for a, b in zip(ours, floor)))
    print("seam ratio at borders every   across rows  across columns")
    for region in sorted({b.region for b in sampler.model.config.bricks}):
        cells = [f"{seam_ratio(images, true, region, axis):.2f} ({seam_ratio(other, true, region, axis):.2f})"
                 if sampler.size[axis - 1] > region else "" for axis in (1, 2)]
        print(f"{region:>20} pixels   {cells[0]:>11}  {cells[1]:>14}")


def main():
    a = read_flags()
    out = Path(a.out)
    if out.suffix not in ("", ".png", ".npz"):
        raise ValueError(f"--out {out}: name a FILE.png, a FILE.npz or a folder")
    sampler = Sampler(a)
    if a.bench or a.eval:
        return bench(sampler) if a.bench else evaluate(sampler, a.eval, a.n)
    (out.parent if out.suffix else out).mkdir(parents=True, exist_ok=True)
    began, config = time.perf_counter(), sampler.model.config
    if a.stages:
        out = out.with_suffix(".png") if out.suffix else out / "stages.png"
        save_picture(stages(sampler), out)
        return print(f"written to {out}")
    if out.suffix == ".npz":
        write_aside(out, partial(write_npz, sampler.batches(a.n), (a.n, *sampler.size, config.channels)))
    elif out.suffix == ".png":
        if a.n * math.prod(sampler.size) > LARGEST_SHEET:
            raise ValueError(f"{a.n} images of {sampler.size[0]}x{sampler.size[1]} are too much for one picture: name a folder")
        columns = min(a.n, max(1, round(sheet_columns(config.classes) * sampler.size[0] / sampler.size[1])))
        save_picture(picture(np.concatenate(list(sampler.batches(a.n))), columns), out)
    else:
        for i, image in enumerate(itertools.chain.from_iterable(sampler.batches(a.n))):
            save_picture(picture(image[None], 1, enlarge=False), out / f"{i:06d}.png")
    seconds = time.perf_counter() - began
    print(f"{a.n} images of {sampler.size[0]}x{sampler.size[1]} in {seconds:.1f} s: {sampler.flops / a.n / 1e9:.2f} GFLOPs and "
          f"{1000 * seconds / a.n:.1f} ms per image, peak memory {peak_memory(sampler.device):.0f} MB, written to {out}")


if __name__ == "__main__":
    command(main)
