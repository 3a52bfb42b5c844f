"""The one script behind the project's evidence, run from the repository's root:

python assets/measure.py distances   how far samples are from the images of a data set
python assets/measure.py subsets     what the loss becomes without some of the bricks
python assets/measure.py canvas      other ways to sample a canvas, to compare ours with
python assets/measure.py classifier  train the classifier whose features FD-CIFAR compares

Each has a --help. The first three take the flags of sample_tiny.py besides their own.

SPDX-License-Identifier: MIT
"""

import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate, pad
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lego
import sample_tiny
from sample_tiny import covering_subsets
from train_tiny import (CIFAR10, Parser, command, flag, held_out_batch, last_brick, load_data,
                        losses_at, to_float)

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
        # numpy sorts eight times faster than torch, which also keeps the indices.
        a, b = (np.sort((some @ directions).T.numpy()) for some in rows)
        result.append(1000 * float(np.abs(a - b).mean()))
    return result


def colours(images):
    """The mean, then the standard deviation, of every channel of uint8 (n, H, W, C): (2 C,)."""
    return np.concatenate([images.mean((0, 1, 2)), images.std((0, 1, 2))])


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


def train_classifier(a, rest):
    """Train the classifier whose features FD-CIFAR compares, on the training images of CIFAR-10,
    and write it to assets/classifier.pt."""
    if rest:
        raise ValueError(f"classifier does not know {rest[0]}")
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
    sets, n = [], min(n, len(data.held_out[0]), len(data.train[0]))
    for images, labels in (data.held_out, data.train):
        chosen = np.random.default_rng(0).permutation(len(images))[:n]
        sets.append((images[chosen], labels[chosen]))
    return sets


def print_distances(a, rest):
    """Compare samples with as many images of a data set, and in brackets other images with the
    same, since nothing can be told closer than that: the sliced Wasserstein distance at every
    scale, the colour of every class, and how visible the borders of regions are."""
    flags = sample_tiny.read_flags(rest)
    if flags.label or flags.stages or flags.bench:
        raise ValueError("distances takes no --label, --stages or --bench")
    sampler = sample_tiny.Sampler(flags)
    size, data = sampler.size, matching_data(a, sampler.model)
    if min(size) < 7:
        raise ValueError(f"--size {flags.size}: patches of 7x7 pixels are compared")
    (true, labels), (other, other_labels) = two_sets(data, flags.n, size)
    images = np.concatenate(list(sampler.batches(len(true))))
    asked = np.arange(len(images)) % len(data.classes)
    print(f"\n{len(true)} samples and images: distance x 1000 at every level of the pyramid")
    for level, pair in enumerate(zip(distances(images, true), distances(other, true))):
        print("{:>4} pixels high  {:>6.1f} ({:.1f})".format(size[0] >> level, *pair))
    if data.classes == CIFAR10:
        (ours, told), (floor, _), (goal, most) = (
            seen(*pair) for pair in ((images, asked), (other, other_labels), (true, labels)))
        print(f"FD-CIFAR  {frechet(ours, goal):.2f} ({frechet(floor, goal):.2f}); the class is "
              f"recognised in {told:.1%} ({most:.1%})")
    print("mean of each channel, then standard deviation, minus those of the images, in 255ths")
    for k, name in enumerate(data.classes):
        chosen = images[asked == k], other[other_labels == k], true[labels == k]
        if all(map(len, chosen)):
            ours, floor, goal = map(colours, chosen)
            errors = zip(ours - goal, floor - goal)
            cells = [f"{error:+.1f} ({least:+.1f})" for error, least in errors]
            print(f"{name:<12}" + "".join(f"{cell:>15}" for cell in cells))
    print("seam ratio at the borders of regions, which is 1 for the images")
    regions = sorted({spec.region for spec in sampler.model.config.bricks})
    for region, (axis, name) in itertools.product(regions, [(1, "rows"), (2, "columns")]):
        if region < size[axis - 1]:
            ours, floor = (seam_ratio(some, true, region, axis) for some in (images, other))
            print(f"every {region:>3} pixels across {name:<8} {ours:.2f} ({floor:.2f})")


# ---- The loss of subsets of bricks ---------------------------------------------------


def subset_losses(model, diffusion, data, autocast, count=512):
    """A dictionary for each covering subset: the bricks in `skip`, the held-out `loss` of the
    last brick, also by quarter of noise level from low to high, its `ratio` to that of the full
    stack in the range of the removed brick where it is largest, and `gflops` of a default walk."""
    size, evaluations, rows = model.config.size, diffusion.evaluations(), []
    images, labels, sigma, noise = held_out_batch(data, count)
    works = model.config.active(sigma.log() / 4)                         # (K, n)
    for skip in tqdm(covering_subsets(model.config), "subsets", leave=False):
        losses = losses_at(model, diffusion, images, labels, sigma, noise, autocast, skip)
        loss = last_brick(losses)                                        # (n,)
        if not skip:                        # the first of them, with which the others are compared
            full = loss
        quarters = [float(part.mean()) for part in loss[sigma.argsort()].chunk(4)]
        ranges = [here for here in works[list(skip)] if here.any()]
        ratios = [loss[here].sum() / full[here].sum() for here in ranges]
        flops = [sum(model.flops(size, size, skip, level)) for _, level in evaluations]
        rows.append(dict(skip=skip, loss=float(loss.mean()), quarters=quarters,
                         ratio=float(max(ratios, default=1)), gflops=sum(flops) / 1e9))
    return rows


def print_subsets(a, rest):
    """Print the held-out loss of every subset of bricks that covers all noise levels, also by
    quarter of noise level (1 is the lowest), its ratio to the full stack's loss where a removed
    brick would have worked (the largest of several), and the GFLOPs of a default sample."""
    if a.count < 4:
        raise ValueError("--count must be 4 or more, one for each quarter of noise level")
    sampler = sample_tiny.Sampler(sample_tiny.read_flags(rest))
    model, data = sampler.model, matching_data(a, sampler.model)
    rows = subset_losses(model, sampler.diffusion, data, sampler.autocast, a.count)
    print("\nskipped     loss  quarter 1       2       3       4   ratio   GFLOPs")
    for row in rows:
        name = ",".join(map(str, row["skip"])) or "nothing"
        quarters = "  ".join(f"{quarter:.4f}" for quarter in row["quarters"])
        print(f"{name:<8}  {row['loss']:.4f}     {quarters}  {row['ratio']:>6.3f}  "
              f"{row['gflops']:>7.2f}")


# ---- Other ways to sample a canvas ---------------------------------------------------


def stretched(grid, regions, before, length, device):
    """Grid.axis of the released code, whose config also changes GELU and time features."""
    pixel = torch.arange(regions * grid.spec.region, device=device)
    return 2 * (pixel - before) / max(length - 1, 1) - 1


def widened(model, size, one):
    """The network for a canvas (height, width), which it takes for one as wide as in training,
    so that the grid stays in place. With `one`, image-level regions are as large as it is."""
    config, bricks = model.config, []
    for spec in config.bricks:
        if one and spec.region >= config.size:
            spec = replace(spec, region=math.ceil(max(size) / spec.patch) * spec.patch)
        bricks.append(spec)
    wide = lego.Lego(replace(config, bricks=tuple(bricks), size=size[1]), model.block).eval()
    wide.load_state_dict(model.state_dict())
    wide.info = model.info
    return wide


def sample_canvas(a, rest):
    """Sample a canvas in another way than ours, and otherwise do what sample_tiny.py does."""
    if a.how == "ours":
        return sample_tiny.main(rest)
    flags = sample_tiny.read_flags(rest)
    model = lego.load_checkpoint(sample_tiny.find_checkpoint(flags.ckpt))
    size = sample_tiny.parse_size(flags.size, model.config.size)
    wide = widened(model, size, a.how == "one")
    with (patch.object(sample_tiny, "load_checkpoint", return_value=wide),
          patch.object(lego, "canvases", return_value=[size]),           # in one walk
          patch.object(lego.Grid, "axis", stretched)):
        sample_tiny.main(rest)


def main(arguments=None):
    """Measure as the command line says, or as a list of `arguments` does."""
    p = Parser(description="Measure what the project claims.")
    commands = p.add_subparsers(required=True, metavar="COMMAND")
    samples = "The flags of sample_tiny.py are known as well."
    runs = dict(distances=print_distances, subsets=print_subsets, canvas=sample_canvas,
                classifier=train_classifier)
    for name, run in runs.items():
        also = None if name == "classifier" else samples
        each = commands.add_parser(name, help=run.__doc__, description=run.__doc__, epilog=also)
        each.set_defaults(run=run)
        if name == "canvas":
            flag(each, "--how", "tiled", "tiled: in one walk, regions side by side and coordinates "
                 "stretched over the canvas, as in the released code; one: likewise, but with "
                 "image-level regions as large as the canvas", choices=["ours", "tiled", "one"])
        else:
            usual = "cifar10" if name == "classifier" else "landscapes"
            flag(each, "--dataset", usual, "as train_tiny.py names it")
            flag(each, "--data-dir", "data", "where data sets are looked for and downloaded to")
        if name == "subsets":
            flag(each, "--count", 512, "held-out images", type=int)
        if name == "classifier":
            flag(each, "--epochs", 10, "how often every training image is seen", type=int)
    a, rest = p.parse_known_args(arguments)
    a.run(a, rest)


if __name__ == "__main__":
    command(main)
