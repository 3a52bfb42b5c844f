"""Sample from a trained LEGO stack: `python sample_tiny.py --skip 2,3 --size 64`; --help lists
the rest. What only compares or measures is in assets/measure.py.

Image i of a seed has a random generator of its own, so it is the same picture, but for rounding,
whatever the number of images or the batch.

SPDX-License-Identifier: MIT
"""

import itertools
import math
import os
import re
import time
import zipfile
from collections import defaultdict
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")        # see train_tiny.py

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch.nn.functional import interpolate
from tqdm import tqdm

from lego import OBJECTIVES, SAMPLERS, Block, generator, load_checkpoint, write_aside
from train_tiny import (Parser, check_limits, command, compile_blocks, flag, in_turns, peak_memory,
                        pick_device, pick_precision, picture, save_picture, sheet_columns, table,
                        timed, to_bytes)

LARGEST_SHEET = 1 << 26         # pixels of a picture that holds all samples


def read_flags(arguments=None):
    p = Parser(description="Sample from a LEGO diffusion stack.")
    flag(p, "--ckpt", None, "checkpoint (default: the newest in runs/, else assets/landscapes.pt)")
    flag(p, "--skip", "", "bricks to leave out: 2,3 at every step; 2,3@0-0.5 in the first, noisy "
         "half of the steps (after an @ comes the progress, not sigma as in --bricks); several "
         "parts with semicolons between; auto: where training found that they hardly matter")
    flag(p, "--size", None, "SIDE or HEIGHTxWIDTH in pixels: the height decides the resolution, a "
         "larger width widens the scene (default: the training size)")
    flag(p, "--n", 32, "number of images", type=int)
    flag(p, "--batch", 32, "images computed at a time", type=int)
    flag(p, "--steps", None, "noise levels (default: 18 for edm, 100 for ddpm)", type=int)
    flag(p, "--sampler", None, "ddim is another name of euler (default: dpm2m for edm, ancestral "
         "for ddpm)", choices=[*SAMPLERS, "ddim"])
    flag(p, "--churn", 0.0, "S_churn of Karras et al., for heun and euler", type=float)
    flag(p, "--guidance", 1.0, "scale of classifier-free guidance; 1 is off", type=float)
    flag(p, "--label", None, "class name or index, or none (default: every class in turn)")
    flag(p, "--seed", 0, "seed; image i of a seed is always the same", type=int)
    flag(p, "--out", "runs/samples.png", "FILE.png (one sheet), FILE.gif (that sheet as it forms, "
         "and which bricks run), FILE.npz (arr_0, uint8 NHWC) or a folder of PNG files")
    other = p.add_mutually_exclusive_group()
    flag(other, "--stages", False, "instead show how one image forms: the noisy image in the first "
         "row and the estimate of every brick below, white where it does not run",
         action="store_true")
    flag(other, "--bench", False, "instead time the subsets of bricks that cover all noise levels",
         action="store_true")
    flag(p, "--device", "auto", "auto, cpu, cuda, mps")
    flag(p, "--precision", "auto", "number format of the network", choices=["auto", "fp32", "bf16"])
    flag(p, "--compile", False, "compile the Transformer blocks, which takes a minute at first",
         action="store_true")
    a = p.parse_args(arguments)
    check_limits(p, a, dict(n=(1, 1 << 32), batch=(1, 1 << 16), steps=(1, 10_000),
                            seed=(0, 1 << 64), guidance=(0, 1000), churn=(0, 1000)))
    if a.bench and a.skip:
        p.error("--bench times the subsets by itself: leave --skip out")
    if a.stages and a.churn:
        p.error("--stages shows the noise levels of a walk, which --churn changes: leave one out")
    return a


def find_checkpoint(name):
    """The file that was named, else the newest run, else the weights that the project brings."""
    if name:
        return Path(name)
    runs = Path("runs").glob("**/checkpoint.pt")
    newest = max(runs, key=lambda path: path.stat().st_mtime, default=None)
    shipped = Path(__file__).parent / "assets/landscapes.pt"
    if not newest and not shipped.exists():
        raise ValueError("no checkpoint under runs/ or assets/: train one with python "
                         "train_tiny.py, or name one with --ckpt")
    return newest or shipped


def parse_size(text, size):
    """(height, width) of "64" or "32x128"; None is the training size."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text or str(size))
    sides = [int(side) for side in match.groups() if side] if match else [0]
    if 0 in sides:
        raise ValueError(f"--size {text}: write SIDE or HEIGHTxWIDTH in pixels, such as 32x128")
    if sides[0] * sides[-1] > LARGEST_SHEET:
        raise ValueError(f"--size {text}: {LARGEST_SHEET} pixels are the most")
    return sides[0], sides[-1]


def parse_skip(text):
    """The brick indices to skip as a function of the sampler's progress."""
    parts = []
    for part in filter(None, text.replace(" ", "").split(";")):
        match = re.fullmatch(r"(\d+(?:,\d+)*)(?:@(\d*\.?\d+)-(\d*\.?\d+))?", part)
        if not match:
            raise ValueError(f"--skip {part}: write brick indices such as 2,3, or for a part of "
                             f"the steps 2,3@0-0.5")
        bricks = {int(k) for k in match[1].split(",")}
        start, end = float(match[2] or 0), float(match[3] or 1)
        if not start < end <= 1:
            raise ValueError(f"--skip {part}: the range must rise within 0 (noise) to 1 (image)")
        parts.append((bricks, start, end))

    def skip(progress):
        now = [bricks for bricks, start, end in parts if start <= progress < end]
        return set().union(*now)
    return skip


def skip_useless(model, evaluations, steps):
    """`--skip auto`: leave a brick out of the steps in which none of the noise levels lies where
    training found it useful, unless a level would be left without a brick."""
    try:
        useful = [(float(low or 0), math.inf if high is None else float(high))
                  for low, high in model.info["useful"]]
    except (KeyError, TypeError, ValueError):
        raise ValueError("--skip auto: training has not measured where the bricks of this "
                         "checkpoint are useful") from None

    def skip(progress):
        sigmas = [sigma for i, sigma in evaluations if i == round(progress * steps)]
        useless = set()
        for k, (low, high) in enumerate(useful):
            if not any(low <= sigma < high for sigma in sigmas):
                useless.add(k)
        try:
            model.config.active(torch.tensor(sigmas).log() / 4, useless)
            return useless
        except ValueError:
            return set()
    return skip


def parse_label(text, model):
    """The labels that images take in turn, of which a model without classes has none."""
    classes, names = model.config.classes, model.info.get("classes", [])
    if not classes and text not in (None, "none"):
        raise ValueError(f"--label {text}: this model has no classes")
    if text is None or not classes:
        return list(range(classes))
    known = {str(k): k for k in range(classes)}
    known |= {name: k for k, name in enumerate(names)}
    known["none"] = classes
    if text not in known:
        raise ValueError(f"--label {text}: take none, 0 to {classes - 1}, or one of "
                         f"{', '.join(names)}")
    return [known[text]]


class Sampler:
    """Everything that the flags `a` decide, ready to give images by their number."""

    def __init__(self, a, block=Block):
        path = find_checkpoint(a.ckpt)
        self.device = pick_device(a.device)
        self.autocast = pick_precision(a.precision, self.device)
        self.model = load_checkpoint(path, block)
        objective = self.model.info.get("objective", "edm")
        self.diffusion, self.seed, self.batch = OBJECTIVES[objective](), a.seed, a.batch
        self.size = parse_size(a.size, self.model.config.size)
        self.turn = parse_label(a.label, self.model)
        walk = dict(steps=a.steps or self.diffusion.steps, churn=a.churn,
                    sampler="euler" if a.sampler == "ddim" else a.sampler or self.diffusion.sampler)
        evaluations = self.diffusion.evaluations(**walk)
        if a.skip == "auto":
            skip = skip_useless(self.model, evaluations, walk["steps"])
        else:
            skip = parse_skip(a.skip)
        self.skips = self.diffusion.schedule(self.model.config, skip, **walk)
        self.settings = dict(walk, skip=skip, guidance=a.guidance, clip=True)
        print(f"{path}: {objective}, trained on {self.model.info.get('dataset', '?')}")
        always = frozenset.intersection(*self.skips)
        print(table(self.model, [sigma for _, sigma in evaluations], always))
        if a.skip:
            runs = [self.model.config.running(sigma, self.skips[i]) for i, sigma in evaluations]
            counts = [sum(k in run for run in runs) for k in range(len(self.model.bricks))]
            print(f"skipping {a.skip}: of {len(runs)} evaluations the bricks run in "
                  f"{', '.join(map(str, counts))}")
        if a.compile:               # reduce-overhead: as CUDA graphs, where there is CUDA
            compile_blocks(self.model, mode="reduce-overhead")
        self.model.to(self.device).register_forward_pre_hook(self.count_flops, with_kwargs=True)
        self.flops = 0

    def count_flops(self, model, inputs, settings):
        """Add the FLOPs of the evaluation that the model is about to make."""
        x, c_noise, *_ = inputs
        *each, shared = model.flops(*x.shape[2:], offset=settings.get("offset", (0, 0)))
        rows = settings.get("rows")
        if rows is None:
            rows = model.config.active(c_noise.cpu(), settings.get("skip", ()))
        images = [len(x[here]) for here in rows]
        self.flops += len(x) * shared + sum(map(math.prod, zip(images, each)))

    def labels(self, numbers):
        """The labels of the images of these numbers, or None."""
        if not self.turn:
            return None
        return torch.tensor([self.turn[i % len(self.turn)] for i in numbers], device=self.device)

    def images(self, numbers, **settings):
        """float images (n, C, H, W) of these numbers."""
        shape = len(numbers), self.model.config.channels, *self.size
        generators = [generator(self.seed, i) for i in numbers]
        with self.autocast():
            return self.diffusion.sample(self.model, shape, self.labels(numbers),
                                         generator=generators, **self.settings | settings)

    def batches(self, n, **settings):
        """uint8 images (b, H, W, C), a batch at a time, n in all."""
        for start in tqdm(range(0, n, self.batch), unit="batch"):
            yield to_bytes(self.images(range(start, min(n, start + self.batch)), **settings))


def write_npz(batches, shape, file):
    """An ADM sample file, written as the batches come: `arr_0`, uint8 of `shape` (n, H, W, C)."""
    header = dict(descr="|u1", fortran_order=False, shape=shape)
    with (zipfile.ZipFile(file, "w") as archive,
          archive.open("arr_0.npy", "w", force_zip64=True) as member):
        np.lib.format.write_array_header_1_0(member, header)
        for images in batches:
            member.write(images.tobytes())


def unit_scale(x, sigma):
    """The noisy image x of level sigma in the range of clean images, to be looked at."""
    return x * .5 / math.hypot(.5, sigma)


def film(sampler, n):
    """Yield for every step what n images look like before it, uint8 (n, H, W, C), and the set of
    the bricks that run in it. Last come the images themselves, for which none runs."""
    (H, W), seen, ran, steps = sampler.size, [], set(), defaultdict(list)
    for k, brick in enumerate(sampler.model.bricks):
        brick.register_forward_hook(lambda *_, k=k: ran.add(k))

    def watch(x0, x, sigma):
        seen.append(unit_scale(x, sigma))
        return x0

    def end_step(done, *_):
        x = seen[0]                                         # that of the first evaluation
        w = max(1, round(W * x.shape[2] / H))               # the middle that will be kept
        x = x[..., (x.shape[3] - w) // 2:][..., :w]
        x = to_bytes(interpolate(x, (H, W), mode="nearest-exact"))
        steps[done].append((x, set(ran)))
        seen.clear()
        ran.clear()

    images = list(sampler.batches(n, guide=watch, callback=end_step))
    for batches in [*steps.values(), [(x, set()) for x in images]]:
        parts, runs = zip(*batches)
        yield np.concatenate(parts), runs[0]


def write_gif(film, columns, bricks, file):
    """A sheet for every step of a film, over a strip with the names of the bricks, yellow where
    they run."""
    frames = []
    for images, runs in film:
        sheet = picture(images, columns, enlarge=False).convert("RGB")
        sheet = ImageOps.scale(sheet, max(1, round(512 / max(sheet.size))), Image.NEAREST)
        width = max(sheet.width, 56 * len(bricks))          # room for the names
        sheet = ImageOps.expand(sheet, (0, 0, width - sheet.width, 21), "white")
        draw = ImageDraw.Draw(sheet)
        for k, spec in enumerate(bricks):
            left, right = (i * (width + 2) // len(bricks) for i in (k, k + 1))
            fill, ink = ("gold", "black") if k in runs else ("gainsboro", "gray")
            draw.rectangle((left, sheet.height - 18, right - 3, sheet.height - 1), fill)
            name = str(spec).partition("@")[0]
            middle = (left + right - 2 - draw.textlength(name)) / 2
            draw.text((middle, sheet.height - 15), name, ink)
        # Of Pillow's ways to 256 colours this is the nearest. Dithering made noise of its own.
        frames.append(sheet.quantize(method=Image.Quantize.MAXCOVERAGE, kmeans=1000))
    first, *rest = frames
    times = [max(40, 3000 // len(rest))] * len(rest) + [2000]           # in ms
    first.save(file, format="gif", save_all=True, append_images=rest, duration=times, loop=0)


def write_samples(sampler, n, out):
    """Write n images to a .npz file, a sheet, still or moving, or a folder. ValueError if a sheet
    is too large."""
    config, (height, width), batches = sampler.model.config, sampler.size, sampler.batches(n)
    if out.suffix == ".npz":
        write_aside(out, partial(write_npz, batches, (n, height, width, config.channels)))
    elif out.suffix in (".png", ".gif"):
        columns = min(n, max(1, round(sheet_columns(config.classes) * height / width)))
        gif, sides = out.suffix == ".gif", (columns * width, math.ceil(n / columns) * height)
        pixels = n * height * width * (sampler.settings["steps"] if gif else 1)
        if pixels > LARGEST_SHEET or gif and max(sides) > 1 << 15:      # a GIF ends below 1 << 16
            raise ValueError(f"{n} images of {height}x{width} are too much for one picture: name a "
                             f"folder")
        if gif:
            write_aside(out, partial(write_gif, film(sampler, n), columns, config.bricks))
        else:
            save_picture(picture(np.concatenate(list(batches)), columns), out)
    else:
        if (out / f"{n:06d}.png").exists():
            raise ValueError(f"{out} holds images beyond the {n} asked for: name another folder")
        for i, image in enumerate(itertools.chain.from_iterable(batches)):
            save_picture(picture(image[None], 1, enlarge=False), out / f"{i:06d}.png")


@torch.no_grad()
def stages(sampler, columns=9):
    """A picture of image 0 on its way: x in the first row, below it the estimates of x0 of every
    brick, white where the brick does not run."""
    model, diffusion, seen = sampler.model, sampler.diffusion, {}

    def watch(x0, x, sigma):            # The last evaluation at a level is that of its own step.
        if x.shape[2:] == sampler.size:
            seen[sigma] = x
        return x0

    sampler.images([0], guide=watch)
    levels = diffusion.levels(sampler.settings["steps"])
    steps = [i for i, sigma in enumerate(levels) if sigma in seen]
    if not steps:
        raise ValueError("--stages: no step works on {}x{} pixels, which are cut or enlarged from "
                         "another canvas: take --size {}".format(*sampler.size, model.config.size))
    steps = [steps[round(i * (len(steps) - 1) / (columns - 1))] for i in range(columns)]
    print("noise levels " + ", ".join(f"{levels[i]:.3g}" for i in steps))
    tiles = []
    for i in steps:
        x, sigma = seen[levels[i]], levels[i]
        with sampler.autocast():
            every = diffusion.estimate(model, x, sigma, sampler.labels([0]), skip=sampler.skips[i],
                                       guidance=sampler.settings["guidance"], return_all=True)
        cells = [torch.ones_like(x)] * len(model.bricks)
        for k, estimate in zip(model.config.running(sigma, sampler.skips[i]), every):
            cells[k] = estimate
        tiles.append(torch.cat([unit_scale(x, sigma), *cells]))              # (1 + K, C, H, W)
    return picture(to_bytes(torch.stack(tiles, 1).flatten(0, 1)), columns)


def covering_subsets(config):
    """All choices of bricks to skip, as tuples of indices, whose rest covers every noise level;
    the first one skips nothing."""
    K, subsets = len(config.bricks), []
    for count in range(K):
        for skip in itertools.combinations(range(K), count):
            rest = tuple(spec for k, spec in enumerate(config.bricks) if k not in skip)
            with suppress(ValueError):          # some noise level is left without a brick
                replace(config, bricks=rest)
                subsets.append(skip)
    return subsets


def bench(sampler, rounds=8):
    """A table of what subsets of bricks cost, which take turns."""
    n, subsets = sampler.batch, covering_subsets(sampler.model.config)
    times, flops = {skip: [] for skip in subsets}, {}
    for _, skip in in_turns(subsets, rounds + 1):                        # the first round warms up
        sampler.flops = 0
        seconds = timed(lambda: sampler.images(range(n), skip=skip), sampler.device)
        flops[skip] = sampler.flops / n
        times[skip].append(1000 * seconds / n)
    height, width = sampler.size
    print(f"\n{n} images of {height}x{width}, {sampler.settings['sampler']}: ms per image, median "
          f"(10% to 90%) of {rounds}\nskipped   GFLOPs   ms per image             FLOPs    time   "
          f"time saved / FLOPs saved")
    for skip in subsets:
        low, middle, high = np.quantile(times[skip][1:], [.1, .5, .9])
        share = np.median(np.divide(times[skip], times[()])[1:])
        saved = 1 - flops[skip] / flops[()]
        name, spread = ",".join(map(str, skip)), f"{middle:.4g} ({low:.4g} to {high:.4g})"
        print(f"{name or 'nothing':<9} {flops[skip] / 1e9:>6.2f}   {spread:<23} {1 - saved:>6.1%}  "
              f"{share:>6.1%}   " + (f"{(1 - share) / saved:.2f}" if saved else ""))


def main(arguments=None, block=Block):
    """Sample as the command line says, or as a list of `arguments` does. `block` is the class of
    the blocks, for a checkpoint that was trained with your own."""
    a = read_flags(arguments)
    out = Path(a.out)
    if out.suffix not in ("", ".png", ".gif", ".npz"):
        raise ValueError(f"--out {out}: name a FILE.png, FILE.gif, FILE.npz or a folder")
    sampler = Sampler(a, block)
    if a.bench:
        return bench(sampler)
    (out.parent if out.suffix else out).mkdir(parents=True, exist_ok=True)
    if a.stages:
        out = out.with_suffix(".png") if out.suffix else out / "stages.png"
        save_picture(stages(sampler), out)
        return print(f"written to {out}")
    began = time.perf_counter()
    write_samples(sampler, a.n, out)
    seconds = time.perf_counter() - began
    print(f"{a.n} images of {'x'.join(map(str, sampler.size))} in {seconds:.1f} s: "
          f"{sampler.flops / a.n / 1e9:.2f} GFLOPs and {1000 * seconds / a.n:.1f} ms per image, "
          f"peak memory {peak_memory(sampler.device):.0f} MB, written to {out}")


if __name__ == "__main__":
    command(main)
