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
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention, silu
from torch.utils.flop_counter import FlopCounterMode

import lego
import sample_tiny
import train_tiny
from lego import (DDPM, EDM, PRESETS, BrickSpec, Diffusion, Lego, LegoConfig, canvases, generator, load_checkpoint,
                  load_official, patchify, position_table, read_checkpoint, save_checkpoint, time_features)

HERE = Path(__file__).parent
SMALL = LegoConfig.parse("16/4x2 8/4x1 8/2x1 4/2x1", width=16, heads=2, classes=3)
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def filled(config, seed=0):
    """A network whose every parameter matters: the zero initialisation would hide most mistakes."""
    model, g = Lego(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (.2 if p.ndim == 1 else p.shape[1] ** -.5))
    return model.eval()


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- The authors' network --------------------------------------------------------------------------------------------

PARITY = [  # figures computed once with the released code: size, means and deviations of F_k, D_k at six places
    (16, [-.2325003, .0217738, .1682498], [1.1442115, .7578898, .7614422],
     [[-.664322, .290041, .346278, .375216, -.647384, -.123215], [.246065, .334309, .710935, .62376, .533661, -.412894],
      [.340409, .860641, .71022, .194279, .336586, .490328]]),
    (32, [-.2261839, .0242824, .1659942], [1.1170849, .8440744, .7525996],
     [[-.597899, -1.301163, .668523, .417991, -.694439, -.100427], [.149863, -1.116437, .665853, .764227, .518659, -.374823],
      [.281332, -.465189, .857956, .230756, .732195, .45431]])]


def official_weights(config):
    """Names and shapes of the released network's parameters, filled with sine waves."""
    D = config.width
    shapes = {"t_embedder.mlp.0": (D, 256), "t_embedder.mlp.2": (D, D), "y_embedder.embedding_table": (D, config.classes)}
    block = {"attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.fc1": (4 * D, D), "mlp.fc2": (D, 4 * D),
             "adaLN_modulation.1": (6 * D, D)}
    for k, b in enumerate(config.bricks):
        shapes |= {f"model.{k}.blocks.{j}.{name}": shape for j in range(b.depth) for name, shape in block.items()}
        shapes |= {f"model.{k}.x_embedder.proj": (D, 5 if k == 0 else 8, b.patch, b.patch),
                   f"model.{k}.final_layer.adaLN_modulation.1": (2 * D, D),
                   f"model.{k}.final_layer.linear": (b.patch ** 2 * 3, D)}
    shapes = {f"{n}.weight": s for n, s in shapes.items()} | {f"{n}.bias": s[:1] for n, s in shapes.items()}
    wave = lambda k, shape: .08 * torch.sin(.37 * torch.arange(math.prod(shape), dtype=torch.float64) + k)
    return {name: wave(k, shape).reshape(shape).float() for k, (name, shape) in enumerate(sorted(shapes.items()))}


@pytest.mark.parametrize("S, means, stds, samples", PARITY, ids=["PG", "PG-retiled"])
def test_parity_with_the_released_network(S, means, stds, samples):
    config = LegoConfig.official("4/2x1 8/4x1 16/2x2", width=32, heads=4)
    model = Lego(config)
    load_official(model, official_weights(config) | {"model.1.pos_embed": position_table(2, 32)[None]})
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


@pytest.mark.parametrize("name, millions", [
    ("S-PG-64", 33.74), ("S-PR-64", 33.74), ("S-U-64", 61.22), ("L-PG-64", 500.57), ("L-PG-64-released", 462.79),
    ("L-PG-32", 462.79), ("XL-PG-32", 729.05), ("XL-PG-64", 729.05), ("XL-U-32", 1261.37)])
def test_parameter_counts_of_the_authors_stacks(name, millions):
    with torch.device("meta"):
        model = Lego(PRESETS[name])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


# ---- Stacks, bricks, skipping ----------------------------------------------------------------------------------------


def test_stacks_are_read_and_mistakes_say_what_to_change():
    parse = lambda stack, **settings: LegoConfig.parse(stack, **dict(width=8, heads=2) | settings)
    assert parse("32/4x6 8/2x1").bricks == (BrickSpec(32, 4, 6), BrickSpec(8, 2, 1)) and parse("8/2x1 32/4x6").size == 32
    model, x, t = filled(SMALL), rand(1, 3, 16, 16), torch.zeros(1)
    released = LegoConfig.official("4/2x1 8/4x1", width=32, heads=4)
    weights, load = official_weights(released), lambda weights: load_official(Lego(released), weights)
    for said, mistake in {
            "take region 35": lambda: parse("32/5x1"), "such as 32/4x6": lambda: parse("32-4x1"),
            "at least one brick": lambda: parse(""), "depth must be": lambda: parse("8/2x0"),
            "take width 12": lambda: parse("8/2x1", width=10), "heads must be": lambda: parse("8/2x1", heads=0),
            "classes must be": lambda: parse("8/2x1", classes=-1), "cannot skip all 4": lambda: model(x, t, skip=range(4)),
            "cannot skip brick [4]": lambda: model(x, t, skip=[4]), "cannot skip brick [-1]": lambda: model(x, t, skip=[-1]),
            "1 generators for 2": lambda: EDM().sample(model, (2, 3, 16, 16), generator=[generator(0)]),
            "needs labels": lambda: EDM().denoise(model, x, 1., guidance=2.),
            "no classes": lambda: Lego(replace(SMALL, classes=0))(x, t, torch.tensor([0])),
            "Missing key": lambda: load({name: w for name, w in weights.items() if "qkv" not in name}),
            "Unexpected key": lambda: load(weights | {"model.7.pos_embed": torch.zeros(1)}),
            "position table differs": lambda: load(weights | {"model.0.pos_embed": torch.zeros(1, 4, 32)})}.items():
        with pytest.raises(ValueError, match=re.escape(said)):
            mistake()


def test_attention_is_the_fused_kernel():
    for N, gradients in itertools.product((9, 40), (True, False)):                    # 40 tokens: fused only without gradients
        q, k, v = rand(3, 6, 2, N, 4)
        for mask in (None, (rand(6, 1, N, N) > -1) | torch.eye(N, dtype=bool)):
            with torch.set_grad_enabled(gradients):
                assert torch.allclose(lego.attention(q, k, v, mask), scaled_dot_product_attention(q, k, v, mask), atol=1e-6)


def test_a_new_network_is_zero_and_its_blocks_the_identity():
    model, h = Lego(SMALL), rand(2, 1, 16, 16)
    assert not model(rand(2, 3, 16, 16), torch.zeros(2)).any()
    assert torch.equal(model.bricks[0].blocks[0](h, rand(2, 16)), h)


def slow_brick(brick, x, z, c, offset=(0, 0), wrap=False):
    """A brick by plain loops over one image: every region, every token, every pixel (i, j) of the grid of regions."""
    (C, H, W), (r, p), cfg = x.shape, (brick.spec.region, brick.spec.patch), brick.config
    top, left, turn = -offset[0] % r, -offset[1] % r, 0                               # the canvas lies this far inside the grid
    if wrap and W % r == 0:
        left, turn = 0, offset[1] % r
    rows, columns = math.ceil((top + H) / r), math.ceil((left + W) / r)
    spread = lambda i, side: 2 * i / max(side - 1, 1) - 1
    place = lambda i, n, side, before: (spread(i - before, side) if cfg.stretch else
                                        spread(i // r * math.ceil(cfg.size / r) // n * r + i % r, cfg.size))
    inside = lambda i, j: 0 <= i - top < H and 0 <= j - left < W
    at = lambda i, j: (slice(None), min(max(i - top, 0), H - 1), (min(max(j - left, 0), W - 1) + turn) % W)
    coordinates = lambda i, j: torch.tensor([place(i, rows, H, top), place(j, columns, W, left)], dtype=x.dtype)
    inputs = lambda i, j: [z[at(i, j)], x[at(i, j)], coordinates(i, j)][brick.first:]
    norm = lambda h, shift, scale: layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift
    square, out = list(itertools.product(range(p), repeat=2)), z.clone()
    for y, x_ in itertools.product(range(0, rows * r, r), range(0, columns * r, r)):
        patches = [[(y + i * p + a, x_ + j * p + b) for a, b in square] for i, j in itertools.product(range(r // p), repeat=2)]
        seen = [n for n, patch in enumerate(patches) if any(inside(i, j) for i, j in patch)]
        h = brick.local(torch.stack([torch.cat([part for i, j in patches[n] for part in inputs(i, j)]) for n in seen]))
        if brick.local_mlp is not None:
            h = brick.local_mlp(gelu(h, approximate=cfg.gelu))
        h = h + brick.position[seen]
        for block in brick.blocks:
            s1, a1, g1, s2, a2, g2 = block.adaln(c).chunk(6)
            q, k, v = block.qkv(norm(h, s1, a1)).chunk(3, 1)
            heads = [torch.softmax(qh @ kh.T / math.sqrt(qh.shape[1]), 1) @ vh
                     for qh, kh, vh in zip(*(t.chunk(cfg.heads, 1) for t in (q, k, v)))]
            h = h + g1 * block.proj(torch.cat(heads, 1))
            h = h + g2 * block.fc2(gelu(block.fc1(norm(h, s2, a2)), approximate=cfg.gelu))
        decoded = brick.decode(norm(h, *brick.adaln(c).chunk(2))).view(-1, p * p, C)
        for n, pixels in zip(seen, decoded):
            for (i, j), new in zip(patches[n], pixels):
                if inside(i, j):
                    out[at(i, j)] = new + (z[at(i, j)] if cfg.residual else 0)
    return out


@pytest.mark.parametrize("H, W, offset, wrap", [
    (16, 16, (0, 0), False), (13, 21, (0, 0), False), (3, 5, (0, 0), False), (1, 1, (0, 0), False), (16, 32, (0, 5), True),
    (24, 32, (3, 6), False), (19, 30, (9, 2), True)])
@pytest.mark.parametrize("official", [False, True])
def test_any_canvas_equals_a_slow_plain_brick(H, W, offset, wrap, official, monkeypatch):
    monkeypatch.setitem(lego.CHUNK, "cpu", 100)           # without gradients the regions go through in chunks, here of a few
    config = LegoConfig.official(str(SMALL), width=16, heads=2, classes=3) if official else SMALL
    model = filled(config).double()
    x, z, c = (rand(*shape, seed=i).double() for i, shape in enumerate([(2, 3, H, W), (2, 3, H, W), (2, 16)]))
    for brick in model.bricks:
        with torch.no_grad():
            slow = torch.stack([slow_brick(brick, *item, offset, wrap) for item in zip(x, z, c)])
            chunked = brick(x, z, c, offset=offset, wrap=wrap)
        for fast in (chunked, brick(x, z, c, offset=offset, wrap=wrap)):
            assert torch.allclose(fast, slow, atol=2e-6), f"brick {brick.spec}"      # coordinates are float32


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.slow] * (seed >= 20)) for seed in range(200)])
def test_random_stacks_on_random_canvases(seed):
    random = np.random.default_rng(seed)
    pick = lambda *options: options[random.integers(len(options))]
    heads, stack = pick(1, 2, 3), []
    for _ in range(random.integers(1, 4)):
        patch = int(random.integers(1, 5))
        stack.append(BrickSpec(patch * int(random.integers(1, 4)), patch, int(random.integers(1, 3))))
    config = LegoConfig(tuple(stack), width=12 * heads, heads=heads, channels=pick(1, 3), classes=pick(0, 2),
                        size=int(random.integers(1, 13)), mlp_ratio=pick(1, 2), local_mlp=pick(True, False),
                        residual=pick(True, False), stretch=pick(True, False), gelu=pick("none", "tanh"))
    B, H, W = (int(n) for n in random.integers(1, [3, 11, 11]))
    offset, wrap = tuple(random.integers(0, 9, 2).tolist()), pick(True, False)
    skip = set(random.permutation(len(stack))[:random.integers(len(stack))].tolist())
    model, x, t = filled(config, seed).double(), rand(B, config.channels, H, W).double(), torch.linspace(-1, 1, B).double()
    with torch.no_grad():
        c = silu(model.time(time_features(4 * t).double()) + (model.label.bias if config.classes else 0))
        z, out = torch.zeros_like(x), []
        for k in sorted(set(range(len(stack))) - skip):
            z = torch.stack([slow_brick(model.bricks[k], *item, offset, wrap) for item in zip(x, z, c)])
            out.append(z)
        every = model(x, t, skip=skip, return_all=True, offset=offset, wrap=wrap)
        assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-5) for a, b in zip(every, out, strict=True))
        half = model.bfloat16()(x.float(), t.float(), skip=skip, offset=offset, wrap=wrap)
        assert half.dtype == torch.float32 and (half - z).norm() < .1 * z.norm() + .1


@pytest.mark.parametrize("skip", [s for n in range(4) for s in itertools.combinations(range(4), n)])
def test_skipped_bricks_hand_on_z_and_cost_nothing(skip):
    model, x, t, y = filled(SMALL), rand(2, 3, 16, 24), torch.tensor([-.5, .3]), torch.tensor([0, 2])
    for settings in (dict(), dict(offset=(3, 5)), dict(offset=(0, 5), wrap=True)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            every = model(x, t, y, skip=skip, return_all=True, **settings)
        flops, out = model.flops(16, 24, skip, **settings), []
        assert counter.get_total_flops() == 2 * sum(flops) and not any(flops[k] for k in skip)
        c, z = silu(model.time(time_features(4 * t)) + model.label.weight.T[y] + model.label.bias), torch.zeros_like(x)
        for k in sorted(set(range(4)) - set(skip)):
            z = model.bricks[k](x, z, c, **settings)
            out.append(z)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(every, out, strict=True))


def test_sampled_regions_equal_the_full_run_and_pass_z_elsewhere(monkeypatch):
    monkeypatch.setitem(lego.CHUNK, "cpu", 32)                                        # a region at a time
    for config in (SMALL, LegoConfig.official(str(SMALL), width=16, heads=2, classes=3)):
        brick, c = filled(config).bricks[2], rand(2, 16)
        x, z, chosen = rand(2, 3, 13, 16), rand(2, 3, 13, 16, seed=1), torch.tensor([3, 0])           # 3 is partly padding
        with torch.no_grad(), FlopCounterMode(display=False) as whole:
            full = brick(x, z, c)
        with torch.no_grad(), FlopCounterMode(display=False) as half:
            part = brick(x, z, c, regions=chosen)
        for region in range(4):
            here = np.s_[:, :, region // 2 * 8:region // 2 * 8 + 8, region % 2 * 8:region % 2 * 8 + 8]
            assert torch.allclose(part[here], (full if region in chosen else z)[here], atol=1e-6)
        assert torch.allclose(part, brick(x, z, c, chosen), atol=1e-6)                # with gradients: all at once
        assert half.get_total_flops() == whole.get_total_flops() / 2                  # even of adaLN, computed once a chunk


@pytest.mark.parametrize("detach", [True, False])
def test_which_bricks_a_loss_trains(detach):
    model, x = filled(replace(SMALL, detach=detach)), rand(2, 3, 16, 16)
    model(x, torch.zeros(2), return_all=True)[2].square().mean().backward()
    reached = [any(p.grad is not None and bool(p.grad.any()) for p in brick.parameters()) for brick in model.bricks]
    assert reached == [not detach, not detach, True, False] and model.time[0].weight.grad.any()
    draws = lambda **how: EDM().loss(model, x, generator=generator(1), **how)
    (every, each, _), (last, again, _) = draws(), draws(supervise_all=False)
    assert torch.allclose(every, each.mean()) and torch.allclose(last, each[:, -1].mean()) and torch.equal(each, again)


# ---- Diffusion -------------------------------------------------------------------------------------------------------


def test_edm_coefficients_satisfy_their_identities():
    sigma, edm = torch.logspace(-3, 2, 50, dtype=torch.float64), EDM()
    (c_skip, c_out, c_in, c_noise), sd, one = edm.coefficients(sigma), edm.sigma_data, torch.ones_like(sigma)
    error = lambda c: (1 - c) ** 2 * sd ** 2 + c ** 2 * sigma ** 2
    assert torch.allclose(c_in ** 2 * (sigma ** 2 + sd ** 2), one)                    # the input has unit variance
    assert torch.allclose(error(c_skip) / c_out ** 2, one)                            # so has the target
    assert (error(c_skip) <= torch.minimum(error(c_skip + 1e-3), error(c_skip - 1e-3))).all()     # F's errors grow least
    assert torch.allclose((4 * c_noise).exp(), sigma)
    assert [edm.levels(18)[i] for i in (0, 17, 18)] == pytest.approx([80, .002, 0])
    assert edm.sigma_at(torch.tensor([.15865525, .5, .84134475])).log().tolist() == pytest.approx([-2.4, -1.2, 0], abs=1e-4)


@pytest.mark.parametrize("diffusion", [EDM(), DDPM()])
@pytest.mark.parametrize("device", DEVICES)
def test_loss_is_the_formula_for_the_chosen_regions_and_bricks(diffusion, device):
    model, x0, noise = (part.to(device) for part in (filled(SMALL), rand(4, 3, 16, 16) * .5, rand(4, 3, 16, 16, seed=3)))
    sigma, fractions, y = torch.tensor([.1, .5, 1., 4.], device=device), [1, .5, .25, .125], torch.arange(4, device=device)
    loss = lambda **how: diffusion.loss(model, x0, y, sigma=sigma, noise=noise, generator=generator(1), **how)
    scalar, losses, used = loss(region_fraction=fractions)
    point, s = torch.rand(2, generator=generator(1)) * 16, sigma.view(-1, 1, 1, 1)
    weight = (s ** 2 + .25) / (s * .5) ** 2 if isinstance(diffusion, EDM) else s ** -2                  # lambda(sigma)
    c_skip, c_out, c_in, _ = diffusion.coefficients(s)
    label = torch.cat([model.label.weight.T, x0.new_zeros(1, 16)]) + model.label.bias                   # 3 is "no label"
    x, z, c, expected = x0 + s * noise, torch.zeros_like(x0), silu(model.time(time_features(sigma.log())) + label), []
    for k, brick in enumerate(model.bricks):
        side, count = brick.spec.region, (16 // brick.spec.region) ** 2
        middles = [((i // (16 // side) + .5) * side, (i % (16 // side) + .5) * side) for i in range(count)]
        apart = [max(min(abs(m - p), 16 - abs(m - p)) for m, p in zip(middle, point)) for middle in middles]
        chosen = torch.tensor(sorted(range(count), key=lambda i: apart[i])[:round(fractions[k] * count)], device=device)
        z = brick(c_in * x, z, c, chosen)
        error = weight * (c_skip * x + c_out * z - x0) ** 2
        expected.append(patchify(error, side, brick.spec.patch)[:, chosen].mean((1, 2, 3)))
    expected = torch.stack(expected, 1)
    assert torch.allclose(losses, expected, rtol=1e-3) and torch.equal(used, sigma)
    assert scalar.item() == pytest.approx(expected.mean().item(), rel=1e-3)
    scalar, losses, _ = loss(skip=[1, 3])
    assert losses[:, [1, 3]].isnan().all() and scalar.item() == pytest.approx(losses[:, [0, 2]].mean().item() / 2, rel=1e-5)


@pytest.mark.parametrize("diffusion", [EDM(), DDPM(), DDPM("linear")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_finite_at_the_ends_of_the_noise(diffusion, dtype):
    for sigma in diffusion.levels(2)[:2]:
        model, x0 = Lego(SMALL), rand(4, 3, 16, 16).clamp(-1, 1)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss, *_ = diffusion.loss(model, x0, torch.arange(4) % 3, sigma=torch.full((4,), sigma))
            estimate = Diffusion.denoise(diffusion, model, x0 + sigma * rand(4, 3, 16, 16, seed=1), sigma)
        loss.backward()
        assert torch.cat([p.grad.flatten() for p in model.parameters()]).norm() < 100
        assert loss.item() < 3 and estimate.isfinite().all()


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


@pytest.mark.parametrize("diffusion, sampler, order, counts", [
    (EDM(), "heun", 2, (20, 40, 80)), (EDM(), "euler", 1, (40, 80, 160)), (DDPM("linear"), "euler", 1, (50, 100, 200)),
    (DDPM(), "euler", 1, (100, 200, 400))])
def test_samplers_reach_the_exact_solution_at_their_order(diffusion, sampler, order, counts):
    model, errors = Gaussian(diffusion), []
    for steps in counts:
        first = diffusion.levels(steps)[0]
        noise = first * lego.normal((64, 1, 4, 4), generator(0), "cpu").double()
        exact = model.m + (noise - model.m) * model.s / math.hypot(model.s, first)    # as many deviations from the mean
        samples = diffusion.sample(model, (64, 1, 4, 4), steps=steps, sampler=sampler, generator=generator(0)).double()
        errors.append((samples - exact).square().mean().sqrt().item())
    for coarse, fine in itertools.pairwise(errors):
        assert 2 ** (order - .35) < coarse / fine < 2 ** (order + .6), errors
    assert errors[-1] < .04 * model.s


@pytest.mark.parametrize("diffusion, sampler, steps, churn", [
    (DDPM(), "ancestral", 400, 0), (EDM(), "ancestral", 400, 0), (EDM(), "heun", 100, 40)])
def test_stochastic_samplers_reach_the_distribution(diffusion, sampler, steps, churn):
    model, settings = Gaussian(diffusion), dict(sampler=sampler, steps=steps, churn=churn)
    samples = diffusion.sample(model, (4000, 1, 4, 4), generator=generator(1), **settings)
    assert samples.mean().item() == pytest.approx(model.m, abs=5 * model.s / math.sqrt(samples.numel()))
    assert samples.std().item() == pytest.approx(model.s, rel=.03)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddpm_marginals(schedule):
    ddpm, scale, variance = DDPM(schedule), 1., 0.
    f = np.cos((np.arange(1001) / 1000 + .008) / 1.008 * math.pi / 2) ** 2
    beta = np.linspace(1e-4, .02, 1000) if schedule == "linear" else np.minimum(1 - f[1:] / f[:-1], .999)
    for t in range(1000):                                                             # q(x_t | x_{t-1}) applied t times
        scale, variance = scale * math.sqrt(1 - beta[t]), variance * (1 - beta[t]) + beta[t]
        assert ddpm.abar[t].item() == pytest.approx(scale ** 2, rel=1e-9)
        assert ddpm.sigmas[t].item() == pytest.approx(math.sqrt(variance) / scale, rel=1e-6)


def test_ddpm_denoise_takes_t_and_a_variance_preserving_image():
    ddpm, model, x, t = DDPM(), filled(SMALL), rand(2, 3, 16, 16), torch.tensor([100, 700])
    a = ddpm.abar[t].float().view(-1, 1, 1, 1)
    with torch.no_grad():
        eps = model(x, ddpm.sigmas[t].log() / 4)
        assert torch.allclose(ddpm.denoise(model, x, t), (x - (1 - a).sqrt() * eps) / a.sqrt(), rtol=1e-4, atol=1e-4)


def test_guidance():
    model, x, y, edm = filled(SMALL), rand(2, 3, 16, 16), torch.tensor([0, 2]), EDM()
    with torch.no_grad():
        wanted, none = edm.denoise(model, x, 1., y, skip=[1]), edm.denoise(model, x, 1., skip=[1])
        assert torch.allclose(edm.denoise(model, x, 1., y, skip=[1], guidance=3.0), none + 3 * (wanted - none), atol=1e-5)
        assert (wanted - none).abs().max() > .01


def test_skip_schedule_guide_and_callback():
    model, known, calls, seen = filled(SMALL), rand(1, 3, 16, 16), [], []
    run = lambda **s: EDM().sample(model, (1, 3, 16, 16), steps=4, generator=generator(0), **s)
    scheduled = run(skip=lambda progress: calls.append(progress) or ([2, 3] if progress < .5 else []))
    assert calls == [0, .25, .5, .75] and not torch.equal(scheduled, run()) and torch.equal(run(skip=lambda p: ()), run())
    guide = lambda x0, x, sigma: known if x.shape == x0.shape and sigma > 0 else x0
    assert torch.allclose(run(guide=guide, callback=lambda *news: seen.append(news)), known, atol=1e-5)
    assert [news[:2] for news in seen] == [(i, 4) for i in range(1, 5)] and torch.equal(seen[-1][2], known)


def test_canvases_grow_from_the_training_height():
    assert canvases(32, 32, 32) == [(32, 32)] and canvases(32, 32, 128) == [(32, 128)]
    assert canvases(32, 64, 64) == [(32, 32), (64, 64)] and canvases(32, 100, 200) == [(32, 64), (64, 128), (100, 200)]
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
        assert (samples.mean(0) - model.m).abs().max() < 5 * model.s / math.sqrt(1500)
        assert shape[0] > 8 or (samples.std(0) / model.s - 1).abs().max() < .12


# ---- Checkpoints and data sets ---------------------------------------------------------------------------------------


def zip_of(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_checkpoints_round_trip_and_nothing_else_is_opened(tmp_path):
    model, path = filled(SMALL), tmp_path / "c.pt"
    model.info = dict(objective="edm", classes=["a", "b", "c"])
    save_checkpoint(path, model)
    again = load_checkpoint(path)
    assert again.config == SMALL and again.info == model.info and not again.training
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    whole = path.read_bytes()
    def interrupted(file):                                                            # a shell's background job gets no SIGINT
        file.write(b"half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        lego.write_aside(path, interrupted)
    assert path.read_bytes() == whole and os.listdir(tmp_path) == ["c.pt"]
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "owned",)
    good = torch.load(path, weights_only=True)
    config, weights = good["config"], good["weights"]
    huge = good | dict(config=config | dict(width=1 << 14))
    for name, content in dict(
            hostile=dict(config=Hostile()), empty=dict(config=dict(bricks=[]), info={}, weights={}), number=3,
            none=good | dict(weights=None), nan=good | dict(weights=weights | {"label.bias": torch.full((16,), torch.nan)}),
            missing=good | dict(weights=weights | {"label.bias": torch.zeros(3)}), huge=huge,
            other=good | dict(config=config | dict(classes=2)), objective=good | dict(info=dict(objective="x")),
            expanded=huge | dict(weights={k: torch.zeros(1).expand(1 << 30) for k in weights})).items():
        torch.save(content, tmp_path / f"{name}.pt")
    (tmp_path / "short.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.pt").write_text("step,loss\n1,2\n")
    with zipfile.ZipFile(path) as archive:
        zip_of(tmp_path / "deflated.pt", {member: archive.read(member) for member in archive.namelist()})
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
            assert again.config == SMALL and all(map(torch.equal, again.parameters(), model.parameters()))
        except ValueError:
            noticed += 1
    assert noticed > 100


def test_landscapes_are_the_same_scenes_in_any_batch_size_and_width():
    images, labels = train_tiny.landscapes(7, range(6), 32, 32)
    assert np.array_equal(train_tiny.landscapes(7, [4, 1], 32, 32)[0], images[[4, 1]]) and labels.tolist() == [0, 1, 2, 3, 0, 1]
    assert np.array_equal(train_tiny.landscapes(7, range(6), 32, 96)[0][:, :, :32], images)           # wider shows more
    fine = train_tiny.landscapes(7, range(6), 128, 128)[0].reshape(6, 32, 4, 32, 4, 3).mean((2, 4))
    assert np.abs(fine - images).mean() < 3 and not np.array_equal(images, train_tiny.landscapes(8, range(6), 32, 32)[0])
    sky, ground = images[:, :4].mean((1, 2, 3)), images[:, -4:].mean((1, 2, 3))
    assert sky[0] > sky[2] and (sky > ground).sum() >= 5                                             # day is lighter than night


def tar_of(members):
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def test_cifar10_binary_records(tmp_path):
    records, path = np.random.default_rng(0).integers(0, 256, (6, 4, 3073), dtype=np.uint8), tmp_path / "cifar.tar.gz"
    records[:, :, 0] %= 10
    members = {f"data_batch_{i + 1}" if i < 5 else "test_batch": batch.tobytes() for i, batch in enumerate(records)}
    path.write_bytes(whole := tar_of(members))
    (images, labels), (test_images, test_labels) = train_tiny.read_cifar10(path)
    assert labels.tolist() == records[:5, :, 0].flatten().tolist() and test_labels.tolist() == records[5, :, 0].tolist()
    assert images[9, 5, 7].tolist() == records[2, 1, 1 + 32 * 5 + 7::1024].tolist() and test_images.shape == (4, 32, 32, 3)
    for bad, word in [(tar_of(members | dict(data_batch_3=members["data_batch_3"][:-1])), "not whole records"),
                      (tar_of(members | dict(test_batch=b"\x0a" + members["test_batch"][1:])), "label 10"),
                      (tar_of(members | dict(data_batch_1=b"")), "has 0 bytes"),
                      (whole[:len(whole) // 2], "not a readable"), (b"<html>404</html>", "not a readable")]:
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=word):
            train_tiny.read_cifar10(path)


def test_fashion_mnist_idx_files(tmp_path):
    idx = lambda a: gzip.compress(bytes([0, 0, 8, a.ndim]) + struct.pack(f">{a.ndim}I", *a.shape) + a.tobytes())
    images, labels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8), np.array([0, 9, 3, 3, 1], np.uint8)
    x, y, good = tmp_path / "x.gz", tmp_path / "y.gz", gzip.decompress(idx(images))
    x.write_bytes(idx(images)), y.write_bytes(idx(labels))
    read = train_tiny.read_idx(x, y)
    assert np.array_equal(read[0][..., 0], images) and np.array_equal(read[1], labels)
    assert train_tiny.resized(read[0], 32).shape == (5, 32, 32, 1)
    broken = [gzip.compress(data) for data in (b"\0\0\x09" + good[3:], good[:-1], good + b"\0", b"", good[:10])]
    for bad, numbers, said in [*zip(broken, [labels] * 5, ["not a whole idx file"] * 5), (b"<html>", labels, "not a readable"),
                               (idx(images), labels + 1, "labels up to 10")]:
        x.write_bytes(bad), y.write_bytes(idx(numbers))
        with pytest.raises(ValueError, match=said):
            train_tiny.read_idx(x, y)


def picture_file(mode, size=(40, 30), colour=None, form="PNG"):
    Image.new(mode, size, colour).save(file := io.BytesIO(), form)
    return file.getvalue()


def test_folders_and_zips_of_images_of_any_size_and_mode(tmp_path):
    cats = {"set/cats/rgb.png": picture_file("RGB", (64, 48), (200, 100, 0)),
            "set/cats/rgba.png": picture_file("RGBA", (9, 17), (0, 0, 0, 0)),
            "set/cats/palette.gif": picture_file("P", form="GIF")}
    dogs = {f"set/dogs/{i}.png": picture_file("L", colour=10 * i) for i in range(8)} | {
        "set/dogs/sixteen.png": picture_file("I;16", colour=65535), "set/dogs/one.png": picture_file("1", colour=1),
        "set/dogs/gray.jpg": picture_file("L", colour=80, form="JPEG"), "set/dogs/broken.png": b"not an image",
        "set/dogs/notes.txt": b"hello", "set/dogs/.hidden.png": b"no"}
    zipfile.ZipFile(zip_of(tmp_path / "set.zip", cats | dogs)).extractall(tmp_path)
    zip_of(tmp_path / "dogs.zip", dogs)
    folder, zipped, gray = (train_tiny.load_data(str(tmp_path / name), "", 16) for name in ("set", "set.zip", "dogs.zip"))
    for data in (folder, zipped):
        assert data.classes == ["cats", "dogs"] and data.channels == 3 and data.train[1].tolist() == [0] * 3 + [1] * 10
        assert data.train[0][1][0, 0].tolist() == [200, 100, 0] and (data.train[0][2] == 255).all()    # transparent: white
        assert data.held_out[1].tolist() == [1]
    assert all(np.array_equal(a, b) for a, b in zip(folder.train + folder.held_out, zipped.train + zipped.held_out))
    assert gray.channels == 1 and gray.classes == ["dogs"]
    assert sorted(np.concatenate([gray.train[0], gray.held_out[0]])[:, 0, 0, 0]) == [*range(0, 90, 10), 255, 255]
    upright = Image.new("L", (20, 40))
    upright.paste(255, (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 3                                                                  # taken upside down
    upright.save(file := io.BytesIO(), "PNG", exif=exif)
    assert train_tiny.read_image(file.getvalue(), 20)[[0, 5, 14, 19], 0, 0].tolist() == [0, 0, 255, 255]


def test_hostile_archives_are_refused_and_write_nothing(tmp_path, capsys):
    good, link = {f"a/{i}.png": picture_file("L", colour=i) for i in range(3)}, zipfile.ZipInfo("a/link.png")
    link.external_attr = 0o120777 << 16
    bomb = bytearray(picture_file("L"))
    bomb[16:24] = struct.pack(">II", 60000, 60000)                                    # claims 3.6 gigapixels
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    unreadable = {"a/x.png": b"no image", "b/y.png": bytes(bomb)}
    for name, members in dict(up={"../up.png": good["a/0.png"]} | good, absolute={"/absolute.png": good["a/0.png"]} | good,
                              link={link: "/etc/passwd"} | good, bomb={"a/x.png": bytes(300 << 20)}, claims=good,
                              noise=unreadable | {"a/z.png": good["a/0.png"][:40]}, mixed=unreadable | good).items():
        zip_of(tmp_path / f"{name}.zip", members)
    for name, place, number in (("claims", 24, b"\xf0\xff\xff\xff"), ("mixed", 10, b"\x09\x00")):
        data = bytearray((tmp_path / f"{name}.zip").read_bytes())
        entry = data.index(b"PK\x01\x02") + place                                    # of the first member: 4 GB, says the
        data[entry:entry + len(number)] = number                                      # directory; packed in a way unknown here
        (tmp_path / f"{name}.zip").write_bytes(data)
    before = sorted(os.listdir(tmp_path))
    for name, word in zip(("up", "absolute", "link", "bomb", "claims", "noise"),
                          ["points out"] * 3 + ["hundred times"] * 2 + ["0 readable images"]):
        assert in_process(train_tiny, TINY, "--steps 1 --dataset", tmp_path / f"{name}.zip", "--out", tmp_path / "run") == 2
        assert word in capsys.readouterr().err and sorted(os.listdir(tmp_path)) == before
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
    right = lambda step, **how: data.batch(3, step, 4, **how)[0][:, 0, 0, 3]
    assert .4 < np.mean([(right(step, flip=True) > right(step)).float().mean() for step in range(100)]) < .6
    assert torch.equal(data.held(3)[0], data.held(4)[0][:3]) and len(data.held(99)[0]) == 10


def test_muon_orthogonalises_the_momentum():
    parameters = [torch.nn.Parameter(rand(*shape, seed=i)) for i, shape in enumerate([(8, 24), (8, 24), (24, 8), (8, 8)])]
    momenta, optimizer = [torch.zeros_like(p) for p in parameters], train_tiny.Muon(parameters, 1e-2)
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


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `data` on loopback, with ranges; a path under /broken stops half-way, under /error it is an error page."""
    data, ranges = np.random.default_rng(0).bytes(200_000), []

    def do_GET(self):
        place, data, start = self.path.split("/")[1], self.data, int(self.headers["Range"][6:-1])
        self.ranges.append(start)
        if place == "error":
            data, start = b"<html>busy</html>", 0
        self.send_response(200 if place == "error" else 206 if start < len(data) else 416)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:start + 1000] if place == "broken" else data[start:])


def test_downloads_resume_are_checked_and_say_where_to_put_the_file(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, digest = f"http://127.0.0.1:{server.server_port}", sha256(Server.data).hexdigest()
    path = train_tiny.fetch("f.bin", digest, [f"{url}/broken/", f"{url}/good/"], tmp_path)
    assert path.read_bytes() == Server.data and Server.ranges == [0, 1000]
    assert train_tiny.fetch("f.bin", digest, [], tmp_path) == path
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match="damaged"):
        train_tiny.fetch("f.bin", digest, [], tmp_path)
    part = path.rename(path.with_name("f.bin.part"))
    for content, places in ((Server.data, []), (Server.data[::-1], 2 * [f"{url}/good/"])):  # stopped before the check; damaged
        part.write_bytes(content)
        assert train_tiny.fetch("f.bin", digest, places, tmp_path) == path and path.read_bytes() == Server.data
        path.unlink()
    for place in (f"{url}/error/", f"{url}/broken/", "http://127.0.0.1:9/"):
        with pytest.raises(ValueError, match=f"put it at {re.escape(str(path))}"):
            train_tiny.fetch("f.bin", digest, [place], tmp_path)
        assert not path.exists()


# ---- Command lines ---------------------------------------------------------------------------------------------------

TINY = "--bricks '16/4x1 8/4x1 8/2x1' --width 16 --heads 2 --size 16 --batch 8 --device cpu"


def words(*flags):
    """A command line: strings are split as a shell would, anything else is one word."""
    return [word for flag in flags for word in (shlex.split(flag) if isinstance(flag, str) else [str(flag)])]


def in_process(module, *flags):
    """Run a command line in this process; returns its exit code."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *words(*flags)])
        train_tiny.command(module.main)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return stop.value.code


def start(*command, **settings):
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    return subprocess.Popen([sys.executable, *words(*command)], cwd=HERE, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, **settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    assert in_process(train_tiny, TINY, "--steps 60 --lr 8e-3 --out", run) == 0
    return run / "checkpoint.pt"


def test_training_learns_and_leaves_checkpoint_log_and_picture(trained):
    assert sorted(os.listdir(trained.parent)) == ["checkpoint.pt", "held_out.csv", "log.csv", "samples-0000060.png"]
    rows = np.genfromtxt(trained.parent / "log.csv", delimiter=",", names=True)
    assert rows.dtype.names == ("step", "images", "seconds", "loss", "brick0", "brick1", "brick2", "low", "middle", "high")
    assert rows["step"].tolist() == [20, 40, 60] and rows["images"].tolist() == [160, 320, 480]
    assert 1.3 > rows["loss"][0] > rows["loss"][2] > .2
    model, data = load_checkpoint(trained), train_tiny.load_data("landscapes", "", 16)
    assert model.info["classes"] == train_tiny.LANDSCAPES and model.info["images"] == 480
    loss, fresh = (train_tiny.held_out_loss(m, EDM(), data, nullcontext, 64)[0].mean(0) for m in (model, Lego(model.config)))
    assert max(loss) < .8 * min(fresh)
    state = read_checkpoint(trained)
    apart = [(state["weights"][k] - w).abs().max().item() for k, w in state["train"]["weights"].items()]
    assert 0 < max(apart) < .2                                                        # the checkpoint holds the average
    assert state["train"]["optimizers"][0]["param_groups"][0]["lr"] < 8e-3 * .05      # and the learning rate fell


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(tmp_path, kills):
    flags, random = f"{TINY} --steps {200 * kills} --precision fp32 --brick-drop .2,.3,.4 --out", np.random.default_rng(kills)
    whole, run = start("train_tiny.py", flags, tmp_path / "whole"), tmp_path / "broken"
    again = lambda: ["--resume", run] if (run / "checkpoint.pt").exists() else [flags, run, "--save-minutes .005"]
    for kill in range(kills):
        process = start("train_tiny.py", *again())
        time.sleep(random.uniform(1.5, 5))                                            # while it imports, or while it saves
        process.send_signal([signal.SIGKILL, signal.SIGTERM, signal.SIGINT][kill % 3])
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:                                             # Ctrl-C got lost while Python imported
            process.kill()
            process.communicate()
    process, log = start("train_tiny.py", *again()), run / "log.csv"
    read = lambda path: path.read_text() if path.exists() else ""
    before, deadline = read(log), time.time() + 60
    while len(read(log)) <= len(before) and process.poll() is None and time.time() < deadline:
        time.sleep(.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and f"go on with: python train_tiny.py --resume {run}" in said, said
    for process in (whole, start("train_tiny.py --resume", run, "--save-minutes 100")):
        said = process.communicate(timeout=600)[0]
        assert process.returncode == 0, said
    a, b = (read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "broken"))
    for ours, theirs in ((a["weights"], b["weights"]), (a["train"]["weights"], b["train"]["weights"])):
        assert all(torch.equal(w, theirs[name]) for name, w in ours.items())
    steps = [[line.split(",")[:2] + line.split(",")[3:] for line in (tmp_path / name / "log.csv").read_text().splitlines()]
             for name in ("whole", "broken")]                                         # all but the seconds
    assert steps[0] == steps[1] and len(steps[0]) == 10 * kills + 1 and not list(run.glob(".*"))
    held = [int(line.split(",")[0]) for line in (run / "held_out.csv").read_text().splitlines()[1:]]
    assert held == sorted(set(held)) and held[-1] == 200 * kills


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    import resource                                                                   # which Windows lacks
    run, limit = tmp_path / "run", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    assert in_process(train_tiny, TINY, "--steps 5 --out", run) == 0
    before = (run / "checkpoint.pt").read_bytes()
    full = start("train_tiny.py --resume", run, "--steps 9", preexec_fn=limit)
    said = full.communicate(timeout=60)[0]
    assert full.returncode == 2 and "go on with --resume" in said.splitlines()[-1] and "Traceback" not in said, said
    assert (run / "checkpoint.pt").read_bytes() == before and not list(run.glob(".*"))
    assert in_process(train_tiny, "--resume", run, "--steps 9") == 0


def test_a_batch_that_is_not_finite_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", words("train_tiny.py", TINY, "--steps 5 --out", tmp_path / "run"))
    trainer = train_tiny.Trainer(*train_tiny.read_flags(), 0, 1)
    images, labels = trainer.data.batch(0, 0, 8)
    for step, bad in enumerate([False, True, False]):
        state = lambda: [v for o in trainer.optimizers for p in o.state.values() for v in p.values()]
        kept = lambda: trainer.parameters + trainer.averages + state()
        before = [t.clone() for t in kept()]
        trainer.advance(torch.full_like(images, torch.nan) if bad else images, labels, step / 5)
        assert (len(before) == len(kept()) and all(map(torch.equal, before, kept()))) == bad
        assert all(t.isfinite().all() for t in kept()) and not any(t.requires_grad for t in trainer.averages)
    assert trainer.unsound == 1 and trainer.step == 3 and trainer.sums.isfinite().all() and trainer.sums[1, 0] == 16


def test_two_processes_train_like_one(tmp_path):
    flags = f"{TINY} --steps 4 --precision fp32 --region-fraction 1,.5,.5 --brick-drop .2 --label-drop .5 --lr 1e-4 --out"
    two = start("-m torch.distributed.run --standalone --nproc_per_node=2 train_tiny.py", flags, tmp_path / "two")
    assert in_process(train_tiny, flags, tmp_path / "one") == 0
    said = two.communicate(timeout=180)[0]
    assert two.returncode == 0, said
    one, other = (read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
    torch.manual_seed(0)
    initial, one, other = Lego(one["config"]).state_dict(), one["train"]["weights"], other["train"]["weights"]
    for key in one:
        assert torch.allclose(one[key], other[key], atol=2e-6), key
    assert max((one[k] - initial[k]).abs().max() for k in one) > 1e-4                 # they did move


def test_ddpm_own_images_and_grayscale_by_command(tmp_path):
    images = {f"{c}/{i}.png": picture_file("L", colour=20 * i) for c, i in itertools.product("ab", range(12))}
    path, run = zip_of(tmp_path / "set.zip", images), tmp_path / "run"
    assert in_process(train_tiny, TINY, "--dataset", path, "--objective ddpm --steps 3 --out", run) == 0
    for sampler in ("ancestral", "ddim"):
        out = tmp_path / f"{sampler}.npz"
        assert in_process(sample_tiny, "--ckpt", run / "checkpoint.pt", f"--n 3 --steps 3 --sampler {sampler} --out", out) == 0
        assert np.load(out)["arr_0"].shape == (3, 16, 16, 1)


def test_samples_do_not_depend_on_batch_or_container(trained, tmp_path):
    flags = "--n 5 --steps 3 --size 24x40 --skip '1@0-.5;2' --guidance 2 --precision fp32"
    for name, more in {"a.npz": "", "b.npz": "--batch 2", "folder": "--batch 2", "sheet.png": "", "c.npz": "--seed 1"}.items():
        assert in_process(sample_tiny, "--ckpt", trained, flags, more, "--out", tmp_path / name) == 0
    a, b, c = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in "abc")
    folder = np.stack([np.asarray(Image.open(tmp_path / "folder" / f"{i:06d}.png")) for i in range(5)])
    assert a.shape == (5, 24, 40, 3) and a.dtype == np.uint8 and np.array_equal(b, folder)
    assert np.abs(a.astype(int) - b).max() <= 1 and len({image.tobytes() for image in a}) == 5
    assert np.abs(a.astype(int) - c).mean() > 1
    assert Image.open(tmp_path / "sheet.png").size == (4 * (5 * 41 - 1), 4 * 24)


def test_sampling_says_what_it_does(trained, tmp_path, capsys):
    flops = load_checkpoint(trained).flops                                            # of one evaluation of an image
    assert in_process(sample_tiny, "--ckpt", trained, "--skip 1,2 --n 2 --steps 5 --out", tmp_path / "s.png") == 0
    said = capsys.readouterr().out
    assert "skipping 1,2" in said and said.count("skipped") == 2 and "ms per image" in said
    assert f"{9 * sum(flops(16, 16, (1, 2))) / 1e9:.2f} GFLOPs" in said               # 5 Heun steps are 9 evaluations
    assert in_process(sample_tiny, "--ckpt", trained, "--stages --steps 9 --out", tmp_path / "stages.png") == 0
    assert Image.open(tmp_path / "stages.png").size == (6 * (9 * 17 - 1), 6 * (4 * 17 - 1))
    assert in_process(sample_tiny, "--ckpt", trained, "--bench --batch 2") == 0
    table = capsys.readouterr().out.splitlines()[-9:-2]
    assert [row.split()[0] for row in table] == ["nothing", "0", "1", "2", "0,1", "0,2", "1,2"]
    assert float(table[6].split()[7][:-1]) == pytest.approx(100 * sum(flops(16, 16, (1, 2))) / sum(flops(16, 16)), abs=.06)


def test_a_fresh_clone_samples_from_the_weights_it_brings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert in_process(sample_tiny, "--skip 2,3 --size 64 --n 1 --steps 2") == 0
    shown = capsys.readouterr().out
    assert "assets/landscapes.pt" in shown and "1 images of 64x64" in shown
    assert in_process(sample_tiny, "--ckpt", HERE / "assets/cifar10.pt", "--skip 2 --n 1 --steps 2") == 0
    monkeypatch.setattr(sample_tiny, "__file__", str(tmp_path / "sample_tiny.py"))    # copied without its weights
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert in_process(sample_tiny) == 2 and "train one with" in capsys.readouterr().err


def test_canvases_to_compare_with(trained, tmp_path):
    model = load_checkpoint(trained)
    tiled, one = (sample_tiny.stretched(model, span) for span in (0, 24))
    assert [b.region for b in tiled.config.bricks] == [16, 8, 8] and [b.region for b in one.config.bricks] == [24, 8, 8]
    labels, noise = torch.tensor([0, 1]), 80 * lego.normal((2, 3, 16, 24), generator("c"), "cpu")
    x0 = EDM().sample(tiled, (2, 3, 16, 24), labels, steps=1, sampler="euler", generator=generator("c"), plain=True)
    assert torch.allclose(x0, EDM().denoise(tiled, noise, 80., labels), atol=1e-4)    # one walk over the canvas as it is
    samples = []
    for canvas in ("ours", "tiled", "one"):
        out = tmp_path / f"{canvas}.npz"
        assert in_process(sample_tiny, "--ckpt", trained, f"--n 2 --steps 3 --size 24x24 --canvas {canvas} --out", out) == 0
        samples.append(np.load(out)["arr_0"].astype(float))
    assert min(np.abs(a - b).mean() for a, b in itertools.pairwise(samples)) > 1


def test_skip_auto_leaves_out_what_hardly_lowers_the_loss(trained):
    sigma, last = torch.tensor([8., .1, 1., .5, 4., 2.]), torch.full((6,), 10.)
    gain = torch.tensor([0., .05, .3, .3, .1, .3])    # of 60 in all: .12 may be lost on either side
    useful = train_tiny.useful_levels(torch.stack([last + gain, last, last], 1), sigma)
    assert useful == [(0, torch.inf), (.5, 2.), (0, 0)]
    model = load_checkpoint(trained)
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
    steps, ramp = (c.astype(np.uint8)[None, None, :, None] * np.ones((2, 32, 1, 3), np.uint8)
                   for c in (column // 8 * 10 + column % 8, column))
    assert sample_tiny.seam_ratio(steps, ramp, 8, 2) == pytest.approx(3)              # 3 across borders, 1 elsewhere
    assert sample_tiny.seam_ratio(steps.transpose(0, 2, 1, 3), ramp.transpose(0, 2, 1, 3), 8, 1) == pytest.approx(3)
    assert in_process(sample_tiny, "--ckpt", trained, "--eval landscapes --n 4 --steps 3 --size 16x32") == 0
    *_, distances, _, first, second = capsys.readouterr().out.splitlines()
    assert len(re.findall(r"\d+\.\d \(\d+\.\d\)", distances)) == 2 and len(re.findall(r"\d\.\d\d \(\d\.\d\d\)", first)) == 2
    assert first.split()[0] == "8" and second.split()[0] == "16"


NAMED = "--steps 0", "--batch 0", "--seed -1", "--size 0"                             # for both scripts; errors name the flag
BAD_TRAINING = [(flags, flags.split()[0]) for flags in NAMED + (
    "--steps many", "--minutes nan", "--lr -1", "--lr nan", "--batch 99999", "--region-fraction 1,2", "--brick-drop 1",
    "--frobnicate", "--label-drop 1.5", "--save-minutes -1")] + [
    ("--dataset nowhere", "nowhere"), ("--dataset README.md", "not a readable zip"), ("--resume nowhere", "nowhere"),
    ("--resume assets", "assets"), ("--out README.md/run", "README.md"), ("--device abacus", "abacus"), ("--width 0", "width"),
    ("--width -4", "width"), ("--width 1048576", "from 4 to 16384"), ("--heads 5", "take width"),
    ("--preset huge", "unknown preset"), ("--bricks 2048/1x1", "tokens per region are too many"),
    ("--bricks 8/2x99999", "depth"), ("--bricks 16/5x1", "take region 20"), ("--without luck", "take some of local_mlp"),
    ("--bricks 8/2x1 --preset tiny", "not allowed with"), ("--steps 5 --minutes 1", "not allowed with"),
    ("--out RUN", "holds a run already: continue it with --resume"), ("--out RUN --resume RUN --lr .1", "--lr 0.1 contradicts")]
BAD_SAMPLING = [(flags, flags.split()[0]) for flags in NAMED + (
    "--steps 99999", "--size 64x", "--size -4", "--size 99999x99999", "--skip x", "--skip -1", "--skip 0@0.5", "--label 4",
    "--label -1", "--guidance nan", "--guidance -1", "--guidance inf", "--churn nan", "--n 0", "--sampler magic")] + [
    ("--skip 0,1,2", "cannot skip all"), ("--skip '0@0-1;1,2@.5-1'", "cannot skip all"), ("--skip 7", "bricks 0 to 2"),
    ("--skip 1@.5-.2", "must rise"), ("--label dragon", "dragon"), ("--ckpt README.md", "not a LEGO checkpoint"),
    ("--ckpt nowhere.pt", "nowhere.pt"), ("--out x.bmp", "x.bmp"), ("--out README.md/s.png", "README.md"),
    ("--stages --bench", "not allowed with"), ("--stages --size 8", "take --size 16"),
    ("--eval landscapes --size 40x4", "40x4 are too small")]


@pytest.mark.parametrize("script, flags, said", [(train_tiny, *case) for case in BAD_TRAINING]
                         + [(sample_tiny, *case) for case in BAD_SAMPLING])
def test_bad_flags_give_one_line_and_exit_code_2(trained, script, flags, said, capsys, tmp_path):
    others = ["--ckpt", trained] if script is sample_tiny else [] if "--minutes" in flags else ["--steps 1"]
    flags = [trained.parent if word == "RUN" else word for word in words(flags)]
    assert in_process(script, *others, "--out", tmp_path / "new.png", *flags) == 2
    lines = capsys.readouterr().err.splitlines()
    error = [line for line in lines if line.strip() and "files/s" not in line]        # but for a progress bar
    assert len(error) == 1 and said in error[0] and not (tmp_path / "new.png").exists()


def test_the_example_in_the_readme_runs():
    example = re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)[1]
    exec(example, scope := {})
    assert scope["samples"].shape == (4, 3, 32, 32) and scope["samples"].isfinite().all() and scope["per_brick"].shape == (8, 3)


def test_bricks_that_repeat_train_less():
    none_given = Namespace(region_fraction=None, brick_drop=None)
    shares = lambda stack: train_tiny.shares(none_given, LegoConfig.parse(stack, width=8, heads=2))
    assert str(PRESETS["tiny"]) == "32/4x6 16/2x2 8/2x1 4/2x1"
    assert shares("32/4x6 16/2x2 8/2x1 4/2x1") == ([1, .25, .25, .25], [0, 0, .75, .75])
    assert shares("4/2x1 8/2x1 16/2x2 32/4x6") == ([.25, .25, .25, 1], [0] * 4)       # each has the larger region
    assert shares("32/4x6 16/4x1 8/2x1 16/4x1 32/2x1") == ([1, 1, .25, 1, .25], [0, .75, 0, .75, 0])


# ---- The notebook ----------------------------------------------------------------------------------------------------

NOTEBOOK = HERE / "walkthrough.ipynb"
RUN_CELLS = """
import ast, json, sys
def display(thing):
    shown = [getattr(thing, name)() for name in ("_repr_png_", "_repr_svg_", "_repr_markdown_") if hasattr(thing, name)]
    assert thing is None or any(shown) or repr(thing)
for i, cell in enumerate(c for c in json.load(open(sys.argv[1]))["cells"] if c["cell_type"] == "code"):
    tree = ast.parse("".join(cell["source"]))
    if isinstance(tree.body[-1], ast.Expr):
        tree.body[-1].value = ast.Call(ast.Name("display", ast.Load()), [tree.body[-1].value], [])
    exec(compile(ast.fix_missing_locations(tree), f"code cell {i + 1}", "exec"), globals())

# What each neighbour must be in a limiting case; the cells themselves check the others.
whole, first = (draw(model, n=2, skip=skip)[0] for skip in ((), (1, 2, 3)))
assert torch.equal(draw(model, n=2, skip=stitched(0))[0], whole) and torch.equal(draw(model, n=2, skip=stitched(1))[0], first)
x = many[:4]
for scale in (.01, 1):
    guided = toward(kinds, 2, scale)(x, x, .5)
    assert kinds(guided).log_softmax(1)[:, 2].mean() > kinds(x).log_softmax(1)[:, 2].mean()
assert torch.equal(expert()(x), kinds(x)) and not torch.equal(experts[0](x), kinds(x))
h, c, TimeNormBlock.label = torch.randn(4, 2, 16, 64), torch.zeros(4, 64), torch.zeros(1)
for kind, sees_time in ((TimeNormBlock, True), (NoTimeBlock, False)):
    block, TimeNormBlock.tau = kind(SMALL), 1.
    assert torch.equal(block(h, c), h)                                      # its gates are closed
    [torch.nn.init.normal_(p, std=.1) for p in block.parameters()]
    before, TimeNormBlock.tau = block(h, c), -1.
    assert torch.equal(block(h, c), before) != sees_time
patchwise, other = Codec(4, encoder=0, decoder=0), x.clone()
other[:, :, :4, :4] += 1
apart = (patchwise.decode(patchwise.encode(x)[0]) - patchwise.decode(patchwise.encode(other)[0])).abs().amax((0, 1))
assert apart[:4, :4].min() > 0 and not apart[4:].any() and not apart[:4, 4:].any()
"""


def test_the_notebook_was_run_from_top_to_bottom():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert {out["output_type"] for cell in cells for out in cell["outputs"]} <= {"stream", "display_data", "execute_result"}
    assert not any(out.get("name") == "stderr" for cell in cells for out in cell["outputs"]) and NOTEBOOK.stat().st_size < 4e6


def test_every_cell_of_the_notebook_runs():
    quick = os.environ | dict(LEGO_QUICK="1")
    run = subprocess.run([sys.executable, "-c", RUN_CELLS, NOTEBOOK], env=quick, cwd=HERE, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
