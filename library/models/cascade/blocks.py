"""The blocks of Stable Cascade's stages B and C.

All blocks are called alike, `(x, times, condition, skip)`, so that whoever runs, checkpoints, compiles or shards them
need not know which is which. Feature maps are [N,C,H,W] whose memory is channels last: norms and linear layers then
work on views, and no copy is made between them. Modules bear the names of the official files, except that the packed
projection of queries, keys and values is three layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from library.checkpoints.cascade_configs import CascadeConfig

NORM_EPS = 1e-6


def normalize(x: Tensor) -> Tensor:
    """Normalize the last dimension, without weights."""
    return functional.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


class LayerNorm2d(nn.Module):
    """Normalizes the features of each pixel of [N,C,H,W], without weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        return normalize(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GlobalResponseNorm(nn.Module):
    """Scales features [N,H,W,C] by how strongly each responds over the picture, relative to the others.

    ConvNeXt V2 (arXiv:2301.00808), section 3.2: g * x * n + b + x with n the L2 norm over the picture divided by the
    mean norm of all features. Written as x * (1 + g * n) + b, it is one pass over the features.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, features))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, features))

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same shape and type."""
        norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
        relative = norms / (norms.mean(dim=-1, keepdim=True) + NORM_EPS)
        scale = torch.addcmul(torch.ones_like(relative), self.gamma.float(), relative)
        return torch.addcmul(self.beta.to(x.dtype), x, scale.to(x.dtype))


class ResBlock(nn.Module):
    """A depthwise convolution, and a perceptron on every pixel, which also sees the `skip` of the down path."""

    channelwise: Any

    def __init__(self, features: int, skip_features: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(features, features, kernel, padding=kernel // 2, groups=features)
        self.channelwise = nn.Sequential(
            nn.Linear(features + skip_features, features * 4),
            nn.GELU(),
            GlobalResponseNorm(features * 4),
            nn.Dropout(dropout),
            nn.Linear(features * 4, features),
        )

    def set_dropout(self, probability: float) -> None:
        """Set how many features training leaves out."""
        self.channelwise[3].p = probability

    def forward(self, x: Tensor, times: Tensor, condition: Tensor, skip: Tensor | None = None) -> Tensor:
        """Return x [N,C,H,W] with what this block adds; `skip` has the same size."""
        inner = normalize(self.depthwise(x).permute(0, 2, 3, 1))
        if skip is not None:
            inner = torch.cat([inner, skip.permute(0, 2, 3, 1).to(inner.dtype)], dim=-1)
        return x + self.channelwise(inner).permute(0, 3, 1, 2)


class TimestepBlock(nn.Module):
    """Scales and shifts features by the time, and by further values with embeddings of their own."""

    def __init__(self, features: int, c_time: int, names: tuple[str, ...]) -> None:
        super().__init__()
        self.mapper = nn.Linear(c_time, features * 2)
        for name in names:
            setattr(self, f"mapper_{name}", nn.Linear(c_time, features * 2))
        self.names = names

    def forward(self, x: Tensor, times: Tensor, condition: Tensor, skip: Tensor | None = None) -> Tensor:
        """Return x [N,C,H,W], scaled and shifted; times are the embeddings [N, (1 + names) * c_time] one by one."""
        parts = times.chunk(len(self.names) + 1, dim=1)
        sums = self.mapper(parts[0])
        for name, part in zip(self.names, parts[1:], strict=True):
            sums = sums + getattr(self, f"mapper_{name}")(part)
        scale, shift = sums.to(x.dtype)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, x, 1 + scale)


class Attention(nn.Module):
    """Multi-head attention with biases; in training mode probabilities are dropped out."""

    def __init__(self, features: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.to_q = nn.Linear(features, features)
        self.to_k = nn.Linear(features, features)
        self.to_v = nn.Linear(features, features)
        self.out_proj = nn.Linear(features, features)
        self.heads = heads
        self.dropout = dropout

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """Return [N,Q,C] for queries [N,Q,C] that look at a context [N,K,C]."""
        q, k, v = (
            layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, tokens in ((self.to_q, queries), (self.to_k, context), (self.to_v, context))
        )
        seen = functional.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(seen.transpose(1, 2).flatten(2))


class Attention2d(nn.Module):
    """Stands between a block and its attention because files name them so; holds `attn`."""

    def __init__(self, features: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attn = Attention(features, heads, dropout)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """Return what the attention returns."""
        return self.attn(queries, context)


class AttnBlock(nn.Module):
    """Lets every pixel look at all pixels and at the condition."""

    def __init__(self, features: int, c_cond: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention2d(features, heads, dropout)
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(c_cond, features))

    def set_dropout(self, probability: float) -> None:
        """Set how many attention probabilities training leaves out."""
        self.attention.attn.dropout = probability

    def forward(self, x: Tensor, times: Tensor, condition: Tensor, skip: Tensor | None = None) -> Tensor:
        """Return x [N,C,H,W] with what this block adds; the condition is [N,L,c_cond]."""
        height, width = x.shape[-2:]
        pixels = normalize(x.permute(0, 2, 3, 1)).flatten(1, 2)
        extra = self.kv_mapper(condition)
        added = self.attention(pixels, torch.cat([pixels.to(extra.dtype), extra], dim=1))
        return x + added.unflatten(1, (height, width)).permute(0, 3, 1, 2)


class Resampler(nn.Module):
    """A joint of two levels: a 1x1 convolution, and on some models a resize by two after it or before it."""

    def __init__(self, c_in: int, c_out: int, factor: float, *, resizes: bool) -> None:
        super().__init__()
        conv = nn.Conv2d(c_in, c_out, 1)
        resize = Resize(factor) if resizes else nn.Identity()
        self.blocks = nn.ModuleList([resize, conv] if factor > 1 else [conv, resize])

    def forward(self, x: Tensor) -> Tensor:
        """Return the map as the next level takes it."""
        for block in self.blocks:
            x = block(x)
        return x


class Resize(nn.Module):
    """Resizes a map by a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return the resized map."""
        return resize(x, (int(x.shape[-2] * self.factor), int(x.shape[-1] * self.factor)))


def resize(x: Tensor, size_hw: Any) -> Tensor:
    """Resize [N,C,H,W] to a height and width, bilinear with corners aligned, computed in float32."""
    size = tuple(size_hw)
    if tuple(x.shape[-2:]) == size:
        return x
    resized = functional.interpolate(x.float(), size=size, mode="bilinear", align_corners=True)
    return resized.to(x.dtype)


def map_pixels(c_in: int, features: int) -> nn.Sequential:
    """Make the perceptron that maps each pixel of a condition to features."""
    return nn.Sequential(
        nn.Conv2d(c_in, features * 4, 1), nn.GELU(), nn.Conv2d(features * 4, features, 1), LayerNorm2d()
    )


def make_level(config: CascadeConfig, level: int, groups: int, *, skip: bool) -> nn.ModuleList:
    """Make the blocks of a level; with `skip` the first one takes the output of the down path besides."""
    features, dropout = config.c_hidden[level], config.dropout[level]
    blocks = nn.ModuleList()
    for kind in config.levels[level] * groups:
        if kind == "C":
            blocks.append(ResBlock(features, 0 if blocks or not skip else features, config.kernel, dropout))
        elif kind == "T":
            blocks.append(TimestepBlock(features, config.c_time, config.time_conditions))
        else:
            blocks.append(AttnBlock(features, config.c_cond, config.heads[level], dropout))
    return blocks


def make_joint(config: CascadeConfig, level: int, *, up: bool) -> nn.Module:
    """Make what joins a level to the next outer one: norm, and a convolution that also changes the resolution."""
    outer, inner = config.c_hidden[level - 1], config.c_hidden[level]
    c_in, c_out = (inner, outer) if up else (outer, inner)
    if config.switch is not None:
        joint: nn.Module = Resampler(c_in, c_out, 2 if up else 0.5, resizes=config.switch[level - 1])
    elif up:
        joint = nn.ConvTranspose2d(c_in, c_out, 2, 2)
    else:
        joint = nn.Conv2d(c_in, c_out, 2, 2)
    return nn.Sequential(LayerNorm2d(), joint)


def make_repeats(config: CascadeConfig, level: int, rounds: int) -> nn.ModuleList:
    """Make the convolutions that stand between the rounds of a level that runs several times."""
    features = config.c_hidden[level]
    return nn.ModuleList([nn.Conv2d(features, features, 1) for _ in range(rounds - 1)])
