"""LEGO diffusion in one readable file: stackable, skippable bricks for image generation.

Zheng et al., "Learning Stackable and Skippable LEGO Bricks for Efficient, Reconfigurable,
and Variable-Resolution Diffusion Modeling", ICLR 2024 (arXiv 2310.06389) is "the paper"
below, the authors' repository is "the released code", and what we chose is "ours".

Symbols: x0 is a clean image in [-1, 1], sigma a noise level, eps unit noise, x = x0 + sigma
eps the noisy image, x0_hat an estimate of x0, F the raw output of the network (from which
x0_hat = c_skip x + c_out F), c the condition (noise level and label). Shapes: B images, C
channels, H x W pixels, R regions an image, N tokens a region, p x p pixels a patch, width D,
K bricks. A canvas is an image of any size, not only of the training size.

A LEGO network is a stack of bricks, which hand on z, an estimate of F at full resolution:

    z = 0
    for brick in bricks:
        cut     [z, x, coordinates] into regions, and every region into patches
        enrich  every patch by an MLP, which makes it a token
        attend  from token to token within each region, in a few Transformer blocks
        decode  every token to the pixels of its patch, and join them to a correction
        add     the correction to z

All bricks estimate the same F, so any of them can be left out: z then passes it by, unchanged.
Ours: a brick may also state the noise levels at which it works. Outside of them it is
skipped, in training and sampling alike, and costs nothing.

SPDX-License-Identifier: MIT
"""

import hashlib
import inspect
import io
import json
import math
import os
import re
import zipfile
from bisect import bisect_left
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import count
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import (
    gelu, interpolate, layer_norm, one_hot, pad, scaled_dot_product_attention, silu)
from torch.utils.flop_counter import FlopCounterMode

# ---- The specification of a stack ----------------------------------------------------


@dataclass(frozen=True)
class BrickSpec:
    """One brick. ValueError for numbers that do not fit."""
    region: int                     # side of its regions in pixels
    patch: int                      # side of its patches in pixels
    depth: int                      # number of its Transformer blocks
    noise: tuple = (0.0, math.inf)  # it works at low <= sigma < high; None is an open end

    def __post_init__(self):
        check_whole_numbers(self, region=1, patch=1, depth=1)
        if self.region % self.patch:
            fits = math.ceil(self.region / self.patch) * self.patch
            raise ValueError(f"patches of {self.patch} do not fill region {self.region}: "
                             f"take region {fits}")
        if self.tokens > 256 ** 2:              # no machine has the memory for such attention
            raise ValueError(f"{self.tokens} tokens a region are too many: take larger patches")
        low, high = self.noise
        low, high = float(low or 0), math.inf if high is None else float(high)
        if not 0 <= low < high:
            raise ValueError(f"a noise range must rise from 0 or more, found {low:g}:{high:g}")
        object.__setattr__(self, "noise", (low, high))

    @property
    def tokens(self):
        """N, the tokens of a region, which is the span of attention."""
        return (self.region // self.patch) ** 2

    @property
    def noise_range(self):
        """The range as `parse` reads it: low:high, with nothing for an open end."""
        low, high = self.noise
        return f"{low or ''}:{high if high < math.inf else ''}"

    def __str__(self):
        noise = f"@{self.noise_range}".removesuffix("@:")
        return f"{self.region}/{self.patch}x{self.depth}{noise}"


# The settings of the released network: linear enrichment, z replaced, gradients through z, and no
# QK-norm.
RELEASED = dict(local_mlp=False, residual=False, detach=False, qk_norm=False, released=True)


@dataclass(frozen=True)
class LegoConfig:
    """A whole network. ValueError for parts that do not fit."""
    bricks: tuple               # of BrickSpecs, or dictionaries of their fields, in running order
    width: int                  # D, of all Transformer blocks
    heads: int                  # of all attention
    channels: int = 3
    classes: int = 0            # 0 makes an unconditional network
    size: int | None = None     # side of the training images (None: the largest region)
    mlp_ratio: int = 4          # hidden width of a block's MLP in units of D
    local_mlp: bool = True      # True: an MLP makes a token (paper). False: one linear map
    residual: bool = True       # True: a brick adds to z (ours). False: it replaces z
    detach: bool = True         # True: no gradient flows back through z (ours)
    qk_norm: bool = True        # True: queries and keys are normalised (ours)
    released: bool = False      # True: the coordinates, GELU and time features of released code

    def __post_init__(self):
        bricks = tuple(b if isinstance(b, BrickSpec) else BrickSpec(**b) for b in self.bricks)
        object.__setattr__(self, "bricks", bricks)
        if not bricks:
            raise ValueError("a stack needs at least one brick, such as 32/4x6")
        if self.size is None:
            object.__setattr__(self, "size", max(b.region for b in bricks))
        check_whole_numbers(self, width=4, heads=1, channels=1, classes=0, size=1, mlp_ratio=1)
        step = math.lcm(4, self.heads)          # 4: sine and cosine of row and column
        if self.width % step:
            fits = math.ceil(self.width / step) * step
            raise ValueError(f"{self.heads} heads and 4 must divide width {self.width}: "
                             f"take width {fits}")
        if self.qk_norm and self.width == self.heads:
            raise ValueError(f"QK-norm leaves nothing of heads of width 1: take fewer heads than "
                             f"{self.heads}, or qk_norm=False")
        reached = 0.0
        end = (math.inf, math.inf)              # an empty range, which shows a gap below infinity
        for low, high in sorted([b.noise for b in bricks]) + [end]:
            if low > reached:
                raise ValueError(f"no brick works at sigma {reached:g} to {low:g}: widen a range")
            reached = max(reached, high)

    @classmethod
    def parse(cls, stack, **settings):
        """The config of a stack such as "32/4x6@0.3: 32/4x6@:0.4 16/2x4@:0.4": for each brick
        region/patch x depth and, after an @, its noise range low:high in sigma. `settings` are
        the other fields of the config."""
        number = r"(\d*\.?\d+(?:e[+-]?\d+)?)?"
        bricks = []
        for word in stack.split():
            match = re.fullmatch(rf"(\d+)/(\d+)x(\d+)(?:@{number}:{number})?", word)
            if not match:
                raise ValueError(f"cannot read brick {word!r}: write region/patch x depth, such "
                                 f"as 32/4x6, or with a noise range 16/2x4@0.1:0.4")
            region, patch, depth, low, high = match.groups()
            bricks.append(BrickSpec(int(region), int(patch), int(depth), (low, high)))
        return cls(tuple(bricks), **settings)

    @classmethod
    def official(cls, stack, classes=10, **settings):
        """The released network, for a stack as `parse` reads it."""
        return cls.parse(stack, classes=classes, **RELEASED, **settings)

    def __str__(self):
        return " ".join(map(str, self.bricks))

    def checked(self, skip):
        """`skip` as a set. ValueError if it names an unknown brick, or all of them."""
        skip, K = set(skip), len(self.bricks)
        if not skip < set(range(K)):
            raise ValueError(f"cannot skip {sorted(skip)}: this stack has bricks 0 to {K - 1}, "
                             f"and at least one must stay")
        return skip

    def active(self, c_noise, skip=()):
        """Which bricks run on which images, bool (K, B), for c_noise = ln(sigma)/4, (B,).
        ValueError if `skip` leaves an image without a brick, or if sigma is 0 or infinite."""
        if not c_noise.isfinite().all():
            raise ValueError("there is an image with a noise level that is not above 0 and finite")
        # c_noise is compared, not sigma: to undo the logarithm would round, and 0.3 fall below 0.3.
        noise = torch.tensor([b.noise for b in self.bricks], dtype=c_noise.dtype)
        low, high = noise.log().div(4).T[:, :, None]                     # (K, 1) each
        works = (low <= c_noise) & (c_noise < high)                      # (K, B)
        runs = works.clone()
        runs[list(self.checked(skip))] = False
        bare = ~runs.any(0)                     # (B,), the images that are left without a brick
        if bare.any():
            sigma = (4 * c_noise[bare]).exp()
            cover = works[:, bare].any(1).nonzero().flatten().tolist()
            raise ValueError(f"without bricks {sorted(skip)} none is left from sigma "
                             f"{sigma.min():.3g} to {sigma.max():.3g}: keep some of {cover}, "
                             f"which work there")
        return runs

    def running(self, sigma, skip=()):
        """The indices of the bricks that run at the noise level `sigma`, a number."""
        active = self.active(torch.tensor([sigma]).log() / 4, skip)
        return active[:, 0].nonzero().flatten().tolist()


def check_whole_numbers(spec, **minimums):
    """ValueError unless these fields are whole numbers from their minimum to 16384, a bound that
    stops a typing error or a hostile file before it asks for all memory."""
    for name, least in minimums.items():
        value = getattr(spec, name)
        if type(value) is not int or not least <= value <= 16384:
            raise ValueError(f"{name} must be a whole number from {least} to 16384, "
                             f"found {value!r}")


# ---- Building blocks -----------------------------------------------------------------


def position_table(n, width):
    """Fixed sine-cosine embedding (n * n, D) of n x n tokens, row by row. The first half of
    the features tells the column, the other half the row."""
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(n, dtype=torch.float64)[:, None] * omega        # (n, D/4)
    axis = torch.cat([angle.sin(), angle.cos()], 1).float()              # (n, D/2)
    return torch.cat([axis.repeat(n, 1), axis.repeat_interleave(n, 0)], 1)


def time_features(t):
    """Fourier features (B, 256) of t (B,), some logarithm of sigma: cosines, then sines."""
    omega = 10000.0 ** (-torch.arange(128, device=t.device) / 128)
    angle = t.float()[:, None] * omega                                   # (B, 128)
    return torch.cat([angle.cos(), angle.sin()], 1)


def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(d)) v for q, k, v (B * R, heads, N, d), where heads * d = D.
    mask (B * R, 1, N, N) is True where a token may look."""
    # The fused kernel pays on accelerators and for many tokens. On a CPU in bfloat16 its
    # backward pass is ten times slower than the lines below at 16 to 256 tokens, and its
    # forward pass is slower below 32. On CUDA it takes at most 65,535 regions.
    many = q.shape[-2] > (256 if torch.is_grad_enabled() else 32)
    fused = many if q.device.type == "cpu" else len(q) < 65536
    if fused:
        return scaled_dot_product_attention(q, k, v, mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)             # (B * R, heads, N, N)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def modulate(h, shift, scale):
    """Layer norm without weights of its own, times 1 + scale, plus shift (adaLN). Here and in
    blocks, addcmul makes a product and a sum in one pass over the memory instead of two."""
    return torch.addcmul(shift, layer_norm(h, h.shape[-1:], eps=1e-6), 1 + scale)


class Block(nn.Module):
    """adaLN-Zero Transformer block (Peebles & Xie 2023) on tokens h (B, R, N, D), under the
    condition c (B, D) of the whole image. `Lego` makes its gates zero at first, and so a new
    block is the identity.

    For another mixer, override `mix` in a subclass and pass that as Lego(config, block=...)."""

    def __init__(self, config):
        super().__init__()
        D = config.width
        self.heads = config.heads
        self.gelu = "tanh" if config.released else "none"
        self.adaln = nn.Linear(D, 6 * D)
        self.qkv = nn.Linear(D, 3 * D)
        self.sharpness = nn.Parameter(torch.ones(D // self.heads)) if config.qk_norm else None
        self.proj = nn.Linear(D, D)
        self.fc1 = nn.Linear(D, config.mlp_ratio * D)
        self.fc2 = nn.Linear(config.mlp_ratio * D, D)
        self.takes_mask = "mask" in inspect.signature(self.mix).parameters

    def attention_inputs(self, h):
        """Queries, keys and values (B * R, heads, N, d) of tokens h (B, R, N, D)."""
        B, R, N, D = h.shape
        q, k, v = self.qkv(h).view(B * R, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.sharpness is not None:
            # QK-norm (Dehghani et al. 2023): without it the scores of some head grow in a long
            # run until bfloat16 is too coarse for them, and the loss jumps up. Only the product
            # of q and k counts, so that one weight is enough for both.
            q = layer_norm(q, q.shape[-1:], self.sharpness)
            k = layer_norm(k, k.shape[-1:])
        return q, k, v

    def mix(self, h, mask=None):
        """The one place where tokens meet: attention within each region, (B, R, N, D) to the
        same. mask (B * R, 1, N, N) is True where a token may look (None: everywhere). It is
        passed by name, and only where there is padding."""
        mixed = attention(*self.attention_inputs(h), mask)               # (B * R, heads, N, d)
        return self.proj(mixed.transpose(1, 2).reshape(h.shape))

    def forward(self, h, c, mask=None):
        if mask is not None and not self.takes_mask:
            raise ValueError(f"{type(self).__name__}.mix has no parameter `mask`, so padding would "
                             f"leak into the picture: honour a mask, or keep to whole regions")
        modulation = self.adaln(c)[:, None, None].chunk(6, -1)           # each (B, 1, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        normed = modulate(h, shift1, scale1)
        mixed = self.mix(normed) if mask is None else self.mix(normed, mask=mask)
        h = torch.addcmul(h, gate1, mixed)                               # h + gate1 * mixed
        wide = gelu(self.fc1(modulate(h, shift2, scale2)), approximate=self.gelu)
        return torch.addcmul(h, gate2, self.fc2(wide))


# ---- The grid of regions -------------------------------------------------------------


class Grid:
    """How a brick cuts a canvas of H x W pixels into regions and patches.

    `offset` shifts the grid down and right by so many pixels. Where regions reach over the
    edge of the canvas, it is padded with copies of its edge pixels."""

    def __init__(self, spec, config, H, W, offset=(0, 0)):
        self.spec, self.config, self.H, self.W = spec, config, H, W
        region = spec.region
        self.top, self.left = -offset[0] % region, -offset[1] % region  # pixels of padding
        self.rows = math.ceil((self.top + H) / region)
        self.columns = math.ceil((self.left + W) / region)
        right = self.columns * region - self.left - W
        bottom = self.rows * region - self.top - H
        self.padding = self.left, right, self.top, bottom

    def cut(self, x):
        """A canvas (B, C, H, W) to its patches (B, R, N, p * p, C)."""
        return self.tile(pad(x, self.padding, mode="replicate") if any(self.padding) else x)

    def tile(self, x):
        """A padded canvas to its patches (B, R, N, p * p, C), everything row by row."""
        B, C = x.shape[:2]
        p, n = self.spec.patch, self.spec.region // self.spec.patch
        x = x.view(B, C, self.rows, n, p, self.columns, n, p)
        x = x.permute(0, 2, 5, 3, 6, 4, 7, 1)              # (B, rows, columns, n, n, p, p, C)
        return x.reshape(B, -1, n * n, p * p, C)

    def join(self, patches):
        """(B, R, N, p * p * C) back to a canvas (B, C, H, W), without the padding."""
        B, p, n = len(patches), self.spec.patch, self.spec.region // self.spec.patch
        x = patches.reshape(B, self.rows, self.columns, n, n, p, p, -1)
        x = x.permute(0, 7, 1, 3, 5, 2, 4, 6)              # (B, C, rows, n, p, columns, n, p)
        x = x.reshape(B, -1, self.rows * n * p, self.columns * n * p)
        return x[:, :, self.top:self.top + self.H, self.left:self.left + self.W]

    def real(self, device):
        """(R, N): True for a token that has a pixel of the canvas. None if there is no padding."""
        if not any(self.padding):
            return None
        canvas = pad(torch.ones(1, 1, self.H, self.W, device=device), self.padding)
        return self.tile(canvas)[0].flatten(2).any(-1)

    def coordinates(self, device):
        """The place (R, N, p * p, 2) of every pixel: row and column, from -1 to 1 over an
        image of the training size (released code: over the canvas)."""
        down = self.axis(self.rows, self.top, self.H, device)
        across = self.axis(self.columns, self.left, self.W, device)
        place = torch.stack(torch.meshgrid(down, across, indexing="ij"))
        return self.tile(place[None])[0]

    def axis(self, regions, before, length, device):
        """The coordinates along an axis of so many regions, padding included."""
        region, size = self.spec.region, self.config.size
        pixel = torch.arange(regions * region, device=device)
        if self.config.released:                # stretched over the canvas
            return 2 * (pixel - before) / max(length - 1, 1) - 1
        # Ours: region i gets the coordinates of region floor(i m / regions) of the m in a
        # training image, so that no brick meets coordinates it was not trained on.
        m = math.ceil(size / region)
        trained = pixel // region * m // regions
        return 2 * (trained * region + pixel % region) / max(size - 1, 1) - 1


# ---- The brick -----------------------------------------------------------------------

CHUNK = {"cpu": 4096}       # tokens that a brick works on at a time when it samples. Other
                            # devices take 65536, and training takes all.


class Brick(nn.Module):
    """One LEGO brick (paper, section 3.1): (x, z) to a new z, all (B, C, H, W).

    Its weights are shared by all regions. The first brick of a stack has no input for z,
    since nothing comes before it."""

    def __init__(self, spec, config, first, block=Block):
        super().__init__()
        self.spec, self.config, self.first = spec, config, first
        D, area = config.width, spec.patch ** 2
        channels = config.channels * (1 if first else 2) + 2             # z, x, coordinates
        self.local = nn.Linear(channels * area, D)
        self.local_mlp = nn.Linear(D, D) if config.local_mlp else None
        self.blocks = nn.ModuleList(block(config) for _ in range(spec.depth))
        self.adaln = nn.Linear(D, 2 * D)
        self.decode = nn.Linear(D, config.channels * area)
        table = position_table(spec.region // spec.patch, D)
        self.register_buffer("position", table, persistent=False)

    def forward(self, x, z, c, regions=None, offset=(0, 0)):
        """The new z under the condition c (B, D). `regions` holds the indices of the regions
        to run, outside of which z stays as it is (None: all). See `Grid` for offset."""
        grid = Grid(self.spec, self.config, *x.shape[2:], offset)
        old = grid.cut(z)                                                # (B, R, N, p * p, C)
        place = grid.coordinates(x.device).to(x.dtype).expand(len(x), -1, -1, -1, -1)
        seen = [grid.cut(x), place] if self.first else [old, grid.cut(x), place]
        pixels = torch.cat(seen, 4).flatten(3)                           # (B, R, N, inputs)
        real = grid.real(x.device)                                       # (R, N) or None

        B, R, N, _ = pixels.shape
        regions = torch.arange(R, device=x.device) if regions is None else regions
        at_once = R if torch.is_grad_enabled() else CHUNK.get(x.device.type, 65536) // (B * N)
        shift, scale = self.adaln(c)[:, None, None].chunk(2, -1)         # each (B, 1, 1, D)
        new = []
        for some in regions.split(max(1, at_once)):     # a few, which take little memory
            h = self.enrich(pixels[:, some].to(c.dtype))                 # (B, some, N, D)
            h = self.orchestrate(h, c, None if real is None else real[some])
            h = self.decode(modulate(h, shift, scale))                   # (B, some, N, p * p * C)
            new.append(h.to(x.dtype))
        new, old = torch.cat(new, 1), old.flatten(3)
        if self.config.residual:
            new = new + old[:, regions]
        return grid.join(old.index_copy(1, regions, new))

    def enrich(self, pixels):
        """Local-feature enrichment: each patch becomes a token, (B, R, N, D)."""
        h = self.local(pixels)
        if self.local_mlp is not None:
            h = self.local_mlp(gelu(h))
        return h + self.position.to(h.dtype)

    def orchestrate(self, h, c, real):
        """Global-content orchestration: the tokens of a region attend to each other. Those of
        nothing but padding see only each other, and no other token sees them."""
        mask = None
        if real is not None:
            mask = real[:, :, None] == real[:, None, :]                  # (R, N, N)
            mask = mask[:, None].repeat(len(h), 1, 1, 1)                 # (B * R, 1, N, N)
        for block in self.blocks:
            h = block(h, c, mask)
        return h


# ---- The stack -----------------------------------------------------------------------


def check_labels(labels, B):
    """ValueError unless there is a label for each of B images, or none at all."""
    if labels is not None and labels.shape != (B,):
        raise ValueError(f"{B} images need labels of the shape ({B},), found {tuple(labels.shape)}")


class Lego(nn.Module):
    """The stack of bricks, which share one embedding of noise level and label. `block` is the
    class of their blocks. `info` is a plain dictionary that checkpoints keep; its "objective"
    is a name in OBJECTIVES."""

    def __init__(self, config, block=Block):
        super().__init__()
        D = config.width
        self.config, self.block, self.info = config, block, {}
        self.time = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.label = nn.Linear(config.classes, D) if config.classes else None
        self.bricks = nn.ModuleList(Brick(spec, config, k == 0, block)
                                    for k, spec in enumerate(config.bricks))
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                # A new block is the identity, and a new brick adds nothing to z.
                if "adaln" in name or "decode" in name:
                    nn.init.zeros_(module.weight)

    def condition(self, c_noise, labels):
        """c (B, D), after the SiLU of adaLN, so that blocks need only a linear layer."""
        check_labels(labels, len(c_noise))
        t = c_noise if self.config.released else 4 * c_noise             # 4 c_noise is ln(sigma)
        c = self.time(time_features(t).to(self.time[0].weight.dtype))
        if self.label is not None:
            if labels is None:
                labels = torch.full_like(c_noise, self.config.classes, dtype=torch.long)
            # "No label" is the zero vector, to which the layer still adds its bias.
            c = c + self.label(one_hot(labels, self.config.classes + 1)[:, :-1].to(c.dtype))
        elif labels is not None:
            raise ValueError("this network has no classes: pass labels=None")
        return silu(c)

    def forward(self, x, c_noise, labels=None, *,
                skip=(),                # indices of bricks to leave out, which then cost nothing
                return_all=False,       # a list with F of every brick that ran for some image
                rows=None,              # for every brick the images it runs for, as a slice
                regions=None,           # for every brick the indices of regions to run, or None
                hidden=None,            # (B, K) bool: later bricks get the z that this one got
                offset=(0, 0)):         # see `Grid`
        """F of the last brick that ran, (B, C, H, W). Where a brick does not run, z passes it by.

        x is c_in times the noisy images, of any H and W. c_noise (B,) is ln(sigma)/4. A brick
        runs for the images in its noise range, or for those that `rows` names, unchecked.
        labels (B,) go from 0 to classes; the last one, like None, means "no label". ValueError
        if `skip` names an unknown brick or leaves an image without one, and for labels of
        another shape or where there are no classes."""
        skip = self.config.checked(skip)
        if rows is None:
            rows = self.config.active(c_noise.cpu(), skip)               # (K, B), bool
        c = self.condition(c_noise, labels)
        z, out = torch.zeros_like(x), []
        for k, brick in enumerate(self.bricks):
            here = rows[k]
            if k in skip or not len(c[here]):
                continue
            z = z.detach() if self.config.detach else z
            new = z.clone()
            some = regions[k] if regions else None
            new[here] = brick(x[here], z[here], c[here], some, offset)
            out.append(new)
            z = new if hidden is None else torch.where(hidden[:, k, None, None, None], z, new)
        return out if return_all else out[-1]

    def flops(self, H, W, skip=(), sigma=None, offset=(0, 0)):
        """Floating-point operations (a multiply-add is two) of one evaluation of an H x W image:
        a number for every brick, 0 where it does not run, and last the shared embeddings.
        With `sigma` only the bricks that work there run."""
        config, skip = self.config, self.config.checked(skip)
        run = range(len(config.bricks)) if sigma is None else config.running(sigma, skip)
        flops = [0] * len(config.bricks) + [count_flops(config, self.block)]
        for k in set(run) - skip:
            grid = Grid(config.bricks[k], config, H, W, offset)
            flops[k] = count_flops(config, self.block, k, grid.rows, grid.columns)
        return flops


@lru_cache(maxsize=1024)
def count_flops(config, block, k=None, rows=1, columns=1):
    """The FLOPs of brick k on so many regions, or of the embeddings (None), for one image:
    counted by torch on the meta device, which works out shapes and nothing else. (With
    gradients a brick works on all its regions at once.)"""
    with torch.device("meta"), torch.enable_grad(), FlopCounterMode(display=False) as counter:
        if k is None:
            Lego(config, block).condition(torch.zeros(1), None)
        else:
            spec, side = config.bricks[k], config.bricks[k].region
            x = torch.zeros(1, config.channels, rows * side, columns * side)
            Brick(spec, config, k == 0, block)(x, x, torch.zeros(1, config.width))
    return counter.get_total_flops()


# ---- Samplers ------------------------------------------------------------------------
#
# A sampler takes x from the level sigma to sigma_next. It is given denoise(x, sigma), which is
# x0_hat, noise(), which is unit noise, and a dictionary `state` that is empty at first.


def euler(x, sigma, sigma_next, denoise, **_):
    """Euler's method, which is DDIM (Song et al. 2021)."""
    d_cur = (x - denoise(x, sigma)) / sigma
    return x + (sigma_next - sigma) * d_cur


def heun(x, sigma, sigma_next, denoise, **_):
    """Heun's method, two evaluations a step (Karras et al. 2022, algorithm 1)."""
    d_cur = (x - denoise(x, sigma)) / sigma
    x_next = x + (sigma_next - sigma) * d_cur
    if sigma_next > 0:
        d_prime = (x_next - denoise(x_next, sigma_next)) / sigma_next
        x_next = x + (sigma_next - sigma) * (d_cur + d_prime) / 2
    return x_next


def ancestral(x, sigma, sigma_next, denoise, noise, **_):
    """A draw from the posterior q(x_next | x, x0_hat) (Ho et al. 2020, equation 7)."""
    x0_hat = denoise(x, sigma)
    keep = (sigma_next / sigma) ** 2
    return x0_hat + keep * (x - x0_hat) + sigma_next * math.sqrt(1 - keep) * noise()


def dpm2m(x, sigma, sigma_next, denoise, state, **_):
    """DPM-Solver++(2M), one evaluation a step (Lu et al. 2022, algorithm 2)."""
    x0_hat = denoise(x, sigma)
    if sigma_next == 0:
        return x0_hat
    h = math.log(sigma / sigma_next)
    ahead = x0_hat
    if state:
        ahead = x0_hat + h / (2 * state["h"]) * (x0_hat - state["x0_hat"])
    state.update(h=h, x0_hat=x0_hat)
    return sigma_next / sigma * x - math.expm1(-h) * ahead


SAMPLERS = {"heun": heun, "euler": euler, "ancestral": ancestral, "dpm2m": dpm2m}
S_MIN, S_MAX, S_NOISE = 0.05, 10.0, 1.003      # where and how churn acts (released code)


def walk(x, levels, sampler, estimate, noise, first=0, churn=0.0):
    """Yield x after each step of a sampler from levels[first] to the last level, 0.

    estimate(step, x, sigma) is x0_hat. churn is S_churn of Karras et al. (algorithm 2)."""
    steps, state = len(levels) - 1, {}
    for i in range(first, steps):
        sigma, sigma_next = levels[i], levels[i + 1]
        if churn and S_MIN <= sigma <= S_MAX:
            sigma_hat = sigma * (1 + min(churn / steps, math.sqrt(2) - 1))
            x = x + math.sqrt(sigma_hat ** 2 - sigma ** 2) * S_NOISE * noise()
            sigma = sigma_hat
        denoise = partial(estimate, i)
        x = SAMPLERS[sampler](x, sigma, sigma_next, denoise=denoise, noise=noise, state=state)
        yield x


def generator(*key):
    """A random generator on the CPU for any key, such as (seed, image number). Torch looks at
    only 32 bits of a seed, so the key is hashed into them, which keeps neighbours apart."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def normal(shape, generator, device):
    """Unit noise, drawn on the CPU and so the same on every device. `generator` is one for
    all, a list with one for each image, or None for torch's own."""
    if not isinstance(generator, (list, tuple)):
        return torch.randn(shape, generator=generator).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for {shape[0]} images: "
                         f"pass one for each, or a single one")
    return torch.stack([torch.randn(shape[1:], generator=g) for g in generator]).to(device)


# ---- Diffusion -----------------------------------------------------------------------

REFINE = 0.3            # An enlarged canvas is denoised again from this noise level or lower.


def pick_regions(spec, fraction, H, W, point):
    """The indices of the regions to train on, and the weights (1, 1, H, W), of mean 1, of the
    pixels in the loss.

    The regions are those nearest to a random `point` (2,) in [0, 1), where distance wraps round
    the edges (ours). All bricks share the point, so most later regions get a refined z."""
    rows, columns = math.ceil(H / spec.region), math.ceil(W / spec.region)
    middles = [(torch.arange(n, device=point.device) + .5) / n for n in (rows, columns)]
    down, across = [(middle - at + .5) % 1 - .5 for middle, at in zip(middles, point)]
    distance = torch.maximum(down.abs()[:, None], across.abs()).flatten()
    chosen = distance.argsort()[:max(1, round(fraction * len(distance)))]
    weight = torch.zeros_like(distance).index_fill(0, chosen, 1).view(1, 1, rows, columns)
    weight = interpolate(weight, scale_factor=spec.region)[..., :H, :W]
    return chosen, weight / weight.mean()


def canvases(size, H, W):
    """The sizes that lead from the training height to H x W, each at most twice the last."""
    heights = [size]
    while heights[-1] != H:
        heights.append(min(2 * heights[-1], H))
    return [(h, max(1, round(W * h / H))) for h in heights]


class Diffusion:
    """What EDM and DDPM share: x0_hat = c_skip x + c_out F estimates x0 from x = x0 + sigma eps.

    A subclass defines these coefficients, the noise levels in training (sigma_at(q) is their
    q-quantile, quantile(sigma) its inverse), those of a walk (levels(n): n falling ones, then
    0), the default `sampler` and number of `steps`, and the samplers that take churn."""

    def loss(self, model, x0, labels=None, *,
             region_fraction=None,      # a list: every brick's share of regions to learn from
             brick_drop=None,           # chance to hide a brick's result from the later ones
             label_drop=0.0,            # chance to hide a label, which guidance needs
             supervise_all=True,        # every brick learns, or only the last one for an image
             skip=(),                   # indices of bricks that do not run
             shuffle=True,              # levels at random; if False, image i has the i-th lowest
             generator=None,            # for all draws, on the device of x0
             shard=(0, 1),              # (rank, world): x0 is one process's part of the batch
             sigma=None, noise=None):   # (B,) and (B, C, H, W), instead of drawn ones
        """The loss of a step: (scalar, losses (B, K) of every brick, sigma (B,)).

        A brick's loss for an image of x0 is the mean squared error of F (paper, equation 6, with
        weight 1 / c_out^2), NaN if it did not run. The scalar is the sum of all that ran over B K,
        or with supervise_all=False the mean, over the images, of the last brick's.
        brick_drop is a number or a tensor (K,), and a hidden result is learnt from all the
        same. With supervise_all=False take detach=False, so that other bricks learn as well.
        Each of several processes makes all draws of the whole batch, and keeps every world-th of
        them. ValueError if a brick works at none of the levels that are drawn, if `skip` leaves
        an image without a brick, and for labels of another shape than (B,)."""
        B, C, H, W = x0.shape
        check_labels(labels, B)
        rank, world = shard
        device, config = x0.device, model.config
        n, K = world * B, len(config.bricks)

        def draw(*shape, law=torch.rand):
            return law(n, *shape, generator=generator, device=device)[rank::world]

        # Noise: the levels rise, so that each brick runs on a slice of the batch.
        order = torch.arange(B, device=device)                           # the image of each level
        if sigma is None:
            rows = self.rows(config, n, shard, skip)
            sigma = self.sigma_at((torch.arange(rank, n, world, device=device) + draw()) / n)
            order = draw().argsort() if shuffle else order
        else:
            rows = config.active(sigma.cpu().log() / 4, skip)
        x0 = x0[order]
        labels = None if labels is None else labels[order]
        noise = draw(C, H, W, law=torch.randn) if noise is None else noise[order]
        s = sigma.view(-1, 1, 1, 1)
        x = x0 + s * noise                                               # (B, C, H, W)

        # Run.
        if labels is not None and label_drop:
            labels = labels.masked_fill(draw() < label_drop, config.classes)
        hidden = None if brick_drop is None else draw(K) < brick_drop    # (B, K)
        point = torch.rand(2, generator=generator, device=device)
        pairs = zip(config.bricks, region_fraction or [1.0] * K, strict=True)
        picked = [pick_regions(spec, share, H, W, point) for spec, share in pairs]
        regions, weights = zip(*picked)
        c_skip, c_out, c_in, c_noise = self.coefficients(s)
        out = model(c_in * x, c_noise.flatten(), labels, skip=skip, return_all=True, rows=rows,
                    regions=regions, hidden=hidden)

        # Compare with what F should have been.
        target = (x0 - c_skip * x) / c_out
        losses = x0.new_full((B, K), torch.nan)
        last = x0.new_zeros(B)                  # the loss of the last brick that ran for an image
        total = 0.0
        ran = [k for k in range(K) if k not in skip and len(sigma[rows[k]])]
        for k, F in zip(ran, out, strict=True):
            error = (F - target)[rows[k]].square() * weights[k]
            error = error.mean((1, 2, 3))
            losses[rows[k], k] = error.detach()
            last[rows[k]] = error
            total = total + error.sum()
        scalar = total / (B * K) if supervise_all else last.mean()
        level = order.argsort()                                          # the level of each image
        return scalar, losses[level], sigma[level]

    def rows(self, config, n, shard=(0, 1), skip=()):
        """For every brick its slice of a batch of n images in order of noise: the share of the
        training levels in its range, rounded to whole images. ValueError if that is none, or if
        `skip` leaves an image without a brick."""
        rank, world = shard
        skip = config.checked(skip)
        rows, bare = [], set(range(n))          # bare: the images that no brick runs for
        for k, spec in enumerate(config.bricks):
            first, end = (round(n * self.quantile(sigma)) for sigma in spec.noise)
            if first == end:
                raise ValueError(f"brick {k} ({spec}) works at none of the {n} noise levels of a "
                                 f"batch: take a larger batch, or widen its noise range")
            if k not in skip:
                bare.difference_update(range(first, end))
            # This rank has the images rank, rank + world, ...
            rows.append(slice(math.ceil((first - rank) / world), math.ceil((end - rank) / world)))
        if bare:
            raise ValueError(f"without bricks {sorted(skip)} none is left for {len(bare)} of the "
                             f"{n} noise levels of a batch: skip fewer of them")
        return rows

    def denoise(self, model, x, sigma, labels=None, *, skip=(), guidance=1.0, return_all=False,
                offset=(0, 0)):
        """x0_hat from x = x0 + sigma eps, (B, C, H, W), or with `return_all` a list with that of
        every brick that ran. sigma is a number or (B,), above 0; skip and offset go to the model.

        Guidance g other than 1 is none + g (label - none), the estimates with and without label.
        ValueError if there are no labels to guide with, or if no brick is left."""
        rows = None
        if not torch.is_tensor(sigma):
            # The same bricks run for all images, and a GPU need not be asked which.
            run = model.config.running(sigma, skip)
            nobody, everybody = slice(0), slice(None)
            rows = [everybody if k in run else nobody for k in range(len(model.config.bricks))]
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma.view(-1, 1, 1, 1))
        inputs, c_noise = c_in * x, c_noise.flatten()
        if guidance != 1:
            if labels is None:
                raise ValueError(f"guidance {guidance} needs labels: pass them, or take guidance=1")
            inputs, c_noise = inputs.repeat(2, 1, 1, 1), c_noise.repeat(2)
            labels = torch.cat([labels, torch.full_like(labels, model.config.classes)])
        out = model(inputs, c_noise, labels, skip=skip, return_all=True, rows=rows,
                    offset=offset)
        if guidance != 1:
            halves = [F.chunk(2) for F in out]
            out = [none + guidance * (label - none) for label, none in halves]
        out = [c_skip * x + c_out * F for F in out]
        return out if return_all else out[-1]

    def estimate(self, model, x, sigma, labels=None, **settings):
        """x0_hat as samplers ask for it: from x = x0 + sigma eps and a number sigma."""
        return self.denoise(model, x, sigma, labels, **settings)

    def evaluations(self, steps=None, sampler=None, churn=0.0):
        """The (step, sigma) of every evaluation of a walk, found by walking an image of one pixel.
        ValueError if the sampler is unknown or takes no churn, or for less than one step."""
        sampler = sampler or self.sampler
        steps = self.steps if steps is None else steps
        if steps < 1:
            raise ValueError(f"sampling takes one step or more, found {steps}")
        if sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {sampler!r}: take one of {', '.join(SAMPLERS)}")
        if churn and sampler not in self.with_churn:
            raise ValueError("churn is for EDM and the samplers heun and euler: name one of "
                             "them, or take churn=0")
        asked, zero = [], torch.zeros(1)

        def record(step, x, sigma):
            asked.append((step, sigma))
            return x

        list(walk(zero, self.levels(steps), sampler, record, zero.clone, churn=churn))
        return asked

    def schedule(self, config, skip=(), steps=None, sampler=None, churn=0.0):
        """For every step of `sample` with these arguments the set of bricks that it leaves out.
        ValueError if an evaluation would find no brick at its noise level."""
        asked = self.evaluations(steps, sampler, churn)
        steps = 1 + asked[-1][0]
        skips = [skip(i / steps) if callable(skip) else skip for i in range(steps)]
        skips = [frozenset(some) for some in skips]
        for some in set(skips):
            sigmas = torch.tensor([sigma for i, sigma in asked if skips[i] == some])
            config.active(sigmas.log() / 4, some)
        return skips

    @torch.no_grad()
    def sample(self, model, shape, labels=None, *,
               steps=None,              # noise levels (None: 18 for EDM, 100 for DDPM)
               sampler=None,            # in SAMPLERS (None: dpm2m for EDM, ancestral for DDPM)
               skip=(),                 # brick indices, or a function progress -> indices
               guidance=1.0,            # see `denoise`
               generator=None,          # a CPU generator, or a list of one for each image
               guide=None,              # guide(x0_hat, x, sigma) corrects every estimate
               callback=None,           # callback(done, total, x0_hat) follows every step
               clip=False,              # clamp every estimate to [-1, 1]
               churn=0.0):              # S_churn of Karras et al., for heun and euler
        """Images of the shape (B, C, H, W), about [-1, 1], from noise. Step i of n has the
        progress i / n. ValueError if a step would find no brick at its level.

        A canvas of another size than in training is made so (ours), and `guide` and `callback`
        see all its stages:
        1. Its scene is made at the training height, which decides how large things are.
        2. It is made in whole training widths, of which the middle is cut out. If there are
           several, the left edge continues the right one, and the whole panorama turns under
           the regions at every step, so that no seam stays.
        3. It is enlarged by a factor of at most two at a time. Each time noise is added and
           removed again, while the grid of regions moves on, down and right. This begins at the
           first level of the walk that is at most REFINE. With few steps it may lie far below,
           which adds little detail. From a higher one, every region would get a scene of its own.
        4. A canvas lower than in training is a shrunken one."""
        skips = self.schedule(model.config, skip, steps, sampler, churn)
        levels, device = self.levels(len(skips)), next(model.parameters()).device
        B, C, H, W = shape
        size = model.config.size
        (h, w), *larger = canvases(size, H, W)
        restart = next(i for i, sigma in enumerate(levels) if sigma <= REFINE)
        refined = sum(height > size for height, _ in larger)
        total = len(skips) + refined * (len(skips) - restart)
        done = count(1)
        x0_hat = None

        def descend(x, first, turn=0, shift=(0, 0)):
            """From x at levels[first] to clean images. At every step the canvas turns sideways,
            and the grid shifts down and across, by so many pixels more."""
            def estimate(i, x, sigma):
                nonlocal x0_hat
                moves = i - first + 1
                offset = moves * shift[0] % size, moves * shift[1] % size
                turned = x.roll(-moves * turn, 3)
                x0_hat = self.estimate(model, turned, sigma, labels, skip=skips[i],
                                       guidance=guidance, offset=offset)
                x0_hat = x0_hat.roll(moves * turn, 3)
                if guide:
                    x0_hat = guide(x0_hat, x, sigma)
                if clip:
                    x0_hat = x0_hat.clamp(-1, 1)
                return x0_hat

            noise = partial(normal, x.shape, generator, device)
            for x in walk(x, levels, sampler or self.sampler, estimate, noise, first, churn):
                if callback:
                    callback(next(done), total, x0_hat)
            return x                            # the last one, at level 0

        # Shifts that share no divisor with the size lead the grid through all its phases.
        down, across = (next(n for n in count(least) if math.gcd(n, size) == 1)
                        for least in (size // 3, size * 2 // 5))
        full = math.ceil(w / size) * size       # a whole number of training widths
        x = levels[0] * normal((B, C, h, full), generator, device)
        x0 = descend(x, 0, turn=across if w > size else 0)
        left = (full - w) // 2
        x0 = x0[..., left:left + w]
        for h, w in larger:
            x0 = interpolate(x0, (h, w), mode="bicubic", antialias=True)
            if h > size:
                x = x0 + levels[restart] * normal(x0.shape, generator, device)
                x0 = descend(x, restart, shift=(down, across))
        return x0


class EDM(Diffusion):
    """Karras et al. 2022: F and its input have unit scale at every noise level, and sigma is
    log-normal in training. (train_tiny.py takes P_mean=-0.8 and P_std=1.4. That visits the high
    levels more often, which decide the colours of a sample.) Karras et al. sample by Heun's
    method, and the default here does as well with half of the evaluations."""
    sampler, steps, with_churn = "dpm2m", 18, ("heun", "euler")

    def __init__(self, P_mean=-1.2, P_std=1.2, sigma_data=0.5, sigma_min=0.002, sigma_max=80.0,
                 rho=7.0):
        self.P_mean, self.P_std, self.sigma_data = P_mean, P_std, sigma_data
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho

    def coefficients(self, sigma):
        """c_skip, c_out, c_in and c_noise (table 1)."""
        total = sigma ** 2 + self.sigma_data ** 2
        c_skip = self.sigma_data ** 2 / total
        c_out = sigma * self.sigma_data / total.sqrt()
        return c_skip, c_out, total.rsqrt(), sigma.log() / 4

    def sigma_at(self, q):
        device, q = q.device, q.clamp(1e-6, 1 - 1e-6)   # ndtri is infinite at 0 and 1
        q = q.cpu() if device.type == "mps" else q      # and Apple's GPUs do not have it
        return (self.P_mean + self.P_std * torch.special.ndtri(q)).exp().to(device)

    def quantile(self, sigma):
        ln_sigma = math.log(sigma) if sigma else -math.inf
        return (1 + math.erf((ln_sigma - self.P_mean) / self.P_std / math.sqrt(2))) / 2

    def levels(self, steps):            # equation 5
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        share = [i / max(steps - 1, 1) for i in range(steps)]
        return [(high + s * (low - high)) ** self.rho for s in share] + [0.0]


class DDPM(Diffusion):
    """Ho et al. 2020 with noise prediction: F estimates eps at T levels t = 0..T-1 of a "cosine"
    (Nichol & Dhariwal 2021) or "linear" schedule, with sigma = sqrt((1 - abar) / abar).
    ValueError for another schedule, more steps than T, and a level that is none of the T.

    `denoise` takes x_t = sqrt(abar) x0 + sqrt(1 - abar) eps. All else works on x = x_t /
    sqrt(abar) = x0 + sigma eps, for which DDIM is Euler's method."""
    sampler, steps, with_churn = "ancestral", 100, ()

    def __init__(self, schedule="cosine", T=1000):
        if schedule == "cosine":
            angle = (torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2
            beta = 1 - (angle[1:].cos() / angle[:-1].cos()) ** 2
        elif schedule == "linear":
            beta = torch.linspace(1e-4 * 1000 / T, 0.02 * 1000 / T, T, dtype=torch.float64)
        else:
            raise ValueError(f"unknown schedule {schedule!r}: take cosine or linear")
        self.T = T
        self.abar = (1 - beta.clamp(max=0.999)).cumprod(0)               # (T,), float64
        self.sigmas = ((1 - self.abar) / self.abar).sqrt().float()
        self.rising = self.sigmas.tolist()

    def coefficients(self, sigma):
        """c_skip, c_out, c_in and c_noise: x0_hat is x - sigma F, and c_in x is x_t."""
        return torch.ones_like(sigma), -sigma, (1 + sigma ** 2).rsqrt(), sigma.log() / 4

    def sigma_at(self, q):              # t is uniform in training
        self.sigmas = self.sigmas.to(q.device)  # once, since a GPU should not wait for them
        return self.sigmas[(q * self.T).long().clamp(max=self.T - 1)]

    def quantile(self, sigma):
        return bisect_left(self.rising, sigma) / self.T

    def levels(self, steps):            # evenly spread over t, from T - 1 to 0
        if steps > self.T:
            raise ValueError(f"DDPM has {self.T} noise levels, so take no more steps than that")
        t = torch.linspace(self.T - 1, 0, steps).round().long()
        return self.sigmas[t].tolist() + [0.0]

    def denoise(self, model, x, t, labels=None, **settings):
        """As for `Diffusion`, but from x_t and t in 0..T-1, a number or (B,)."""
        t = torch.as_tensor(t).cpu()
        if t.min() < 0 or t.max() >= self.T:
            raise ValueError(f"t must lie in 0..{self.T - 1}, found {t.tolist()}")
        sigma = self.sigmas[t].to(x.device).expand(len(x))
        x = x * (1 + sigma ** 2).sqrt().view(-1, 1, 1, 1)
        return super().denoise(model, x, sigma, labels, **settings)

    def estimate(self, model, x, sigma, labels=None, **settings):
        t = (self.sigmas - sigma).abs().argmin()
        if not math.isclose(self.sigmas[t], sigma, rel_tol=1e-6):
            raise ValueError(f"sigma {sigma:g} is none of the {self.T} levels of DDPM: take a "
                             f"sampler that keeps to them")
        return self.denoise(model, x / math.sqrt(1 + sigma ** 2), t, labels, **settings)


OBJECTIVES = {"edm": EDM, "ddpm": DDPM}

# ---- Presets -------------------------------------------------------------------------

# Ours: the default, and stacks of a single brick, which are DiTs, to compare it with.
TINY = "32/4x6@0.3: 32/4x6@:0.4 16/2x4@:0.25 32/2x3@0.05:1.2"
PRESETS = {
    "tiny": LegoConfig.parse(TINY, width=128, heads=4),
    "dit-4": LegoConfig.parse("32/4x9", width=128, heads=4),
    "dit-2": LegoConfig.parse("32/2x9", width=128, heads=4)}
# The authors'. PR (progressive refinement) is PG (growth) in reverse, and is added below.
for _name, _stack in {
        "S-PG-64": "4/2x2 16/8x4 64/2x6",
        "S-U-64": "64/2x6 16/8x4 4/2x2 16/8x4 64/2x6",
        "S-U-32": "32/2x6 16/8x4 4/2x2 16/8x4 32/2x6",
        "L-PG-64": "4/2x6 16/8x8 64/2x12",
        "L-PG-64-released": "4/2x6 16/8x6 64/2x12",     # by the size of the published weights
        "L-PG-32": "4/2x4 16/8x8 32/2x12",
        "L-U-64": "64/2x12 16/8x8 4/2x6 16/8x8 64/2x12",
        "L-U-32": "32/2x12 16/8x8 4/2x6 16/8x8 32/2x12",
        "XL-PG-32": "4/2x4 16/8x12 32/2x14",
        "XL-PG-64": "4/2x4 16/8x12 64/2x14",
        "XL-U-32": "32/2x14 16/8x10 4/2x4 16/8x10 32/2x14",
        "XL-U-64": "64/2x14 16/8x12 4/2x4 16/8x12 64/2x14"}.items():
    _width, _heads, _channels = {                                        # XL is for latents
        "S": (384, 6, 3), "L": (1024, 16, 3), "XL": (1152, 16, 4)}[_name.split("-")[0]]
    _config = LegoConfig.official(
        _stack, classes=1000, width=_width, heads=_heads, channels=_channels)
    PRESETS[_name] = _config
    if "PG" in _name:
        PRESETS[_name.replace("PG", "PR")] = replace(_config, bricks=_config.bricks[::-1])

# ---- Checkpoints ---------------------------------------------------------------------

FORMAT = 3      # of checkpoints; 1 knew no noise ranges, and 2, which can be read, no QK-norm


def write_aside(path, write):
    """Call write(file) on a temporary file beside `path`, flush it to the disk and rename it:
    what stands at `path` is whole at any moment."""
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
    """Write a model to `path`: config, name of the block class, `model.info` (JSON-able), its
    weights, or the state_dict `weights` in their place (an average, say), and any further
    `state` of tensors, numbers, strings, lists and dictionaries."""
    config = asdict(model.config)
    for brick in config["bricks"]:
        low, high = brick["noise"]
        brick["noise"] = [low or None, high if high < math.inf else None]
    head = dict(format=FORMAT, config=config, block=model.block.__name__, info=model.info)
    json.dumps(head)                    # a TypeError for what could not be read again
    buffer = io.BytesIO()               # so that a full disk is an OSError, not one inside torch
    torch.save(dict(**head, weights=weights or model.state_dict(), **state), buffer)
    write_aside(path, lambda file: file.write(buffer.getbuffer()))


def read_checkpoint(path):
    """The dictionary that `save_checkpoint` wrote, its config as a LegoConfig.

    Nothing is unpickled but tensors and plain containers. Checksums are compared, which torch
    does not do, and weights must be finite and no larger than the file. ValueError if the file
    is anything else, FileNotFoundError if there is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type for member in archive.infolist()) or archive.testzip():
                raise ValueError("it is compressed, or a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state.get("format") == 2:
            state["config"]["qk_norm"] = False
        elif state.get("format") != FORMAT:
            raise ValueError(f"its format is {state.get('format', 1)}, and this lego.py reads 2 "
                             f"and {FORMAT}: use the one that wrote it, or train anew")
        state["config"] = LegoConfig(**state["config"])
        weights = state["weights"].values()
        if sum(w.numel() * w.element_size() for w in weights) > Path(path).stat().st_size:
            raise ValueError("weights larger than the file")
        if not all(w.isfinite().all() for w in weights):
            raise ValueError("weights that are not finite")
        known = state["info"].get("objective", "edm") in OBJECTIVES
        if not known or type(state["block"]) is not str:
            raise ValueError("an unknown objective or block")
    except OSError:
        raise
    except Exception as error:          # torch's reader meets hostile bytes with any error
        reason = error if type(error) is ValueError else type(error).__name__
        raise ValueError(f"{path} is not a LEGO checkpoint that can be read: {reason}") from error
    return state


def load_checkpoint(path, block=Block):
    """The model stored in `path`, on the CPU, in evaluation mode. `block` is the class of its
    blocks; ValueError if the file names another one, or for what `read_checkpoint` refuses."""
    state = read_checkpoint(path)
    if state["block"] != block.__name__:
        raise ValueError(f"the blocks in {path} are of the class {state['block']}, not "
                         f"{block.__name__}: pass block={state['block']} to load_checkpoint")
    with torch.device("meta"):          # which costs nothing, whatever size the config claims
        model = Lego(state["config"], block)
    shapes = {name: w.shape for name, w in model.state_dict().items()}
    if shapes != {name: w.shape for name, w in state["weights"].items()}:
        raise ValueError(f"{path}: the weights do not fit the stack {state['config']}")
    model = Lego(state["config"], block)
    model.load_state_dict(state["weights"])
    model.info = state["info"]
    return model.eval()


OFFICIAL_NAMES = {      # theirs: ours, replaced in this order
    "t_embedder.mlp": "time", "y_embedder.embedding_table": "label", "model.": "bricks.",
    "x_embedder.proj": "local", "final_layer.linear": "decode", "final_layer.": "",
    "attn.": "", "mlp.": "", "adaLN_modulation.1": "adaln"}


def load_official(model, state_dict):
    """Load the authors' parameters into a model made from `LegoConfig.official`.

    Their published files are pickled Python classes, which this project never opens. With the
    authors' code, in its own environment, save the tensors once with
    `torch.save(ema.model.state_dict(), "weights.pt")`, and read that file with
    `torch.load("weights.pt", weights_only=True)`. Their fixed position tables, where the file
    has them, are compared with ours. ValueError if config, names, shapes or tables do not fit."""
    if model.config != replace(model.config, **RELEASED):
        raise ValueError("the model is not the released network: make it from LegoConfig.official")
    ours = {}
    for name, tensor in state_dict.items():
        for theirs, mine in OFFICIAL_NAMES.items():
            name = name.replace(theirs, mine)
        if name.endswith("local.weight"):       # theirs is a convolution (D, channels, p, p)
            tensor = tensor.permute(0, 2, 3, 1).flatten(1)
        ours[name] = tensor
    for k, brick in enumerate(model.bricks):
        table = ours.pop(f"bricks.{k}.pos_embed", brick.position).flatten().float()
        expected = brick.position.flatten()
        if len(table) != len(expected) or not torch.allclose(table, expected, atol=1e-5):
            raise ValueError(f"brick {k}: the position table differs from the released network's")
    try:
        model.load_state_dict(ours)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the weights do not fit this stack: {reason}") from error
