"""Tests of values, not of shapes: `python -m pytest -q`. They need no file from elsewhere and take a few minutes on 2 cores.

SPDX-License-Identifier: MIT
"""

import copy
import gzip
import http.server
import io
import itertools
import math
import os
import re
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import gelu, layer_norm, silu
from torch.utils.flop_counter import FlopCounterMode

import lego
import sample_tiny
import train_tiny
from lego import (DDPM, EDM, PRESETS, BrickSpec, Diffusion, Lego, LegoConfig, canvases, generator, load_checkpoint,
                  load_official, patchify, position_table, save_checkpoint, time_features, unpatchify)

HERE = Path(__file__).parent
SMALL = LegoConfig.parse("16/4x2 8/4x1 8/2x1 4/2x1", width=16, heads=2, classes=3)


def filled(config, seed=0):
    """A network whose every parameter matters: the zero initialisation would hide most mistakes."""
    model, g = Lego(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (.2 if p.ndim == 1 else p.shape[1] ** -.5))
    return model.eval()


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# The authors' network

PARITY = [  # figures computed once with the released code: size, means and deviations of F_k, D_k at six places
    (16, [-.2325003, .0217738, .1682498], [1.1442115, .7578898, .7614422],
     [[-.664322, .290041, .346278, .375216, -.647384, -.123215], [.246065, .334309, .710935, .62376, .533661, -.412894],
      [.340409, .860641, .71022, .194279, .336586, .490328]]),
    (32, [-.2261839, .0242824, .1659942], [1.1170849, .8440744, .7525996],
     [[-.597899, -1.301163, .668523, .417991, -.694439, -.100427], [.149863, -1.116437, .665853, .764227, .518659, -.374823],
      [.281332, -.465189, .857956, .230756, .732195, .45431]])]


def official_shapes(config):
    D, linear = config.width, {"t_embedder.mlp.0": (config.width, 256), "t_embedder.mlp.2": (config.width, config.width),
                               "y_embedder.embedding_table": (config.width, config.classes)}
    for k, b in enumerate(config.bricks):
        linear[f"model.{k}.x_embedder.proj"] = D, (5 if k == 0 else 8), b.patch, b.patch
        linear[f"model.{k}.final_layer.adaLN_modulation.1"] = 2 * D, D
        linear[f"model.{k}.final_layer.linear"] = b.patch ** 2 * 3, D
        for j in range(b.depth):
            for name, shape in {"attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.fc1": (4 * D, D), "mlp.fc2": (D, 4 * D),
                                "adaLN_modulation.1": (6 * D, D)}.items():
                linear[f"model.{k}.blocks.{j}.{name}"] = shape
    return {f"{n}.weight": s for n, s in linear.items()} | {f"{n}.bias": s[:1] for n, s in linear.items()}


def official_weights(config):
    wave = lambda k, shape: .08 * torch.sin(.37 * torch.arange(math.prod(shape), dtype=torch.float64) + k)
    return {name: wave(k, shape).reshape(shape).float() for k, (name, shape) in enumerate(sorted(official_shapes(config).items()))}


@pytest.mark.parametrize("S, means, stds, samples", PARITY, ids=["PG", "PG-retiled"])
def test_parity_with_the_released_network(S, means, stds, samples):
    config = LegoConfig.official("4/2x1 8/4x1 16/2x2", width=32, heads=4)
    model = Lego(config)
    weights = official_weights(config)
    weights["model.1.pos_embed"] = position_table(2, 32)[None]
    load_official(model, weights)
    assert sum(p.numel() for p in model.parameters()) == 99848
    x = (2 * torch.sin(.11 * torch.arange(2 * 3 * S * S, dtype=torch.float64))).reshape(2, 3, S, S).float()
    sigma, labels = torch.tensor([.5, 5.]), torch.tensor([3, 7])
    with torch.no_grad():
        D = EDM().denoise(model, x, sigma, labels, return_all=True)
    c_skip, c_out, _, _ = EDM().coefficients(sigma.view(-1, 1, 1, 1))
    places = [(0, 0, 0, 0), (0, 1, 3, 5), (0, 2, S - 1, 0), (1, 0, 0, S - 1), (1, 1, S // 2, S // 2), (1, 2, S - 1, S - 1)]
    for k in range(3):
        F = (D[k] - c_skip * x) / c_out
        assert F.mean().item() == pytest.approx(means[k], abs=2e-6) and F.std().item() == pytest.approx(stds[k], abs=2e-6)
        assert [D[k][p].item() for p in places] == pytest.approx(samples[k], abs=2e-6)


def test_load_official_refuses_what_does_not_fit():
    model = Lego(config := LegoConfig.official("4/2x1 8/4x1", width=32, heads=4))
    good = official_weights(config)
    for bad in ({k: v for k, v in good.items() if "qkv" not in k}, good | {"extra": torch.zeros(1)},
                good | {"model.0.pos_embed": torch.zeros(1, 4, 32)}):
        with pytest.raises(ValueError):
            load_official(model, bad)


@pytest.mark.parametrize("name, millions", [
    ("S-PG-64", 33.74), ("S-PR-64", 33.74), ("S-U-64", 61.22), ("L-PG-64", 500.57), ("L-PG-64-released", 462.79),
    ("L-PG-32", 462.79), ("XL-PG-32", 729.05), ("XL-PG-64", 729.05), ("XL-U-32", 1261.37)])
def test_parameter_counts_of_the_authors_stacks(name, millions):
    with torch.device("meta"):
        model = Lego(PRESETS[name])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


# ---------------------------------------------------------------------------------------------------------------------
# Stacks and building blocks


def test_config_says_what_to_change():
    assert LegoConfig.parse("32/4x6 8/2x1", width=8, heads=2).bricks == (BrickSpec(32, 4, 6), BrickSpec(8, 2, 1))
    assert LegoConfig.parse("8/2x1 32/4x6", width=8, heads=2).size == 32
    for stack, settings, remedy in [("32/5x1", {}, "take region 35"), ("32-4x1", {}, "such as 32/4x6"), ("", {}, "at least one brick"),
                                    ("8/2x0", {}, "depth"), ("8/2x1", dict(width=10), "take width 12"),
                                    ("8/2x1", dict(heads=0), "heads"), ("8/2x1", dict(classes=-1), "classes")]:
        with pytest.raises(ValueError, match=re.escape(remedy)):
            LegoConfig.parse(stack, **dict(width=8, heads=2) | settings)
    first, *_, last = PRESETS["tiny"].bricks
    assert len(PRESETS["tiny"].bricks) >= 4 and first.region == max(b.region for b in PRESETS["tiny"].bricks)
    assert last.patch == min(b.patch for b in PRESETS["tiny"].bricks)


def test_patchify_places_pixels_where_a_loop_would():
    x, region, patch = torch.arange(2 * 3 * 8 * 12.).view(2, 3, 8, 12), 4, 2
    tokens = patchify(x, region, patch)
    for r, n in itertools.product(range(6), range(4)):
        top, left = r // 3 * region + n // 2 * patch, r % 3 * region + n % 2 * patch
        for i, j, c in itertools.product(range(2), range(2), range(3)):
            assert torch.equal(tokens[:, r, n, (i * patch + j) * 3 + c], x[:, c, top + i, left + j])
    assert torch.equal(unpatchify(tokens, region, patch, 8, 12), x)


def test_attention_is_the_fused_kernel():
    q, k, v = rand(3, 6, 2, 9, 4)
    mask = rand(6, 1, 9, 9) > -1
    mask |= torch.eye(9, dtype=bool)
    for m in (None, mask):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, m)
        assert torch.allclose(lego.attention(q, k, v, m), expected, atol=1e-6)


def test_a_new_network_is_zero_and_its_blocks_the_identity():
    model, x = Lego(SMALL), rand(2, 3, 16, 16)
    assert not model(x, torch.zeros(2)).any()
    h = rand(2, 1, 16, 16)
    assert torch.equal(model.bricks[0].blocks[0](h, rand(2, 16)), h)


def slow_brick(brick, x, z, c, offset=(0, 0), wrap=False):
    """A brick by plain loops over one image in float64: every region, every group, token by token."""
    (C, H, W), (r, p), cfg = x.shape, (brick.spec.region, brick.spec.patch), brick.config
    rows, columns = math.ceil(H / r), math.ceil(W / r)
    dy, dx = (o % r // p * p for o in offset)
    wraps = wrap and W % r == 0
    place = [[2 * (i * math.ceil(cfg.size / r) // n * r + j) / (cfg.size - 1) - 1 for i in range(n) for j in range(r)]
             for n in (rows, columns)]
    if cfg.stretch:
        place = [[2 * i / (side - 1) - 1 for i in range(n * r)] for n, side in ((rows, H), (columns, W))]
    out = z.clone()
    for top, left in itertools.product(range(0, rows * r, r), range(0, columns * r, r)):
        groups = {}
        for i, j in itertools.product(range(0, r, p), range(0, r, p)):
            y0, x0 = (top + i + dy) % (rows * r), (left + j + dx) % (columns * r)
            if y0 < H and x0 < W:
                groups.setdefault((top + i + dy >= rows * r, left + j + dx >= columns * r and not wraps), []).append((i, j, y0, x0))
        for tokens in groups.values():
            pixels = []
            for i, j, y0, x0 in tokens:
                channels = {name: torch.zeros(p, p, size, dtype=x.dtype) for name, size in (("z", C), ("x", C), ("m", 2))}
                for a, b in itertools.product(range(p), range(p)):
                    if y0 + a < H and x0 + b < W:
                        channels["z"][a, b], channels["x"][a, b] = z[:, y0 + a, x0 + b], x[:, y0 + a, x0 + b]
                    channels["m"][a, b] = torch.tensor([place[0][top + i + a], place[1][left + j + b]])
                pixels.append(torch.cat([channels[name].flatten() for name in ("zxm"[brick.first:])]))
            h = brick.local(torch.stack(pixels))
            if brick.local_mlp is not None:
                h = brick.local_mlp(gelu(h, approximate=cfg.gelu))
            h = h + torch.stack([brick.position[i // p * (r // p) + j // p] for i, j, _, _ in tokens])
            for block in brick.blocks:
                s1, a1, g1, s2, a2, g2 = block.adaln(c).chunk(6)
                q, k, v = block.qkv(layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + a1) + s1).chunk(3, 1)
                heads = [torch.softmax(qh @ kh.T / math.sqrt(qh.shape[1]), 1) @ vh
                         for qh, kh, vh in zip(*(t.chunk(cfg.heads, 1) for t in (q, k, v)))]
                h = h + g1 * block.proj(torch.cat(heads, 1))
                h = h + g2 * block.fc2(gelu(block.fc1(layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + a2) + s2), approximate=cfg.gelu))
            shift, scale = brick.adaln(c).chunk(2)
            new = brick.decode(layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift).view(-1, p, p, C)
            for (_, _, y0, x0), patch in zip(tokens, new):
                for a, b in itertools.product(range(p), range(p)):
                    if y0 + a < H and x0 + b < W:
                        out[:, y0 + a, x0 + b] = patch[a, b] + (z[:, y0 + a, x0 + b] if cfg.residual else 0)
    return out


@pytest.mark.parametrize("H, W, offset, wrap", [(16, 16, (0, 0), False), (13, 21, (0, 0), False), (3, 5, (0, 0), False), (1, 1, (0, 0), False),
                                                (16, 32, (0, 5), True), (24, 32, (3, 6), False), (19, 30, (9, 2), True)])
@pytest.mark.parametrize("official", [False, True])
def test_any_canvas_equals_a_slow_plain_brick(H, W, offset, wrap, official):
    config = LegoConfig.official(str(SMALL), width=16, heads=2, classes=3) if official else SMALL
    if official and 1 in (H, W):
        pytest.skip("stretched coordinates need two pixels")
    model = filled(config).double()
    x, z, c = (rand(*shape, seed=i).double() for i, shape in enumerate([(2, 3, H, W), (2, 3, H, W), (2, 16)]))
    with torch.no_grad():
        for brick in model.bricks:
            fast = brick(x, z, c, offset=offset, wrap=wrap)
            slow = torch.stack([slow_brick(brick, *item, offset, wrap) for item in zip(x, z, c)])
            assert torch.allclose(fast, slow, atol=2e-6), f"brick {brick.spec}"      # coordinates are float32


def test_attention_never_crosses_a_region():
    brick, c = filled(SMALL).bricks[2], rand(1, 16)
    x, z = rand(1, 3, 32, 24), rand(1, 3, 32, 24, seed=1)
    with torch.no_grad():
        before = brick(x, z, c)
        x[:, :, 8:16, 16:24] += 1
        changed = (brick(x, z, c) != before).any(1)[0]
    assert changed[8:16, 16:24].all()
    changed[8:16, 16:24] = False
    assert not changed.any()


def test_a_shifted_grid_that_wraps_commutes_with_rolling():
    brick, c, x = filled(SMALL).bricks[0], rand(2, 16), rand(2, 3, 16, 64)
    with torch.no_grad():
        plain = brick(x, torch.zeros_like(x), c, wrap=True).roll(-8, 3)
        rolled = brick(x.roll(-8, 3), torch.zeros_like(x), c, offset=(0, 8), wrap=True)
    assert torch.allclose(plain, rolled, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Skipping, sampled regions, supervision


def test_all_but_one_skipped_is_that_brick_alone():
    model, x, t, y = filled(SMALL), rand(2, 3, 16, 16), torch.tensor([-.5, .3]), torch.tensor([0, 2])
    with torch.no_grad():
        c = silu(model.time(time_features(t)) + model.label.weight.T[y] + model.label.bias)
        for k, brick in enumerate(model.bricks):
            alone = brick(x, torch.zeros_like(x), c)
            assert torch.allclose(model(x, t, y, skip=set(range(4)) - {k}), alone, atol=1e-6)


@pytest.mark.parametrize("skip", [s for n in range(1, 4) for s in itertools.combinations(range(4), n)])
def test_skipping_equals_a_stack_built_without_those_bricks(skip):
    model, x, t, y = filled(SMALL), rand(2, 3, 20, 16), torch.tensor([-.5, .3]), torch.tensor([0, 3])
    kept = [k for k in range(4) if k not in skip]
    short = Lego(replace(SMALL, bricks=tuple(SMALL.bricks[k] for k in kept), size=16))
    weights = {}
    for name, tensor in model.state_dict().items():
        part = name.split(".")
        if part[0] == "bricks":
            if int(part[1]) in skip:
                continue
            if name.endswith("local.weight") and int(part[1]) == kept[0] != 0:      # the first brick gets no z
                tensor = tensor[:, 3 * SMALL.bricks[kept[0]].patch ** 2:]
            part[1] = str(kept.index(int(part[1])))
        weights[".".join(part)] = tensor
    short.load_state_dict(weights)
    with torch.no_grad():
        every = model(x, t, y, skip=skip, return_all=True)
        for a, b in zip(every, short(x, t, y, return_all=True), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_skipped_bricks_cost_nothing():
    model, x = filled(SMALL), rand(1, 3, 16, 24)
    for skip in [s for n in range(4) for s in itertools.combinations(range(4), n)]:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, torch.zeros(1), skip=skip)
        assert counter.get_total_flops() == sum(model.flops(16, 24, skip))
    assert sum(model.flops(16, 16)) == pytest.approx(2 * sum(model.flops(16, 16, (2, 3))), rel=.6)


def test_bad_skips_and_labels_are_refused():
    model, x = filled(SMALL), rand(1, 3, 16, 16)
    for skip in [range(4), (4,), (-1,)]:
        with pytest.raises(ValueError, match="cannot skip"):
            model(x, torch.zeros(1), skip=skip)
    with pytest.raises(ValueError, match="no classes"):
        filled(replace(SMALL, classes=0))(x, torch.zeros(1), torch.tensor([0]))
    assert torch.equal(model(x, torch.zeros(1)), model(x, torch.zeros(1), torch.tensor([3])))       # None is "no label"


def test_sampled_regions_equal_the_full_run_and_pass_z_elsewhere():
    for config in (SMALL, LegoConfig.official(str(SMALL), width=16, heads=2, classes=3)):
        brick, c = filled(config).bricks[2], rand(2, 16)
        x, z, chosen = rand(2, 3, 16, 16), rand(2, 3, 16, 16, seed=1), torch.tensor([3, 0])
        with torch.no_grad():
            full, part = brick(x, z, c), brick(x, z, c, regions=chosen)
        for region in range(4):
            here = np.s_[:, :, region // 2 * 8:region // 2 * 8 + 8, region % 2 * 8:region % 2 * 8 + 8]
            assert torch.allclose(part[here], (full if region in chosen else z)[here], atol=1e-6)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            brick(x, z, c, regions=chosen)
        with FlopCounterMode(display=False) as whole, torch.no_grad():
            brick(x, z, c)
        per_image = 2 * 2 * (6 + 2) * 16 * 16                                         # adaLN is not per region
        assert counter.get_total_flops() - per_image == (whole.get_total_flops() - per_image) / 2


@pytest.mark.parametrize("detach", [True, False])
def test_which_bricks_a_loss_trains(detach):
    model, x = filled(replace(SMALL, detach=detach)), rand(2, 3, 16, 16)
    model(x, torch.zeros(2), return_all=True)[2].square().mean().backward()
    reached = [any(p.grad is not None and bool(p.grad.any()) for p in brick.parameters()) for brick in model.bricks]
    assert reached == [not detach, not detach, True, False]
    assert model.time[0].weight.grad.any()


# ---------------------------------------------------------------------------------------------------------------------
# Diffusion


def test_edm_coefficients_satisfy_their_identities():
    sigma, edm = torch.logspace(-3, 2, 50, dtype=torch.float64), EDM()
    c_skip, c_out, c_in, c_noise = edm.coefficients(sigma)
    sd = edm.sigma_data
    one = torch.ones_like(sigma)
    assert torch.allclose(c_in ** 2 * (sigma ** 2 + sd ** 2), one)                    # the input has unit variance
    assert torch.allclose(((1 - c_skip) ** 2 * sd ** 2 + c_skip ** 2 * sigma ** 2) / c_out ** 2, one)     # so has the target
    error = lambda c: (1 - c) ** 2 * sd ** 2 + c ** 2 * sigma ** 2                    # c_skip amplifies errors of F least
    assert (error(c_skip) <= torch.minimum(error(c_skip + 1e-3), error(c_skip - 1e-3))).all()
    assert torch.allclose((4 * c_noise).exp(), sigma)
    levels = edm.levels(18)
    assert levels[0] == pytest.approx(80) and levels[17] == pytest.approx(.002) and levels[18] == 0
    q = torch.tensor([.15865525, .5, .84134475])
    assert torch.allclose(edm.sigma_at(q).log(), torch.tensor([-2.4, -1.2, 0.]), atol=1e-4)


@pytest.mark.parametrize("diffusion", [EDM(), DDPM()])
def test_loss_is_the_formula(diffusion):
    model, x0, y = filled(SMALL), rand(6, 3, 16, 16) * .5, torch.tensor([0, 1, 2, 3, 0, 1])
    sigma, noise = diffusion.sigma_at(torch.linspace(.2, .8, 6)), rand(6, 3, 16, 16, seed=2)
    scalar, losses, used = diffusion.loss(model, x0, y, sigma=sigma, noise=noise)
    x = x0 + sigma.view(-1, 1, 1, 1) * noise
    with torch.no_grad():
        D = Diffusion.denoise(diffusion, model, x, sigma, y, return_all=True)
    weight = (sigma ** 2 + .25) / (sigma * .5) ** 2 if isinstance(diffusion, EDM) else sigma ** -2     # lambda(sigma)
    expected = torch.stack([weight * (d - x0).square().mean((1, 2, 3)) for d in D], 1)
    assert torch.allclose(losses, expected, rtol=1e-3) and torch.equal(used, sigma)
    assert scalar.item() == pytest.approx(expected.mean().item(), rel=1e-3)


def test_loss_counts_the_chosen_regions_and_bricks_alone():
    model, x0, edm = filled(SMALL), rand(4, 3, 16, 16) * .5, EDM()
    settings = dict(sigma=torch.full((4,), .5), noise=rand(4, 3, 16, 16, seed=3))
    fractions = [1, .5, .25, .125]
    scalar, losses, _ = edm.loss(model, x0, region_fraction=fractions, generator=torch.Generator().manual_seed(1), **settings)
    g = torch.Generator().manual_seed(1)
    x = x0 + .5 * settings["noise"]
    z, c = torch.zeros_like(x), silu(model.time(time_features(torch.full((4,), math.log(.5) / 4))) + model.label.bias)
    c_skip, c_out, c_in, _ = edm.coefficients(torch.tensor(.5))
    target, expected = (x0 - c_skip * x) / c_out, []
    for k, brick in enumerate(model.bricks):
        count = (16 // brick.spec.region) ** 2
        chosen = None if k == 0 else torch.randperm(count, generator=g)[:round(fractions[k] * count)]
        z = brick(c_in * x, z, c, chosen)
        error = patchify((z - target) ** 2, brick.spec.region, brick.spec.patch)
        expected.append((error if k == 0 else error[:, chosen]).mean((1, 2, 3)))
    expected = torch.stack(expected, 1)
    assert torch.allclose(losses, expected, rtol=1e-4) and scalar.item() == pytest.approx(expected.mean().item(), rel=1e-4)
    scalar, losses, _ = edm.loss(model, x0, skip=[1, 3], **settings)
    assert losses[:, [1, 3]].isnan().all() and scalar.item() == pytest.approx(losses[:, [0, 2]].mean().item(), rel=1e-5)


def test_ranks_share_the_draws_of_one_batch():
    model, x0, y, edm = filled(SMALL), rand(8, 3, 16, 16) * .5, torch.arange(8) % 3, EDM()
    run = lambda part, shard: edm.loss(model, x0[part], y[part], region_fraction=[1, .5, .5, .5], brick_drop=.3, label_drop=.5,
                                       generator=generator(5), shard=shard)
    whole, losses, sigma = run(slice(None), (0, 1))
    halves = [run(slice(0, 4), (0, 2)), run(slice(4, 8), (1, 2))]
    assert torch.equal(torch.cat([h[2] for h in halves]), sigma)
    assert torch.allclose(torch.cat([h[1] for h in halves]), losses, atol=1e-5, equal_nan=True)
    grads = [torch.autograd.grad(l, model.time[0].weight)[0] for l in (whole, halves[0][0], halves[1][0])]
    assert torch.allclose(grads[0], (grads[1] + grads[2]) / 2, atol=1e-6)


class Gaussian(torch.nn.Module):
    """A network that denoises independent pixels of mean m and deviation s exactly, so that sampling has a closed form."""

    def __init__(self, diffusion, m=.3, s=.2, size=4):
        super().__init__()
        self.d, self.m, self.s, self.config = diffusion, m, s, LegoConfig.parse(f"{size}/1x1", width=4, heads=1)
        self.device_holder = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x, c_noise, labels=None, **_):
        sigma = (4 * c_noise.double()).exp().view(-1, 1, 1, 1)
        c_skip, c_out, c_in, _ = self.d.coefficients(sigma)
        x = x / c_in
        return [(self.m + self.s ** 2 / (self.s ** 2 + sigma ** 2) * (x - self.m) - c_skip * x) / c_out]

    def solution(self, x, sigma):
        """Where the probability flow takes x from level sigma: the same number of deviations from the mean."""
        return self.m + (x - self.m) * self.s / math.sqrt(self.s ** 2 + sigma ** 2)


@pytest.mark.parametrize("diffusion, sampler, order, counts", [(EDM(), "heun", 2, (20, 40, 80)), (EDM(), "euler", 1, (40, 80, 160)),
                                                               (DDPM("linear"), "euler", 1, (50, 100, 200)), (DDPM(), "euler", 1, (100, 200, 400))])
def test_samplers_reach_the_exact_solution_at_their_order(diffusion, sampler, order, counts):
    model, errors = Gaussian(diffusion), []
    for steps in counts:
        levels = diffusion.levels(steps)
        start = levels[0] * lego.normal((64, 1, 4, 4), generator(0), "cpu").double()
        samples = diffusion.sample(model, (64, 1, 4, 4), steps=steps, sampler=sampler, generator=generator(0)).double()
        errors.append((samples - model.solution(start, levels[0])).square().mean().sqrt().item())
    for coarse, fine in itertools.pairwise(errors):
        assert 2 ** (order - .35) < coarse / fine < 2 ** (order + .6), errors
    assert errors[-1] < .04 * model.s


@pytest.mark.parametrize("diffusion, settings", [(DDPM(), dict(sampler="ancestral", steps=400)), (EDM(), dict(sampler="ancestral", steps=400)),
                                                 (EDM(), dict(churn=40, steps=100))])
def test_stochastic_samplers_reach_the_distribution(diffusion, settings):
    samples = diffusion.sample(model := Gaussian(diffusion), (4000, 1, 4, 4), generator=generator(1), **settings)
    assert samples.mean().item() == pytest.approx(model.m, abs=5 * model.s / math.sqrt(samples.numel()))
    assert samples.std().item() == pytest.approx(model.s, rel=.03)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddpm_marginals_and_posterior(schedule):
    ddpm = DDPM(schedule)
    beta = torch.cat([1 - ddpm.abar[:1], 1 - ddpm.abar[1:] / ddpm.abar[:-1]])
    scale, variance = 1., 0.
    for t in range(1000):                                                             # q(x_t | x_{t-1}) applied t times
        scale, variance = scale * math.sqrt(1 - beta[t]), variance * (1 - beta[t].item()) + beta[t].item()
        if t in (0, 10, 500, 998):
            assert scale ** 2 == pytest.approx(ddpm.abar[t].item(), rel=1e-9) and variance == pytest.approx(1 - ddpm.abar[t].item(), rel=1e-9)
            assert ddpm.sigmas[t].item() == pytest.approx(math.sqrt(variance) / scale, rel=1e-6)
    if schedule == "linear":
        assert beta[0].item() == pytest.approx(1e-4) and beta[-1].item() == pytest.approx(.02)
    else:
        f = lambda t: math.cos((t / 1000 + .008) / 1.008 * math.pi / 2) ** 2
        assert ddpm.abar[499].item() == pytest.approx(f(500) / f(0), rel=1e-9)
    # One ancestral step in our variables is the posterior of Ho et al., equation 7, in theirs.
    t, x0, xt = 600, .7, -.4
    a, a1, b = ddpm.abar[t].item(), ddpm.abar[t - 1].item(), beta[t].item()
    mean = math.sqrt(a1) * b / (1 - a) * x0 + math.sqrt(1 - b) * (1 - a1) / (1 - a) * xt
    keep = ((1 - a1) / a1) / ((1 - a) / a)
    assert math.sqrt(a1) * (x0 + keep * (xt / math.sqrt(a) - x0)) == pytest.approx(mean, rel=1e-9)
    assert a1 * ((1 - a1) / a1) * (1 - keep) == pytest.approx((1 - a1) / (1 - a) * b, rel=1e-9)


def test_ddpm_denoise_takes_t_and_a_variance_preserving_image():
    ddpm, model, x0, noise = DDPM(), filled(SMALL), rand(2, 3, 16, 16) * .5, rand(2, 3, 16, 16, seed=1)
    t = torch.tensor([100, 700])
    a = ddpm.abar[t].float().view(-1, 1, 1, 1)
    x = a.sqrt() * x0 + (1 - a).sqrt() * noise
    with torch.no_grad():
        eps = model(x, ddpm.sigmas[t].log() / 4)
        assert torch.allclose(ddpm.denoise(model, x, t), (x - (1 - a).sqrt() * eps) / a.sqrt(), rtol=1e-4, atol=1e-4)


def test_guidance():
    model, x, y, edm = filled(SMALL), rand(2, 3, 16, 16), torch.tensor([0, 2]), EDM()
    with torch.no_grad():
        wanted, none = edm.denoise(model, x, 1., y, skip=[1]), edm.denoise(model, x, 1., skip=[1])
        assert torch.equal(edm.denoise(model, x, 1., y, skip=[1], guidance=1.0), wanted)
        assert torch.allclose(edm.denoise(model, x, 1., y, skip=[1], guidance=3.0), none + 3 * (wanted - none), atol=1e-5)
        assert (wanted - none).abs().max() > .01
    with pytest.raises(ValueError, match="needs labels"):
        edm.denoise(model, x, 1., guidance=2.0)


def test_skip_schedule_guide_and_callback():
    model, edm, seen, calls = filled(SMALL), EDM(), [], []
    run = lambda **s: edm.sample(model, (1, 3, 16, 16), steps=4, generator=generator(0), **s)
    scheduled = run(skip=lambda progress: calls.append(progress) or ([2, 3] if progress < .5 else []))
    assert calls == [0, .25, .5, .75] and not torch.equal(scheduled, run()) and torch.equal(run(skip=lambda p: ()), run())
    known = rand(1, 3, 16, 16)

    def guide(x0, x, sigma):
        assert x.shape == x0.shape and sigma > 0
        return known
    assert torch.allclose(run(guide=guide, callback=lambda done, total, x0: seen.append((done, total, x0))), known, atol=1e-5)
    assert [s[:2] for s in seen] == [(i, 4) for i in range(1, 5)] and torch.equal(seen[-1][2], known)


def test_canvases_grow_from_the_training_height():
    assert canvases(32, 32, 32) == [(32, 32)] and canvases(32, 32, 128) == [(32, 128)]
    assert canvases(32, 64, 64) == [(32, 32), (64, 64)]
    assert canvases(32, 100, 200) == [(32, 64), (64, 128), (100, 200)]
    assert canvases(32, 16, 16) == [(32, 32), (16, 16)] and canvases(32, 96, 48) == [(32, 16), (64, 32), (96, 48)]


@pytest.mark.parametrize("shape", [(32, 32), (16, 40), (40, 16), (8, 8), (37, 23)])
@pytest.mark.parametrize("skip", [(), (2, 3), (0,)])
def test_any_canvas_is_sampled_independently_of_the_batch(shape, skip):
    model, edm = filled(SMALL), EDM()
    run = lambda numbers: edm.sample(model, (len(numbers), 3, *shape), steps=4, skip=skip, clip=True,
                                     generator=[generator(0, i) for i in numbers])
    both = run([0, 1])
    assert both.shape[2:] == shape and both.isfinite().all() and not torch.allclose(both[0], both[1], atol=.1)
    assert torch.allclose(run([1])[0], both[1], atol=1e-3)


def test_a_gaussian_canvas_has_the_same_distribution_everywhere():
    model = Gaussian(EDM(), size=8)
    for shape in [(8, 24), (16, 16)]:
        samples = EDM().sample(model, (1500, 1, *shape), steps=24, generator=generator(2))
        assert torch.allclose(samples.mean(0), torch.tensor(model.m, dtype=samples.dtype), atol=5 * model.s / math.sqrt(1500))
        if shape[0] == 8:
            assert torch.allclose(samples.std(0), torch.tensor(model.s, dtype=samples.dtype), rtol=.12)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_checkpoints_round_trip_and_nothing_else_is_opened(tmp_path):
    model, path = filled(SMALL), tmp_path / "c.pt"
    model.info = dict(objective="edm", classes=["a", "b", "c"])
    save_checkpoint(path, model)
    again = load_checkpoint(path)
    assert again.config == SMALL and again.info == model.info and not again.training
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    whole = path.read_bytes()

    def half_written(file):
        file.write(b"half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        lego.write_aside(path, half_written)
    assert path.read_bytes() == whole and os.listdir(tmp_path) == ["c.pt"]

    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "owned",)
    torch.save(dict(config=Hostile()), tmp_path / "hostile.pt")
    (tmp_path / "short.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.pt").write_text("step,loss\n1,2\n")
    torch.save(dict(config=dict(bricks=[]), info={}, weights={}), tmp_path / "empty.pt")
    for bad in ("hostile.pt", "short.pt", "text.pt", "empty.pt"):
        with pytest.raises(ValueError, match="not a LEGO checkpoint"):
            load_checkpoint(tmp_path / bad)
    assert not (tmp_path / "owned").exists()
