"""Stage A: pictures to the latents of stage B and back, an autoencoder used without its codebook.

Structure: the Paella VQGAN (arXiv:2211.07292) that Würstchen and Stable Cascade share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints.cascade_parts import STAGE_A_SCALE, StageAConfig
from library.models.cascade.blocks import normalize
from library.models.cascade.effnet import FixedBatchNorm2d


class MixingBlock(nn.Module):
    """A depthwise convolution and a perceptron per pixel, each scaled and shifted by three of six learned numbers."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.depthwise = nn.Sequential(nn.ReplicationPad2d(1), nn.Conv2d(features, features, 3, groups=features))
        self.channelwise = nn.Sequential(
            nn.Linear(features, features * 4), nn.GELU(), nn.Linear(features * 4, features)
        )
        self.gammas = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape [N,C,H,W]."""
        scale, shift, gain, scale_2, shift_2, gain_2 = self.gammas.unbind()
        inner = normalize(x.permute(0, 2, 3, 1)) * (1 + scale) + shift
        x = x + self.depthwise(inner.permute(0, 3, 1, 2)) * gain
        inner = normalize(x.permute(0, 2, 3, 1)) * (1 + scale_2) + shift_2
        return x + self.channelwise(inner).permute(0, 3, 1, 2) * gain_2


class Codebook(nn.Module):
    """The vectors of the quantizer: nothing uses them, but files hold them."""

    def __init__(self, entries: int, channels: int) -> None:
        super().__init__()
        self.codebook = nn.Embedding(entries, channels)


class StageA(nn.Module):
    """Pixels [N,3,H,W] in [0,1] to latents [N,4,H/4,W/4] and back. H and W are multiples of four."""

    in_block: Any

    def __init__(self, config: StageAConfig) -> None:
        super().__init__()
        self.config = config
        outer, inner = config.features // 2, config.features
        pixels = 3 * config.patch**2
        self.in_block = nn.Sequential(nn.PixelUnshuffle(config.patch), nn.Conv2d(pixels, outer, 1))
        self.down_blocks = nn.Sequential(
            MixingBlock(outer),
            nn.Conv2d(outer, inner, 4, 2, 1),
            MixingBlock(inner),
            nn.Sequential(nn.Conv2d(inner, config.channels, 1, bias=False), FixedBatchNorm2d(config.channels)),
        )
        self.vquantizer = Codebook(config.codebook, config.channels)
        self.up_blocks = nn.Sequential(
            nn.Sequential(nn.Conv2d(config.channels, inner, 1)),
            *(MixingBlock(inner) for _ in range(config.bottleneck)),
            nn.ConvTranspose2d(inner, outer, 4, 2, 1),
            MixingBlock(outer),
        )
        self.out_block = nn.Sequential(nn.Conv2d(outer, pixels, 1), nn.PixelShuffle(config.patch))

    def encode(self, pixels: Tensor) -> Tensor:
        """Return latents in the scale in which stage B works."""
        pixels = pixels.to(self.in_block[1].weight.dtype).contiguous(memory_format=torch.channels_last)
        return self.down_blocks(self.in_block(pixels)) / STAGE_A_SCALE

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels clamped to [0,1]."""
        latents = latents.to(self.in_block[1].weight.dtype).contiguous(memory_format=torch.channels_last)
        return self.out_block(self.up_blocks(latents * STAGE_A_SCALE)).clamp(0, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return pixels that were encoded and decoded."""
        return self.decode(self.encode(pixels))
