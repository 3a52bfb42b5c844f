"""LEGO diffusion in one readable file: stackable, skippable bricks for image generation.

Zheng et al., "Learning Stackable and Skippable LEGO Bricks for Efficient, Reconfigurable, and Variable-Resolution
Diffusion Modeling", ICLR 2024 (arXiv 2310.06389). "Paper" below means that text, "released code" the authors' repository,
"ours" a choice of this file.

A LEGO network is a stack of bricks. Every brick sees the whole noisy image x and the estimate z of the brick before it, cuts
both into regions, each region into patches, turns every patch into a token with a small MLP, lets the tokens of a region
attend to each other, and hands on a new full-resolution z. Since every z estimates the same thing, a brick can be left out.

Read from top to bottom: stack specification, building blocks, brick, backbone, diffusion and sampling, checkpoints.

Symbols: x noisy image, x0 clean image in [-1, 1], z estimate handed from brick to brick, F raw network output (what z holds),
sigma noise level, c condition, B batch, C channels, H x W canvas, R regions per image, N tokens per region, D width.

SPDX-License-Identifier: MIT
"""

import hashlib
import io
import json
import math
import os
import re
import zipfile
from dataclasses import asdict, dataclass
from itertools import count, repeat
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import gelu, interpolate, layer_norm, one_hot, pad, scaled_dot_product_attention, silu

# ---- Stack specification ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BrickSpec:
    """One brick: regions of `region` x `region` pixels, cut into patches of `patch` x `patch` pixels (one token each),
    and `depth` Transformer blocks. ValueError if a number is not an int from 1 to 16384, patches do not tile the region, or
    they are more than 256 along a side."""
    region: int
    patch: int
    depth: int

    def __post_init__(self):
        for name, value in vars(self).items():
            if type(value) is not int or not 1 <= value <= 1 << 14:
                raise ValueError(f"brick {self}: {name} must be a whole number from 1 to 16384, found {value!r}")
        if self.region % self.patch:
            raise ValueError(f"brick {self}: region {self.region} is not a multiple of patch {self.patch}; "
                             f"take region {math.ceil(self.region / self.patch) * self.patch}")
        if self.region > 256 * self.patch:
            raise ValueError(f"brick {self}: {self.tokens} tokens per region are too many: "
                             f"take patch {self.region // 256} or larger")

    def __str__(self):
        return f"{self.region}/{self.patch}x{self.depth}"

    @property
    def tokens(self):
        """Tokens per region, N: the span of attention."""
        return (self.region // self.patch) ** 2

    def grid(self, H, W):
        """How many regions cover a canvas of H x W pixels: (rows, columns)."""
        return math.ceil(H / self.region), math.ceil(W / self.region)


@dataclass(frozen=True)
class LegoConfig:
    """A whole network. ValueError with the remedy if the numbers do not fit together.

    bricks: in the order they run; width D and heads of all Transformer blocks; image channels; classes (0: unconditional).
    size: height and width of the training images in pixels (default: the largest region).
    local_mlp: local enrichment is an MLP on each patch (paper) rather than one linear map (released code).
    residual: a brick adds a correction to z (ours) rather than replacing z.
    detach: no gradient flows from a brick back through z (ours), so each brick's loss trains that brick alone.
    stretch: coordinates are stretched over any canvas (released code); ours keeps those seen in training, see `Brick`.
    gelu: "tanh" (released code) or "none", the exact one (ours), two to four times faster on a CPU in bfloat16.
    time_scale: the Fourier features see c_noise times this; at 1 (released code) noise levels look much alike, at 4 (ours,
    which makes it ln sigma) training is faster from the start."""
    bricks: tuple
    width: int
    heads: int
    channels: int = 3
    classes: int = 0
    size: int | None = None
    mlp_ratio: int = 4
    local_mlp: bool = True
    residual: bool = True
    detach: bool = True
    stretch: bool = False
    gelu: str = "none"
    time_scale: float = 4.0

    def __post_init__(self):
        bricks = tuple(b if isinstance(b, BrickSpec) else BrickSpec(**b) for b in self.bricks)
        object.__setattr__(self, "bricks", bricks)
        if not bricks:
            raise ValueError("a stack needs at least one brick, such as 32/4x6 (region/patch x depth)")
        if self.size is None:
            object.__setattr__(self, "size", max(b.region for b in bricks))
        for name, least in dict(width=4, heads=1, channels=1, classes=0, size=1, mlp_ratio=1).items():
            if type(getattr(self, name)) is not int or not least <= getattr(self, name) <= 1 << 14:
                raise ValueError(f"{name} must be a whole number from {least} to 16384, found {getattr(self, name)!r}")
        if self.gelu not in ("none", "tanh"):
            raise ValueError(f"gelu must be none or tanh, found {self.gelu!r}")
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of 4 and of heads ({self.heads}); "
                             f"take width {math.ceil(self.width / math.lcm(4, self.heads)) * math.lcm(4, self.heads)}")

    @classmethod
    def parse(cls, stack, **settings):
        """The config of a stack written "32/4x6 16/4x2 8/2x2": region/patch x depth, in running order."""
        bricks = []
        for word in stack.split():
            match = re.fullmatch(r"(\d+)/(\d+)x(\d+)", word)
            if not match:
                raise ValueError(f"cannot read brick {word!r}: write region/patch x depth without spaces, such as 32/4x6")
            bricks.append(BrickSpec(*map(int, match.groups())))
        return cls(tuple(bricks), **settings)

    @classmethod
    def official(cls, stack, classes=10, **settings):
        """The network of the released code: linear enrichment, z replaced, gradients through z, stretched coordinates."""
        return cls.parse(stack, classes=classes, local_mlp=False, residual=False, detach=False, stretch=True, gelu="tanh",
                         time_scale=1.0, **settings)

    def __str__(self):
        return " ".join(map(str, self.bricks))


# Ours: the default (progressive refinement), its bricks in other orders, and the plain DiTs it is compared with.
PRESETS = {name: LegoConfig.parse(stack, width=128, heads=4) for name, stack in {
    "tiny": "32/4x6 16/2x2 8/2x1 4/2x1", "tiny-pg": "4/2x1 8/2x1 16/2x2 32/4x6", "tiny-u": "32/4x6 16/4x1 8/2x1 16/4x1 32/2x1",
    "dit-4": "32/4x9", "dit-2": "32/2x9"}.items()}
# The authors'. XL works on 4 latent channels; every PR is its PG reversed.
_STACKS = {
    "S-PG-64": "4/2x2 16/8x4 64/2x6", "S-U-64": "64/2x6 16/8x4 4/2x2 16/8x4 64/2x6",
    "S-U-32": "32/2x6 16/8x4 4/2x2 16/8x4 32/2x6",
    "L-PG-64": "4/2x6 16/8x8 64/2x12", "L-PG-64-released": "4/2x6 16/8x6 64/2x12", "L-PG-32": "4/2x4 16/8x8 32/2x12",
    "L-U-64": "64/2x12 16/8x8 4/2x6 16/8x8 64/2x12", "L-U-32": "32/2x12 16/8x8 4/2x6 16/8x8 32/2x12",
    "XL-PG-32": "4/2x4 16/8x12 32/2x14", "XL-PG-64": "4/2x4 16/8x12 64/2x14",
    "XL-U-32": "32/2x14 16/8x10 4/2x4 16/8x10 32/2x14", "XL-U-64": "64/2x14 16/8x12 4/2x4 16/8x12 64/2x14"}
_STACKS |= {name.replace("PG", "PR"): " ".join(reversed(s.split())) for name, s in _STACKS.items() if "PG" in name}
for _name, _stack in _STACKS.items():
    _width, _heads, _channels = dict(S=(384, 6, 3), L=(1024, 16, 3), XL=(1152, 16, 4))[_name.split("-")[0]]
    PRESETS[_name] = LegoConfig.official(_stack, width=_width, heads=_heads, channels=_channels, classes=1000)

# ---- Building blocks -------------------------------------------------------------------------------------------------


def patchify(x, region, patch):
    """(B, C, H, W), H and W multiples of region, to (B, R, N, patch * patch * C): regions and the patches inside each in
    row-major order, a patch as (row, column, channel). Its inverse is `unpatchify`."""
    B, C, H, W = x.shape
    n = region // patch
    x = x.view(B, C, H // region, n, patch, W // region, n, patch)
    return x.permute(0, 2, 5, 3, 6, 4, 7, 1).reshape(B, -1, n * n, patch * patch * C)


def unpatchify(tokens, region, patch, H, W):
    """(B, R, N, patch * patch * C) back to (B, C, H, W), H and W multiples of region."""
    B, n = len(tokens), region // patch
    x = tokens.view(B, H // region, W // region, n, n, patch, patch, -1)
    return x.permute(0, 7, 1, 3, 5, 2, 4, 6).reshape(B, -1, H, W)


def position_table(n, width):
    """Fixed sine-cosine embedding (n * n, width) of the n x n tokens of a region: first the column, then the row."""
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(n, dtype=torch.float64)[:, None] * omega                                # (n, D/4)
    axis = torch.cat([angle.sin(), angle.cos()], 1).float()                                      # (n, D/2)
    return torch.cat([axis.repeat(n, 1), axis.repeat_interleave(n, 0)], 1)                       # (n * n, D)


def time_features(t):
    """Fourier features (B, 256) of t (B,), of order 1: cosines, then sines."""
    omega = 10000.0 ** (-torch.arange(128, device=t.device, dtype=torch.float32) / 128)
    angle = t.float()[:, None] * omega
    return torch.cat([angle.cos(), angle.sin()], 1)


def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(d)) v for q, k, v (..., N, d); mask (..., N, N) is True where a token may look."""
    # The fused kernel pays on accelerators and for long sequences. On a CPU in bfloat16 its backward pass is ten times
    # slower than these three lines at the 16 to 256 tokens of a region, and its forward pass slower at fewer than 32. On CUDA it
    # takes at most 65,535 regions.
    fused = q.shape[-2] > (256 if torch.is_grad_enabled() else 32) if q.device.type == "cpu" else len(q) < 1 << 16
    if fused:
        return scaled_dot_product_attention(q, k, v, mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def modulate(h, shift, scale):
    """Layer norm without weights of its own, then the shift and scale that the condition asks for (adaLN)."""
    return torch.addcmul(shift, layer_norm(h, h.shape[-1:], eps=1e-6), 1 + scale)


class Block(nn.Module):
    """adaLN-Zero Transformer block (Peebles & Xie 2023) on tokens h (B, R, N, D), attention inside each region only.
    The condition c (B, D) is one per image, not per region. Zero gates make the block the identity at the start."""

    def __init__(self, config):
        super().__init__()
        width, hidden = config.width, config.mlp_ratio * config.width
        self.config = config
        self.adaln = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def mix(self, h, mask):
        """The one place where tokens meet: attention within each region, (B, R, N, D) to the same."""
        B, R, N, D = h.shape
        q, k, v = self.qkv(h).view(B * R, N, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)     # each (B * R, heads, N, d)
        return self.proj(attention(q, k, v, mask).transpose(1, 2).reshape(B, R, N, D))

    def forward(self, h, c, mask=None):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(c)[:, None, None].chunk(6, -1)  # each (B, 1, 1, D)
        h = torch.addcmul(h, gate1, self.mix(modulate(h, shift1, scale1), mask))
        return torch.addcmul(h, gate2, self.fc2(gelu(self.fc1(modulate(h, shift2, scale2)), approximate=self.config.gelu)))


CHUNK = dict(cpu=4096, gpu=65536)       # tokens that a brick works on at a time when sampling

# ---- Brick -----------------------------------------------------------------------------------------------------------


class Brick(nn.Module):
    """One LEGO brick (paper, section 3.1): (x, z) -> new z, all (B, C, H, W), for any H and W.

    Local-feature enrichment turns every patch of [z, x, coordinates] into a token; global-content orchestration lets the
    tokens of a region attend to each other; a linear map decodes each token to its pixels. Weights are shared by all regions.

    Any canvas: H and W are padded to whole regions with copies of the edge, and tokens of padding alone are never looked at.
    `offset` shifts the grid of regions and patches down and right by any number of pixels, at the cost of one more row and
    column of regions; with `wrap` the scene goes round sideways and the canvas is rolled instead, at no cost. Coordinates
    (ours): region i of n along an axis takes those of region floor(i m / n) of the m in a training image, so that no brick
    ever meets coordinates it was not trained on."""

    def __init__(self, spec, config, first, block=Block):
        super().__init__()
        self.spec, self.config, self.first = spec, config, first
        D, pixels = config.width, spec.patch ** 2
        inputs = (config.channels * (1 if first else 2) + 2) * pixels       # no z comes to the first brick
        self.local = nn.Linear(inputs, D)
        self.local_mlp = nn.Linear(D, D) if config.local_mlp else None
        self.blocks = nn.ModuleList(block(config) for _ in range(spec.depth))
        self.adaln = nn.Linear(D, 2 * D)
        self.decode = nn.Linear(D, config.channels * pixels)
        self.register_buffer("position", position_table(spec.region // spec.patch, D), persistent=False)

    def layout(self, length, offset, wrap=False):
        """How an axis of `length` pixels is cut: (padding before, length with padding, pixels to roll by)."""
        region = self.spec.region
        if wrap and length % region == 0:
            return 0, length, offset % region
        before = -offset % region
        return before, math.ceil((before + length) / region) * region, 0

    def coordinates(self, before, padded, length, device):
        """Positions in [-1, 1] along an axis, padding included: (padded,)."""
        region, size, pixel = self.spec.region, self.config.size, torch.arange(padded, device=device)
        if self.config.stretch:
            return 2 * (pixel - before) / max(length - 1, 1) - 1
        seen = pixel // region * math.ceil(size / region) // (padded // region) * region          # the region's start
        return 2 * (seen + pixel % region) / max(size - 1, 1) - 1

    def mask(self, around, H, W, device):
        """(R, N, N), True where attention is allowed on a canvas padded by `around`; None where it is everywhere."""
        if not any(around):
            return None
        canvas = pad(torch.ones(1, 1, H, W, device=device), around)
        real = patchify(canvas, self.spec.region, self.spec.patch)[0].any(-1)         # (R, N), tokens with a pixel of the image
        return real[:, :, None] == real[:, None, :]

    def correction(self, pixels, c, mask):
        """Regions of pixels (B, R, N, inputs) through enrichment, orchestration and decoding: (B, R, N, p * p * C)."""
        h = self.local(pixels.to(c.dtype))                                                        # (B, R, N, D)
        if self.local_mlp is not None:
            h = self.local_mlp(gelu(h, approximate=self.config.gelu))
        h = h + self.position.to(h.dtype)
        if mask is not None:
            mask = mask[:, None].repeat(len(h), 1, 1, 1)                                          # (B * R, 1, N, N)
        for block in self.blocks:
            h = block(h, c, mask)
        return self.decode(modulate(h, *self.adaln(c)[:, None, None].chunk(2, -1))).to(pixels.dtype)

    def forward(self, x, z, c, regions=None, offset=(0, 0), wrap=False):
        """x and z (B, C, H, W), c (B, D), `regions` a tensor of region indices to run (None: all). Returns the new z;
        outside the chosen regions it is the old one."""
        (B, C, H, W), region, patch = x.shape, self.spec.region, self.spec.patch
        (top, Hp, _), (left, Wp, roll) = self.layout(H, offset[0]), self.layout(W, offset[1], wrap)
        around = left, Wp - W - left, top, Hp - H - top                                           # pixels of padding
        canvas = torch.cat([z, x], 1)                                                             # (B, 2C, H, W)
        canvas = canvas.roll(-roll, 3) if roll else canvas
        canvas = pad(canvas, around, mode="replicate") if any(around) else canvas
        place = self.coordinates(top, Hp, H, x.device), self.coordinates(left, Wp, W, x.device)
        place = torch.stack(torch.meshgrid(*place, indexing="ij")).to(x.dtype)                    # (2, Hp, Wp)
        pixels = patchify(torch.cat([canvas, place.expand(B, -1, -1, -1)], 1), region, patch)     # (B, R, N, p * p * (2C + 2))
        pixels = pixels.unflatten(3, (patch * patch, -1))                                         # a pixel is [z, x, place]
        chosen, mask = slice(None) if regions is None else regions, self.mask(around, H, W, x.device)
        z, inputs = pixels[..., :C].flatten(3), pixels[..., C if self.first else 0:].flatten(3)[:, chosen]
        mask = None if mask is None else mask[chosen]
        R, N = inputs.shape[1:3]
        # Without gradients the regions go through in chunks: memory for tokens is bounded by the chunk, not by the canvas.
        size = R if torch.is_grad_enabled() else max(1, CHUNK["cpu" if x.device.type == "cpu" else "gpu"] // (B * N))
        masks = repeat(None) if mask is None else mask.split(size)
        new = torch.cat([self.correction(part, c, m) for part, m in zip(inputs.split(size, 1), masks)], 1)
        if self.config.residual:
            new = new + z[:, chosen]
        z = new if regions is None else z.index_copy(1, regions, new)
        z = unpatchify(z, region, patch, Hp, Wp)[:, :, top:top + H, left:left + W]
        return z.roll(roll, 3) if roll else z


# ---- Backbone --------------------------------------------------------------------------------------------------------


class Lego(nn.Module):
    """The stack. `info` is a plain dictionary (objective, class names, ...) that travels with the weights in checkpoints.
    `block` makes the blocks of all bricks from the config: a subclass of `Block` with another `mix`, say."""

    def __init__(self, config, block=Block):
        super().__init__()
        D = config.width
        self.config, self.info = config, {}
        self.time = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.label = nn.Linear(config.classes, D) if config.classes else None
        self.bricks = nn.ModuleList(Brick(spec, config, k == 0, block) for k, spec in enumerate(config.bricks))
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                if "adaln" in name or "decode" in name:                     # every brick starts by handing on z (or 0)
                    nn.init.zeros_(module.weight)

    def kept(self, skip):
        """The indices of the bricks that run when those in `skip` do not. ValueError if none is left or one is unknown."""
        skip, K = set(skip), len(self.bricks)
        if not skip <= set(range(K)):
            raise ValueError(f"cannot skip brick {sorted(skip - set(range(K)))}: this stack has bricks 0 to {K - 1}")
        if len(skip) == K:
            raise ValueError(f"cannot skip all {K} bricks: leave at least one")
        return [k for k in range(K) if k not in skip]

    def forward(self, x, c_noise, labels=None, *, skip=(), return_all=False, regions=None, offset=(0, 0), wrap=False):
        """F of the last brick run, (B, C, H, W) float32; with return_all the list of F of every brick run.

        x (B, C, H, W), any H and W, already scaled by c_in; c_noise (B,); labels (B,) int64 in 0..classes, where the index
        `classes`, like None, is "no label". skip: indices of bricks to leave out, which then cost nothing. regions: for every
        brick the region indices to run, or None for all. offset, wrap: see `Brick`. ValueError on a bad `skip`, or labels
        for a network without classes."""
        c = self.time(time_features(self.config.time_scale * c_noise).to(self.time[0].weight.dtype))         # (B, D)
        if self.label is not None:
            labels = torch.full_like(c_noise, self.config.classes, dtype=torch.long) if labels is None else labels
            # "No label" is the zero vector, which leaves the bias.
            c = c + self.label(one_hot(labels, self.config.classes + 1)[:, :-1].to(c.dtype))
        elif labels is not None:
            raise ValueError("labels were given, but this network has no classes: pass labels=None")
        c = silu(c)
        z, out = torch.zeros_like(x), []
        for k in self.kept(skip):
            z = z.detach() if self.config.detach else z
            z = self.bricks[k](x, z, c, regions[k] if regions else None, offset, wrap)
            out.append(z)
        return out if return_all else z

    def flops(self, H, W, skip=(), offset=(0, 0), wrap=False):
        """Floating-point operations for one image and one evaluation (a multiply-add is two), as a list: one number for
        every brick, 0 where skipped, and last the shared embeddings. Arguments as for `forward`."""
        cfg, D, kept = self.config, self.config.width, self.kept(skip)
        macs = [0] * len(self.bricks) + [256 * D + D * D + cfg.classes * D]
        for k in kept:
            spec, brick = cfg.bricks[k], self.bricks[k]
            tokens = brick.layout(H, offset[0])[1] * brick.layout(W, offset[1], wrap)[1] // spec.patch ** 2
            block = (4 + 2 * cfg.mlp_ratio) * D * D + 2 * spec.tokens * D
            ends = (brick.local.in_features + brick.decode.out_features + D * cfg.local_mlp) * D
            macs[k] = tokens * (ends + spec.depth * block) + (6 * spec.depth + 2) * D * D
        return [2 * m for m in macs]

    def table(self, skip=()):
        """The stack in words: index, region, patch, depth, tokens per region, parameters and share of FLOPs of each brick."""
        flops, whole = self.flops(self.config.size, self.config.size), sum(p.numel() for p in self.parameters())
        lines = [f"brick  region  patch  depth  tokens  parameters  FLOPs    (width {self.config.width}, "
                 f"{whole / 1e6:.2f}M parameters, {sum(flops) / 1e9:.3f} GFLOPs at {self.config.size}x{self.config.size})"]
        for k, (s, brick) in enumerate(zip(self.config.bricks, self.bricks)):
            count = sum(p.numel() for p in brick.parameters())
            lines.append(f"{k:>5}  {s.region:>6}  {s.patch:>5}  {s.depth:>5}  {s.tokens:>6}  {count:>10}  "
                         f"{flops[k] / sum(flops):>5.1%}{'    skipped' if k in skip else ''}")
        return "\n".join(lines)


# ---- Diffusion and sampling ------------------------------------------------------------------------------------------

SAMPLERS = "heun", "euler", "ancestral"
S_MIN, S_MAX, S_NOISE = 0.05, 10.0, 1.003       # where and how churn acts: the released code's values


def generator(*key):
    """A CPU random generator for any key, such as (seed, image): the same draws on every device. It keeps only 32 bits of
    a seed; hashing keeps neighbouring keys apart."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def normal(shape, generator, device):
    """Standard normal noise of `shape`, drawn on the CPU; a list of generators draws image i from the i-th."""
    if isinstance(generator, (list, tuple)):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} images: pass one for each, or a single one")
        return torch.stack([torch.randn(shape[1:], generator=g) for g in generator]).to(device)
    return torch.randn(shape, generator=generator).to(device)


class Diffusion:
    """What EDM and DDPM share. Noise is added to an unscaled image, x = x0 + sigma * eps (the variance-exploding form), and
    D = c_skip x + c_out F estimates x0. The two differ in these coefficients, in the noise levels they train on, and in the
    levels they sample at. The network's target (x0 - c_skip x) / c_out has the same form for both, and so has the loss."""

    def loss(self, model, x0, labels=None, *, skip=(), region_fraction=None, brick_drop=0.0, label_drop=0.0, supervise_all=True,
             generator=None, shard=(0, 1), sigma=None, noise=None):
        """(scalar loss, detached losses (B, K) of every brick, sigma (B,)) for x0 (B, C, H, W) in [-1, 1].

        Mean over the bricks of the mean squared error of F (paper, equation 6, with lambda = 1 / c_out^2). A brick not run adds
        nothing to the scalar, and NaN to the table. region_fraction: for every brick the share of its regions to run and to learn
        from, those nearest to one random point (counted round the edges), so that most regions meet the refined z that they will
        meet when sampling. brick_drop: chance of leaving a brick out of this batch, a number or one per brick; label_drop: chance
        of hiding a label; supervise_all: train on the losses of all bricks run, not on the last one's alone. Draws come from the
        CPU `generator`, unless sigma (B,) and noise (B, C, H, W) are given. shard (rank, world): x0 is the rank-th part of a
        batch shared by `world` processes; the draws are those of the whole batch."""
        (B, device), (rank, world), K = (len(x0), x0.device), shard, len(model.config.bricks)
        n, mine = world * B, slice(rank * B, (rank + 1) * B)
        if sigma is None:               # one draw from each n-th of the distribution: less noise in the loss, same average
            strata = torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)
            sigma = self.sigma_at(strata / n)[mine].to(device)
        if noise is None:
            noise = torch.randn(n, *x0.shape[1:], generator=generator)[mine].to(device)
        if labels is not None and label_drop > 0:
            hidden = torch.rand(n, generator=generator)[mine].to(device) < label_drop
            labels = torch.where(hidden, model.config.classes, labels)
        chances = torch.as_tensor(brick_drop)
        if chances.any():
            dropped = set((torch.rand(K, generator=generator) < chances).nonzero().flatten().tolist()) | set(skip)
            skip = dropped if len(dropped) < K else skip
        regions, weights, point = [None] * K, [1.0] * K, torch.rand(2, generator=generator)
        for k, (spec, share) in enumerate(zip(model.config.bricks, region_fraction or ())):
            rows, columns = spec.grid(*x0.shape[2:])
            some = max(1, round(share * rows * columns))
            if some < rows * columns:
                apart = [(((torch.arange(m) + .5) / m - p + .5) % 1 - .5).abs() for m, p in zip((rows, columns), point)]
                regions[k] = torch.maximum(apart[0][:, None], apart[1]).flatten().argsort()[:some].to(device)
                chosen = torch.zeros(rows * columns, device=device).index_fill(0, regions[k], 1).view(1, 1, rows, columns)
                weight = interpolate(chosen, scale_factor=spec.region)[..., :x0.shape[2], :x0.shape[3]]
                weights[k] = weight / weight.mean()                                               # (1, 1, H, W), of mean 1
        s = sigma.view(-1, 1, 1, 1)
        x = x0 + s * noise
        c_skip, c_out, c_in, c_noise = self.coefficients(s)
        target = (x0 - c_skip * x) / c_out                                                        # (B, C, H, W)
        kept = model.kept(skip)
        out = model(c_in * x, c_noise.flatten(), labels, skip=skip, return_all=True, regions=regions)
        errors = torch.stack([((F - target).square() * weights[k]).mean((1, 2, 3)) for k, F in zip(kept, out)], 1)    # (B, run)
        losses = torch.full((B, K), torch.nan, device=device)
        for k, column in zip(kept, errors.detach().unbind(1)):              # an index made of a list would wait for the GPU
            losses[:, k] = column
        # Over K and not over the bricks run, so that a dropped brick does not change what the others learn.
        return errors.mean(0).sum() / K if supervise_all else errors[:, -1].mean(), losses, sigma

    def denoise(self, model, x, sigma, labels=None, *, skip=(), guidance=1.0, return_all=False, offset=(0, 0), wrap=False):
        """Estimate of x0 (B, C, H, W), or one for every brick run, from x = x0 + sigma * eps; sigma a number or (B,).

        guidance g other than 1 asks the network for labels and for none in one call: D = D_none + g (D_labels - D_none).
        ValueError if there are no labels to guide with."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma.view(-1, 1, 1, 1))
        inputs, c_noise = c_in * x, c_noise.flatten()
        if guidance != 1:
            if labels is None:
                raise ValueError(f"guidance {guidance} needs labels: pass them, or take guidance=1")
            inputs, c_noise = inputs.repeat(2, 1, 1, 1), c_noise.repeat(2)
            labels = torch.cat([labels, torch.full_like(labels, model.config.classes)])
        out = model(inputs, c_noise, labels, skip=skip, return_all=True, offset=offset, wrap=wrap)
        if guidance != 1:
            out = [none + guidance * (wanted - none) for wanted, none in (F.chunk(2) for F in out)]
        out = [c_skip * x + c_out * F for F in out]
        return out if return_all else out[-1]

    @torch.no_grad()
    def sample(self, model, shape, labels=None, *, steps=None, sampler=None, skip=(), guidance=1.0, generator=None, guide=None,
               callback=None, clip=False, churn=0.0, refine=0.3, plain=False):
        """Images (B, C, H, W), about [-1, 1], of the `shape` asked for, from noise.

        steps: noise levels walked (None: 18 for EDM, 100 for DDPM). sampler: "heun" (Karras et al. 2022, algorithm 2; two
        evaluations a step), "euler" (which is DDIM, Song et al. 2021) or "ancestral" (Ho et al. 2020); None: heun for EDM,
        ancestral for DDPM. churn: S_churn of Karras et al. for "heun" and "euler".
        skip: brick indices, or a function of the progress (0 at pure noise, 1 at the end) giving them for a step.
        generator: one CPU generator, or a list with one per image. guide(x0_hat, x, sigma) -> x0_hat corrects every estimate.
        clip: clamp estimates to [-1, 1]. callback(done, total, x0_hat) is called after every step.

        Canvases other than the training size (ours; measured in the README). Height decides the scale. The scene is sampled at
        the training height, as wide as the canvas asks; a width beyond one training image goes round like a panorama, with the
        grid of regions shifted sideways at every step so that no seam stays. It is then enlarged in steps of at most two, and
        each time noise of the highest level of the walk up to `refine` is added and removed by the steps from there on, with
        the grid shifted both ways, so that neither regions nor patches leave their mark. A lower canvas is a shrunken one, a
        narrower canvas the middle of a full one. plain: none of this, but one walk over the whole canvas, the grid in place."""
        (B, C, H, W), size, device = shape, model.config.size, next(model.parameters()).device
        sampler, steps = sampler or self.sampler, steps or self.steps
        if sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {sampler!r}: take one of {', '.join(SAMPLERS)}")
        sigmas = self.levels(steps)
        joins = next(i for i, sigma in enumerate(sigmas) if sigma <= refine)
        (h, w), *larger = [(H, W)] if plain else canvases(size, H, W)
        done, total = count(1), steps + (steps - joins) * sum(height > size for height, _ in larger)
        # Strides without a common divisor with the size lead the grid through every phase of the regions and patches, so that no
        # seam stays in place, and need no random numbers.
        strides = [next(n for n in count(least) if math.gcd(n, size) == 1) for least in (size // 3, size * 2 // 5)]

        def walk(x, start, down, across):
            """From x at level sigmas[start] to a clean image, the grid shifting down, across, both or not at all."""
            for i in range(start, steps):
                sigma, lower = sigmas[i], sigmas[i + 1]
                offset = tuple((i - start + 1) * n % size * shifts for n, shifts in zip(strides, (down, across)))
                skipped = skip(i / steps) if callable(skip) else skip

                def estimate(x, sigma):
                    x0 = Diffusion.denoise(self, model, x, sigma, labels, skip=skipped, guidance=guidance, offset=offset,
                                           wrap=across and not down)
                    x0 = guide(x0, x, sigma) if guide else x0
                    return x0.clamp(-1, 1) if clip else x0

                if churn and S_MIN <= sigma <= S_MAX and sampler != "ancestral":
                    raised = sigma * (1 + min(churn / steps, math.sqrt(2) - 1))
                    x = x + math.sqrt(raised ** 2 - sigma ** 2) * S_NOISE * normal(x.shape, generator, device)
                    sigma = raised
                x0 = estimate(x, sigma)
                if sampler == "ancestral":                      # the posterior q(x_lower | x, x0) of Ho et al., equation 7
                    keep = (lower / sigma) ** 2
                    x = x0 + keep * (x - x0)
                    if lower > 0:
                        x = x + lower * math.sqrt(1 - keep) * normal(x.shape, generator, device)
                else:
                    slope = (x - x0) / sigma
                    if sampler == "heun" and lower > 0:
                        ahead = x + (lower - sigma) * slope
                        slope = (slope + (ahead - estimate(ahead, lower)) / lower) / 2
                    x = x + (lower - sigma) * slope
                if callback:
                    callback(next(done), total, x0)
            return x

        full = w if plain else math.ceil(w / size) * size
        x0 = walk(sigmas[0] * normal((B, C, h, full), generator, device), 0, down=False, across=w > size and not plain)
        x0 = x0[..., (full - w) // 2:][..., :w]
        for h, w in larger:
            x0 = interpolate(x0, (h, w), mode="bicubic", antialias=True)
            if h > size:
                x0 = walk(x0 + sigmas[joins] * normal(x0.shape, generator, device), joins, down=True, across=True)
        return x0


def canvases(size, H, W):
    """The heights and widths that lead from the training height to H x W: doubled as often as needed, or shrunk once."""
    heights = [size]
    while heights[-1] < H:
        heights.append(min(2 * heights[-1], H))
    return [(h, max(1, round(W * h / H))) for h in heights + [H] * (H < size)]


class EDM(Diffusion):
    """Karras et al. 2022: F and its input have unit scale at every noise level, and sigma is log-normal in training."""
    sampler, steps = "heun", 18

    def __init__(self, P_mean=-1.2, P_std=1.2, sigma_data=0.5, sigma_min=0.002, sigma_max=80.0, rho=7.0):
        self.P_mean, self.P_std, self.sigma_data = P_mean, P_std, sigma_data
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho

    def coefficients(self, sigma):
        """c_skip, c_out, c_in, c_noise for a tensor sigma (table 1)."""
        total = sigma ** 2 + self.sigma_data ** 2
        return self.sigma_data ** 2 / total, sigma * self.sigma_data / total.sqrt(), total.rsqrt(), sigma.log() / 4

    def sigma_at(self, q):
        """The q-quantile, q in (0, 1), of the noise levels in training."""
        return (self.P_mean + self.P_std * torch.special.ndtri(q.clamp(1e-6, 1 - 1e-6))).exp()

    def levels(self, steps):
        """steps falling noise levels and a final 0 (equation 5)."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return [(high + i / max(steps - 1, 1) * (low - high)) ** self.rho for i in range(steps)] + [0.0]


class DDPM(Diffusion):
    """Ho et al. 2020 with noise prediction: F estimates eps, over T discrete levels t = 0..T-1 of a "cosine" (Nichol &
    Dhariwal 2021) or "linear" schedule, sigma = sqrt((1 - abar) / abar). `denoise` takes the variance-preserving
    x_t = sqrt(abar) x0 + sqrt(1 - abar) eps; everything else works on x = x_t / sqrt(abar) = x0 + sigma eps, in which DDIM is
    Euler's method and the ancestral step has two terms."""
    sampler, steps = "ancestral", 100

    def __init__(self, schedule="cosine", T=1000):
        steps = torch.arange(T + 1, dtype=torch.float64)
        if schedule == "cosine":
            f = torch.cos((steps / T + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        elif schedule == "linear":
            beta = torch.linspace(1e-4 * 1000 / T, 0.02 * 1000 / T, T, dtype=torch.float64).clamp(max=0.999)
        else:
            raise ValueError(f"unknown schedule {schedule!r}: take cosine or linear")
        self.T, self.abar = T, (1 - beta).cumprod(0)                                              # (T,) float64
        self.sigmas = ((1 - self.abar) / self.abar).sqrt().float()

    def coefficients(self, sigma):
        """c_skip, c_out, c_in, c_noise: D = x - sigma F, and c_in x is the variance-preserving x_t."""
        return torch.ones_like(sigma), -sigma, (1 + sigma ** 2).rsqrt(), sigma.log() / 4

    def sigma_at(self, q):
        """The q-quantile of the noise levels in training, where t is uniform."""
        return self.sigmas[(q * self.T).long().clamp(max=self.T - 1)]

    def levels(self, steps):
        """steps falling noise levels, evenly spread over t from T - 1 to 0, and a final 0."""
        t = torch.linspace(self.T - 1, 0, steps).round().long()
        return self.sigmas[t].tolist() + [0.0]

    def denoise(self, model, x, t, labels=None, **settings):
        """As for `Diffusion`, from x_t (variance preserving) and t in 0..T-1, a number or (B,)."""
        sigma = self.sigmas.to(x.device)[torch.as_tensor(t, device=x.device)].expand(len(x))
        return super().denoise(model, x * (1 + sigma ** 2).sqrt().view(-1, 1, 1, 1), sigma, labels, **settings)


OBJECTIVES = {"edm": EDM, "ddpm": DDPM}


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


def write_aside(path, write):
    """Call write(file) on a temporary file beside `path`, flush it to disk and rename it: `path` is whole at any moment."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.part")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def save_checkpoint(path, model, weights=None, **state):
    """Write weights, config and `model.info` (JSON-able) to `path`, with any further `state` of tensors, numbers, strings,
    lists and dictionaries. Pass `weights` to store other tensors than the model's own (an average, say)."""
    json.dumps(model.info)                                                  # TypeError now rather than when it is loaded
    buffer = io.BytesIO()               # so that a full disk is an OSError of ours, not an error inside torch's writer
    torch.save(dict(config=asdict(model.config), info=model.info, weights=weights or model.state_dict(), **state), buffer)
    write_aside(path, lambda file: file.write(buffer.getbuffer()))


def read_checkpoint(path):
    """The dictionary that `save_checkpoint` wrote. Nothing is unpickled but tensors and plain containers, checksums are
    compared (torch itself does not), and weights are finite and no larger than the file. ValueError if it is anything else,
    FileNotFoundError if there is nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type for member in archive.infolist()) or archive.testzip():
                raise ValueError("wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["config"] = LegoConfig(**state["config"])
        if sum(w.numel() * w.element_size() for w in state["weights"].values()) > Path(path).stat().st_size:
            raise ValueError("weights larger than the file")
        if not all(w.isfinite().all() for w in state["weights"].values()):
            raise ValueError("weights that are not finite")
        if state["info"].get("objective", "edm") not in OBJECTIVES:
            raise ValueError("unknown objective")
    except OSError:
        raise
    except Exception as error:          # torch's reader meets hostile bytes with errors of almost any type
        reason = error if type(error) is ValueError else type(error).__name__
        raise ValueError(f"{path} is not a LEGO checkpoint or is damaged ({reason})") from error
    return state


def load_checkpoint(path):
    """The model stored in `path`, on the CPU, in evaluation mode, ready to sample; errors as `read_checkpoint`."""
    state = read_checkpoint(path)
    with torch.device("meta"):          # costs nothing, whatever size the config claims
        wanted = {name: w.shape for name, w in Lego(state["config"]).state_dict().items()}
    if wanted != {name: w.shape for name, w in state["weights"].items()}:
        raise ValueError(f"{path}: the weights do not fit the stack {state['config']}")
    model = Lego(state["config"])
    model.load_state_dict(state["weights"])
    model.info = state["info"]
    return model.eval()


OFFICIAL_NAMES = [("t_embedder.mlp", "time"), ("y_embedder.embedding_table", "label"), ("model.", "bricks."),
                  ("x_embedder.proj", "local"), ("final_layer.linear", "decode"), ("final_layer.", ""), ("attn.", ""),
                  ("mlp.", ""), ("adaLN_modulation.1", "adaln")]


def load_official(model, state_dict):
    """Load the authors' parameters into a model made from `LegoConfig.official`. ValueError if names or shapes do not fit.

    Their published files are pickled Python classes, which this project never opens. With the authors' code and in its own
    environment, save the tensors once: `torch.save(ema.model.state_dict(), "weights.pt")`, and read that file with
    `torch.load("weights.pt", weights_only=True)`. Their fixed position tables are checked against ours."""
    ours = {}
    try:
        for name, tensor in state_dict.items():
            for theirs, mine in OFFICIAL_NAMES:
                name = name.replace(theirs, mine)
            if name.endswith("local.weight"):       # theirs is a convolution (D, [z, x, place], p, p)
                tensor = tensor.permute(0, 2, 3, 1).flatten(1)
            ours[name] = tensor
        for k, brick in enumerate(model.bricks):
            table = ours.pop(f"bricks.{k}.pos_embed", brick.position)
            if not torch.allclose(table.float().reshape(brick.position.shape), brick.position, atol=1e-5):
                raise ValueError(f"brick {k}: the position table differs from the released network's")
        model.load_state_dict(ours)
    except RuntimeError as error:
        raise ValueError("the weights do not fit this stack: " + " ".join(str(error).split())) from error
