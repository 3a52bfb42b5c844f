"""Tests of values, not of shapes: `python -m pytest -q`. They need no file from elsewhere and
take four to seven minutes on 2 cores; `python -m pytest -q -m slow` runs the long ones.

SPDX-License-Identifier: MIT
"""

import gzip
import http.server
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("GOMP_SPINCOUNT", "10000")        # see train_tiny.py

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import gelu, layer_norm, silu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).parent
sys.path.append(str(HERE / "assets"))

import lego
import measure
import sample_tiny
import train_tiny
from lego import (DDPM, EDM, PRESETS, Block, BrickSpec, Diffusion, Grid, Lego, LegoConfig, canvases,
                  generator, load_checkpoint, load_official, position_table, read_checkpoint,
                  save_checkpoint, time_features)

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
SMALL = LegoConfig.parse("16/4x2 8/4x1 8/2x1 4/2x1", width=16, heads=2, classes=3)
# Its bricks work at the upper three quarters of the training levels, at all, and at the lower.
LOW, HIGH = EDM().sigma_at(torch.tensor([.25, .75])).tolist()
RANGED = LegoConfig.parse(f"16/4x1@{LOW}: 8/2x1 4/2x1@:{HIGH}", width=16, heads=2, classes=3)


def filled(config, seed=0, block=Block):
    """A network whose every parameter matters: zeros at the start would hide most mistakes."""
    model, g = Lego(config, block), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            scale = .2 if p.ndim == 1 else p.shape[1] ** -.5
            p.copy_(scale * torch.randn(p.shape, generator=g))
    return model.eval()


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, atol=1e-5, **settings):
    return torch.allclose(a, b, atol=atol, **settings)


def same(model, other):
    parameters = map(torch.equal, model.parameters(), other.parameters())
    return model.config == other.config and all(parameters)


def refuses(said, function, *inputs, **settings):
    with pytest.raises(ValueError, match=re.escape(said)):
        function(*inputs, **settings)


def visited(diffusion, steps=None):
    """The noise levels of all evaluations of a default walk."""
    return [sigma for _, sigma in diffusion.evaluations(steps)]


def walk_flops(model, skip=(), steps=None):
    """The FLOPs of an EDM walk for one image of the training size."""
    size, levels = model.config.size, visited(EDM(), steps)
    return sum(sum(model.flops(size, size, skip, sigma)) for sigma in levels)


# ---- The authors' network ------------------------------------------------------------

PARITY = [  # from the released code: size, means and deviations of F_k, D_k at six places
    (16, [-.2325003, .0217738, .1682498], [1.1442115, .7578898, .7614422],
     [[-.664322, .290041, .346278, .375216, -.647384, -.123215],
      [.246065, .334309, .710935, .62376, .533661, -.412894],
      [.340409, .860641, .71022, .194279, .336586, .490328]]),
    (32, [-.2261839, .0242824, .1659942], [1.1170849, .8440744, .7525996],
     [[-.597899, -1.301163, .668523, .417991, -.694439, -.100427],
      [.149863, -1.116437, .665853, .764227, .518659, -.374823],
      [.281332, -.465189, .857956, .230756, .732195, .45431]])]


def wave(height, step, shape, start=0):
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return (height * torch.sin(step * steps + start)).reshape(shape).float()


def official_weights(config):
    """The released network's parameters under its names, filled with sine waves."""
    D, shapes = config.width, {}

    def linear(name, *shape):
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    linear("t_embedder.mlp.0", D, 256)
    linear("t_embedder.mlp.2", D, D)
    linear("y_embedder.embedding_table", D, config.classes)
    for k, b in enumerate(config.bricks):
        linear(f"model.{k}.x_embedder.proj", D, 8 if k else 5, b.patch, b.patch)
        linear(f"model.{k}.final_layer.adaLN_modulation.1", 2 * D, D)
        linear(f"model.{k}.final_layer.linear", b.patch ** 2 * 3, D)
        for block in (f"model.{k}.blocks.{j}." for j in range(b.depth)):
            linear(block + "attn.qkv", 3 * D, D)
            linear(block + "attn.proj", D, D)
            linear(block + "mlp.fc1", 4 * D, D)
            linear(block + "mlp.fc2", D, 4 * D)
            linear(block + "adaLN_modulation.1", 6 * D, D)
    return {name: wave(.08, .37, shapes[name], k) for k, name in enumerate(sorted(shapes))}


@pytest.mark.parametrize("S, means, stds, samples", PARITY, ids=["PG", "PG-retiled"])
def test_parity_with_the_released_network(S, means, stds, samples):
    config = LegoConfig.official("4/2x1 8/4x1 16/2x2", width=32, heads=4)
    model, table = Lego(config), {"model.1.pos_embed": position_table(2, 32)[None]}
    load_official(model, official_weights(config) | table)
    assert sum(p.numel() for p in model.parameters()) == 99848
    x, sigma = wave(2, .11, (2, 3, S, S)), torch.tensor([.5, 5.])
    with torch.no_grad():
        D = EDM().denoise(model, x, sigma, torch.tensor([3, 7]), return_all=True)
    c_skip, c_out, _, _ = EDM().coefficients(sigma.view(-1, 1, 1, 1))
    F = torch.stack([(D_k - c_skip * x) / c_out for D_k in D]).flatten(1)
    assert F.mean(1).tolist() == pytest.approx(means, abs=2e-6)
    assert F.std(1).tolist() == pytest.approx(stds, abs=2e-6)
    places = ([0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2],
              [0, 3, S - 1, 0, S // 2, S - 1], [0, 5, 0, S - 1, S // 2, S - 1])
    for D_k, wanted in zip(D, samples, strict=True):
        assert D_k[places].tolist() == pytest.approx(wanted, abs=2e-6)


def test_the_authors_stacks_have_their_parameter_counts():
    millions = {"S-PG-64": 33.74, "S-PR-64": 33.74, "S-U-64": 61.22, "L-PG-64": 500.57,
                "L-PG-64-released": 462.79, "L-PG-32": 462.79, "XL-PG-32": 729.05,
                "XL-PG-64": 729.05, "XL-U-32": 1261.37}
    for name, count in millions.items():
        with torch.device("meta"):
            model = Lego(PRESETS[name])
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == count, name


# ---- Stacks, bricks, skipping --------------------------------------------------------


def test_stacks_are_read_and_written_and_work_from_their_lower_to_below_their_upper_border():
    config = LegoConfig.parse("32/4x6@0.3: 16/2x4@:0.4 8/2x1@0.00001:2 8/2x1", width=8, heads=2)
    assert config.bricks == (BrickSpec(32, 4, 6, (.3, None)), BrickSpec(16, 2, 4, (None, .4)),
                             BrickSpec(8, 2, 1, (1e-5, 2)), BrickSpec(8, 2, 1))
    assert str(config).startswith("32/4x6@0.3: 16/2x4@:0.4 8/2x1@") and config.size == 32
    assert LegoConfig.parse(str(config), width=8, heads=2) == config
    for sigma in (.01, .3, .41, 1., 7., 63.):
        config = LegoConfig.parse(f"8/4x1@{sigma}: 8/2x1@:{sigma}", width=8, heads=2)
        assert config.running(sigma) == [0] and config.running(sigma * .9999) == [1]


def test_mistakes_say_what_to_change():
    model, x, t = filled(SMALL), rand(1, 3, 16, 16), torch.zeros(1)
    narrow = filled(LegoConfig.parse("8/2x1 4/2x1@0.4:0.41", width=8, heads=2))
    refuses("classes must be", replace, SMALL, classes=-1)
    refuses("heads of width 1", replace, SMALL, heads=16)
    refuses("cannot skip [0, 1, 2, 3]", model, x, t, skip=range(4))
    refuses("cannot skip [-1]", model, x, t, skip=[-1])
    refuses("cannot skip [7]", model.flops, 16, 16, skip=[7])
    refuses("without bricks [1, 2] none", EDM().loss, filled(RANGED), x.repeat(4, 1, 1, 1),
            skip=[1, 2])
    refuses("no classes", narrow, x, t, torch.tensor([0]))
    refuses("needs labels", EDM().denoise, model, x, 1., guidance=2.)
    refuses("take a larger batch", EDM().loss, narrow, x)

    sample, ddpm = partial(EDM().sample, model, x.shape), DDPM()
    refuses("2 generators for 1", sample, generator=[generator(0), generator(1)])
    refuses("take one of heun, euler, ancestral, dpm2m", sample, sampler="magic")
    refuses("for EDM and the samplers", sample, sampler="ancestral", churn=5)
    refuses("one step or more", sample, steps=0)
    refuses("take churn=0", ddpm.sample, model, x.shape, sampler="euler", churn=5)
    refuses("DDPM has 1000", ddpm.sample, model, x.shape, steps=1001)
    refuses("none of the 1000 levels", ddpm.estimate, model, x, 1.)
    refuses("t must lie in 0..999", ddpm.denoise, model, x, 1000)

    released = LegoConfig.official("4/2x1 8/4x1", width=32, heads=4)
    weights, zero = official_weights(released), torch.zeros(1, 4, 32)
    load, others = partial(load_official, Lego(released)), list(weights)[1:]
    refuses("LegoConfig.official", load_official, Lego(SMALL), weights)
    refuses("Missing key", load, {name: weights[name] for name in others})
    refuses("Unexpected key", load, weights | {"model.7.pos_embed": zero})
    refuses("position table differs", load, weights | {"model.0.pos_embed": zero})


def test_a_new_network_is_zero_and_its_blocks_the_identity():
    model, h = Lego(SMALL), rand(2, 1, 16, 16)
    assert not model(rand(2, 3, 16, 16), torch.zeros(2)).any()
    assert torch.equal(model.bricks[0].blocks[0](h, rand(2, 16)), h)


def test_attention_is_deaf_to_the_length_of_queries_and_keys():
    block, h = filled(SMALL).bricks[0].blocks[0].double(), 9 * rand(2, 4, 16, 16).double()
    mixed, D = block.mix(h), SMALL.width
    with torch.no_grad():
        block.qkv.weight[:2 * D] *= 1e3     # as a long run of Muon would
        block.qkv.bias[:2 * D] *= 1e3
    assert torch.allclose(block.mix(h), mixed, rtol=1e-3) and mixed.std() > 0.01
    block.sharpness.data *= 2
    assert not torch.allclose(block.mix(h), mixed, rtol=1e-1)


def slow_norm(h, shift, scale):
    return layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift


def slow_block(block, h, c, config):
    """A block on the tokens (B, N, D) of one region, head by head."""
    shift1, scale1, gate1, shift2, scale2, gate2 = block.adaln(c).chunk(6, -1)
    qkv = block.qkv(slow_norm(h, shift1, scale1)).chunk(3, -1)
    heads = []
    for q, k, v in zip(*(each.chunk(config.heads, -1) for each in qkv)):
        if config.qk_norm:
            q, k = (e - e.mean(-1, keepdim=True) for e in (q, k))
            q, k = (e / (e.var(-1, False, keepdim=True) + 1e-5).sqrt() for e in (q, k))
            q = q * block.sharpness
        heads.append((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v)
    h = h + gate1 * block.proj(torch.cat(heads, -1))
    hidden = block.fc1(slow_norm(h, shift2, scale2))
    return h + gate2 * block.fc2(gelu(hidden, approximate="tanh" if config.released else "none"))


def slow_axis(brick, length, shift):
    """For every pixel along an axis of the grid of regions: which pixel of the canvas it
    shows, its coordinate, and whether it is real, not padding."""
    r, size = brick.spec.region, brick.config.size
    before = -shift % r
    regions = math.ceil((before + length) / r)
    pixel = torch.arange(regions * r) - before
    nearest, place, span = pixel.clamp(0, length - 1), pixel, length - 1
    if not brick.config.released:
        trained = [i * math.ceil(size / r) // regions * r for i in range(regions)]
        place = (torch.tensor(trained)[:, None] + torch.arange(r)).flatten()
        span = size - 1
    return nearest, 2 * place / max(span, 1) - 1, nearest == pixel


@torch.no_grad()
def slow_brick(brick, x, z, c, offset=(0, 0), regions=None):
    """A brick by plain loops over regions, tokens and heads."""
    (B, C, H, W), (r, p), c = x.shape, (brick.spec.region, brick.spec.patch), c[:, None]
    i, row, real_i = slow_axis(brick, H, offset[0])
    j, column, real_j = slow_axis(brick, W, offset[1])
    place = torch.stack(torch.meshgrid(row, column, indexing="ij")).expand(B, -1, -1, -1)
    x, new, real = x[:, :, i][..., j], z[:, :, i][..., j], real_i[:, None] & real_j
    pixels = torch.cat([new, x, place][brick.first:], 1)
    corners = itertools.product(range(0, len(i), r), range(0, len(j), r))
    for region, (top, left) in enumerate(corners):
        if regions is not None and region not in regions:
            continue
        places = itertools.product(range(top, top + r, p), range(left, left + r, p))
        patches = [np.s_[..., a:a + p, b:b + p] for a, b in places]
        seen = [n for n, patch in enumerate(patches) if real[patch].any()]
        tokens = [pixels[patches[n]].movedim(1, 3).flatten(1) for n in seen]
        h = brick.local(torch.stack(tokens, 1))
        h = (brick.local_mlp(gelu(h)) if brick.config.local_mlp else h) + brick.position[seen]
        for block in brick.blocks:
            h = slow_block(block, h, c, brick.config)
        h = brick.decode(slow_norm(h, *brick.adaln(c).chunk(2, -1)))
        for n, decoded in zip(seen, h.view(B, -1, p, p, C).movedim(4, 2).unbind(1)):
            new[patches[n]] = decoded + (new[patches[n]] if brick.config.residual else 0)
    out = torch.empty_like(z)
    out[:, :, i[real_i][:, None], j[real_j]] = new[:, :, real_i][..., real_j]
    return out


def random_config(number):
    """Up to three bricks, one of which works at every noise level."""
    stack = []
    for k in range(number(1, 3)):
        patch, low = number(1, 4), [None, .1, .5, 2.][number(0, 3) if k else 0]
        noise = (low, [None, 2.5, 9.][number(0, 2) if k else 0])
        stack.append(BrickSpec(patch * number(1, 6), patch, number(1, 2), noise))
    first = number(0, len(stack) - 1)
    local_mlp, residual, released, qk_norm = (bool(number(0, 1)) for _ in range(4))
    return LegoConfig(
        tuple(stack[first:] + stack[:first]), width=12, heads=number(1, 3), channels=number(1, 3),
        classes=number(0, 2), size=number(1, 12), mlp_ratio=number(1, 2), local_mlp=local_mlp,
        residual=residual, released=released, qk_norm=qk_norm)


@pytest.mark.parametrize("seed", [
    pytest.param(seed, marks=[pytest.mark.slow] * (seed >= 40)) for seed in range(200)])
def test_random_stacks_on_random_canvases_equal_slow_plain_bricks(seed, monkeypatch):
    random = np.random.default_rng(seed)

    def number(low, high):
        return int(random.integers(low, high + 1))

    config, B, H, W = random_config(number), number(1, 3), number(1, 16), number(1, 16)
    grid, regions = dict(offset=(number(0, 8), number(0, 8))), []
    for spec in config.bricks:
        cut = Grid(spec, config, H, W, **grid)
        some = torch.from_numpy(random.permutation(cut.rows * cut.columns)[:number(1, 9)])
        regions.append(some if number(0, 1) else None)
    narrow = [k for k, spec in enumerate(config.bricks) if spec.noise_range != ":"]
    skip = narrow[:number(0, len(narrow))]
    model, x = filled(config, seed).double(), rand(B, config.channels, H, W).double()
    sigma = torch.from_numpy(np.exp(random.uniform(-4, 4, B)))
    sigma[0] = random.choice([.1, .5, 2., 2.5, 9.])     # the borders of the noise ranges
    t, z, every = sigma.log() / 4, torch.zeros_like(x), []
    c = model.time(time_features(t if config.released else 4 * t).double())
    c = silu(c + model.label.bias if config.classes else c)
    for k, brick in enumerate(model.bricks):
        low, high = brick.spec.noise
        runs = ((low <= sigma) & (sigma < high)).view(-1, 1, 1, 1) & (k not in skip)
        if runs.any():
            z = torch.where(runs, slow_brick(brick, x, z, c, regions=regions[k], **grid), z)
            every.append(z)
    settings = dict(skip=skip, regions=regions, **grid)
    monkeypatch.setitem(lego.CHUNK, "cpu", 20)      # without gradients a few regions at a time
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            fast = model(x, t, return_all=True, **settings)
        assert all(map(close, fast, every)) and len(fast) == len(every)
    with FlopCounterMode(display=False) as counter:
        model(x, t, skip=skip, **grid)
    flops = [model.flops(H, W, skip, level, **grid) for level in sigma.tolist()]
    assert counter.get_total_flops() == sum(map(sum, flops))
    half = model.bfloat16()(x.float(), sigma.float().log() / 4, **settings)
    assert half.dtype == torch.float32 and (half - z).norm() < .1 * z.norm() + .1


@pytest.mark.parametrize("detach", [True, False])
def test_which_bricks_the_loss_of_one_trains(detach):
    model = filled(replace(SMALL, detach=detach))
    model(rand(2, 3, 16, 16), torch.zeros(2), return_all=True)[2].square().mean().backward()
    reached = [brick.local.weight.grad is not None for brick in model.bricks]
    assert reached == [not detach, not detach, True, False]
    assert model.bricks[2].local.weight.grad.any() and model.time[0].weight.grad.any()


# ---- Diffusion in training -----------------------------------------------------------


@pytest.mark.parametrize("diffusion", [EDM(), DDPM(), DDPM("linear")])
def test_quantile_is_the_inverse_of_sigma_at(diffusion):
    q = torch.arange(1, 20, dtype=torch.float64) / 20
    quantiles = [diffusion.quantile(sigma) for sigma in diffusion.sigma_at(q).tolist()]
    assert quantiles == pytest.approx(q.tolist(), abs=1e-7)
    assert diffusion.quantile(0) == 0 and diffusion.quantile(math.inf) == 1


@pytest.mark.parametrize("diffusion", [EDM(), DDPM()])
def test_a_batch_has_one_level_in_each_part_of_the_noise_whatever_the_image(diffusion):
    model, x0 = Lego(LegoConfig.parse("2/2x1", width=4, heads=1)), torch.zeros(8, 3, 2, 2)

    def places(**settings):
        _, _, sigma = diffusion.loss(model, x0, **settings)
        return [8 * float(diffusion.quantile(s)) for s in sigma.tolist()]

    q = torch.tensor([places(generator=generator(seed)) for seed in range(200)])
    assert torch.equal(q.floor().sort(1)[0], torch.arange(8.).expand(200, 8))
    assert (q.mean(0) - 4).abs().max() < 5 * q.std() / 200 ** .5            # for each image
    assert (q % 1).mean().item() == pytest.approx(.5, abs=.05)              # within its part
    assert (q % 1).std().item() == pytest.approx(12 ** -.5, abs=.03)
    assert list(map(int, places(shuffle=False))) == list(range(8))


@pytest.mark.parametrize("diffusion, seed", [(EDM(), 5), (DDPM(), 9)])      # near two edges
@pytest.mark.parametrize("device", DEVICES)
def test_loss_is_the_formula_for_the_regions_nearest_to_a_point(diffusion, seed, device):
    model, x0 = filled(SMALL).to(device), .5 * rand(4, 3, 16, 16).to(device)
    noise, y = rand(4, 3, 16, 16, seed=3).to(device), torch.arange(4, device=device)
    sigma, fractions = torch.tensor([.1, .5, 1., 4.], device=device), [1, .5, .25, .125]
    settings = dict(sigma=sigma, noise=noise, region_fraction=fractions)
    scalar, losses, used = diffusion.loss(model, x0, y, generator=generator(seed), **settings)
    point, regions = torch.rand(2, generator=generator(seed)) * 16, []
    for spec, fraction in zip(SMALL.bricks, fractions):
        middle = (torch.arange(16 // spec.region) + .5) * spec.region
        down, across = ((middle - p).abs() for p in point)
        down, across = torch.minimum(down, 16 - down), torch.minimum(across, 16 - across)
        far = torch.maximum(down[:, None], across).flatten()
        regions.append(far.argsort()[:round(fraction * len(far))].to(device))
    c_skip, c_out, c_in, c_noise = diffusion.coefficients(sigma.view(-1, 1, 1, 1))
    x = x0 + sigma.view(-1, 1, 1, 1) * noise
    every = model(c_in * x, c_noise.flatten(), y, regions=regions, return_all=True)
    for spec, chosen, F, loss in zip(SMALL.bricks, regions, every, losses.unbind(1)):
        error = Grid(spec, SMALL, 16, 16).cut((c_skip * x + c_out * F - x0) / c_out)
        assert close(loss, error[:, chosen].square().mean((1, 2, 3, 4)), rtol=1e-3)
    assert close(scalar, losses.mean()) and torch.equal(used, sigma)


def test_losses_are_those_of_the_bricks_that_ran_in_the_order_of_the_images():
    model, y, (x0, noise) = filled(RANGED), torch.arange(16) % 3, rand(2, 16, 3, 16, 16)
    loss = partial(EDM().loss, model, x0, labels=y, noise=noise)
    scalar, losses, sigma = loss(generator=generator(0))
    ran = torch.stack([sigma >= LOW, sigma > 0, sigma < HIGH], 1)
    assert torch.equal(~losses.isnan(), ran)
    assert close(scalar, losses.nansum() / (16 * 3))
    assert close(loss(sigma=sigma)[1], losses, equal_nan=True)
    scalar, _, _ = loss(generator=generator(0), supervise_all=False)
    last = torch.where(ran[:, 2], losses[:, 2], losses[:, 1])
    assert close(scalar, last.mean())
    assert torch.equal(loss(sigma=sigma, label_drop=1)[0], loss(sigma=sigma, labels=None)[0])
    scalar, losses, _ = loss(sigma=sigma, skip=[0, 2])
    assert losses[:, [0, 2]].isnan().all() and close(scalar, losses[:, 1].mean() / 3)
    model.bricks[2].decode.bias.data[0] = torch.nan             # a network that diverged
    assert loss(sigma=sigma)[0].isnan()


def test_a_training_step_costs_what_ranges_and_regions_say():
    model, images, shares = filled(RANGED), [5, 7, 5], [1, .5, .25]
    *each, shared = model.flops(16, 16)
    assert model.flops(16, 16, skip=[0, 2]) == [0, each[1], 0, shared]
    adaln = 2 * 16 ** 2 * (6 + 2)                       # once an image, whatever its regions
    costs = [n * (adaln + share * (F - adaln)) for n, share, F in zip(images, shares, each)]
    for seed in range(5):
        settings = dict(region_fraction=shares, generator=generator(seed))
        with FlopCounterMode(display=False) as counter:
            _, losses, _ = EDM().loss(model, rand(7, 3, 16, 16), **settings)
        assert counter.get_total_flops() == sum(costs) + 7 * shared
        assert losses.isfinite().sum(0).tolist() == images


def test_a_batch_whose_levels_are_rounded_away_from_all_bricks_is_refused():
    # Image 1 of 4 has a level between the quantiles .25 and .5, and the gap is at .37 to .38.
    gap = EDM().sigma_at(torch.tensor([.37, .38])).tolist()
    bricks = [BrickSpec(8, 4, 1, noise) for noise in [(0, None), (0, gap[0]), (gap[1], None)]]
    model = filled(replace(SMALL, bricks=bricks))
    loss = partial(EDM().loss, model, rand(4, 3, 16, 16), generator=generator(0))
    with pytest.raises(ValueError, match=r"without bricks \[0\] none is left for 1 of the 4"):
        loss(skip=[0])
    assert loss(skip=[1])[0].isfinite()                         # Brick 0 is there for all levels.


@pytest.mark.parametrize("labels", [[1], [0, 1, 2, 0], [[0, 1]]])
@pytest.mark.parametrize("ask", ["loss", "denoise", "sample", "guided"])
def test_labels_of_another_number_than_the_images_are_refused(labels, ask):
    model, x, labels = filled(SMALL), rand(2, 3, 16, 16), torch.tensor(labels)
    asked = dict(loss=lambda: EDM().loss(model, x, labels),
                 denoise=lambda: EDM().denoise(model, x, 1.0, labels),
                 sample=lambda: EDM().sample(model, x.shape, labels, steps=1),
                 guided=lambda: EDM().denoise(model, x, 1.0, labels, guidance=2))
    with pytest.raises(ValueError, match="images need labels of the shape"):
        asked[ask]()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_take_the_step_of_one_process(world):
    n = 2 * world
    border = EDM().sigma_at(torch.tensor(1 / n)).item()         # one image below: rank 0's
    config = replace(SMALL, bricks=(BrickSpec(8, 4, 1), BrickSpec(4, 2, 1, (None, border))))
    model, x0, y = filled(config).double(), rand(n, 3, 16, 16).double(), torch.arange(n) % 3

    def step(rank, world):
        loss, losses, sigma = EDM().loss(
            model, x0[rank::world], y[rank::world], shuffle=False, shard=(rank, world),
            region_fraction=[.5, .5], brick_drop=.3, label_drop=.3, generator=generator(1))
        gradients = torch.autograd.grad(loss, model.parameters(), materialize_grads=True)
        return torch.cat([g.flatten() for g in gradients]), losses, sigma

    gradient, losses, sigma = step(0, 1)
    gradients, parts, sigmas = zip(*(step(rank, world) for rank in range(world)))
    assert torch.equal(torch.stack(sigmas, 1).flatten(), sigma) and gradient.norm() > .1
    assert close(torch.stack(parts, 1).flatten(0, 1), losses, equal_nan=True)
    assert parts[0][0, 1].isfinite() and parts[1][:, 1].isnan().all()
    assert close(torch.stack(gradients).mean(0), gradient, 1e-8)


def test_a_dropped_brick_learns_but_is_hidden_from_the_later_ones():
    model, x0 = filled(SMALL), rand(16, 3, 16, 16)
    first = model.bricks[0].local.weight

    def step(**settings):
        loss, losses, _ = EDM().loss(model, x0, generator=generator(0), **settings)
        return losses, *torch.autograd.grad(loss, first, materialize_grads=True)

    (plain, learnt), (skipped, _) = step(), step(skip=[0])
    hidden, still_learnt = step(brick_drop=torch.tensor([1., 0, 0, 0]))
    assert close(hidden[:, 1:], skipped[:, 1:]) and close(hidden[:, 0], plain[:, 0])
    assert learnt.any() and close(still_learnt, learnt)
    half, _ = step(brick_drop=torch.tensor([.5, 0, 0, 0]))
    dropped = (half - hidden)[:, 1:].abs().amax(1, keepdim=True) < 1e-5
    assert close(half, torch.where(dropped, hidden, plain)) and 0 < dropped.sum() < 16


@pytest.mark.parametrize("diffusion", [EDM(), DDPM(), DDPM("linear")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_finite_at_the_ends_of_the_noise(diffusion, dtype):
    for sigma in diffusion.levels(2)[:2]:
        model, x0 = Lego(SMALL), rand(4, 3, 16, 16).clamp(-1, 1)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss, _, _ = diffusion.loss(model, x0, sigma=torch.full((4,), sigma))
            estimate = Diffusion.denoise(diffusion, model, x0 + sigma * rand(*x0.shape), sigma)
        loss.backward()
        assert torch.cat([p.grad.flatten() for p in model.parameters()]).norm() < 100
        assert loss.item() < 3 and estimate.isfinite().all()


# ---- Diffusion in sampling -----------------------------------------------------------


class Gaussian(torch.nn.Module):
    """A perfect denoiser of independent pixels of mean m and deviation s, for which what a
    sampler should arrive at has a closed form."""

    def __init__(self, diffusion, m=.3, s=.2, size=4):
        super().__init__()
        self.diffusion, self.m, self.s = diffusion, m, s
        self.config = LegoConfig.parse(f"{size}/1x1", width=4, heads=1)
        self.says_the_device, self.grids = torch.nn.Parameter(torch.zeros(1)), []

    def forward(self, x, c_noise, labels=None, offset=None, **_):
        self.grids.append(offset)
        sigma = (4 * c_noise.double()).exp().view(-1, 1, 1, 1)
        c_skip, c_out, c_in, _ = self.diffusion.coefficients(sigma)
        x, gain = x / c_in, self.s ** 2 / (self.s ** 2 + sigma ** 2)
        return [(self.m + gain * (x - self.m) - c_skip * x) / c_out]


@pytest.mark.parametrize("diffusion, sampler, order, steps", [
    (EDM(), "heun", 2, 20), (EDM(), "euler", 1, 40), (EDM(), "dpm2m", 2, 20),
    (DDPM("linear"), "euler", 1, 50), (DDPM(), "euler", 1, 100)])
def test_samplers_reach_the_exact_solution_at_their_order(diffusion, sampler, order, steps):
    model, errors = Gaussian(diffusion), []
    for steps in (steps, 2 * steps, 4 * steps):
        first, settings = diffusion.levels(steps)[0], dict(steps=steps, sampler=sampler)
        noise = first * lego.normal((64, 1, 4, 4), generator(0), "cpu").double()
        exact = model.m + (noise - model.m) * model.s / math.hypot(model.s, first)
        samples = diffusion.sample(model, noise.shape, generator=generator(0), **settings)
        errors.append((samples - exact).square().mean().sqrt().item())
    for coarse, fine in itertools.pairwise(errors):
        assert 2 ** (order - .35) < coarse / fine < 2 ** (order + .6), errors
    assert errors[-1] < .04 * model.s


@pytest.mark.parametrize("diffusion, sampler, steps, churn", [
    (DDPM(), "ancestral", 400, 0), (EDM(), "ancestral", 400, 0), (EDM(), "heun", 100, 40)])
def test_stochastic_samplers_reach_the_distribution(diffusion, sampler, steps, churn):
    model, settings = Gaussian(diffusion), dict(sampler=sampler, steps=steps, churn=churn)
    samples = diffusion.sample(model, (4000, 1, 4, 4), generator=generator(1), **settings)
    assert samples.mean().item() == pytest.approx(model.m, abs=5 * model.s / 64000 ** .5)
    assert samples.std().item() == pytest.approx(model.s, rel=.03)


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_edm_and_ddpm_have_the_published_noise(schedule):
    assert EDM().levels(3) == pytest.approx([80, 2.5152, .002, 0], rel=1e-4)
    deviations = EDM().sigma_at(torch.tensor([.15865525, .5, .84134475])).log()
    assert deviations.tolist() == pytest.approx([-2.4, -1.2, 0], abs=1e-4)
    ddpm, scale, variance = DDPM(schedule), 1., 0.
    f = np.cos((np.arange(1001) / 1000 + .008) / 1.008 * math.pi / 2) ** 2
    betas = np.linspace(1e-4, .02, 1000) if schedule == "linear" else 1 - f[1:] / f[:-1]
    for t, beta in enumerate(np.minimum(betas, .999)):          # q(x_t | x_{t-1}), t times
        scale, variance = scale * math.sqrt(1 - beta), variance * (1 - beta) + beta
        assert ddpm.abar[t].item() == pytest.approx(scale ** 2, rel=1e-9)
        assert ddpm.sigmas[t].item() == pytest.approx(math.sqrt(variance) / scale, rel=1e-6)
    model, x, t = filled(SMALL), rand(2, 3, 16, 16), torch.tensor([100, 700])
    a, eps = ddpm.abar[t].float().view(-1, 1, 1, 1), model(x, ddpm.sigmas[t].log() / 4)
    assert close(ddpm.denoise(model, x, t), (x - (1 - a).sqrt() * eps) / a.sqrt(), 1e-4, rtol=1e-4)


@torch.no_grad()
def test_guidance_is_none_plus_the_scaled_difference_to_the_label():
    model, x, y, edm = filled(SMALL), rand(2, 3, 16, 16), torch.tensor([0, 2]), EDM()
    label, none = edm.denoise(model, x, 1., y, skip=[1]), edm.denoise(model, x, 1., skip=[1])
    guided = edm.denoise(model, x, 1., y, skip=[1], guidance=3.)
    assert close(guided, none + 3 * (label - none)) and not close(label, none, .01)


def test_skip_schedule_guide_and_callback_follow_every_step():
    model, known, progress, seen, runs = filled(SMALL), rand(1, 3, 16, 16), [], [], []
    model.bricks[2].register_forward_hook(lambda *_: runs.append(2))
    run = partial(EDM().sample, model, known.shape, steps=4, sampler="heun")

    def schedule(now):
        progress.append(now)
        return [2, 3] if now < .5 else []

    run(skip=schedule)
    assert progress == [0, .25, .5, .75] and len(runs) == 3     # of 2 + 2 + 2 + 1
    run(skip=[2])
    assert len(runs) == 3
    run(skip=sample_tiny.parse_skip("2,3@0-0.5"))               # which ends below .5 as well
    assert len(runs) == 6
    run = partial(run, clip=True, callback=lambda *news: seen.append(news))
    guided = run(guide=lambda x0_hat, x, sigma: 2 * known)
    assert close(guided, seen[-1][2]) and torch.equal(seen[-1][2], (2 * known).clamp(-1, 1))
    assert [news[:2] for news in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("missing, skip", [
    (0, [0]), (1, [1]), (1, lambda progress: [1] if progress > .5 else [])])
def test_a_level_without_a_brick_is_refused_before_the_first_evaluation(missing, skip):
    model = filled(LegoConfig.parse("16/4x1@0.3: 8/2x1@:0.4", width=16, heads=2))
    model.register_forward_hook(lambda *_: pytest.fail("the network was evaluated"))
    first = max(level for level in EDM().levels(6) if level < .3 or not missing)
    said = rf"none is left from sigma .*{first:.3g}\b.*keep some of \[{missing}\]"
    with pytest.raises(ValueError, match=said):
        EDM().sample(model, (1, 3, 16, 16), steps=6, skip=skip)


@pytest.mark.parametrize("diffusion", [EDM, DDPM])
def test_a_sampler_and_the_denoise_of_ones_own_are_called(diffusion, monkeypatch):
    class Constant(diffusion):
        def denoise(self, model, x, level, *_, **__):
            asked.append(float(level if diffusion is EDM else self.sigmas[level]))
            return torch.full_like(x, .25)

    def euler(x, sigma, sigma_next, denoise, noise, state):
        states.append(dict(state))
        state["last"] = sigma
        return x + (sigma_next / sigma - 1) * (x - denoise(x, sigma))

    monkeypatch.setitem(lego.SAMPLERS, "mine", euler)
    asked, states, mine = [], [], Constant()
    samples = mine.sample(filled(SMALL), (1, 3, 32, 32), steps=5, sampler="mine")
    *levels, _ = mine.levels(5)
    refined = [sigma for sigma in levels if sigma <= lego.REFINE]       # in a walk of its own
    assert asked == levels + refined and close(samples, torch.full_like(samples, .25))
    states = states[-len(asked):]                                       # the first walk is a trial
    assert states == [{}, *(dict(last=sigma) for sigma in levels[:-1]),
                      {}, *(dict(last=sigma) for sigma in refined[:-1])]


@pytest.mark.parametrize("shape, stages", [
    ((8, 24), [(8, 24)]), ((16, 16), [(8, 8), (16, 16)]), ((13, 5), [(8, 3), (13, 5)]),
    ((4, 4), [(8, 8), (4, 4)]), ((24, 12), [(8, 4), (16, 8), (24, 12)])])
def test_a_canvas_grows_in_stages_and_has_the_same_distribution_everywhere(shape, stages):
    model = Gaussian(EDM(), size=8)
    samples = EDM().sample(model, (1500, 1, *shape), steps=24, generator=generator(2))
    assert canvases(8, *shape) == stages and samples.shape[2:] == shape
    down, across = map(set, zip(*model.grids))                  # The grid goes through its phases.
    assert len(down) == len(across) == (8 if shape[0] > 8 else 1)
    assert (samples.mean(0) - model.m).abs().max() < 5 * model.s / math.sqrt(1500)
    if shape[0] > 4:                    # where pixels of an enlarged canvas overlap
        tolerance = {8: .12, 16: .25}.get(shape[0], .3)
        assert (samples.std(0) / model.s - 1).abs().max() < tolerance


def test_a_panorama_turns_under_its_regions_and_back():
    class Marked(EDM):
        def denoise(self, model, x, sigma, labels=None, **settings):
            return torch.zeros_like(x).index_fill(3, torch.tensor(0), 1)

    seen = []

    def guide(x0_hat, x, sigma):
        seen.append(x0_hat[0, 0, 0].argmax().item())
        return x0_hat

    Marked().sample(Gaussian(EDM(), size=8), (1, 1, 8, 24), guide=guide, sampler="euler")
    steps = [(b - a) % 24 for a, b in itertools.pairwise(seen)]
    assert steps == seen[:1] * 17 and {column % 8 for column in seen} == set(range(8))
    places = torch.arange(16.).expand(1, 1, 8, -1)              # of two training widths
    middle = EDM().sample(Gaussian(EDM(), size=8), (1, 1, 8, 12), guide=lambda *_: places)
    assert close(middle, places[..., 2:14])


# ---- Checkpoints ---------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, RANGED])
def test_checkpoints_round_trip_and_are_whole_at_any_moment(config, tmp_path, monkeypatch):
    model, path = filled(config), tmp_path / "c.pt"
    model.info = dict(objective="edm", classes=["a", "b", "c"])
    save_checkpoint(path, model)
    again, whole = load_checkpoint(path), path.read_bytes()
    assert same(again, model) and again.info == model.info and not again.training
    last = torch.load(path, weights_only=True)["config"]["bricks"][-1]
    assert last["noise"] == [None, HIGH if config == RANGED else None]

    def interrupted(file):
        file.write(b"half")
        file.flush()
        assert path.read_bytes() == whole
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lego.write_aside(path, interrupted)
    done = []
    monkeypatch.setattr(os, "fsync", lambda _: done.append("flushed"))
    monkeypatch.setattr(os, "replace", lambda *_: done.append("renamed"))
    save_checkpoint(path, Lego(config))
    assert done == ["flushed", "renamed"]
    assert path.read_bytes() == whole and os.listdir(tmp_path) == ["c.pt"]


def test_nothing_but_a_checkpoint_is_opened(tmp_path):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "owned",)

    def good(config={}, weights={}, **parts):
        parts["config"] = whole["config"] | config
        parts["weights"] = whole["weights"] | weights
        return whole | parts

    save_checkpoint(path := tmp_path / "c.pt", filled(SMALL))
    whole, data = torch.load(path, weights_only=True), path.read_bytes()
    huge, wide = dict(width=1 << 14), torch.zeros(1).expand(1 << 30)
    for name, content in dict(
            number=3, empty=good(dict(bricks=[])), hostile=good(info=Hostile()),
            objective=good(info=dict(objective="x")), none=whole | dict(weights=None),
            nan=good(weights={"label.bias": torch.full((16,), torch.nan)}),
            missing=good(weights={"label.bias": torch.zeros(3)}), huge=good(huge),
            other=good(dict(classes=2)), old=whole | dict(format=None),
            expanded=good(huge, dict.fromkeys(whole["weights"], wide))).items():
        torch.save(content, tmp_path / f"{name}.pt")
    (tmp_path / "short.pt").write_bytes(data[:len(data) // 2])
    (tmp_path / "text.pt").write_text("step,loss\n1,2\n")
    with zipfile.ZipFile(path) as archive:
        zip_of(tmp_path / "deflated.pt", {name: archive.read(name) for name in archive.namelist()})
    bad = set(os.listdir(tmp_path)) - {"c.pt"}
    assert len(bad) == 14
    for name in bad:
        with pytest.raises(ValueError, match="not a LEGO checkpoint|do not fit"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "owned").exists()
    refuses("its format is", load_checkpoint, tmp_path / "old.pt")


def test_a_checkpoint_of_before_qk_norm_is_read_as_one_without(tmp_path):
    save_checkpoint(path := tmp_path / "c.pt", model := filled(replace(SMALL, qk_norm=False)))
    state = torch.load(path, weights_only=True)
    del state["config"]["qk_norm"]
    torch.save(state | dict(format=2), path)
    assert same(load_checkpoint(path), model)


def test_a_flipped_bit_is_noticed(tmp_path):
    save_checkpoint(path := tmp_path / "c.pt", model := filled(SMALL))
    whole, noticed = path.read_bytes(), 0
    for place in np.random.default_rng(0).integers(0, 8 * len(whole), 150):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:                                    # a bit of the padding between members, perhaps
            assert same(load_checkpoint(path), model)
        except ValueError:
            noticed += 1
    assert noticed > 100


# ---- Data sets -----------------------------------------------------------------------


def numbered(seed, indices, H, W):
    """Gray images of the value of their number, but for the first column, and their labels."""
    indices = np.asarray(indices)
    images = indices.astype(np.uint8)[:, None, None, None] * np.ones((H, W, 1), np.uint8)
    images[:, :, 0] += 100
    return images, indices % 2


def test_landscapes_are_the_same_scenes_in_any_batch_size_and_width():
    images, labels = train_tiny.landscapes(7, range(6), 32, 32)
    assert labels.tolist() == [0, 1, 2, 3, 0, 1]
    assert np.array_equal(train_tiny.landscapes(7, [4, 1], 32, 32)[0], images[[4, 1]])
    assert not np.array_equal(train_tiny.landscapes(8, range(6), 32, 32)[0], images)
    wide = train_tiny.landscapes(7, range(6), 32, 96)[0]
    assert np.array_equal(wide[:, :, :32], images)
    fine = train_tiny.landscapes(7, range(6), 128, 128)[0]
    assert np.abs(fine.reshape(6, 32, 4, 32, 4, 3).mean((2, 4)) - images).mean() < 3
    sky, ground = images[:, :4].mean((1, 2, 3)), images[:, -4:].mean((1, 2, 3))
    assert sky[0] > sky[2] and (sky > ground).sum() >= 5    # Day is lighter than night.


def test_batches_are_shuffled_epochs():
    pair = numbered(0, range(10), 4, 4)
    data = train_tiny.Data("d", ["even", "odd"], 1, True, 4, pair, pair)
    images, labels = map(torch.cat, zip(*(data.batch(3, step, 5) for step in range(4))))
    seen = train_tiny.to_bytes(images)[:, 0, 1, 0].tolist()
    assert [number % 2 for number in seen] == labels.tolist()
    first, second = seen[:10], seen[10:]
    assert sorted(first) == sorted(second) == list(range(10)) and set(first[:5]) != set(second[:5])
    assert torch.equal(data.held(3)[0], data.held(4)[0][:3]) and len(data.held(99)[0]) == 10


def test_ranks_share_a_batch_of_a_data_set_of_ones_own_in_which_no_class_has_a_place(monkeypatch):
    def make(folder, size):
        return train_tiny.Data("mine", ["even", "odd"], 1, False, size, draw=numbered)

    monkeypatch.setitem(train_tiny.DATASETS, "mine", make)
    data = train_tiny.load_data("mine", "", 4)
    batch, *parts = (data.batch(0, 1, 200, *shard, flip=True) for shard in ((0, 1), (0, 2), (1, 2)))
    for whole, even, odd in zip(batch, *parts):
        assert torch.equal(whole[0::2], even) and torch.equal(whole[1::2], odd)
    held, kinds = data.held(6)
    assert held.shape == (6, 1, 4, 4) and sorted(kinds.tolist()) == [0, 0, 0, 1, 1, 1]
    assert all(map(torch.equal, batch, data.batch(0, 1, 200, flip=True)))       # as before
    flipped, (images, _) = batch[0], data.batch(0, 1, 200)
    mirrored = (images != flipped).flatten(1).any(1)
    assert torch.equal(flipped[mirrored], images[mirrored].flip(3))
    assert .4 < mirrored.float().mean() < .6
    labels = torch.stack([data.batch(0, step, 64)[1] for step in range(60)]).float()
    assert (labels.sum(1) == 32).all() and (labels.mean(0) - .5).abs().max() < .3
    assert abs(np.corrcoef(labels.flatten(), np.tile(np.arange(64), 60))[0, 1]) < .05


def tar_of(members):
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def test_cifar10_records_are_read(tmp_path):
    records = np.random.default_rng(0).integers(0, 256, (6, 4, 3073), dtype=np.uint8)
    records[:, :, 0] %= 10
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    members = dict(zip(names, map(bytes, records)))
    path = tmp_path / "cifar.tar.gz"
    path.write_bytes(tar_of(members))
    (images, labels), (test_images, test_labels) = train_tiny.read_cifar10(path)
    assert labels.tolist() == records[:5, :, 0].flatten().tolist()
    assert test_labels.tolist() == records[5, :, 0].tolist()
    assert test_images.shape[1:] == images.shape[1:] == (32, 32, 3)
    assert images[9, 5, 7].tolist() == records[2, 1, 1 + 32 * 5 + 7::1024].tolist()


@pytest.mark.parametrize("shape", [(5, 28, 27), (5,)])
def test_idx_files_are_read(tmp_path, shape):
    path = tmp_path / "x.gz"
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    head = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
    path.write_bytes(gzip.compress(head + bytes(array)))
    assert np.array_equal(train_tiny.read_idx(path), array)


def picture_file(mode, size=(40, 30), colour=None, form="PNG"):
    Image.new(mode, size, colour).save(file := io.BytesIO(), form)
    return file.getvalue()


def zip_of(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_folders_and_zips_of_images_of_any_size_and_mode(tmp_path):
    cats = {"set/cats/rgb.png": picture_file("RGB", (64, 48), (200, 100, 0)),
            "set/cats/rgba.png": picture_file("RGBA", (9, 17), (0, 0, 0, 0)),
            "set/cats/palette.gif": picture_file("P", form="GIF")}
    dogs = {f"set/dogs/{i}.png": picture_file("L", colour=10 * i) for i in range(8)}
    dogs |= {"set/dogs/sixteen.png": picture_file("I;16", colour=90 * 257),
             "set/dogs/one.png": picture_file("1", colour=1),
             "set/dogs/gray.jpg": picture_file("L", colour=80, form="JPEG"),
             "set/dogs/deep.tif": picture_file("I", colour=9, form="TIFF"),
             "set/dogs/float.tif": picture_file("F", colour=.5, form="TIFF"),
             "set/dogs/broken.png": b"not an image", "set/dogs/notes.txt": b"hello",
             "set/dogs/.hidden.png": picture_file("RGB"), "set/.cache/x.png": picture_file("RGB"),
             "set/dogs/program.png": picture_file("RGB", form="EPS"),
             "set/dogs/unlisted.png": picture_file("RGB", form="PPM")}
    zipfile.ZipFile(zip_of(tmp_path / "set.zip", cats | dogs)).extractall(tmp_path)
    zip_of(tmp_path / "dogs.zip", dogs)
    folder, zipped, gray = (train_tiny.load_data(str(tmp_path / name), "", 16)
                            for name in ("set", "set.zip", "dogs.zip"))
    for a, b in zip(folder.train + folder.held_out, zipped.train + zipped.held_out):
        assert np.array_equal(a, b)
    assert folder.classes == ["cats", "dogs"] and folder.channels == 3
    images, labels = folder.train
    assert labels.tolist() == [0] * 3 + [1] * 10 and folder.held_out[1].tolist() == [1]
    assert images[1][0, 0].tolist() == [200, 100, 0]
    assert (images[2] == 255).all()                         # What is transparent becomes white.
    assert gray.channels == 1 and gray.classes == ["dogs"]
    values, (held,) = gray.train[0][:, 0, 0, 0], gray.held_out[0][:, 0, 0, 0]
    assert sorted(values) == [*range(0, 90, 10), 255] and held == 90


def test_images_are_turned_upright_and_cropped_around_the_centre():
    image, exif = Image.new("L", (20, 40)), Image.Exif()
    image.paste(255, (0, 0, 20, 20))
    exif[0x0112] = 3                                        # It was taken upside down.
    image.save(file := io.BytesIO(), "PNG", exif=exif)
    upright = train_tiny.read_image(file, 20)
    assert upright[[0, 5, 14, 19], 0, 0].tolist() == [0, 0, 255, 255]
    images = np.zeros((2, 28, 56, 1), np.uint8)
    images[:, :, 14:42] = 200
    fitted = train_tiny.resized(images, 32)
    assert fitted.shape == (2, 32, 32, 1) and (fitted[:, :, 4:-4] == 200).all()


def change_directory(path, place, new):
    """Overwrite bytes of the first entry in the directory of a zip."""
    data = bytearray(path.read_bytes())
    place += data.index(b"PK\x01\x02")
    data[place:place + len(new)] = new
    path.write_bytes(data)


def test_hostile_archives_are_refused_and_write_nothing(tmp_path, capsys):
    good = {f"a/{i}.png": picture_file("L", colour=i) for i in range(3)}
    link = zipfile.ZipInfo("a/link.png")
    link.external_attr = 0o120777 << 16
    bomb = bytearray(picture_file("L"))
    bomb[16:24] = struct.pack(">II", 60000, 60000)          # It claims 3.6 gigapixels.
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    unreadable = {"a/x.png": b"no image", "b/y.png": bytes(bomb)}
    archives = dict(
        up={"../up.png": good["a/0.png"]} | good, absolute={"/absolute.png": good["a/0.png"]},
        link={link: "/etc/passwd"} | good, bomb={"a/x.png": bytes(300 << 20)}, claims=good,
        noise=unreadable | {"a/z.png": good["a/0.png"][:40]}, mixed=unreadable | good)
    paths = {name: zip_of(tmp_path / f"{name}.zip", archives[name]) for name in archives}
    change_directory(paths["claims"], 24, b"\xf0\xff\xff\xff")      # It claims 4 GB.
    change_directory(paths["mixed"], 10, b"\x09\x00")       # It is packed in an unknown way.
    before = sorted(os.listdir(tmp_path))
    for name, said in dict(up="points out", absolute="points out", link="points out",
                           bomb="hundred times", claims="hundred times",
                           noise="0 readable images").items():
        with pytest.raises(ValueError, match=f"{name}.zip.*{said}"):
            train_tiny.load_data(str(paths[name]), "", 16)
    assert len(train_tiny.load_data(str(paths["mixed"]), "", 16).train[0]) == 3
    assert "3 images in 1 classes, 2 unreadable files" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == before


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `data` on loopback, with ranges but under /whole. Under /broken it stops early."""
    data, ranges = np.random.default_rng(0).bytes(200_000), []

    def do_GET(self):
        start, status = int(self.headers["Range"][6:-1]), 206
        self.ranges.append(start)
        if "whole" in self.path:
            start, status = 0, 200
        if start >= len(self.data):
            status = 416
        self.send_response(status)
        self.send_header("Content-Length", str(len(self.data) - start))
        self.end_headers()
        end = start + 1000 if "broken" in self.path else None
        self.wfile.write(self.data[start:end])

    def log_message(self, *args):
        pass


def test_downloads_resume_are_checked_and_say_where_to_put_the_file(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    path, part = tmp_path / "f.bin", tmp_path / "f.bin.part"
    right, wrong = sha256(Server.data).hexdigest(), sha256(b"another file").hexdigest()

    def fetch(*places, digest=right, **settings):
        urls = [f"http://127.0.0.1:{server.server_port}/{place}/" for place in places]
        assert train_tiny.fetch("f.bin", digest, urls, tmp_path, **settings) == path

    fetch("broken", "good")
    assert Server.ranges == [0, 1000]
    fetch()
    path.write_bytes(b"x")
    refuses("damaged", fetch)
    stopped, short, long = Server.data, Server.data[:5], Server.data[::-1] + b"x"
    for content, places in ((stopped, ["good"]), (long, ["good", "good"]), (short, ["whole"])):
        path.unlink()
        part.write_bytes(content)
        fetch(*places)
        assert path.read_bytes() == Server.data and not part.exists()
    for level in (1, 9):                        # Packed files are checked by what they hold.
        path.write_bytes(gzip.compress(Server.data, level))
        fetch(opener=gzip.open)
    path.write_bytes(b"no gzip")
    refuses("damaged", fetch, opener=gzip.open)
    path.unlink()
    for place, digest in (("good", wrong), ("broken", right)):
        refuses(f"put it at {path}", fetch, place, digest=digest)
    server.server_close()
    refuses(f"put it at {path}", fetch, "good")
    assert not path.exists()


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path):
    mine = train_tiny.lock(tmp_path / "run")
    refuses("another process is at work in", train_tiny.lock, tmp_path / "run")
    assert in_process(train_tiny, TINY, "--steps 1 --out", tmp_path / "run") == 2
    assert os.listdir(tmp_path / "run") == [".lock"]
    mine.close()
    train_tiny.lock(tmp_path / "run").close()


def test_a_run_that_another_process_went_on_with_is_not_set_back(tmp_path):
    run = tmp_path / "run"
    assert in_process(train_tiny, TINY, "--steps 1 --out", run) == 0
    late = train_tiny.Trainer(*train_tiny.read_flags(words("--resume", run, "--steps 2")))
    assert in_process(train_tiny, "--resume", run, "--steps 3") == 0
    before = (run / "checkpoint.pt").read_bytes()
    refuses("another process has written to", late.fit, run)
    late.source = late.lock = None                  # This ends its worker.
    assert (run / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_have_white_lines_between_images(channels):
    images = np.full((3, 4, 5, channels), 7, np.uint8)
    expected = np.full((9, 11, channels), 255, np.uint8)
    expected[:4, :5] = expected[:4, 6:] = expected[5:, :5] = 7
    sheet = np.asarray(train_tiny.picture(images, 2, enlarge=False)).reshape(expected.shape)
    assert np.array_equal(sheet, expected)
    assert train_tiny.picture(images, 2).size == (24 * 11, 24 * 9)
    assert np.array_equal(train_tiny.to_bytes(train_tiny.to_float(expected[None]))[0], expected)


# ---- Command lines -------------------------------------------------------------------

TINY = ("--bricks '16/4x1 8/4x1@0.2: 8/2x1@:0.5' --width 16 --heads 2 --size 16 --batch 8 "
        "--device cpu")


def words(*flags):
    """A command line: strings are split as a shell would, anything else is one word."""
    split = [shlex.split(flag) if isinstance(flag, str) else [str(flag)] for flag in flags]
    return list(itertools.chain.from_iterable(split))


def in_process(module, *flags, **settings):
    """Run a command line in this process; returns its exit code."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as stop:
        train_tiny.command(partial(module.main, words(*flags), **settings))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return stop.value.code


def start(*command, **settings):
    """Start a command line in a process of its own."""
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    signal.signal(signal.SIGINT, signal.default_int_handler)    # which a shell's & would ignore
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([sys.executable, *words(*command)], cwd=HERE, env=environment, **pipes,
                            **settings)


def finish(process, code=0, timeout=600):
    """What a process printed, once it has left with the given exit code."""
    said = process.communicate(timeout=timeout)[0]
    assert process.returncode == code, said
    return said


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    assert in_process(train_tiny, TINY, "--steps 60 --lr 8e-3 --out", run) == 0
    return run / "checkpoint.pt"


def test_training_learns_and_leaves_checkpoint_logs_and_picture(trained):
    files = [".lock", "checkpoint.pt", "held_out.csv", "log.csv", "samples-0000060.png"]
    assert sorted(os.listdir(trained.parent)) == files
    log, held = (np.genfromtxt(trained.parent / name, delimiter=",", names=True)
                 for name in ("log.csv", "held_out.csv"))
    assert log.dtype.names[3:] == ("loss", "brick0", "brick1", "brick2", "low", "middle", "high")
    assert log["step"].tolist() == [20, 40, 60] and log["images"].tolist() == [160, 320, 480]
    assert 1.3 > log["loss"][0] > log["loss"][2] > .2
    quarters = [held[f"quarter{i}"] for i in (1, 2, 3, 4)]
    assert np.mean(quarters) == pytest.approx(held["last"], abs=2e-5)
    model, data = load_checkpoint(trained), train_tiny.load_data("landscapes", "", 16)
    columns, fresh = (train_tiny.held_out_losses(some, EDM(), data, nullcontext)
                      for some in (model, Lego(model.config)))
    assert columns["last"] == pytest.approx(held["last"], abs=2e-3)     # The run may be in bf16.
    assert model.config.classes == 4 and model.info["classes"] == train_tiny.LANDSCAPES
    assert columns["last"] < .8 * fresh["last"] and columns["sigma5"] < fresh["sigma5"]
    state = read_checkpoint(trained)
    average, weights = state["weights"], state["train"]["weights"]
    assert 0 < max((average[name] - weights[name]).abs().max() for name in average) < .2
    assert state["train"]["optimizers"][0]["param_groups"][0]["lr"] < 8e-3 * .05
    again = train_tiny.Trainer(*train_tiny.read_flags(words("--resume", trained.parent)))
    again.source = None                             # This ends its worker.
    assert same(again.average, model) and again.model.info == model.info


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(tmp_path, kills):
    random, run = np.random.default_rng(kills), tmp_path / "broken"
    flags = f"{TINY} --steps {150 * kills} --precision fp32 --out"
    whole = start("train_tiny.py", flags, tmp_path / "whole")

    def again():
        if (run / "checkpoint.pt").exists():
            return start("train_tiny.py --resume", run)
        return start("train_tiny.py", flags, run, "--save-minutes .005")

    def lines():
        return (run / "log.csv").exists() and len((run / "log.csv").read_text().splitlines())

    for kill in range(kills):
        process = again()
        time.sleep(random.uniform(1.5, 5))          # it may be importing, training or saving
        process.send_signal([signal.SIGKILL, signal.SIGTERM, signal.SIGINT][kill % 3])
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:           # a Ctrl-C was lost while Python imported
            process.kill()
            process.communicate()
    process, before, deadline = again(), lines(), time.time() + 300
    while lines() <= before and process.poll() is None and time.time() < deadline:
        time.sleep(.02)
    process.send_signal(signal.SIGINT)
    assert f"go on with: python train_tiny.py --resume {run}" in finish(process)
    finish(start("train_tiny.py --resume", run, "--save-minutes 100"))
    finish(whole)

    a, b = (read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "broken"))
    for one, other in ((a, b), (a["train"], b["train"])):
        assert all(torch.equal(w, other["weights"][name]) for name, w in one["weights"].items())
    assert a["info"]["useful"] == b["info"]["useful"]
    logs = [(tmp_path / name / "log.csv").read_text() for name in ("whole", "broken")]
    one, other = (re.sub(r",\d+\.\d,", ",", log) for log in logs)          # but for the seconds
    assert one == other
    held = np.genfromtxt(run / "held_out.csv", delimiter=",", names=True)["step"].tolist()
    assert held == sorted(set(held)) and held[-1] == 150 * kills
    assert [path.name for path in run.glob(".*")] == [".lock"]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    import resource                                 # which Windows lacks
    run = tmp_path / "run"
    assert in_process(train_tiny, TINY, "--steps 5 --out", run) == 0
    before = (run / "checkpoint.pt").read_bytes()
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (50_000, 50_000))
    said = finish(start("train_tiny.py --resume", run, "--steps 9", preexec_fn=full), code=2)
    assert "go on with --resume" in said.splitlines()[-1] and "Traceback" not in said
    assert (run / "checkpoint.pt").read_bytes() == before
    assert [path.name for path in run.glob(".*")] == [".lock"]
    held = run / "held_out.csv"                     # It has a line beyond the checkpoint,
    held.write_text(held.read_text() + "1")         # and now the beginning of one of step 10.
    assert in_process(train_tiny, "--resume", run, "--steps 9") == 0
    assert [line.split(",")[0] for line in held.read_text().split()] == ["step", "5", "9"]


def test_a_batch_that_is_not_finite_changes_nothing(tmp_path):
    settings, _ = train_tiny.read_flags(words(TINY, "--steps 5 --out", tmp_path / "run"))
    trainer = train_tiny.Trainer(settings)
    draw = trainer.source.batch

    def spoiled():
        images, labels = draw()
        return images * torch.nan, labels

    def kept():
        states = [list(o.state.values()) for o in trainer.optimizers]
        numbers = [t for state in itertools.chain(*states) for t in state.values()]
        return trainer.parameters + trainer.averages + numbers

    for step, bad in enumerate([False, True, False]):
        before = [tensor.clone() for tensor in kept()]
        with patch.object(trainer.source, "batch", spoiled if bad else draw):
            trainer.advance(step / 5)
        assert (len(before) == len(kept()) and all(map(torch.equal, before, kept()))) == bad
        assert all(tensor.isfinite().all() for tensor in kept())
    assert not any(tensor.requires_grad for tensor in trainer.averages)
    assert trainer.left_out == 1 and trainer.step == 3
    assert trainer.sums.isfinite().all() and trainer.sums[1, 0] == 16


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_muon_takes_the_steps_of_that_of_torch(shape):
    ours, theirs = (torch.nn.Parameter(rand(*shape)) for _ in range(2))
    reference = torch.optim.Muon([theirs], lr=.1, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    optimizers = train_tiny.Muon([ours], lr=.1), reference
    for seed in range(3):
        ours.grad = theirs.grad = rand(*shape, seed=seed)
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - theirs).norm() < .3 * (theirs - rand(*shape)).norm()


class HostFree(TorchDispatchMode):
    """Fails where a step would make the host wait for a GPU, or send it something."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        waits = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "lift_fresh", "item"}
        assert name not in waits, name
        return function(*args, **kwargs or {})


def test_a_step_neither_waits_for_the_device_nor_sends_it_anything(tmp_path, monkeypatch):
    def unchecked(labels, n):       # Torch's looks at the labels' range, but only on a CPU.
        return (labels[:, None] == torch.arange(n)).long()

    monkeypatch.setattr(lego, "one_hot", unchecked)
    settings, _ = train_tiny.read_flags(words(TINY, "--steps 9 --out", tmp_path / "run"))
    trainer = train_tiny.Trainer(settings)
    trainer.source = train_tiny.Pool(trainer.data, settings, trainer.device, scenes=16)
    trainer.advance(.1)                     # the first step makes the state of the optimizers
    trainer.source.renew(1)
    with HostFree():
        trainer.compute()
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            trainer.rate.item()
    trainer.source = None


def test_a_pool_goes_on_after_a_resume_and_is_shared_by_ranks():
    data, device = train_tiny.load_data("landscapes", "", 4), torch.device("cpu")
    settings, _ = train_tiny.read_flags(words("--batch 6 --size 4 --seed 3"))

    def walked(first, last, rank=0, world=1):
        pool = train_tiny.Pool(data, settings, device, rank, world, first, scenes=20, every=2)
        for step in range(first, last):
            pool.renew(step)
        torch.manual_seed(0)
        return pool, *pool.batch()

    pool, images, labels = walked(0, 9)
    scenes, kinds = train_tiny.landscapes(3, range(5 * 6, 9 * 6), 4, 4)     # blocks 5 to 8
    order = [*range(18, 24), *range(0, 18)]                                 # block 8 comes first
    assert np.array_equal(pool.images, scenes[order]) and pool.labels.tolist() == [*kinds[order]]
    assert all(map(torch.equal, walked(4, 9)[1:], (images, labels)))
    assert all(map(torch.equal, walked(5, 9)[1:], (images, labels)))
    for rank in (0, 1):
        _, part, some = walked(0, 9, rank, 2)
        assert torch.equal(part, images[rank::2]) and torch.equal(some, labels[rank::2])


def test_a_pool_of_images_draws_all_of_them_and_mirrors_half():
    pair = np.arange(8, dtype=np.uint8).reshape(2, 2, 2, 1), np.array([0, 1])
    data = train_tiny.Data("d", ["a", "b"], 1, True, 2, pair, pair)
    settings, _ = train_tiny.read_flags(words("--batch 400 --size 2"))
    torch.manual_seed(0)
    images, labels = train_tiny.Pool(data, settings, torch.device("cpu")).batch()
    seen = (images * 127.5 + 127.5).round().int().flatten(1)
    as_they_are = seen[:, 0] % 2 == 0
    expected = torch.where(as_they_are[:, None], seen, seen[:, [1, 0, 3, 2]])
    assert torch.equal(expected, torch.arange(8).view(2, 4)[labels].int())
    assert 150 < labels.sum() < 250 and 150 < as_they_are.sum() < 250


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_equals_an_eager_one(tmp_path):
    runs = []
    for eager in (True, False):
        out = tmp_path / str(eager)
        settings, _ = train_tiny.read_flags(words(TINY, "--steps 9 --precision fp32 --out", out))
        trainer = train_tiny.Trainer(settings)
        trainer.graph = None if eager else trainer.graph
        for step in range(8):
            trainer.advance(step / 9)
        runs.append([p.detach().clone() for p in trainer.averages])
        trainer.source = None
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*runs))


def test_a_run_that_begins_sees_that_another_has_begun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [train_tiny.claim_folder("../photos.zip") for _ in range(3)] == [
        "runs/photos", "runs/photos-2", "runs/photos-3"]


def test_a_data_set_that_fails_ends_the_run_and_its_workers(tmp_path):
    script = tmp_path / "camera.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import train_tiny
def draw(seed, numbers, H, W):
    if max(numbers) > 40:
        raise OSError("the camera is off")
    return train_tiny.landscapes(seed, numbers, H, W)
train_tiny.DATASETS["camera"] = lambda folder, size: train_tiny.Data(
    "camera", train_tiny.LANDSCAPES, 3, False, size, draw=draw)
train_tiny.command(train_tiny.main)
""")
    flags = TINY, "--dataset camera --steps 99 --out", tmp_path / "run"
    said = finish(start(script, *flags), code=2, timeout=60)
    assert "the camera is off" in said.splitlines()[-1] and "make room" not in said


def test_a_run_gives_the_signals_back_and_forgets_where_its_bricks_were_useful(tmp_path):
    run, before = tmp_path / "run", list(map(signal.getsignal, train_tiny.SIGNALS))
    train_tiny.main(words(TINY, "--steps 2 --out", run))
    assert list(map(signal.getsignal, train_tiny.SIGNALS)) == before
    again = words("--resume", run, "--dataset landscapes --steps 4")
    trainer = train_tiny.Trainer(*train_tiny.read_flags(again))
    trainer.advance(.5)
    trainer.save(run, last=False)
    trainer.source = None                           # This ends its worker.
    assert "useful" not in read_checkpoint(run / "checkpoint.pt")["info"]


def test_few_held_out_images_have_all_quarters():
    data = train_tiny.load_data("landscapes", "", 16)
    columns = train_tiny.held_out_losses(filled(RANGED), EDM(), data, nullcontext, count=5)
    assert list(columns)[4:8] == [f"quarter{i}" for i in (1, 2, 3, 4)]
    assert all(map(math.isfinite, columns.values()))


def test_two_processes_train_like_one(tmp_path):
    bricks = "--bricks '16/4x1 8/4x1@0.2: 8/2x1@:0.08'"         # the last for one image of eight
    flags = (f"{TINY} {bricks} --steps 4 --precision fp32 --region-fraction 1,.5,.5 "
             f"--brick-drop .2 --lr 1e-4 --out")
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2 train_tiny.py"
    two = start(launch, flags, tmp_path / "two")
    assert in_process(train_tiny, flags, tmp_path / "one") == 0
    finish(two, timeout=180)
    one, other = (read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
    torch.manual_seed(0)
    initial = Lego(one["config"]).state_dict()
    one, other = one["train"]["weights"], other["train"]["weights"]
    assert all(close(weight, other[name], 2e-6) for name, weight in one.items())
    assert max((weight - initial[name]).abs().max() for name, weight in one.items()) > 1e-4


def test_training_draws_its_noise_where_the_flags_say_and_a_resumed_run_goes_on_there(trained):
    for flags, law in (("", (-.8, 1.4)), ("--bricks 16/4x1 --p-mean 1 --p-std .5", (1, .5))):
        s, _ = train_tiny.read_flags(words(TINY, flags, "--steps 1"))
        trainer = train_tiny.Trainer(s)
        trainer.source.renew(0)
        _, sigma = trainer.gradients()
        trainer.source = None                           # This ends the worker.
        order = EDM(*law).quantile
        place = [8 * order(float(level)) for level in sigma.sort()[0]]
        assert [math.floor(number) for number in place] == list(range(8))
    state = lego.read_checkpoint(trained)
    del state["info"]["settings"]["p_mean"]
    old = trained.parent.parent / "old"
    old.mkdir()
    model = load_checkpoint(trained)
    model.info = state["info"]
    save_checkpoint(old / "checkpoint.pt", model, train=state["train"])
    refuses("did not know p_mean", train_tiny.read_flags, words("--resume", old))


class Mean(Block):
    def mix(self, h):
        return self.proj(h.mean(2, keepdim=True).expand_as(h))


class Named(Block):
    def mix(self, h, scale=1, *, mask=None):
        return super().mix(h * scale, mask)


def test_a_mixer_gets_its_mask_by_name():
    x = rand(1, 3, 16, 13)
    expected, found = (filled(SMALL, block=block)(x, torch.zeros(1)) for block in (Block, Named))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("sigma", [0.0, math.inf, math.nan])
def test_a_noise_level_that_is_none_is_refused(sigma):
    for level in (sigma, torch.tensor([1.0, sigma])):
        refuses("above 0 and finite", EDM().denoise, filled(SMALL), rand(2, 3, 16, 16), level)


def test_a_mixer_of_ones_own_learns_gray_images_of_ones_own_by_ddpm(tmp_path, capsys):
    model = filled(SMALL, block=Mean)
    with FlopCounterMode(display=False) as counter:
        model(rand(1, 3, 16, 16), torch.zeros(1))
    assert counter.get_total_flops() == sum(model.flops(16, 16)) < sum(filled(SMALL).flops(16, 16))
    refuses("Mean.mix has no parameter `mask`", model, rand(1, 3, 16, 13), torch.zeros(1))
    names = itertools.product("ab", range(12))
    images = {f"{c}/{i}.png": picture_file("L", colour=20 * i) for c, i in names}
    data, run, out = zip_of(tmp_path / "set.zip", images), tmp_path / "run", tmp_path / "s.npz"
    begin = [TINY, "--dataset", data, "--objective ddpm --steps 3 --out", run]
    sample = ["--ckpt", run / "checkpoint.pt", "--n 3 --steps 3 --out", out]
    assert in_process(train_tiny, *begin, block=Mean) == 0
    assert in_process(train_tiny, "--resume", run, "--steps 5", block=Mean) == 0
    for sampler in ("ancestral", "ddim", "dpm2m"):
        assert in_process(sample_tiny, *sample, "--sampler", sampler, block=Mean) == 0
        assert np.load(out)["arr_0"].shape == (3, 16, 16, 1) and np.load(out)["arr_0"].std() > 0
    capsys.readouterr()
    assert in_process(sample_tiny, *sample) == in_process(train_tiny, "--resume", run) == 2
    said = capsys.readouterr().err
    assert "pass block=Mean" in said and "blocks of the class Mean" in said


def test_a_run_goes_on_with_images_of_no_class_that_moved(tmp_path):
    images = {f"{i}.png": picture_file("L", colour=20 * i) for i in range(12)}
    data, run = zip_of(tmp_path / "photos.zip", images), tmp_path / "run"
    assert in_process(train_tiny, TINY, "--dataset", data, "--steps 1 --out", run) == 0
    moved = data.rename(tmp_path / "pictures.zip")
    assert in_process(train_tiny, "--resume", run, "--steps 2 --dataset", moved) == 0


def test_samples_do_not_depend_on_batch_or_container(trained, tmp_path):
    flags = "--n 5 --steps 3 --size 24x44 --skip '1@0-.5;2' --guidance 2 --precision fp32"
    for name, more in {"a.npz": "", "b.npz": "--batch 2", "folder": "--batch 2", "sheet.png": "",
                       "c.npz": "--seed 1", "d.npz": "--label sunset"}.items():
        flags_and_out = flags, more, "--out", tmp_path / name
        assert in_process(sample_tiny, "--ckpt", trained, *flags_and_out) == 0
    a, b, c, d = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in "abcd")
    folder = [np.asarray(Image.open(tmp_path / "folder" / f"{i:06d}.png")) for i in range(5)]
    fewer = "--n 2 --steps 3 --out", tmp_path / "folder"        # It would keep the other three.
    assert in_process(sample_tiny, "--ckpt", trained, *fewer) == 2
    assert a.shape == (5, 24, 44, 3) and a.dtype == np.uint8 and np.array_equal(b, np.stack(folder))
    assert np.abs(a.astype(int) - b).max() <= 1 and len({image.tobytes() for image in a}) == 5
    assert np.abs(a.astype(int) - c).mean() > 1
    alike = np.abs(a.astype(int) - d).max((1, 2, 3)) <= 1           # Classes take turns.
    assert alike.tolist() == [False, True, False, False, False]
    assert Image.open(tmp_path / "sheet.png").size == (4 * (4 * 45 - 1), 4 * (2 * 25 - 1))


@pytest.mark.parametrize("objective, channels, size", [("edm", 3, "24x40"), ("ddpm", 1, "16")])
def test_a_gif_shows_pictures_form_and_which_bricks_run(tmp_path, objective, channels, size):
    model, diffusion = filled(replace(RANGED, channels=channels)), lego.OBJECTIVES[objective]()
    model.info = dict(objective=objective)
    save_checkpoint(tmp_path / "c.pt", model)
    flags = f"--n 5 --batch 3 --steps 6 --size {size} --skip '1@0-.5;0@.5-1' --out"
    for name in ("s.gif", "s.png"):
        assert in_process(sample_tiny, "--ckpt", tmp_path / "c.pt", flags, tmp_path / name) == 0
    gif, png = Image.open(tmp_path / "s.gif"), Image.open(tmp_path / "s.png").convert("RGB")
    (H, W), times = ((24, 40), 3) if size == "24x40" else ((16, 16), 6)
    assert gif.size == (times * (5 * (W + 1) - 1), times * H + 21) and gif.info["loop"] == 0
    runs, lit, frames = [], [], []
    for i in range(6):
        sigmas = [sigma for step, sigma in diffusion.evaluations(6) if step == i]
        each = [model.config.running(sigma, {1} if i < 3 else {0}) for sigma in sigmas]
        runs.append(sorted(set().union(*each)))
    if size == "24x40":                                         # an enlarged canvas goes on
        runs += [runs[i] for i in range(6) if diffusion.levels(6)[i] <= lego.REFINE]
    for i in range(gif.n_frames):
        gif.seek(i)
        frames.append(np.asarray(gif.convert("RGB")).astype(int))
        cells = [frames[i][-3, k * (gif.width + 2) // 3 + 3] for k in range(3)]
        lit.append([k for k, (red, _, blue) in enumerate(cells) if red - blue > 99])
    assert lit == runs + [[]] and [0] in lit and [1, 2] in lit and gif.info["duration"] == 2000
    images = np.asarray(png)[::96 // H, ::96 // H]              # 256 colours come near to them
    away = [np.abs(frame[:times * H:times, ::times] - images).mean() for frame in frames]
    assert away[-1] < 12 and away[5] < 50 < away[0]            # 5 ends the first canvas


def test_sampling_says_what_it_does_and_costs_what_it_says(trained, tmp_path, capsys):
    model, sample = load_checkpoint(trained), partial(in_process, sample_tiny, "--ckpt", trained)
    walk, cost = visited(EDM(), 5), walk_flops(model, (1,), 5)
    with FlopCounterMode(display=False) as counter:
        assert sample("--skip 1 --n 2 --steps 5 --out", tmp_path / "s.png") == 0
    said, runs = capsys.readouterr().out, sum(sigma < .5 for sigma in walk)
    assert counter.get_total_flops() == 2 * cost and f"{cost / 1e9:.2f} GFLOPs" in said
    assert f"of 5 evaluations the bricks run in 5, 0, {runs}" in said and 0 < runs < 5
    rows = [line.split() for line in said.splitlines() if line.startswith("    ")]
    assert [row[4] for row in rows] == [":", "0.2:", ":0.5"]        # the noise ranges
    assert [row[-1] == "skipped" for row in rows] == [False, True, False]
    assert sample("--stages --steps 9 --out", tmp_path / "st.png") == 0
    stages = np.asarray(Image.open(tmp_path / "st.png"))
    assert stages.shape[:2] == (6 * (4 * 17 - 1), 6 * (9 * 17 - 1))
    for left, idle in ((0, 2), (6 * 17 * 8, 1)):                    # at sigma 80 and .002
        cells = [stages[6 * 17 * (k + 1):, left:][:6 * 16, :6 * 16] for k in range(3)]
        assert [(cell == 255).all() for cell in cells] == [k == idle for k in range(3)]
    assert sample("--bench --batch 2") == 0
    rows = [row.split() for row in capsys.readouterr().out.splitlines()[-5:]]
    assert [row[0] for row in rows] == ["nothing", "0", "1", "2", "1,2"]        # those that cover
    share = walk_flops(model, (1, 2)) / walk_flops(model)
    assert float(rows[-1][6][:-1]) == pytest.approx(100 * share, abs=.06)


def test_the_speed_table_knows_the_ranges(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_tiny.bench, "__defaults__", (1,))                 # rounds
    assert in_process(train_tiny, TINY, "--bench --out", tmp_path / "run") == 0
    rows = {line[:36].strip(): line[36:].split() for line in capsys.readouterr().out.splitlines()}
    trained, regions, levels = (float(rows[f"{name}, bf16"][5]) for name in (
        "as trained", "all regions", "all regions and noise levels"))
    assert trained < regions < levels and not (tmp_path / "run").exists()


def test_a_fresh_clone_samples_from_the_weights_it_brings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert in_process(sample_tiny, "--skip 2,3 --size 64 --n 1 --steps 2") == 0
    shown = capsys.readouterr().out
    assert "assets/landscapes.pt" in shown and "1 images of 64x64" in shown
    cifar = HERE / "assets/cifar10.pt"
    assert in_process(sample_tiny, "--ckpt", cifar, "--skip auto --n 1 --steps 2") == 0
    monkeypatch.setattr(sample_tiny, "__file__", str(tmp_path / "sample_tiny.py"))
    (tmp_path / "runs").rename(tmp_path / "elsewhere")              # copied without its weights
    assert in_process(sample_tiny) == 2 and "train one with" in capsys.readouterr().err


def test_every_covering_subset_of_the_shipped_stack_draws_pictures():
    model = load_checkpoint(HERE / "assets/landscapes.pt").float()
    assert str(model.config) == str(PRESETS["tiny"]) and len(model.bricks) >= 4
    data = train_tiny.load_data("landscapes", "", 32)
    autocast = train_tiny.pick_precision("auto", torch.device("cpu"))
    rows, _ = measure.subset_losses(model, EDM(), data, autocast, 256)
    assert "2,3" in [row["skipped"] for row in rows] and len(rows) > 4
    for row in rows:
        assert row["ratio"] <= 1.5, row


def test_skip_auto_removes_what_hardly_lowers_the_error_and_covers_all(trained):
    model, data = load_checkpoint(trained), train_tiny.load_data("landscapes", "", 16)
    useful = partial(train_tiny.useful_levels, model, EDM(), data, nullcontext, count=32)
    assert useful(tolerance=1e9)[2] == [0.0, 0.0]
    assert useful(tolerance=-1) == [[None, None]] * 3           # nothing may go
    # Bricks that do nothing go wherever others are left, the most costly one first.
    levels = train_tiny.useful_levels(Lego(RANGED), EDM(), data, nullcontext, count=32)
    border = pytest.approx(LOW, rel=.01)
    assert levels == [[border, None], [0.0, 0.0], [None, border]]
    evaluations = [(0, 80.), (0, 2.), (1, 2.), (1, 1.), (2, 1.), (2, .4), (3, .4), (3, .1)]
    model.info["useful"] = [[.5, None], [None, 2.], [0.0, 0.0]]
    skip = sample_tiny.skip_useless(model, evaluations, 4)
    assert [sorted(skip(i / 4)) for i in range(4)] == [[1, 2], [2], [2], []]    # 1 works above .2
    for broken in ({}, dict(useful=3), dict(useful=[("low", "high")])):
        model.info = broken
        refuses("has not measured", sample_tiny.skip_useless, model, evaluations, 4)


def named(*flags):
    """Flags whose error names the first of their words."""
    return {each: each.split()[0] for each in flags}


# What each command line is told, and what its error says.
BAD_TRAINING = named(
    "--steps 0", "--steps many", "--batch 0", "--batch 99999", "--seed -1", "--size 0", "--lr nan",
    "--lr -1", "--minutes nan", "--region-fraction 1,2", "--brick-drop 1", "--frobnicate",
    "--save-minutes -1") | {
    "--dataset nowhere": "nowhere", "--dataset README.md": "README.md",
    "--resume nowhere": "nowhere", "--resume assets": "assets", "--out ''": "name a folder",
    "--out README.md/run": "README.md",
    "--out RUN": "go on with it by --resume",
    "--out RUN --resume RUN --lr .1": "--lr 0.1 contradicts",
    "--p-std 0": "--p-std must lie", "--objective ddpm --p-mean -1": "for --objective edm",
    "--device abacus": "abacus", "--device meta": "cannot be used here",
    "--width 0": "width", "--width -4": "width",
    "--width 1048576": "from 4 to 16384", "--heads 0": "heads must be", "--heads 5": "take width",
    "--width 10 --heads 2": "take width 12",
    "--preset huge": "--preset", "--bricks 8/2x1 --preset tiny": "not allowed with",
    "--steps 5 --minutes 1": "not allowed with",
    "--bricks ''": "one brick", "--bricks 16/5x1": "take region 20",
    "--bricks 2048/1x1": "too many", "--bricks 8/2x99999": "depth",
    "--bricks 8-2x1": "such as 32/4x6", "--bricks 8/2x1@x:": "cannot read",
    "--bricks 8/2x1@0.3": "noise range 16/2x4@0.1:0.4",
    "--bricks '8/2x1@0.4:0.3 8/2x1'": "must rise from 0 or more, found 0.4:0.3",
    "--bricks 8/2x1@0.3:": "no brick works at sigma 0 to 0.3",
    "--bricks '8/2x1@0.4: 8/2x1@:0.3'": "no brick works at sigma 0.3 to 0.4",
    "--bricks '8/2x1@0.4:2 8/2x1@:0.5'": "no brick works at sigma 2 to inf",
    "--bricks '8/2x1 8/2x1@:1e-9'": "none of the 8 noise levels"}
BAD_SAMPLING = named(
    "--steps 0", "--steps 99999", "--batch 0", "--seed -1", "--n 0", "--size 0", "--size 64x",
    "--size -4", "--size 99999x99999", "--skip x", "--skip -1", "--skip 0@0.5", "--label 4",
    "--label -1", "--guidance nan", "--guidance -1", "--guidance inf", "--churn nan",
    "--sampler magic") | {
    "--skip 0,1,2": "cannot skip", "--skip 7": "bricks 0 to 2", "--skip 1@.5-.2": "must rise",
    "--skip 0,1": "keep some of [0, 1]", "--skip '0,1@.5-1'": "none is left from sigma 0.",
    "--skip '0@0-1;2@.5-1'": "none is left from sigma 0.", "--label dragon": "dragon",
    "--ckpt README.md": "not a LEGO", "--ckpt nowhere.pt": "nowhere.pt", "--out x.bmp": "x.bmp",
    "--size 1024 --out x.gif": "name a folder", "--out README.md/s.png": "README.md",
    "--stages --bench": "not allowed with", "--bench --skip 1": "leave --skip out",
    "--stages --sampler heun --churn 9": "leave one out",
    "--stages --size 8": "take --size 16",
    "--sampler dpm2m --churn 1": "churn is for EDM and the samplers heun and euler: name one"}
BAD_MEASURING = {
    "": "command", "weigh": "invalid choice", "compare --n 0": "--n must lie",
    "compare '--size 40x4'": "7 pixels", "compare '--label 1'": "--label",
    "compare '' '--ckpt assets/cifar10.pt'": "same classes", "compare --dataset nowhere": "nowhere",
    "compare --dataset assets": "has not the checkpoint's channels and classes",
    "subsets --n 3": "--n must lie", "subsets '' ''": "a single case",
    "subsets --log assets/levels.csv": "not there yet", "subsets --frobnicate": "--frobnicate",
    "race nowhere --log l.csv": "nowhere", "race": "--log", "plot README.md": "levels, race, curve",
    "race --log assets/levels.csv": "no log with the columns data, kind",
    "plot": "levels, race, curve", "pace '--bricks 16'": "cannot read"}


@pytest.mark.parametrize("script, flags, said", [
    *[(train_tiny, *case) for case in BAD_TRAINING.items()],
    *[(sample_tiny, *case) for case in BAD_SAMPLING.items()],
    *[(measure, *case) for case in BAD_MEASURING.items()]])
def test_bad_flags_give_one_line_and_exit_code_2(trained, script, flags, said, capsys, tmp_path):
    out = tmp_path / "new.png"
    others = [flags.replace("RUN", str(trained.parent))]
    if script is train_tiny:
        budget = "" if "--minutes" in flags else "--steps 1"
        others = ["--batch 8 --size 16 --device cpu", budget, "--out", out, *others]
    elif script is sample_tiny:
        others = ["--ckpt", trained, "--out", out, *others]
    assert in_process(script, *others) == 2
    lines = capsys.readouterr().err.splitlines()
    error = [line for line in lines if line.strip() and "files/s" not in line]  # but for a bar
    assert len(error) == 1 and said in error[0] and not out.exists()


def test_lack_of_memory_says_what_to_do_and_a_mistake_of_ours_is_traced(monkeypatch, capsys):
    monkeypatch.setattr(sample_tiny, "main", lambda *_: torch.empty(1 << 50))
    assert in_process(sample_tiny) == 2 and "take a smaller batch" in capsys.readouterr().err
    monkeypatch.setattr(sample_tiny, "main", lambda *_: 1 / 0)
    assert in_process(sample_tiny) == 1 and "Traceback" in capsys.readouterr().err


def test_the_example_in_the_readme_runs():
    example = re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)[1]
    exec(example, scope := {})
    assert scope["samples"].shape == (4, 3, 32, 32) and scope["samples"].isfinite().all()


# ---- Evidence ------------------------------------------------------------------------


def test_distances_tell_at_which_scale_images_differ_and_see_a_shared_error_of_colour():
    random = np.random.default_rng(0)
    a, b = random.integers(0, 128, (2, 40, 64, 64, 3), np.uint8)

    def striped(width, height):
        stripes = np.arange(64) // width % 2 * height
        return measure.distances(a + stripes.astype(np.uint8)[:, None], b)

    floor, fine, broad = striped(1, 0), striped(1, 120), striped(16, 120)
    assert len(floor) == 3 and max(floor) < 50
    assert fine[0] > 5 * floor[0] and broad[2] > 2 * max(broad[:2])
    true = random.integers(0, 128, (64, 7, 7, 3), np.uint8)     # They have one patch alone.
    shifted = true + np.array([0, 90, 0], np.uint8)
    # In standard deviations, times 1000. Along a random direction u of 147 numbers, a shift of
    # one channel counts by the sum of 49 of them, of mean size sqrt(2 / pi) sqrt(49 / 147).
    expected = 1000 * 90 / true[..., 1].std() * (2 / np.pi * 49 / 147) ** .5
    assert measure.distances(shifted, true)[0] == pytest.approx(expected, rel=.1)
    # The second set's deviation counts, which is twice as large here in the second case.
    double, half = measure.distances(2 * true, true), measure.distances(true, 2 * true)
    assert double[0] == pytest.approx(2 * half[0], rel=1e-4)
    flat = measure.pyramid(torch.ones(1, 1, 64, 64))
    assert max(level.abs().max() for level in flat[:2]) < 1e-6


def test_the_frechet_distance_is_that_of_two_normal_distributions():
    a = torch.randn(500, 4, generator=generator("frechet")) @ torch.randn(4, 4)
    scale = torch.tensor(3.0)
    expected = (2 * a.mean(0) + 1).square().sum() + (scale - 1) ** 2 * a.T.cov().trace()
    assert measure.frechet(a, scale * a + 1) == pytest.approx(float(expected), rel=1e-4)
    assert measure.frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_a_classifier_learns_to_tell_what_classes_look_like(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "CLASSIFIER", tmp_path / "classifier.pt")
    for k, name in enumerate(train_tiny.CIFAR10):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(30):
            colour = (255 * (k % 3 // 2), 255 * (k % 2), 25 * k)
            Image.new("RGB", (32, 32), colour).save(tmp_path / "data" / name / f"{i}.png")
    measure.main(words("classifier --epochs 8 --dataset", tmp_path / "data"))
    assert float(re.search(r"([\d.]+)% of 30", capsys.readouterr().out)[1]) >= 80
    data = train_tiny.load_data(str(tmp_path / "data"), "", 32)
    assert measure.seen(*data.held_out)[0].shape == (30, 128)
    refuses("classes of CIFAR-10", measure.main, words("classifier --dataset landscapes"))


@pytest.mark.parametrize("axis", [1, 2])
def test_seam_ratio_is_that_of_differences_across_borders(axis):
    place = np.uint8(np.arange(32).reshape(-1, *[1] * (3 - axis)))
    ramp = place + np.zeros((2, 32, 32, 3), np.uint8)
    jumps = ramp + place // 8 * 2                                               # 3 against 1
    assert measure.seam_ratio(jumps, ramp, 8, axis) == pytest.approx(3)


@pytest.mark.parametrize("stack, subsets", [
    ("8/4x1 8/2x1 4/2x1@:.3", [(), (0,), (1,), (2,), (0, 2), (1, 2)]),
    ("8/4x1@.3: 8/4x1@:.4 4/2x1@:.4 4/2x1@:.2", [(), (1,), (2,), (3,), (1, 3), (2, 3)]),
    ("8/4x1@:.3 8/2x1@.3:1 4/2x1@1:", [()]),
    ("8/4x1@:.3 8/4x1@.3: 4/2x1", [(), (0,), (1,), (2,), (0, 1)])])
def test_covering_subsets_are_those_found_by_hand(stack, subsets):
    assert measure.covering_subsets(LegoConfig.parse(stack, width=16, heads=2)) == subsets


@torch.no_grad()
def test_losses_of_subsets_are_those_of_the_estimates_of_x0(trained, tmp_path, capsys):
    model, data = load_checkpoint(trained), train_tiny.load_data("landscapes", "", 16)
    images, labels, levels, noise = train_tiny.held_out_batch(data, 64)
    sigma = levels.view(-1, 1, 1, 1)
    works = model.config.active(levels.log() / 4)
    rows, by_level = measure.subset_losses(model, EDM(), data, nullcontext, 64)
    assert [row["skipped"] for row in rows] == ["nothing", "0", "1", "2", "1,2"]
    whole = train_tiny.held_out_losses(model, EDM(), data, nullcontext, 64)
    parts = [f"quarter{i}" for i in range(1, 5)]
    assert [rows[0][part] for part in parts] == pytest.approx([whole[part] for part in parts])
    batch = images, labels, levels, noise       # Under DDPM a new network's estimate is x itself.
    losses = train_tiny.losses_at(Lego(model.config), DDPM(), *batch, nullcontext)
    expected = (sigma * noise / EDM().coefficients(sigma)[1]).square().mean((1, 2, 3))
    assert close(train_tiny.last_brick(losses), expected, rtol=1e-4)
    log = tmp_path / "log.csv"
    case = f"--precision fp32 --ckpt {trained}"
    assert in_process(measure, "subsets --n 64 --log", log, repr(case)) == 0
    table, full = capsys.readouterr().out.splitlines()[-5:], None
    assert measure.read_log(log) == [measure.written(line) for line in by_level]
    order = levels.argsort().chunk(16)
    for row, line, skip in zip(rows, table, [[], [0], [1], [2], [1, 2]]):
        x0_hat = EDM().denoise(model, images + sigma * noise, levels, labels, skip=skip)
        error = (x0_hat - images) / EDM().coefficients(sigma)[1]
        loss = error.square().mean((1, 2, 3))
        full = loss if full is None else full       # of the stack that skips nothing
        ratios = [loss[works[k]].mean() / full[works[k]].mean() for k in skip or [0]]
        quarters = [part.mean() for part in loss[levels.argsort()].chunk(4)]
        expected = torch.stack([loss.mean(), *quarters, max(ratios)]).tolist()
        expected.append(walk_flops(model, skip) / 1e9)
        assert list(row.values())[1:] == pytest.approx(expected, rel=1e-4)
        assert line.split() == list(measure.written(row).values())
        here = [level for level in by_level if level["skipped"] == row["skipped"]]
        found = [(level["sigma"], level["loss"], level["ratio"]) for level in here]
        wanted = [(levels[i].log().mean().exp().item(), loss[i].mean().item(),
                   (loss[i].mean() / full[i].mean()).item()) for i in order]
        assert np.array(found) == pytest.approx(np.array(wanted), rel=1e-4)


def test_ways_to_sample_are_compared_with_true_images(trained, tmp_path, capsys):
    log = tmp_path / "log.csv"
    cases = [f"--ckpt {trained} --size 16x32 --steps 3 {more}" for more in ("", "--skip 2")]
    assert in_process(measure, "compare --n 16 --log", log, *map(repr, cases)) == 0
    rows, said = measure.read_log(log), capsys.readouterr().out.splitlines()[-4:]
    assert [row["case"] for row in rows] == ["other images", *cases]
    assert said.pop(0).split() == list(rows[0])
    (true, kinds), (other, _) = measure.two_sets(
        train_tiny.load_data("landscapes", "", 16), 16, (16, 32))
    assert not (true == other).all((1, 2, 3)).any()                     # No image is in both.
    for row, line, case in zip(rows, said, [None, *cases]):
        if case:
            out = tmp_path / "s.npz"
            assert in_process(sample_tiny, case, "--n 16 --out", out) == 0
            flops = re.search(r"([\d.]+) GFLOPs", capsys.readouterr().out)[1]
            assert float(row["gflops"]) == pytest.approx(float(flops), abs=.006)
        images = np.load(out)["arr_0"] if case else other
        every = measure.distances(images, true)
        seams = [measure.seam_ratio(images, true, *border) for border in ((8, 1), (8, 2), (16, 2))]
        means = [[part[kinds == k].mean((0, 1, 2)) for k in range(4)] for part in (images, true)]
        error = np.subtract(*means)
        expected = [every[0], every[-1], max(seams), (error ** 2).mean() ** .5]
        figures = [float(row[name]) for name in ("fine", "coarse", "seam", "colour")]
        assert figures == pytest.approx(expected, rel=1e-3)
        assert line.split()[:7] == list(row.values())[:7]
    assert in_process(measure, "compare --n 16", repr(cases[0]), f"'--ckpt {trained}'") == 2


def test_runs_are_raced_and_paced_and_drawn(trained, tmp_path, capsys):
    log = tmp_path / "race.csv"
    run = tmp_path / "some-stack-0"
    run.symlink_to(trained.parent)
    for wrong in ("some-stack-7", "0"):                         # The seed was 0.
        (tmp_path / wrong).symlink_to(trained.parent)
        assert in_process(measure, "race --log", log, tmp_path / wrong) == 2 and not log.exists()
    assert in_process(measure, "race --log", log, run) == 0
    lines, held = measure.read_log(log), measure.read_log(trained.parent / "held_out.csv")
    assert {(line["kind"], line["seed"]) for line in lines} == {("some-stack", "0")}
    assert [line["last"] for line in lines] == [line["last"] for line in held]
    assert in_process(measure, "plot", log) == 2                                # a single point
    other = [line | dict(seed="1", share="0.5",
                         last=str(float(line["last"]) + .01)) for line in lines]
    measure.add_to_log(log, other)
    refuses("no log with the columns other", measure.add_to_log, log, [dict(other=1)])
    refuses("no log with the columns data", measure.add_to_log, log, [dict(data="d")])  # fewer
    capsys.readouterr()
    assert in_process(measure, "race --log", log) == 0
    mean, deviation = float(held[-1]["last"]) + .005, .01 / 2 ** .5
    head, *said = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head[:2] == ["last", "quarter1"] and said[0][len(measure.LOSSES)] == "2"
    assert [float(line[0]) for line in said] == pytest.approx([mean, deviation], rel=1e-3)
    assert in_process(measure, "plot", log) == 0
    assert in_process(measure, "plot", log.rename(tmp_path / "curve.csv")) == 2     # no such columns
    drawn = np.asarray(Image.open(tmp_path / "race.png"))
    assert drawn.shape == (420, 820, 3) and (drawn.std(2) > 20).sum() > 100     # coloured pixels
    small = "--size 16 --batch 8 --width 16 --heads 2 --device cpu --bricks"
    cases = [f"'{small} 16/4x1'", f"'{small} 16/1x2'"]
    assert in_process(measure, "pace --minutes 1", *cases) == 0
    few, many = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert float(few[0]) < float(many[0])
    assert int(few[3]) == pytest.approx(60_000 / float(few[0]), rel=.01)


def test_sets_of_a_data_set_in_memory_share_no_image():
    pairs = numbered(0, range(30), 8, 8), numbered(0, range(30, 40), 8, 8)
    data = train_tiny.in_memory("set", ["even", "odd"], False, 8, *pairs)
    held, train = measure.two_sets(data, 20, (8, 8))
    assert sorted(held[0][:, 0, 1, 0]) == [*range(30, 40)]
    assert len(set(train[0][:, 0, 1, 0])) == 10 and train[0][:, 0, 1, 0].max() < 30
    for images, labels in (held, train):
        assert (images[:, 0, 1, 0] % 2 == labels).all()
    refuses("take --size 8", measure.two_sets, data, 20, (8, 16))


# ---- The notebook --------------------------------------------------------------------

NOTEBOOK = HERE / "walkthrough.ipynb"
RUN_CELLS = """
import ast, json, sys

def display(thing):
    pictures = ("_repr_png_", "_repr_svg_", "_repr_markdown_")
    shown = [getattr(thing, name)() for name in pictures if hasattr(thing, name)]
    assert thing is None or any(shown) or repr(thing)

cells = [cell for cell in json.load(open(sys.argv[1]))["cells"] if cell["cell_type"] == "code"]
names = dict(__name__="__main__", display=display)     # of the cells
for i, cell in enumerate(cells):
    tree = ast.parse("".join(cell["source"]))
    last = tree.body[-1]
    if isinstance(last, ast.Expr):
        last.value = ast.Call(ast.Name("display", ast.Load()), [last.value], [])
    code = compile(ast.fix_missing_locations(tree), f"code cell {i + 1}", "exec")
    exec(code, names)
exec(compile(sys.argv[2], "NEIGHBOURS", "exec"), names)
"""

# What runs after the cells, on the names that they leave: for every row of Part II a check that
# a wrong core fails.
NEIGHBOURS = """
# T-Stitch: every evaluation of a step comes from the network of the plan (Heun's method has two),
# and the ends are known.
asked, hooks = [], []
for net in (model, little):
    hook = lambda net, inputs: asked.append((net, float(inputs[1][0])))
    hooks.append(net.register_forward_pre_hook(hook))
plan = stitch(.4, (little, ()), list(range(STEPS)))
walked(plan, 0, 2, "heun")
for hook in hooks:
    hook.remove()
for (net, c_noise), (step, sigma) in zip(asked, edm.evaluations(STEPS, "heun"), strict=True):
    assert net is plan(step)[0] and math.isclose(c_noise, math.log(sigma) / 4, abs_tol=1e-5)
assert {net for net, _ in asked} == {model, little}
part, apart = smalls["part of the stack"]
for rho, skip in ((0, ()), (1, others)):
    stitched_images, direct = walked(stitch(rho, part, apart), 0, n=2), draw(model, 0, 2, skip=skip)
    assert torch.allclose(stitched_images, direct, atol=1e-3)
# The threshold of its verdict: a loss of a tenth passes, one of a fifth does not.
def fake(early):
    alone = np.array([[20., 20., 0.], [21, 21, 0]]) - 10
    for key, rise in (((1, True), 1), ((.4, True), early), ((.4, False), .9)):
        stitched["fake", *key] = d_whole + rise * alone
    return verdict_of(*stitch_claims("fake", shape=SHAPE))
assert fake(.05) == "supported" and fake(.2).startswith("not supported")
assert "since it was not seen" in verdict_of({"a": (1., .1)}, {"b": (.1, .2)})
assert verdict_of({"a": (.1, .2)}).startswith("not testable")
assert verdict_of({"a": (-.3, .2)}).startswith("not supported")

# Diffusion Classifier: labels share their noise, the control keeps sigma, elimination agrees.
some, every = data.held(4)[0], torch.arange(CLASSES).repeat(4, 1)
same = errors(tied(model), some, every, [0])
own = errors(tied(model), some, every, [0], shared=False)
assert torch.equal(same, same[:, :1].expand(-1, CLASSES))
assert not torch.equal(own, own[:, :1].expand(-1, CLASSES))
sigma = edm.sigma_at(torch.rand(4, generator=generator("classify", 0)))
seen_sigmas, before = [], EDM.loss
def spy(self, *inputs, sigma, **settings):
    seen_sigmas.append(sigma)
    return before(self, *inputs, sigma=sigma, **settings)
EDM.loss = spy
errors(model, some, every, [0], shared=False)
EDM.loss = before
assert len(seen_sigmas) == CLASSES and all(torch.equal(one, sigma) for one in seen_sigmas)
total = sum(draws for draws, _ in ROUNDS)
patient = errors(model, some, every, range(total)).argmin(1)
assert float((classify(model, some) == patient).float().mean()) >= .75

# PPGN: e1 = 0 hears nothing of the denoiser, and raises the guide's confidence all the same.
x, x0_hat = 3 * torch.randn(8, 3, SIDE, SIDE), data.held(8)[0]
wish = towards(by_kind)
deaf, hears = plug_in(wish, 0, 30.), plug_in(wish, 1, 30.)
assert torch.equal(deaf(x0_hat, x, 1.), deaf(-x0_hat, x, 1.))
assert not torch.equal(hears(x0_hat, x, 1.), hears(-x0_hat, x, 1.))
assert torch.allclose(plug_in(wish, 1, 0.)(x0_hat, x, 1.), x0_hat, atol=1e-5)
y = .3 * torch.randn(8, 3, SIDE, SIDE)
for e1 in (0, 1):
    step = plug_in(wish, e1, 1.)(x0_hat, y, 1.)
    assert wish(step.clamp(-1, 1)) > wish((x0_hat if e1 else y).clamp(-1, 1))

# PPAP: an expert learns its range (a few lessons are enough for that), and the wrong one is worse.
clean = teach(Judge(), brightest, steps=60)
made = data.held(64)[0]
pair = [learn(clean, adapted(clean, 1), *edges, 60, 0) for edges in (EDGES[:2], EDGES[-2:])]
def kl_of(net, edges):
    said = says(net, *lesson(generator("check"), made, *edges))
    return float(kl_div(said, clean(made).log_softmax(1), reduction="batchmean", log_target=True))
for right, wrong, edges in ((*pair, EDGES[:2]), (*pair[::-1], EDGES[-2:])):
    assert kl_of(right, edges) < .9 * min(kl_of(wrong, edges), kl_of(clean, edges))
assert [in_range(range(RANGES))(sigma) for sigma in middles] == list(range(RANGES))
for name, w in clean.state_dict().items():          # the classifier is frozen
    layer, kind = name.split(".")
    kept = pair[0].state_dict()
    assert torch.equal(w, kept.get(name, kept.get(f"{layer}.parametrizations.{kind}.original")))

# LiT: the formula, written out with its N x N weights; everything but attention is inherited.
one = LegoConfig.parse("4/1x1", width=32, heads=2, classes=4)
block = LinearBlock(one)
h = torch.randn(2, 3, 16, 32)
q, k, v = block.qkv(h).unflatten(3, (3, 2, 16)).permute(3, 0, 1, 4, 2, 5)
w = (q.relu() + 1e-4) @ (k.relu() + 1e-4).mT
written_out = block.proj((w / w.sum(-1, keepdim=True) @ v).transpose(2, 3).flatten(3))
assert torch.allclose(block.mix(h), written_out, atol=1e-4)
heir = inherit(Lego(config, LinearConvBlock), model).state_dict()
for name, w in model.state_dict().items():
    assert torch.equal(heir[name], w) != is_attention(name), name

x0, labels = data.held(4)
def value_of(loss, net):
    torch.manual_seed(0)
    with torch.no_grad():
        return float(loss(net, x0, labels, 0))
taught = partial(second_draw, teacher=model)           # who agrees with itself
assert math.isclose(value_of(taught, model), value_of(lego_loss, model), rel_tol=1e-4)
assert value_of(taught, Lego(config)) > 1.2 * value_of(lego_loss, Lego(config))
assert value_of(second_draw, model) > 1.2 * value_of(lego_loss, model)

# DiCo: tokens mix, regions do not, and the channels are weighed by the mean of their own region.
block = DiCoBlock(LegoConfig.parse("8/1x1", width=32, heads=2))
h = torch.randn(1, 2, 64, 32)
near, far = h.clone(), h.clone()
near[0, 0, 9] += 1
before, after = block.mix(h), block.mix(near)
assert torch.equal(before[0, 1], after[0, 1])
assert (before[0, 0, 0] - after[0, 0, 0]).abs().max() > 1e-4                # a neighbour
assert (before[0, 0, 63] - after[0, 0, 63]).abs().max() > 1e-7              # by the mean alone
plain = ConvBlock(LegoConfig.parse("8/1x1", width=32, heads=2))
assert torch.equal(plain.mix(h)[0, 0, 63], plain.mix(near)[0, 0, 63])
assert block.fc1.out_features == 2 * 32

# DiMR: parameters per channel, time moves what comes out, and p0 - p1 leaves 0.
norm = TDLN(8, is_block=True)
assert all(getattr(norm, name).shape == (4, 8) for name in ("w", "b", "p0", "p1"))
with torch.no_grad():
    for p in norm.parameters():
        p.normal_()
tau = torch.tensor([[-1.5] + [0.] * 8, [1.5] + [0.] * 8])
out = norm(tau).view(2, 6, 8)
s = ((1 + norm.w) * tau[:, :1, None] + norm.b).sigmoid()
expected = norm.p1 + s * (norm.p0 - norm.p1)
assert torch.allclose(out[:, [0, 1, 3, 4]], expected)
assert torch.equal(out[:, [2, 5]], norm.gates.expand(2, -1, -1))
assert len({round(x, 4) for x in s[0].flatten().tolist()}) == 32    # one for each channel
small = replace(PAIR, width=16)
torch.manual_seed(0)
net = train(DiMR(small, TDLN), 12)
norms_of = [m for m in net.modules() if isinstance(m, TDLN)]
assert all(float((m.p0 - m.p1).abs().max()) > 1e-5 for m in norms_of)
x, still = torch.randn(1, 3, SIDE, SIDE), DiMR(small, NoTime)
still.load_state_dict(net.state_dict())
def moves(net):
    with torch.no_grad():
        low, high = (net(x, torch.tensor([t]), torch.tensor([0])) for t in (-.5, .5))
        return float((low - high).abs().max())
assert moves(net) > 1e-5 and moves(still) == 0
# The half-size brick: what it hands on is as smooth as enlarged pixels, and it costs the same.
net = cascade(HalfBrick)
for p in net.parameters():
    torch.nn.init.normal_(p, std=.2)
x = torch.randn(2, 3, SIDE, SIDE)
swapped = x.unflatten(3, (-1, 2)).flip(4).flatten(3)          # the same means of 2 x 2 pixels
first = [net(each, torch.zeros(2), return_all=True)[0] for each in (x, swapped)]
assert torch.allclose(*first, atol=1e-3) and first[0].abs().max() > .01
assert net.config.bricks[0].tokens == 64 == len(net.bricks[0].position)
# A loss at half resolution does not see what cancels in 2 x 2 pixels, and the sharp one does.
loss_of = {}
for kind in (Sharp, Brick):
    net = cascade(kind)
    stripes = torch.tensor([1., -1.]).repeat(SIDE // 2).expand(2, 3, SIDE, -1)
    net.bricks[0].register_forward_hook(lambda *_: stripes)
    torch.manual_seed(0)
    with torch.no_grad():
        loss_of[kind] = float(cascade_loss(net, x, None, 0))
assert loss_of[Sharp] > loss_of[Brick] + .5

# ViTok: PSNR is that of held-out scenes, E is the count of latents, and more of it helps.
for channels in (1, 8):
    assert Codec(channels).encode(data.held(2)[0])[0].numel() == 2 * 64 * channels
blank = Codec(1)
for p in blank.decoder.leave.parameters():
    torch.nn.init.zeros_(p)
x0 = data.held(16)[0]
assert math.isclose(psnr(blank), 10 * math.log10(4 / float(x0.square().mean())), rel_tol=.1)
trained = []
for channels in (1, 8):
    torch.manual_seed(0)
    trained.append(psnr(train(Codec(channels), 60, 0, codec_loss)))
assert trained[1] > trained[0] + 2 > psnr(blank) + 2, trained

# ReCAP: at the same x, what was kept is what would be computed, and new context is not looked at.
wide = ~is_known[0]
for sigma in edm.levels(18)[4:-1:3]:
    x, c_noise = sigma * torch.randn(2, 3, SIDE, SIDE), torch.full((2,), math.log(sigma) / 4)
    x = edm.coefficients(torch.tensor(sigma))[2] * x
    with torch.no_grad():
        filler.set_reuse(False)
        moved = filler(x + .1 * is_known, c_noise)
        full = filler(x, c_noise)
        filler.set_reuse(True)
        cheap = filler(x, c_noise)
        stale = filler(x + .1 * is_known, c_noise)
    assert torch.allclose(full, model(x, c_noise), atol=1e-5)
    assert torch.allclose(full[..., wide], cheap[..., wide], atol=1e-4), sigma
    assert not torch.allclose(moved[..., wide], full[..., wide], atol=1e-4)
    if all(config.bricks[k].region >= SIDE for k in config.running(sigma)):
        assert torch.allclose(stale[..., wide], cheap[..., wide], atol=1e-4)

# The combination: a mixer is in its own brick alone, and the other bricks keep softmax attention.
kinds_of = lambda name: [{type(block) for block in brick.blocks} for brick in mixed(name).bricks]
assert kinds_of("softmax") == [{Block}] * 3
assert kinds_of("LiT") == [{Block}, {LinearConvBlock}, {Block}]
assert kinds_of("LiT and DiCo") == [{Block}, {LinearConvBlock}, {DiCoBlock}]
assert all(len(row) == 7 for row in ROWS) and len(ROWS) == 13
"""


def test_the_notebook_was_run_from_top_to_bottom():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [out for cell in cells for out in cell["outputs"]]
    assert {out["output_type"] for out in outputs} <= {"stream", "display_data", "execute_result"}
    assert not any(out.get("name") == "stderr" for out in outputs)
    assert NOTEBOOK.stat().st_size < 4e6


def test_every_cell_of_the_notebook_runs():
    quick = os.environ | dict(LEGO_QUICK="1")
    run = subprocess.run([sys.executable, "-c", RUN_CELLS, NOTEBOOK, NEIGHBOURS], env=quick,
                         cwd=HERE, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
