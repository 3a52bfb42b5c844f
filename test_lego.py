"""Tests of values, not of shapes: `python -m pytest -q`. They need no file from elsewhere and take a few minutes on 2 cores.

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
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from argparse import Namespace
from dataclasses import asdict, replace
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
    for N in (9, 40):                                                                 # 40 tokens: fused only without gradients
        q, k, v = rand(3, 6, 2, N, 4)
        mask = (rand(6, 1, N, N) > -1) | torch.eye(N, dtype=bool)
        for m in (None, mask):
            expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, m)
            assert torch.allclose(lego.attention(q, k, v, m), expected, atol=1e-6)
            with torch.no_grad():
                assert torch.allclose(lego.attention(q, k, v, m), expected, atol=1e-6)


def test_a_new_network_is_zero_and_its_blocks_the_identity():
    model, x = Lego(SMALL), rand(2, 3, 16, 16)
    assert not model(x, torch.zeros(2)).any()
    h = rand(2, 1, 16, 16)
    assert torch.equal(model.bricks[0].blocks[0](h, rand(2, 16)), h)


def slow_brick(brick, x, z, c, offset=(0, 0), wrap=False):
    """A brick by plain loops over one image: every region, every token, every pixel."""
    (C, H, W), (r, p), cfg = x.shape, (brick.spec.region, brick.spec.patch), brick.config
    wraps = wrap and W % r == 0
    top, left = -offset[0] % r, 0 if wraps else -offset[1] % r                        # the canvas lies this far inside the grid
    turn = offset[1] % r if wraps else 0
    rows, columns = math.ceil((top + H) / r), math.ceil((left + W) / r)
    place = [[2 * (i * math.ceil(cfg.size / r) // n * r + j) / max(cfg.size - 1, 1) - 1 for i in range(n) for j in range(r)]
             for n in (rows, columns)]
    if cfg.stretch:
        place = [[2 * (i - before) / max(side - 1, 1) - 1 for i in range(n * r)] for n, side, before in ((rows, H, top), (columns, W, left))]
    out = z.clone()
    for y, x_ in itertools.product(range(0, rows * r, r), range(0, columns * r, r)):
        inside = lambda i, j: 0 <= y + i - top < H and 0 <= x_ + j - left < W
        at = lambda i, j: (min(max(y + i - top, 0), H - 1), (min(max(x_ + j - left, 0), W - 1) + turn) % W)
        tokens = [(i, j) for i, j in itertools.product(range(0, r, p), range(0, r, p))
                  if any(inside(i + a, j + b) for a, b in itertools.product(range(p), range(p)))]
        if tokens:
            pixels = []
            for i, j in tokens:
                channels = {name: torch.zeros(p, p, size, dtype=x.dtype) for name, size in (("z", C), ("x", C), ("m", 2))}
                for a, b in itertools.product(range(p), range(p)):
                    channels["z"][a, b], channels["x"][a, b] = z[(slice(None), *at(i + a, j + b))], x[(slice(None), *at(i + a, j + b))]
                    channels["m"][a, b] = torch.tensor([place[0][y + i + a], place[1][x_ + j + b]])
                pixels.append(torch.cat([channels[name] for name in "zxm"[brick.first:]], -1).flatten())
            h = brick.local(torch.stack(pixels))
            if brick.local_mlp is not None:
                h = brick.local_mlp(gelu(h, approximate=cfg.gelu))
            h = h + torch.stack([brick.position[i // p * (r // p) + j // p] for i, j in tokens])
            for block in brick.blocks:
                s1, a1, g1, s2, a2, g2 = block.adaln(c).chunk(6)
                q, k, v = block.qkv(layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + a1) + s1).chunk(3, 1)
                heads = [torch.softmax(qh @ kh.T / math.sqrt(qh.shape[1]), 1) @ vh
                         for qh, kh, vh in zip(*(t.chunk(cfg.heads, 1) for t in (q, k, v)))]
                h = h + g1 * block.proj(torch.cat(heads, 1))
                h = h + g2 * block.fc2(gelu(block.fc1(layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + a2) + s2), approximate=cfg.gelu))
            shift, scale = brick.adaln(c).chunk(2)
            new = brick.decode(layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift).view(-1, p, p, C)
            for (i, j), patch in zip(tokens, new):
                for a, b in itertools.product(range(p), range(p)):
                    if inside(i + a, j + b):
                        where = (slice(None), *at(i + a, j + b))
                        out[where] = patch[a, b] + (z[where] if cfg.residual else 0)
    return out


@pytest.mark.parametrize("H, W, offset, wrap", [(16, 16, (0, 0), False), (13, 21, (0, 0), False), (3, 5, (0, 0), False), (1, 1, (0, 0), False),
                                                (16, 32, (0, 5), True), (24, 32, (3, 6), False), (19, 30, (9, 2), True)])
@pytest.mark.parametrize("official", [False, True])
def test_any_canvas_equals_a_slow_plain_brick(H, W, offset, wrap, official):
    config = LegoConfig.official(str(SMALL), width=16, heads=2, classes=3) if official else SMALL
    model = filled(config).double()
    x, z, c = (rand(*shape, seed=i).double() for i, shape in enumerate([(2, 3, H, W), (2, 3, H, W), (2, 16)]))
    with torch.no_grad():
        for brick in model.bricks:
            fast = brick(x, z, c, offset=offset, wrap=wrap)
            slow = torch.stack([slow_brick(brick, *item, offset, wrap) for item in zip(x, z, c)])
            assert torch.allclose(fast, slow, atol=2e-6), f"brick {brick.spec}"      # coordinates are float32


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.slow] * (seed >= 20)) for seed in range(200)])
def test_random_stacks_on_random_canvases(seed):
    random = np.random.default_rng(seed)
    pick = lambda *options: options[random.integers(len(options))]
    heads, stack = pick(1, 2, 3), []
    for _ in range(random.integers(1, 4)):
        patch = int(random.integers(1, 5))
        stack.append(BrickSpec(patch * int(random.integers(1, 4)), patch, int(random.integers(1, 3))))
    config = LegoConfig(tuple(stack), width=12 * heads, heads=heads, channels=pick(1, 3), classes=pick(0, 2), size=int(random.integers(1, 13)),
                        mlp_ratio=pick(1, 2), local_mlp=pick(True, False), residual=pick(True, False), stretch=pick(True, False), gelu=pick("none", "tanh"))
    B, H, W = (int(n) for n in random.integers(1, [3, 11, 11]))
    offset, wrap = tuple(random.integers(0, 9, 2).tolist()), pick(True, False)
    skip = set(random.permutation(len(stack))[:random.integers(len(stack))].tolist())
    model, x, t = filled(config, seed).double(), rand(B, config.channels, H, W).double(), torch.linspace(-1, 1, B).double()
    with torch.no_grad():
        c, z, out = silu(model.time(time_features(4 * t).double()) + (model.label.bias if config.classes else 0)), torch.zeros_like(x), []
        for k in sorted(set(range(len(stack))) - skip):
            z = torch.stack([slow_brick(model.bricks[k], *item, offset, wrap) for item in zip(x, z, c)])
            out.append(z)
        every = model(x, t, skip=skip, return_all=True, offset=offset, wrap=wrap)
        assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-5) for a, b in zip(every, out, strict=True))
        half = model.bfloat16()(x.float(), t.float(), skip=skip, offset=offset, wrap=wrap)
        assert half.dtype == torch.float32 and (half - z).norm() < .1 * z.norm() + .1


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


def test_regions_in_chunks_are_the_regions_at_once(monkeypatch):
    model, x = filled(SMALL), rand(2, 3, 37, 50)
    monkeypatch.setitem(lego.CHUNK, "cpu", 100)
    for settings in (dict(), dict(offset=(3, 5)), dict(regions=[torch.tensor([2, 5, 0]), None, torch.arange(0, 35, 2), None])):
        at_once = model(x, torch.zeros(2), return_all=True, **settings)                # autograd keeps everything anyway
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            chunked = model(x, torch.zeros(2), return_all=True, **settings)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(at_once, chunked, strict=True))
        assert "regions" in settings or counter.get_total_flops() > 2 * sum(model.flops(37, 50, **settings))


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
        c = silu(model.time(time_features(4 * t)) + model.label.weight.T[y] + model.label.bias)
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
                tensor = tensor.view(16, -1, 8)[:, :, 3:].flatten(1)
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
        for settings in (dict(), dict(offset=(3, 5)), dict(offset=(0, 5), wrap=True)):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(x, torch.zeros(1), skip=skip, **settings)
            assert counter.get_total_flops() == sum(model.flops(16, 24, skip, **settings))
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
    draws = lambda **how: EDM().loss(model, x, generator=generator(1), **how)
    (every, each, _), (last, again, _) = draws(), draws(supervise_all=False)
    assert torch.allclose(every, each.mean()) and torch.allclose(last, each[:, -1].mean()) and torch.equal(each, again)


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
    point = torch.rand(2, generator=torch.Generator().manual_seed(1)) * 16
    x = x0 + .5 * settings["noise"]
    z, c = torch.zeros_like(x), silu(model.time(time_features(torch.full((4,), math.log(.5)))) + model.label.bias)
    c_skip, c_out, c_in, _ = edm.coefficients(torch.tensor(.5))
    target, expected = (x0 - c_skip * x) / c_out, []
    for k, brick in enumerate(model.bricks):
        side, count = brick.spec.region, (16 // brick.spec.region) ** 2
        middles = [((i // (16 // side) + .5) * side, (i % (16 // side) + .5) * side) for i in range(count)]
        apart = [max(min(abs(m - p), 16 - abs(m - p)) for m, p in zip(middle, point)) for middle in middles]
        chosen = None if k == 0 else torch.tensor(sorted(range(count), key=lambda i: apart[i])[:round(fractions[k] * count)])
        z = brick(c_in * x, z, c, chosen)
        error = patchify((z - target) ** 2, brick.spec.region, brick.spec.patch)
        expected.append((error if k == 0 else error[:, chosen]).mean((1, 2, 3)))
    expected = torch.stack(expected, 1)
    assert torch.allclose(losses, expected, rtol=1e-4) and scalar.item() == pytest.approx(expected.mean().item(), rel=1e-4)
    scalar, losses, _ = edm.loss(model, x0, skip=[1, 3], **settings)
    assert losses[:, [1, 3]].isnan().all() and scalar.item() == pytest.approx(losses[:, [0, 2]].mean().item() / 2, rel=1e-5)


@pytest.mark.parametrize("diffusion, levels", [(EDM(), [.002, 80.]), (DDPM(), DDPM().sigmas[[0, -1]].tolist()),
                                               (DDPM("linear"), DDPM("linear").sigmas[[0, -1]].tolist())])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_finite_at_the_ends_of_the_noise(diffusion, levels, dtype):
    for sigma in levels:
        model, x0 = Lego(SMALL), rand(4, 3, 16, 16).clamp(-1, 1)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss, *_ = diffusion.loss(model, x0, torch.arange(4) % 3, sigma=torch.full((4,), sigma))
            estimate = Diffusion.denoise(diffusion, model, x0 + sigma * rand(4, 3, 16, 16, seed=1), sigma)
        loss.backward()
        grads = [p.grad for p in model.parameters()]
        assert all(g.isfinite().all() for g in grads) and sum(g.square().sum() for g in grads) < 1e4
        assert loss.item() < 3 and estimate.isfinite().all()


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
    good = torch.load(path, weights_only=True)
    change = lambda **w: {**good, "weights": good["weights"] | w}
    huge = asdict(replace(SMALL, width=1 << 14))
    for name, content in dict(
            hostile=dict(config=Hostile()), empty=dict(config=dict(bricks=[]), info={}, weights={}), number=3, none=good | dict(weights=None),
            nan=change(**{"label.bias": torch.full((16,), torch.nan)}), missing=change(**{"label.bias": torch.zeros(3)}),
            other=good | dict(config=asdict(replace(SMALL, classes=2))), huge=good | dict(config=huge), objective=good | dict(info=dict(objective="x")),
            expanded=good | dict(config=huge, weights={k: torch.zeros(1).expand(1 << 30) for k in good["weights"]})).items():
        torch.save(content, tmp_path / f"{name}.pt")
    (tmp_path / "short.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.pt").write_text("step,loss\n1,2\n")
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "deflated.pt", "w", zipfile.ZIP_DEFLATED) as other:
        for member in archive.namelist():
            other.writestr(member, archive.read(member))
    bad = sorted(set(os.listdir(tmp_path)) - {"c.pt"})
    assert len(bad) == 13
    for name in bad:
        with pytest.raises(ValueError, match="not a LEGO checkpoint|do not fit"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "owned").exists()


def test_a_flipped_bit_is_noticed(tmp_path):
    save_checkpoint(path := tmp_path / "c.pt", model := filled(SMALL))
    whole, noticed = path.read_bytes(), 0
    for place in np.random.default_rng(0).integers(0, 8 * len(whole), 150):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            again = load_checkpoint(path)           # a bit of the padding between members, perhaps
            assert again.config == SMALL and all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
        except ValueError:
            noticed += 1
    assert noticed > 100


# ---------------------------------------------------------------------------------------------------------------------
# Data sets


def test_landscapes_are_the_same_scenes_in_any_batch_size_and_width():
    images, labels = train_tiny.landscapes(7, range(6), 32, 32)
    again, _ = train_tiny.landscapes(7, [4, 1], 32, 32)
    assert np.array_equal(again, images[[4, 1]]) and labels.tolist() == [0, 1, 2, 3, 0, 1]
    assert np.array_equal(train_tiny.landscapes(7, range(6), 32, 96)[0][:, :, :32], images)           # wider shows more
    fine = train_tiny.landscapes(7, range(6), 128, 128)[0].reshape(6, 32, 4, 32, 4, 3).mean((2, 4))
    assert np.abs(fine - images).mean() < 3 and not np.array_equal(images, train_tiny.landscapes(8, range(6), 32, 32)[0])
    sky, ground = images[:, :4].mean((1, 2, 3)), images[:, -4:].mean((1, 2, 3))
    assert sky[0] > sky[2] and (sky > ground).sum() >= 5                                             # day is lighter than night


def tar_of(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_cifar10_binary_records(tmp_path):
    records = np.random.default_rng(0).integers(0, 256, (6, 4, 3073), dtype=np.uint8)
    records[:, :, 0] %= 10
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    members = {name: r.tobytes() for name, r in zip(names, records)}
    (images, labels), (test_images, test_labels) = train_tiny.read_cifar10(tar_of(tmp_path / "good.tar.gz", members))
    assert labels.tolist() == records[:5, :, 0].flatten().tolist() and test_labels.tolist() == records[5, :, 0].tolist()
    assert images[9, 5, 7].tolist() == [records[2, 1, 1 + 1024 * c + 32 * 5 + 7] for c in range(3)] and test_images.shape == (4, 32, 32, 3)
    for bad in (dict(data_batch_3=members["data_batch_3.bin"][:-1]), dict(test_batch=b"\x0a" + members["test_batch.bin"][1:]), dict(data_batch_1=b"")):
        with pytest.raises(ValueError):
            train_tiny.read_cifar10(tar_of(tmp_path / "bad.tar.gz", members | {f"{k}.bin": v for k, v in bad.items()}))
    whole = (tmp_path / "good.tar.gz").read_bytes()
    for data in (whole[:len(whole) // 2], b"<html>404</html>"):
        (tmp_path / "bad.tar.gz").write_bytes(data)
        with pytest.raises(ValueError, match="not a readable"):
            train_tiny.read_cifar10(tmp_path / "bad.tar.gz")


def idx(array):
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


def test_fashion_mnist_idx_files(tmp_path):
    images, labels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8), np.array([0, 9, 3, 3, 1], np.uint8)
    x, y = tmp_path / "x.gz", tmp_path / "y.gz"
    x.write_bytes(idx(images)), y.write_bytes(idx(labels))
    read = train_tiny.read_idx(x, y)
    assert np.array_equal(read[0][..., 0], images) and np.array_equal(read[1], labels)
    assert train_tiny.resized(read[0], 32).shape == (5, 32, 32, 1)
    good = gzip.decompress(x.read_bytes())
    for data in (b"\0\0\x09" + good[3:], good[:-1], good + b"\0", b"", good[:10]):
        x.write_bytes(gzip.compress(data))
        with pytest.raises(ValueError, match="not a whole idx file"):
            train_tiny.read_idx(x, y)
    x.write_bytes(b"<html>"), y.write_bytes(idx(np.array([0, 10], np.uint8)))
    with pytest.raises(ValueError, match="not a readable"):
        train_tiny.read_idx(x, y)
    x.write_bytes(idx(images[:2]))
    with pytest.raises(ValueError, match="labels up to 10"):
        train_tiny.read_idx(x, y)


def picture_file(mode, size=(40, 30), colour=None, form="PNG"):
    image = Image.new(mode, size, colour)
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def test_folders_and_zips_of_images_of_any_size_and_mode(tmp_path):
    files = {"cats/rgb.png": picture_file("RGB", (64, 48), (200, 100, 0)), "cats/rgba.png": picture_file("RGBA", (9, 17), (0, 0, 0, 0)),
             "cats/palette.gif": picture_file("P", form="GIF"), "dogs/one.png": picture_file("1", colour=1),
             "dogs/sixteen.png": picture_file("I;16", colour=65535), "dogs/gray.jpg": picture_file("L", colour=80, form="JPEG"),
             "dogs/broken.png": b"not an image", "dogs/notes.txt": b"hello", "dogs/.hidden.png": b"no"}
    files |= {f"dogs/{i}.png": picture_file("L", colour=10 * i) for i in range(8)}
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name, data in files.items():
            (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / name).write_bytes(data)
            archive.writestr(f"a/{name}", data)
    folder, zipped = (train_tiny.load_data(str(tmp_path / p), "", 16) for p in ("set", "set.zip"))
    for data in (folder, zipped):
        assert data.classes == ["cats", "dogs"] and data.channels == 3 and data.train[1].tolist() == [0] * 3 + [1] * 10
        assert data.train[0][1][0, 0].tolist() == [200, 100, 0] and (data.train[0][2] == 255).all()    # transparent: white
        assert data.held_out[1].tolist() == [1]
    assert all(np.array_equal(a, b) for a, b in zip(folder.train + folder.held_out, zipped.train + zipped.held_out))
    for file in ("cats/rgb.png", "cats/rgba.png", "cats/palette.gif"):
        (tmp_path / "set" / file).unlink()
    gray = train_tiny.load_data(str(tmp_path / "set"), "", 16)
    assert gray.channels == 1 and gray.classes == ["dogs"]
    values = sorted(image[0, 0, 0] for image in np.concatenate([gray.train[0], gray.held_out[0]]))
    assert values == sorted([10 * i for i in range(8)] + [80, 255, 255])
    upright = Image.new("L", (20, 40))
    upright.paste(255, (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 3                                                                  # taken upside down
    upright.save(file := io.BytesIO(), "PNG", exif=exif)
    assert train_tiny.read_image(file.getvalue(), 20)[[0, 5, 14, 19], 0, 0].tolist() == [0, 0, 255, 255]


def test_hostile_archives_are_refused_and_write_nothing(tmp_path, capsys):
    good, link = {f"a/{i}.png": picture_file("L", colour=i) for i in range(3)}, zipfile.ZipInfo("a/link.png")
    link.external_attr = 0o120777 << 16
    bomb_image = bytearray(picture_file("L"))
    bomb_image[16:24] = struct.pack(">II", 60000, 60000)                              # claims 3.6 gigapixels
    bomb_image[29:33] = struct.pack(">I", zlib.crc32(bomb_image[12:29]))
    for name, members, word in [
            ("up", {"../up.png": good["a/0.png"]}, "points out"), ("absolute", {"/absolute.png": good["a/0.png"]}, "points out"),
            ("link", {link: "/etc/passwd"}, "points out"), ("bomb", {"a/x.png": bytes(300 << 20)}, "hundred times"),
            ("noise", {"a/x.png": b"no image", "a/y.png": bytes(bomb_image), "a/z.png": good["a/0.png"][:40]}, "0 readable images")]:
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for member, data in (members | (good if word == "points out" else {})).items():
                archive.writestr(member, data)
        before = sorted(os.listdir(tmp_path))
        assert in_process(train_tiny, *TINY, "--dataset", tmp_path / f"{name}.zip", "--out", tmp_path / "run") == 2
        assert word in capsys.readouterr().err and sorted(os.listdir(tmp_path)) == before
    with zipfile.ZipFile(tmp_path / "claims.zip", "w") as archive:
        for member, data in good.items():
            archive.writestr(member, data)
    data = bytearray((tmp_path / "claims.zip").read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 24:entry + 28] = struct.pack("<I", 0xFFFFFFF0)                       # a member of 4 GB, says the directory
    (tmp_path / "claims.zip").write_bytes(data)
    assert in_process(train_tiny, *TINY, "--dataset", tmp_path / "claims.zip", "--out", tmp_path / "run") == 2
    assert "hundred times" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "mixed.zip", "w") as archive:
        for member, data in (good | {"a/x.png": b"no image", "a/y.png": bytes(bomb_image)}).items():
            archive.writestr(member, data)
    mixed = train_tiny.load_data(str(tmp_path / "mixed.zip"), "", 16)
    assert "3 images in 1 classes, 2 unreadable files skipped" in capsys.readouterr().out and len(mixed.train[0]) == 3


def test_batches_are_shuffled_epochs_and_ranks_share_them():
    images = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 1), np.uint8)
    images[:, :, 0] += 100
    data = train_tiny.Data("d", ["a", "b"], 1, True, 4, (images, np.arange(10) % 2), (images, np.arange(10) % 2))
    steps = [data.batch(3, step, 4) for step in range(5)]
    seen = torch.cat([(x[:, 0, 0, 3] * 127.5 + 127.5).round() for x, _ in steps]).int().tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:] != list(range(10))
    assert all((y == torch.tensor([s % 2 for s in seen[4 * i:4 * i + 4]])).all() for i, (_, y) in enumerate(steps))
    whole, parts = data.batch(3, 1, 4, flip=True), [data.batch(3, 1, 4, slice(i, i + 2), True) for i in (0, 2)]
    assert torch.equal(torch.cat([p[0] for p in parts]), whole[0])
    flips = torch.cat([data.batch(3, step, 4, flip=True)[0][:, 0, 0, 3] > data.batch(3, step, 4)[0][:, 0, 0, 3] for step in range(100)])
    assert .4 < flips.float().mean() < .6
    assert torch.equal(data.held(3)[0], data.held(4)[0][:3]) and len(data.held(99)[0]) == 10


def test_muon_orthogonalises_the_momentum():
    weights = [rand(*shape, seed=i) for i, shape in enumerate([(8, 24), (8, 24), (24, 8), (8, 8)])]
    parameters, momenta = [torch.nn.Parameter(w.clone()) for w in weights], [torch.zeros_like(w) for w in weights]
    optimizer = train_tiny.Muon(parameters, 1e-2)
    for step in range(4):
        before = [p.detach().clone() for p in parameters]
        for i, p in enumerate(parameters):
            p.grad = None if (step, i) == (1, 2) else rand(*p.shape, seed=10 * step + i)
        optimizer.step()
        for i, (p, old) in enumerate(zip(parameters, before)):
            if p.grad is None:
                assert torch.equal(p, old)
                continue
            momenta[i] = .95 * momenta[i] + .05 * p.grad
            U, S, Vh = torch.linalg.svd(.05 * p.grad + .95 * momenta[i], full_matrices=False)         # Nesterov's look ahead
            update = (old - p.detach()) / (1e-2 * .2 * math.sqrt(max(p.shape)))
            inside = U.T @ update @ Vh.T                                              # diagonal, about 1: its singular values
            known = S / S.norm() > .03
            assert torch.allclose(inside.diag()[known], torch.ones(known.sum()), atol=.45)
            assert (inside - inside.diag().diag()).abs().max() < .05
    for p, w in zip(parameters, weights):
        assert not torch.equal(p, w)


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files` on loopback, with ranges; a path under /broken stops half-way, under /error it is an error page."""
    files, ranges = {}, []

    def do_GET(self):
        place, name = self.path.strip("/").split("/")
        data, start = self.files[name], int(self.headers["Range"][6:-1])
        self.ranges.append(start)
        if place == "error":
            self.send_response(200)
            data, start = b"<html>busy</html>", 0
        else:
            self.send_response(206)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:start + 1000] if place == "broken" else data[start:])

    def log_message(self, *_):
        pass


def test_downloads_resume_are_checked_and_say_where_to_put_the_file(tmp_path):
    data = np.random.default_rng(0).bytes(200_000)
    Server.files, Server.ranges = {"f.bin": data}, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, digest = f"http://127.0.0.1:{server.server_port}", sha256(data).hexdigest()
    try:
        path = train_tiny.fetch("f.bin", digest, [f"{url}/broken/", f"{url}/good/"], tmp_path)
        assert path.read_bytes() == data and Server.ranges == [0, 1000]
        assert train_tiny.fetch("f.bin", digest, [], tmp_path) == path
        path.write_bytes(b"x")
        with pytest.raises(ValueError, match="damaged"):
            train_tiny.fetch("f.bin", digest, [], tmp_path)
        path.unlink()
        for place in ("error", "broken", "none"):
            with pytest.raises(ValueError, match=f"put it at {re.escape(str(path))}"):
                train_tiny.fetch("f.bin", digest, [f"{url}/{place}/"] if place != "none" else ["http://127.0.0.1:9/"], tmp_path)
            assert not path.exists()
    finally:
        server.shutdown()


# ---------------------------------------------------------------------------------------------------------------------
# Command lines

TINY = ["--bricks", "16/4x1 8/4x1 8/2x1", "--width", "16", "--heads", "2", "--size", "16", "--batch", "8", "--device", "cpu"]


def in_process(module, *flags):
    """Run a command line in this process; returns its exit code."""
    old = sys.argv, {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [f"{module.__name__}.py", *map(str, flags)]
    try:
        train_tiny.command(module.main)
        return 0
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = old[0]
        for number, handler in old[1].items():
            signal.signal(number, handler)


def start(*command):
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=HERE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def weights_of(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)["train"]["weights"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    assert in_process(train_tiny, *TINY, "--steps", 60, "--lr", "8e-3", "--out", run) == 0
    return run


def test_training_learns_and_leaves_checkpoint_log_and_picture(trained):
    assert sorted(p.name for p in trained.iterdir()) == ["checkpoint.pt", "held_out.csv", "log.csv", "samples-0000060.png"]
    rows = np.genfromtxt(trained / "log.csv", delimiter=",", names=True)
    assert rows.dtype.names == ("step", "images", "seconds", "loss", "brick0", "brick1", "brick2", "low", "middle", "high")
    assert rows["step"].tolist() == [20, 40, 60] and rows["images"].tolist() == [160, 320, 480]
    assert 1.3 > rows["loss"][0] > rows["loss"][2] > .2
    model = load_checkpoint(trained / "checkpoint.pt")
    data = train_tiny.load_data("landscapes", "", 16)
    loss = train_tiny.held_out_loss(model, EDM(), data, train_tiny.pick_precision("fp32", torch.device("cpu")), count=64)[0].mean(0)
    fresh = train_tiny.held_out_loss(Lego(model.config), EDM(), data, train_tiny.pick_precision("fp32", torch.device("cpu")), count=64)[0].mean(0)
    assert max(loss) < .8 * min(fresh)
    assert model.info["classes"] == train_tiny.LANDSCAPES and model.info["images"] == 480


def test_the_checkpoint_holds_the_average_and_both_decay_with_the_schedule(trained):
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    apart = [(state["weights"][k] - w).abs().max().item() for k, w in state["train"]["weights"].items()]
    assert 0 < max(apart) < .2
    assert state["train"]["optimizers"][0]["param_groups"][0]["lr"] < 8e-3 * .05


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(tmp_path, kills):
    flags, random = [*TINY, "--steps", 200 * kills, "--precision", "fp32", "--brick-drop", ".2,.3,.4"], np.random.default_rng(kills)
    whole, run = start("train_tiny.py", *flags, "--out", tmp_path / "whole"), tmp_path / "broken"

    def go_on():
        again = ["--resume", run] if (run / "checkpoint.pt").exists() else [*flags, "--out", run, "--save-minutes", .005]
        return start("train_tiny.py", *again)
    for kill in range(kills):
        process = go_on()
        time.sleep(random.uniform(1.5, 5))                                            # some while it imports, some while it saves
        process.send_signal([signal.SIGKILL, signal.SIGTERM, signal.SIGINT][kill % 3])
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:                                             # a Ctrl-C that got lost while Python imported
            process.kill()
            process.communicate()
        if (run / "checkpoint.pt").exists():
            load_checkpoint(run / "checkpoint.pt")
    process, log = go_on(), run / "log.csv"
    read = lambda path: path.read_text() if path.exists() else ""
    before, deadline = read(log), time.time() + 60
    while len(read(log)) <= len(before) and process.poll() is None and time.time() < deadline:
        time.sleep(.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and f"go on with: python train_tiny.py --resume {run}" in said, said
    for process in (whole, start("train_tiny.py", "--resume", run, "--save-minutes", 100)):
        said = process.communicate(timeout=600)[0]
        assert process.returncode == 0, said
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "broken"))
    assert all(torch.equal(w, b["weights"][k]) and torch.equal(a["train"]["weights"][k], b["train"]["weights"][k]) for k, w in a["weights"].items())
    steps = [[line.split(",")[:2] + line.split(",")[3:] for line in (tmp_path / name / "log.csv").read_text().splitlines()]
             for name in ("whole", "broken")]                                         # all but the seconds
    assert steps[0] == steps[1] and len(steps[0]) == 10 * kills + 1 and not list(run.glob(".*"))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    run = tmp_path / "run"
    assert in_process(train_tiny, *TINY, "--steps", 5, "--out", run) == 0
    before = (run / "checkpoint.pt").read_bytes()
    full = start("-c", f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
                 f"sys.argv = ['train_tiny.py', '--resume', {str(run)!r}, '--steps', '9']; runpy.run_path('train_tiny.py', run_name='__main__')")
    said = full.communicate(timeout=60)[0]
    assert full.returncode == 2 and "make room and go on with --resume" in said.splitlines()[-1] and "Traceback" not in said, said
    assert (run / "checkpoint.pt").read_bytes() == before and not list(run.glob(".*"))
    assert in_process(train_tiny, "--resume", run, "--steps", 9) == 0


def test_a_batch_that_is_not_finite_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", *TINY, "--steps", "5", "--out", str(tmp_path / "run")])
    trainer = train_tiny.Trainer(*train_tiny.read_flags(), 0, 1)
    images, labels = trainer.data.batch(0, 0, 8)
    for step, bad in enumerate([False, True, False]):
        state = lambda: [t.clone() for t in trainer.parameters + [v for o in trainer.optimizers for p in o.state.values() for v in p.values()]]
        before = state()
        trainer.advance(torch.full_like(images, torch.nan) if bad else images, labels, step / 5)
        after = state()
        assert (len(before) == len(after) and all(map(torch.equal, before, after))) == bad
        assert all(t.isfinite().all() for t in after + trainer.averages) and not any(t.requires_grad for t in trainer.averages)
    assert trainer.unsound == 1 and trainer.step == 3 and trainer.sums.isfinite().all() and trainer.sums[1, 0] == 16


def test_two_processes_train_like_one(tmp_path):
    flags = [*TINY, "--steps", 4, "--precision", "fp32", "--region-fraction", "1,.5,.5", "--brick-drop", ".2", "--lr", "1e-4"]
    two = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_tiny.py", *flags, "--out", tmp_path / "two")
    assert in_process(train_tiny, *flags, "--out", tmp_path / "one") == 0
    said = two.communicate(timeout=180)[0]
    assert two.returncode == 0, said
    one, other = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    torch.manual_seed(0)
    initial = Lego(load_checkpoint(tmp_path / "one" / "checkpoint.pt").config).state_dict()
    for key in one:
        assert torch.allclose(one[key], other[key], atol=2e-6), key
    assert max((one[k] - initial[k]).abs().max() for k in one) > 1e-4                 # they did move


def test_ddpm_own_images_and_grayscale_by_command(tmp_path):
    for c, i in itertools.product("ab", range(12)):
        (tmp_path / "set" / c).mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / c / f"{i}.png").write_bytes(picture_file("L", colour=20 * i))
    assert in_process(train_tiny, *TINY, "--dataset", tmp_path / "set", "--objective", "ddpm", "--steps", 3, "--out", tmp_path / "run") == 0
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt").config.channels == 1
    for sampler in ("ancestral", "ddim"):
        out = tmp_path / f"{sampler}.npz"
        assert in_process(sample_tiny, "--ckpt", tmp_path / "run" / "checkpoint.pt", "--n", 3, "--steps", 3, "--sampler", sampler, "--out", out) == 0
        assert np.load(out)["arr_0"].shape == (3, 16, 16, 1)


def test_samples_do_not_depend_on_batch_or_container(trained, tmp_path):
    flags = ["--ckpt", trained / "checkpoint.pt", "--n", 5, "--steps", 3, "--size", "24x40", "--skip", "1@0-.5;2", "--guidance", 2,
             "--precision", "fp32"]
    for name, batch in (("a.npz", 5), ("b.npz", 2), ("folder", 2), ("sheet.png", 5)):
        assert in_process(sample_tiny, *flags, "--batch", batch, "--out", tmp_path / name) == 0
    a, b = np.load(tmp_path / "a.npz")["arr_0"], np.load(tmp_path / "b.npz")["arr_0"]
    folder = np.stack([np.asarray(Image.open(tmp_path / "folder" / f"{i:06d}.png")) for i in range(5)])
    assert a.shape == (5, 24, 40, 3) and a.dtype == np.uint8 and np.array_equal(b, folder)
    assert np.abs(a.astype(int) - b).max() <= 1 and len({image.tobytes() for image in a}) == 5
    assert in_process(sample_tiny, *flags, "--seed", 1, "--out", tmp_path / "c.npz") == 0
    assert np.abs(np.load(tmp_path / "c.npz")["arr_0"].astype(int) - a).mean() > 1
    assert Image.open(tmp_path / "sheet.png").size == (4 * (5 * 41 - 1), 4 * 24)


def test_sampling_says_what_it_does(trained, tmp_path, capsys):
    model = load_checkpoint(trained / "checkpoint.pt")
    assert in_process(sample_tiny, "--ckpt", trained / "checkpoint.pt", "--skip", "1,2", "--n", 2, "--steps", 5, "--out", tmp_path / "s.png") == 0
    said = capsys.readouterr().out
    assert "skipping 1,2" in said and said.count("skipped") == 2
    flops = 9 * sum(model.flops(16, 16, (1, 2))) / 1e9                                # 5 Heun steps are 9 evaluations
    assert f"{flops:.2f} GFLOPs" in said and "ms per image" in said
    assert in_process(sample_tiny, "--ckpt", trained / "checkpoint.pt", "--stages", "--steps", 9, "--out", tmp_path / "stages.png") == 0
    assert Image.open(tmp_path / "stages.png").size == (6 * (9 * 17 - 1), 6 * (4 * 17 - 1))
    assert in_process(sample_tiny, "--ckpt", trained / "checkpoint.pt", "--bench", "--batch", 2) == 0
    table = capsys.readouterr().out.splitlines()[-9:-2]
    assert [row.split()[0] for row in table] == ["nothing", "0", "1", "2", "0,1", "0,2", "1,2"]
    assert float(table[6].split()[7][:-1]) == pytest.approx(100 * sum(model.flops(16, 16, (1, 2))) / sum(model.flops(16, 16)), abs=.06)


def test_a_fresh_clone_samples_from_the_weights_it_brings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert in_process(sample_tiny, "--skip", "2,3", "--size", 64, "--n", 1, "--steps", 2) == 0
    shown = capsys.readouterr().out
    assert "assets/landscapes.pt" in shown and "1 images of 64x64" in shown
    assert in_process(sample_tiny, "--ckpt", HERE / "assets/cifar10.pt", "--skip", 2, "--n", 1, "--steps", 2) == 0
    monkeypatch.setattr(sample_tiny, "__file__", str(tmp_path / "sample_tiny.py"))         # copied without its weights
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert in_process(sample_tiny) == 2 and "train one with" in capsys.readouterr().err


def test_canvases_to_compare_with(trained, tmp_path):
    model = load_checkpoint(trained / "checkpoint.pt")
    tiled, one = (sample_tiny.stretched(model, span) for span in (0, 24))
    assert [b.region for b in tiled.config.bricks] == [16, 8, 8] and [b.region for b in one.config.bricks] == [24, 8, 8]
    labels, noise = torch.tensor([0, 1]), [generator("c", i) for i in range(2)]
    x0 = EDM().sample(tiled, (2, 3, 16, 24), labels, steps=1, sampler="euler", generator=noise, plain=True)
    noise = 80 * torch.stack([torch.randn(3, 16, 24, generator=generator("c", i)) for i in range(2)])
    assert torch.allclose(x0, EDM().denoise(tiled, noise, 80., labels), atol=1e-4)                # one walk over the canvas as it is
    for canvas in ("ours", "tiled", "one"):
        assert in_process(sample_tiny, "--ckpt", trained / "checkpoint.pt", "--n", 2, "--steps", 3, "--size", "24x24", "--canvas", canvas,
                          "--out", tmp_path / f"{canvas}.npz") == 0
    a, b, c = (np.load(tmp_path / f"{canvas}.npz")["arr_0"].astype(float) for canvas in ("ours", "tiled", "one"))
    assert min(np.abs(a - b).mean(), np.abs(b - c).mean()) > 1


def test_skip_auto_leaves_out_what_hardly_lowers_the_loss(trained):
    sigma, last = torch.tensor([8., .1, 1., .5, 4., 2.]), torch.full((6,), 10.)
    gain = torch.tensor([0., .05, .3, .3, .1, .3])                                    # of 60 in all: .12 may be lost on either side
    losses = torch.stack([last + gain, last, last], 1)
    useful = train_tiny.useful_levels(losses, sigma)
    assert useful == [(0, torch.inf), (.5, 2.), (0, 0)]
    model = load_checkpoint(trained / "checkpoint.pt")
    assert len(model.info["useful"]) == 3
    model.info["useful"] = useful
    at = sample_tiny.parse_skip("auto", model, [80., 2., 1., .4, 0.])
    assert [at(i / 4) for i in range(4)] == [{1, 2}, {2}, {2}, {1, 2}]
    for broken in ({}, dict(useful=3), dict(useful=[("low", "high")])):
        model.info = broken
        with pytest.raises(ValueError, match="has not measured"):
            sample_tiny.parse_skip("auto", model, [80., 0.])


def test_sliced_wasserstein_distance_tells_at_which_scale_images_differ():
    a, b = (np.random.default_rng(i).integers(0, 128, (40, 64, 64, 3), np.uint8) for i in range(2))
    floor = sample_tiny.distances(a, b)
    stripes = lambda width, height: a + (np.arange(64) // width % 2 * height).astype(np.uint8)[:, None]
    fine, broad, faint = (sample_tiny.distances(a, stripes(*s)) for s in ((1, 120), (16, 120), (16, 12)))
    assert len(floor) == 3 and max(floor) < 50
    assert fine[0] > 5 * floor[0] and fine[2] < 2 * floor[2]                          # seen by the finest level alone
    assert broad[2] > 5 * floor[2] and broad[2] > 2 * max(broad[:2])                  # seen by the coarsest most
    assert 1.2 * floor[2] < faint[2] < broad[2]
    assert all(level.abs().max() < 1e-6 for level in sample_tiny.pyramid(torch.ones(1, 1, 64, 64))[:2])


def test_seam_ratio(trained, capsys):
    column = np.arange(32)
    steps, ramp = ((c.astype(np.uint8)[None, None, :, None] * np.ones((2, 32, 1, 3), np.uint8)) for c in (column // 8 * 10 + column % 8, column))
    assert sample_tiny.seam_ratio(steps, ramp, 8, 2) == pytest.approx(3)              # 3 across borders, 1 elsewhere
    assert sample_tiny.seam_ratio(steps.transpose(0, 2, 1, 3), ramp.transpose(0, 2, 1, 3), 8, 1) == pytest.approx(3)
    assert in_process(sample_tiny, "--ckpt", trained / "checkpoint.pt", "--eval", "landscapes", "--n", 4, "--steps", 3, "--size", "16x32") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = lines[-2:]
    assert len(re.findall(r"\d+\.\d \(\d+\.\d\)", lines[-4])) == 2 and [row.split()[0] for row in rows] == ["8", "16"] and len(re.findall(r"\d\.\d\d \(\d\.\d\d\)", rows[0])) == 2


@pytest.mark.parametrize("flags, word", [
    (["--dataset", "nowhere"], "nowhere"), (["--bricks", "16/5x1"], "take region 20"), (["--preset", "huge"], "unknown preset"),
    (["--steps", "0"], "--steps"), (["--minutes", "nan"], "--minutes"), (["--lr", "-1"], "--lr"), (["--batch", "0"], "--batch"),
    (["--region-fraction", "1,2"], "--region-fraction"), (["--brick-drop", "1"], "--brick-drop"), (["--frobnicate"], "--frobnicate"),
    (["--device", "abacus"], "abacus"), (["--resume", "nowhere"], "nowhere"), (["--steps", "many"], "--steps"), (["--size", "0"], "--size"),
    (["--dataset", "README.md"], "not a readable zip"), (["--heads", "5"], "take width"), (["--width", "0"], "width"), (["--width", "-4"], "width"),
    (["--bricks", "8/2x1", "--preset", "tiny"], "not allowed with"), (["--steps", "5", "--minutes", "1"], "not allowed with"),
    (["--bricks", "2048/1x1"], "tokens per region are too many"), (["--bricks", "8/2x99999"], "depth"), (["--lr", "nan"], "--lr"),
    (["--width", "1048576"], "from 4 to 16384"), (["--batch", "99999"], "--batch"), (["--label-drop", "1.5"], "--label-drop"), (["--save-minutes", "-1"], "--save-minutes"),
    (["--seed", "-1"], "--seed"), (["--out", "README.md/run"], "README.md"), (["--resume", "assets"], "assets"),
    (["--without", "luck"], "take some of local_mlp")])
def test_bad_training_flags_give_one_line_and_exit_code_2(flags, word, capsys, tmp_path):
    defaults = {} if "--steps" in flags or "--minutes" in flags else {"--steps": 1}
    assert in_process(train_tiny, "--out", tmp_path / "run", *itertools.chain(*defaults.items()), *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert word in error[-1] and "Traceback" not in "".join(error) and not (tmp_path / "run").exists()
    assert len([line for line in error if line.strip() and "files/s" not in line]) == 1                # but for a progress bar


@pytest.mark.parametrize("flags, word", [
    (["--skip", "0,1,2"], "cannot skip all"), (["--skip", "7"], "bricks 0 to 2"), (["--skip", "1@.5-.2"], "must rise"), (["--skip", "x"], "--skip"),
    (["--skip", "0@0-1;1,2@.5-1"], "cannot skip all"), (["--size", "64x"], "--size"), (["--size", "0"], "--size"), (["--n", "0"], "--n"),
    (["--label", "dragon"], "dragon"), (["--label", "4"], "--label"), (["--guidance", "nan"], "--guidance"), (["--out", "x.bmp"], "x.bmp"),
    (["--ckpt", "nowhere.pt"], "nowhere.pt"), (["--ckpt", "README.md"], "not a LEGO checkpoint"), (["--sampler", "magic"], "--sampler"),
    (["--steps", "0"], "--steps"), (["--steps", "99999"], "--steps"), (["--size", "99999x99999"], "--size"), (["--size", "-4"], "--size"),
    (["--guidance", "-1"], "--guidance"), (["--guidance", "inf"], "--guidance"), (["--churn", "nan"], "--churn"), (["--batch", "0"], "--batch"),
    (["--seed", "-1"], "--seed"), (["--skip", "-1"], "--skip"), (["--skip", "0@0.5"], "--skip"), (["--stages", "--bench"], "not allowed with"),
    (["--out", "README.md/s.png"], "README.md"), (["--label", "-1"], "--label"),
    (["--stages", "--size", "8"], "--size 16 or more"), (["--eval", "landscapes", "--size", "40x4"], "40x4 are too small")])
def test_bad_sampling_flags_give_one_line_and_exit_code_2(trained, flags, word, capsys, tmp_path):
    assert in_process(sample_tiny, "--ckpt", trained / "checkpoint.pt", "--out", tmp_path / "s.png", *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and word in error[0] and not (tmp_path / "s.png").exists()


def test_a_run_is_neither_overwritten_nor_resumed_as_another(trained, capsys):
    assert in_process(train_tiny, *TINY, "--steps", 1, "--out", trained) == 2 and "--resume" in capsys.readouterr().err
    assert in_process(train_tiny, "--resume", trained, "--lr", ".1") == 2 and "contradicts" in capsys.readouterr().err


def test_the_example_in_the_readme_runs():
    example = re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)[1]
    exec(example, scope := {})
    assert scope["samples"].shape == (4, 3, 32, 32) and scope["samples"].isfinite().all() and scope["per_brick"].shape == (8, 3)


def test_bricks_that_repeat_train_less():
    def defaults(stack):
        return train_tiny.shares(Namespace(region_fraction=None, brick_drop=None), LegoConfig.parse(stack, width=8, heads=2))

    assert defaults("32/4x6 16/2x2 8/2x1 4/2x1") == ([1, .25, .25, .25], [0, 0, .75, .75])
    assert defaults("4/2x1 8/2x1 16/2x2 32/4x6") == ([.25, .25, .25, 1], [0] * 4)          # each has the larger region
    assert defaults("32/4x6 16/4x1 8/2x1 16/4x1 32/2x1") == ([1, 1, .25, 1, .25], [0, .75, 0, .75, 0])


# ---------------------------------------------------------------------------------------------------------------------
# The notebook

NOTEBOOK = HERE / "walkthrough.ipynb"
RUN_CELLS = """
import ast, json, sys
sys.path.insert(0, ".")
def display(thing):
    "Ask for what Jupyter would show."
    shown = [getattr(thing, name)() for name in ("_repr_png_", "_repr_svg_", "_repr_markdown_") if hasattr(thing, name)]
    assert thing is None or any(shown) or repr(thing)
scope = dict(display=display, __name__="__main__")
for i, cell in enumerate(c for c in json.load(open(sys.argv[1]))["cells"] if c["cell_type"] == "code"):
    tree = ast.parse("".join(cell["source"]))
    if isinstance(tree.body[-1], ast.Expr):
        tree.body[-1].value = ast.Call(ast.Name("display", ast.Load()), [tree.body[-1].value], [])
    exec(compile(ast.fix_missing_locations(tree), f"code cell {i + 1}", "exec"), scope)
globals().update(scope)

# What each neighbour must be in a limiting case; the cells themselves check the others.
whole, first = (draw(model, n=2, skip=skip)[0] for skip in ((), (1, 2, 3)))
assert torch.equal(draw(model, n=2, skip=stitched(0))[0], whole) and torch.equal(draw(model, n=2, skip=stitched(1))[0], first)
x = many[:4]
for scale in (.01, 1):
    guided = toward(kinds, 2, scale)(x, x, .5)
    assert kinds(guided).log_softmax(1)[:, 2].mean() > kinds(x).log_softmax(1)[:, 2].mean()
assert torch.equal(expert()(x), kinds(x)) and not torch.equal(experts[0](x), kinds(x))
h, c, moved, TimeNormBlock.label = torch.randn(4, 2, 16, 64), torch.zeros(4, 64), {}, torch.zeros(1)
for kind in (TimeNormBlock, NoTimeBlock):
    block, TimeNormBlock.tau = kind(SMALL), 1.
    assert torch.equal(block(h, c), h)                                      # its gates are closed
    for p in block.parameters():
        torch.nn.init.normal_(p, std=.1)
    at = []
    for TimeNormBlock.tau in (-1., 1.):
        at.append(block(h, c))
    moved[kind] = not torch.equal(*at)
assert moved == {TimeNormBlock: True, NoTimeBlock: False}
patchwise, other = Codec(4, encoder=0, decoder=0), x.clone()
other[:, :, :4, :4] += 1
apart = (patchwise.decode(patchwise.encode(x)[0]) - patchwise.decode(patchwise.encode(other)[0])).abs().amax((0, 1))
assert apart[:4, :4].min() > 0 and not apart[4:].any() and not apart[:4, 4:].any()
assert torch.equal(unpatchify(patchify(x, 32, 4), 32, 4, 32, 32), x)
"""


def test_the_notebook_was_run_from_top_to_bottom():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert {out["output_type"] for cell in cells for out in cell["outputs"]} <= {"stream", "display_data", "execute_result"}
    assert not any(out.get("name") == "stderr" for cell in cells for out in cell["outputs"]) and NOTEBOOK.stat().st_size < 4e6


def test_every_cell_of_the_notebook_runs():
    run = subprocess.run([sys.executable, "-c", RUN_CELLS, NOTEBOOK], env=os.environ | dict(LEGO_QUICK="1"), cwd=HERE, text=True,
                         capture_output=True)
    assert run.returncode == 0, run.stderr[-3000:]
