"""The previewer: latents of stage C to a small picture by convolutions alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints.cascade_parts import PreviewerConfig
from library.models.cascade.effnet import FixedBatchNorm2d


class Previewer(nn.Module):
    """Latents [N,16,h,w] to pixels [N,3,8h,8w]."""

    blocks: Any

    def __init__(self, config: PreviewerConfig) -> None:
        super().__init__()
        widest = config.features
        half, quarter = widest // 2, widest // 4
        convs: list[nn.Module] = [nn.Conv2d(config.channels, widest, 1), nn.Conv2d(widest, widest, 3, 1, 1)]
        for c_in, c_out in ((widest, half), (half, quarter), (quarter, quarter)):
            convs += [nn.ConvTranspose2d(c_in, c_out, 2, 2), nn.Conv2d(c_out, c_out, 3, 1, 1)]
        layers: list[nn.Module] = []
        for conv in convs:
            layers += [conv, nn.GELU(), FixedBatchNorm2d(conv.out_channels)]  # type: ignore[arg-type]
        self.blocks = nn.Sequential(*layers, nn.Conv2d(quarter, 3, 1))

    def forward(self, latents: Tensor) -> Tensor:
        """Return pixels clamped to [0,1]."""
        latents = latents.to(self.blocks[0].weight.dtype).contiguous(memory_format=torch.channels_last)
        return self.blocks(latents).clamp(0, 1)
