"""The one script behind the project's evidence, run from the repository's root:

python assets/measure.py compare     how far samples are from true images, and what they cost
python assets/measure.py subsets     what the loss becomes without some of the bricks
python assets/measure.py pace        how many steps of several stacks take the same time
python assets/measure.py race        the held-out loss of runs, over their seeds
python assets/measure.py plot        pictures of the logs levels.csv, race.csv and curve.csv
python assets/measure.py classifier  train the classifier whose features FD-CIFAR compares

SPDX-License-Identifier: MIT
"""

import csv
import math
import os
import re
import shlex
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")        # before torch is there: see train_tiny.py

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.functional import cross_entropy, interpolate, pad
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lego
import sample_tiny
import train_tiny
from sample_tiny import covering_subsets
from train_tiny import (CIFAR10, Parser, check_limits, command, flag, held_out_batch, in_turns,
                        last_brick, load_data, losses_at, save_picture, timed, to_bytes, to_float)

# ---- Distances between samples and images --------------------------------------------


def pyramid(images):
    """The Laplacian pyramid of (n, C, H, W): what each halving loses, and what is left."""
    levels = []
    while min(images.shape[2:]) >= 32:
        low = interpolate(images, scale_factor=.5, mode="bilinear", antialias=True)
        levels.append(images - interpolate(low, images.shape[2:], mode="bilinear"))
        images = low
    return levels + [images]


def random_patches(images, random):
    """128 patches of 7 x 7 pixels from every image: (n, C, H, W) to (n, 128, 7, 7, C)."""
    n, _, H, W = images.shape
    down = torch.randint(H - 6, (n, 128, 1, 1), generator=random) + torch.arange(7)[:, None]
    across = torch.randint(W - 6, (n, 128, 1, 1), generator=random) + torch.arange(7)
    return images[torch.arange(n).view(n, 1, 1, 1), :, down, across]


def distances(images, true):
    """Sliced Wasserstein distance times 1000 at every level of the pyramids of as many uint8
    images and true ones (n, H, W, C), finest first: between patches, along 512 directions.

    Karras et al. 2018 normalise the colours of each set by its own mean and deviation, which
    hides an error that all samples share. Here those of the true images normalise both."""
    result = []
    for level in zip(pyramid(to_float(images)), pyramid(to_float(true))):
        random = lego.generator("distances", len(result))
        directions = torch.randn(49 * level[0].shape[1], 512, generator=random)
        directions = directions / directions.norm(dim=0)
        pair = [random_patches(part, random) for part in level]
        deviation, mean = torch.std_mean(pair[1], (0, 1, 2, 3))          # (C,) each
        rows = [((some - mean) / deviation).flatten(0, 1).flatten(1) for some in pair]
        apart = []
        for few in directions.split(32, 1):     # All at once would take much memory.
            # numpy sorts eight times faster than torch, which also keeps the indices.
            a, b = (np.sort((some @ few).T.numpy()) for some in rows)
            apart.append(np.abs(a - b).mean())
        result.append(1000 * float(np.mean(apart)))
    return result


def seam_ratio(images, true, region, axis):
    """The mean difference of neighbours across region borders over that of all others, divided
    by the same for true images; axis 1 goes down and 2 across uint8 (n, H, W, C)."""
    ratios = []
    for batch in (images, true):
        steps = np.abs(np.diff(batch.astype(np.float32), axis=axis))
        steps = np.moveaxis(steps, axis, 0).mean((1, 2, 3))              # (side - 1,)
        border = np.arange(1, len(steps) + 1) % region == 0
        ratios.append(steps[border].mean() / steps[~border].mean())
    return ratios[0] / ratios[1]


CLASSIFIER = Path(__file__).with_name("classifier.pt")


def small_classifier():
    """A convolutional network from images (B, 3, H, W) in [-1, 1] to the ten classes of CIFAR-10.
    Its last layer sees 128 features."""
    layers, channels = [], 3
    for width, shrink in [(32, 2), (64, 1), (96, 2), (128, 1), (128, 2), (128, 1)]:
        conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(width), nn.GELU(), nn.MaxPool2d(shrink)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def train_classifier(a):
    """Train the classifier whose features FD-CIFAR compares, on the training images of CIFAR-10,
    and write it to assets/classifier.pt."""
    data, random = load_data(a.dataset, a.data_dir, 32), lego.generator("classifier")
    if data.classes != CIFAR10:
        raise ValueError(f"{a.dataset} has not the classes of CIFAR-10: take --dataset cifar10")
    images, labels = data.train[0], torch.from_numpy(data.train[1]).long()
    torch.manual_seed(0)
    network = small_classifier()
    steps = a.epochs * (len(images) // 128)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, steps, pct_start=0.2)
    for step in tqdm(range(steps)):
        chosen = torch.randint(len(images), (128,), generator=random)
        x = to_float(images[chosen.numpy()])
        flipped = torch.rand(128, 1, 1, 1, generator=random) < 0.5
        x = torch.where(flipped, x.flip(3), x)
        down, across = torch.randint(5, (2,), generator=random).tolist()
        x = pad(x, (2, 2, 2, 2), mode="reflect")[..., down:down + 32, across:across + 32]
        loss = cross_entropy(network(x), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    state = {name: value.half() for name, value in network.state_dict().items()}
    lego.write_aside(CLASSIFIER, lambda file: torch.save(state, file))
    images, labels = data.held_out
    print(f"{seen(images, labels)[1]:.1%} of {len(images)} held-out images are recognised")


@torch.no_grad()
def seen(images, labels):
    """The classifier's features (n, 128) of uint8 images, and the share whose class it tells."""
    network = small_classifier()
    network.load_state_dict(torch.load(CLASSIFIER, weights_only=True))
    network.eval()
    parts = np.array_split(images, math.ceil(len(images) / 500))
    features = torch.cat([network[:-1](to_float(part)) for part in parts])
    return features, float((network[-1](features).argmax(1).numpy() == labels).mean())


def frechet(a, b):
    """The Frechet distance of two sets of features (n, D), each taken as normally distributed."""
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()                                  # (D, D) each
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T              # of cov_a
    both = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    spread = cov_a.trace() + cov_b.trace() - 2 * both
    return float((a.mean(0) - b.mean(0)).square().sum() + spread)


def matching_data(a, model):
    """The data set of the flags; ValueError if the model was trained on another kind."""
    data = load_data(a.dataset, a.data_dir, model.config.size)
    known = model.config.channels, model.info.get("classes")
    if (data.channels, data.classes) != known:
        raise ValueError(f"{a.dataset} has not the checkpoint's channels and classes, {known}")
    return data


def two_sets(data, n, size):
    """Two sets of n images of a height and width, and their labels, with no image in both:
    held-out images and those of training, unless the data set is procedural."""
    if data.draw:
        return [data.draw(2 ** 32 + 1 + i, range(n), *size) for i in range(2)]
    if size != (data.size, data.size):
        raise ValueError(f"{data.name} has no images of another size: take --size {data.size}")
    if data.held_out[0] is data.train[0]:
        raise ValueError(f"{data.name} has no held-out images: put ten or more into a class")
    sets, n = [], min(n, len(data.held_out[0]), len(data.train[0]))
    for images, labels in (data.held_out, data.train):
        chosen = np.random.default_rng(0).permutation(len(images))[:n]
        sets.append((images[chosen], labels[chosen]))
    return sets


def judge(images, asked, true, labels, model, classes):
    """The figures of uint8 images that were asked to be of the classes `asked`, against those of
    as many true images: the distances at the finest and the coarsest level; the root mean square
    error of the mean colours of classes, in 255ths; the largest seam ratio; and for CIFAR-10
    FD-CIFAR and the share of the images whose class is recognised."""
    every, (height, width) = distances(images, true), images.shape[1:3]
    errors = [images[asked == k].mean((0, 1, 2)) - true[labels == k].mean((0, 1, 2))
              for k in set(asked) & set(labels)]
    seams = [seam_ratio(images, true, spec.region, axis) for spec in model.config.bricks
             for axis, side in ((1, height), (2, width)) if spec.region < side]
    figures = dict(fine=every[0], coarse=every[-1], seam=max(seams, default=1.0),
                   colour=float(np.sqrt(np.square(errors).mean())))
    if classes == CIFAR10:
        (ours, told), (goal, _) = seen(images, asked), seen(true, labels)
        figures |= dict(fd=frechet(ours, goal), recognised=told)
    return figures


def print_compare(a):
    """Compare ways to sample with true images, and with each other: the time and the GFLOPs of
    an image (batches of all cases take turns in random order), sliced Wasserstein distances x 1000
    (finest and coarsest level), seams, colours, and for CIFAR-10 FD-CIFAR. The first row is
    of other true images, since nothing can be told closer than that."""
    samplers = {}
    for case in a.cases or [""]:
        flags = sample_tiny.read_flags(shlex.split(case))
        if flags.label or flags.stages or flags.bench:
            raise ValueError("compare takes no --label, --stages or --bench")
        samplers[case] = sample_tiny.Sampler(flags)
    first = next(iter(samplers.values()))
    kinds = {(str(some.model.info.get("classes")), some.size) for some in samplers.values()}
    if len(kinds) > 1 or min(first.size) < 7:
        raise ValueError("compare needs cases of the same classes and --size, of 7 pixels or more")
    data = matching_data(a, first.model)
    (true, labels), (other, other_labels) = two_sets(data, a.n, first.size)
    n, parts, times = len(true), {case: [] for case in samplers}, {case: [] for case in samplers}
    for i, case in tqdm(list(in_turns(list(samplers), math.ceil(n / 32))), "batches"):
        numbers = range(32 * i, min(n, 32 * (i + 1)))
        work = lambda: parts[case].append(to_bytes(samplers[case].images(numbers)))
        times[case].append(1000 * timed(work, first.device) / len(numbers))
    floor = judge(other, other_labels, true, labels, first.model, data.classes)
    rows = [dict(gflops=0.0, ms=0.0) | floor | dict(n=n, case="other images")]
    for case, sampler in samplers.items():
        images, asked = np.concatenate(parts[case]), np.arange(n) % len(data.classes)
        figures = judge(images, asked, true, labels, sampler.model, data.classes)
        cost = dict(gflops=sampler.flops / n / 1e9, ms=float(np.median(times[case])))
        rows.append(cost | figures | dict(n=n, case=case or "no flags"))
    show(rows, a.log)


def show(rows, log=None):
    """Print dictionaries with the same names as a table, and add them to a CSV file, if any."""
    for line in (rows[0], *(written(row).values() for row in rows)):
        print("  ".join(f"{cell:>10}" for cell in line))
    add_to_log(log, rows)


def written(row):
    return {name: f"{x:.5g}" if isinstance(x, float) else str(x) for name, x in row.items()}


def add_to_log(path, rows):
    """Add dictionaries to a CSV file, if one is named: a line for each, after a head if it is new.
    ValueError if the file has other columns."""
    if path:
        with open(path, "a+", newline="") as file:
            file.seek(0)
            log, head = csv.DictWriter(file, list(rows[0])), next(csv.reader(file), None)
            if head is None:
                log.writeheader()
            elif head != log.fieldnames:
                raise ValueError(f"{path} is no log with the columns {', '.join(rows[0])} only")
            log.writerows(map(written, rows))


def read_log(path, *names):
    """The lines of a CSV file as dictionaries. ValueError unless all have these columns."""
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    if any(line.get(name) is None for line in lines or [{}] for name in names):
        raise ValueError(f"{path} is no log with the columns {', '.join(names)}")
    return lines


def groups(lines, *names):
    """The lines of a log by what they have under these names."""
    found = {}
    for line in lines:
        key = tuple(line[name] for name in names)
        found.setdefault(key, []).append(line)
    return found


# ---- Races between stacks ------------------------------------------------------------


def print_pace(a, rounds=20):
    """Time a training step of every case, in random turns, to find how many of them fill the same
    time. A race that counts steps can be repeated on a busy machine."""
    trainers, times = {}, {}
    for case in a.cases or [""]:
        settings, _ = train_tiny.read_flags([*shlex.split(case), "--steps", "1000"])
        trainers[case], times[case] = train_tiny.Trainer(settings), []
    for _, case in tqdm(list(in_turns(list(trainers), rounds + 4)), "steps"):    # four to warm up
        trainer = trainers[case]
        times[case].append(timed(lambda: trainer.advance(.5), trainer.device))
    rows = []
    for case, seconds in times.items():
        low, middle, high = np.quantile(1000 * np.array(seconds[4:]), [.1, .5, .9]).tolist()
        steps = round(60_000 * a.minutes / middle)
        rows.append(dict(ms=middle, low=low, high=high, steps=steps, case=case or "no flags"))
        trainers[case].source = None                                     # This ends the workers.
    print(f"the time of a step (10% to 90% of {rounds}), and steps in {a.minutes:g} minutes")
    show(rows)


LOSSES = ["last", "quarter1", "quarter2", "quarter3", "quarter4", "sigma5", "sigma10", "sigma20"]


def print_race(a):
    """Add the held-out losses of finished runs to a log, with the share of the budget spent. The
    folder of a run is named KIND-SEED. Print the losses at the end of every kind of run in the
    log: the mean over its seeds, and below it their standard deviation."""
    rows = []
    for run in map(Path, a.cases):
        info = lego.read_checkpoint(run / "checkpoint.pt")["info"]
        kind, _, seed = run.name.rpartition("-")
        if not kind or seed != str(info.get("settings", {}).get("seed")):
            raise ValueError(f"{run} is no run whose folder is named KIND-SEED, after its seed")
        head = dict(data=info["dataset"], kind=kind, seed=seed)
        for line in read_log(run / "held_out.csv", "step", *LOSSES):
            progress = dict(step=line["step"], share=int(line["step"]) / info["step"])
            rows.append(head | progress | {name: line[name] for name in LOSSES})
    if rows:
        add_to_log(a.log, rows)
    lines, rows = read_log(a.log, "data", "kind", "seed", *LOSSES), []
    for (data, kind), lines in groups(lines, "data", "kind").items():
        last = [some[-1] for some in groups(lines, "seed").values()]
        losses = np.array([[float(line[name]) for name in LOSSES] for line in last])
        spread = losses.std(0, ddof=1) if len(last) > 1 else losses[0] * math.nan
        for figures in (losses.mean(0), spread):
            row = dict(zip(LOSSES, figures.tolist()))
            rows.append(row | dict(seeds=len(last), step=last[0]["step"], data=data, kind=kind))
    show(rows)


# ---- The loss of subsets of bricks ---------------------------------------------------


def subset_losses(model, diffusion, data, autocast, count=512):
    """For each covering subset the bricks that it leaves out, the held-out loss of the last brick,
    also by quarter of noise level from low to high, its ratio to that of the full stack in the
    range of the removed brick where it is largest, and the GFLOPs of a default walk. A second
    list has the loss at 16 noise levels, and its ratio to that of the full stack."""
    size, evaluations, rows, levels = model.config.size, diffusion.evaluations(), [], []
    images, labels, sigma, noise = held_out_batch(data, count)
    order, works = sigma.argsort(), model.config.active(sigma.log() / 4)         # (n,), (K, n)
    for skip in tqdm(covering_subsets(model.config), "subsets", leave=False):
        losses = losses_at(model, diffusion, images, labels, sigma, noise, autocast, skip)
        loss = last_brick(losses)                                        # (n,)
        if not skip:                        # the first of them, with which the others are compared
            full = loss
        row = dict(skipped=",".join(map(str, skip)) or "nothing", loss=float(loss.mean()))
        for i, part in enumerate(order.tensor_split(4)):
            row[f"quarter{i + 1}"] = float(loss[part].mean())
        ranges = [here for here in works[list(skip)] if here.any()]
        ratio = lambda some: float(loss[some].sum() / full[some].sum())
        flops = [sum(model.flops(size, size, skip, level)) for _, level in evaluations]
        rows.append(row | dict(ratio=max(map(ratio, ranges), default=1.0), gflops=sum(flops) / 1e9))
        for part in order.tensor_split(min(16, len(order))):
            middle = float(sigma[part].log().mean().exp())
            levels.append(dict(skipped=row["skipped"], sigma=middle, loss=float(loss[part].mean()),
                               ratio=ratio(part)))
    return rows, levels


def print_subsets(a):
    """Print what `subset_losses` finds for one case. A new log gets its second list."""
    if len(a.cases) > 1 or a.log and Path(a.log).exists():
        raise ValueError("subsets takes a single case, and the name of a log that is not there yet")
    sampler = sample_tiny.Sampler(sample_tiny.read_flags(shlex.split(*a.cases or [""])))
    data = matching_data(a, sampler.model)
    rows, levels = subset_losses(sampler.model, sampler.diffusion, data, sampler.autocast, a.n)
    show(rows)
    add_to_log(a.log, levels)


# ---- Pictures ------------------------------------------------------------------------


def ticks(low, high, log):
    """Round numbers from low to high."""
    step = 10 ** math.floor(math.log10(high - low))
    step *= next(part for part in (1, .5, .2, .1) if (high - low) / step / part >= 4)
    even = np.arange(math.ceil(low / step), high / step + 1e-9) * step
    octaves = [m * 10.0 ** e for e in range(-6, 7) for m in (1, 2, 5)]
    return [value for value in (octaves if log else even) if low <= value <= high]


def plot(series, x, y, log_x=False, join=True):
    """A picture of {name: (xs, ys)}. x and y say what the axes show, and x may be logarithmic.
    Points are joined by lines or not. If they are not, and those of every name share an x, as
    seeds do, a letter marks their mean and a bar their range."""
    W, H, font = 1640, 840, ImageFont.load_default(26)                   # halved at the end
    left, right = 130, W - 110 - max(map(font.getlength, series))
    top, bottom = 60, 740
    image = Image.new("RGB", (W, H), "white")
    draw, (xs, ys) = ImageDraw.Draw(image), map(np.concatenate, zip(*series.values()))
    warp = np.log if log_x else np.asarray
    X = lambda v: left + 30 + (right - left - 60) * (warp(v) - warp(xs.min())) / np.ptp(warp(xs))
    Y = lambda v: bottom - 30 + (top - bottom + 60) * (v - ys.min()) / np.ptp(ys)
    draw.rectangle((left, top, right, bottom), outline="black", width=2)
    for value in ticks(xs.min(), xs.max(), log_x):
        draw.line((X(value), top, X(value), bottom), "#dddddd", 2)
        draw.text((X(value), bottom + 26), f"{value:.4g}", "black", font, "mm")
    for value in ticks(ys.min(), ys.max(), False):
        draw.line((left, Y(value), right, Y(value)), "#dddddd", 2)
        draw.text((left - 14, Y(value)), f"{value:.4g}", "black", font, "rm")
    draw.text(((left + right) / 2, H - 30), x, "black", font, "mm")
    draw.text((left, 28), y, "black", font, "lm")
    bars = not join and all(len(set(line[0])) == 1 for line in series.values())
    for i, (name, line) in enumerate(series.items()):
        colour = f"hsl({210 + 360 * i // len(series)}, 65%, 42%)"
        letter, radius = (chr(ord("a") + i), 16) if bars else ("", 8)
        across, up = X(np.array(line[0])), Y(np.array(line[1]))
        if bars:
            draw.line((across[0], up.min(), across[0], up.max()), colour, 6)
            across, up = across[:1], [up.mean()]
        points = list(zip(across, up))
        if join:
            draw.line(points, colour, 4, "curve")
        for place in [*points, (right + 30, top + 20 + 42 * i)]:
            draw.circle(place, radius, colour)
            draw.text(place, letter, "white", font, "mm")
        draw.text((right + 56, top + 20 + 42 * i), name, "black", font, "lm")
    return image.resize((W // 2, H // 2), Image.LANCZOS)


# Of every log the columns across and up, the names of these axes, the column of the colours,
# whether the axis across is logarithmic, and whether points are joined.
PLOTS = dict(
    levels=("sigma", "ratio", "sigma", "loss without these bricks, over that of the whole stack",
            "skipped", True, True),
    race=("share", "last", "part of the run that is done", "held-out loss", "kind", False, False),
    curve=("gflops", "fine", "GFLOPs for an image", "distance from true scenes, fine structure",
           "case", True, False))


def any_seed(case):
    """The name of a case of compare that runs/tiny-0, runs/tiny-1 and so on have in common."""
    return re.sub(r"--ckpt \S*?([^/]+)-\d+/checkpoint.pt", r"\1", case)


def save_plots(a):
    """Draw logs, each as its file name says, to pictures beside them. What costs nothing, as the
    true images of compare do, has no place on a logarithmic axis and is left out."""
    for path in map(Path, a.cases):
        x, y, across, up, by, log_x, join = PLOTS[path.stem]
        lines = read_log(path, x, y, by)
        lines = [line | {by: any_seed(line[by])} for line in lines if not log_x or float(line[x])]
        if any(len({line[axis] for line in lines}) < 2 for axis in (x, y)):
            raise ValueError(f"{path} has a single value of {x} or {y}: there is nothing to draw")
        series = {name: [[float(line[axis]) for line in some] for axis in (x, y)]
                  for (name,), some in groups(lines, by).items()}
        save_picture(plot(series, across, up, log_x, join), path.with_suffix(".png"))


def main(arguments=None):
    """Measure as the command line says, or as a list of `arguments` does."""
    runs = dict(compare=print_compare, subsets=print_subsets, pace=print_pace, race=print_race,
                plot=save_plots, classifier=train_classifier)
    p = Parser(description=__doc__.split("SPDX")[0], formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("command", choices=runs)
    p.add_argument("cases", nargs="*", metavar="CASE", help="for compare and subsets flags of "
                   "sample_tiny.py in quotes, for pace those of train_tiny.py, for race folders of "
                   "runs, for plot logs")
    flag(p, "--dataset", "landscapes", "as train_tiny.py names it")
    flag(p, "--data-dir", "data", "where data sets are looked for and downloaded to")
    flag(p, "--n", 512, "images that compare makes for a case, or held-out ones of subsets", type=int)
    flag(p, "--minutes", 12.0, "the time that pace fills with steps", type=float)
    flag(p, "--epochs", 10, "how often the classifier sees every image", type=int)
    flag(p, "--log", None, "the CSV file to which compare, subsets and race add their results")
    a = p.parse_intermixed_args(arguments)
    check_limits(p, a, dict(n=(16, 1 << 20), minutes=(1e-9, 1e6), epochs=(1, 10_000)))
    if a.command == "race" and not a.log:
        raise ValueError("race needs a log: name one with --log")
    if a.command == "plot" and not {Path(log).stem for log in a.cases or [""]} <= PLOTS.keys():
        raise ValueError(f"plot draws logs of the names {', '.join(PLOTS)} only")
    runs[a.command](a)


if __name__ == "__main__":
    command(main)
