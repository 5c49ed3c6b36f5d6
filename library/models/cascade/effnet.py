"""EfficientNet-V2-S, which turns a picture into the latents of stage C and feeds most ControlNets.

Structure: EfficientNetV2 (arXiv:2104.00298), table 4. Tensors are named as torchvision names them, so official files
fit, and torchvision itself is not needed. Batch norms always use their running statistics.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from library.checkpoints.cascade_parts import EffNetConfig, MBStage

_EPS = 1e-3
_SQUEEZE = 4
Channels = tuple[float, float, float]
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FixedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that stays in evaluation mode; its weights can be trained all the same."""

    def train(self, mode: bool = True) -> FixedBatchNorm2d:
        """Stay in evaluation mode."""
        return super().train(False)


def _conv(
    c_in: int, c_out: int, *, kernel: int = 1, stride: int = 1, groups: int = 1, active: bool = True
) -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(c_in, c_out, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False),
        FixedBatchNorm2d(c_out, eps=_EPS),
    ]
    return nn.Sequential(*layers, *([nn.SiLU()] if active else []))


class SqueezeExcitation(nn.Module):
    """Scales each channel by what its mean over the picture, seen through a small perceptron, asks for."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled map."""
        means = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.fc2(functional.silu(self.fc1(means))))


class MBConv(nn.Module):
    """Widens, convolves each channel (or, fused, all at once) and narrows again; residual where sizes allow."""

    def __init__(self, c_in: int, stage: MBStage, stride: int) -> None:
        super().__init__()
        wide = c_in * stage.expansion
        if not stage.fused:
            inner = [
                _conv(c_in, wide),
                _conv(wide, wide, kernel=3, stride=stride, groups=wide),
                SqueezeExcitation(wide, max(1, c_in // _SQUEEZE)),
                _conv(wide, stage.width, active=False),
            ]
        elif stage.expansion == 1:
            inner = [_conv(c_in, stage.width, kernel=3, stride=stride)]
        else:
            inner = [_conv(c_in, wide, kernel=3, stride=stride), _conv(wide, stage.width, active=False)]
        self.block = nn.Sequential(*inner)
        self.residual = stride == 1 and c_in == stage.width

    def forward(self, x: Tensor) -> Tensor:
        """Return the map, of half the size where the stride is two."""
        return x + self.block(x) if self.residual else self.block(x)


def make_features(config: EffNetConfig) -> nn.Sequential:
    """Make the convolutional part: pictures [N,c_in,H,W] to [N,width,ceil(H/32),ceil(W/32)].

    With other than three input channels the first convolution has no padding, as in the official ControlNets.
    """
    stem = nn.Sequential(
        nn.Conv2d(config.c_in, config.stem, 3, 2, 1 if config.c_in == 3 else 0, bias=False),
        FixedBatchNorm2d(config.stem, eps=_EPS),
        nn.SiLU(),
    )
    layers: list[nn.Module] = [stem]
    width = config.stem
    for stage, stride in zip(config.stages, config.strides, strict=True):
        inner = [MBConv(width, stage, stride)]
        inner += [MBConv(stage.width, stage, 1) for _ in range(stage.layers - 1)]
        layers.append(nn.Sequential(*inner))
        width = stage.width
    return nn.Sequential(*layers, _conv(width, config.width))


class EffNetEncoder(nn.Module):
    """Pictures to latents of stage C. Never in training mode."""

    mapper: Any

    def __init__(self, config: EffNetConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = make_features(config)
        self.mapper = nn.Sequential(
            nn.Conv2d(config.width, config.channels, 1, bias=False), FixedBatchNorm2d(config.channels, affine=False)
        )

    def train(self, mode: bool = True) -> EffNetEncoder:
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return latents [N,16,ceil(H/32),ceil(W/32)] of pixels [N,3,H,W] in [0,1]."""
        normal = standardize(pixels, _MEAN, _STD).to(self.mapper[0].weight.dtype)
        return self.mapper(self.backbone(normal.contiguous(memory_format=torch.channels_last)))


def standardize(pixels: Tensor, mean: Channels, std: Channels) -> Tensor:
    """Return pixels [N,3,H,W] with the mean and the spread of each channel taken off."""
    shift, scale = _on_device(mean, pixels.device, pixels.dtype), _on_device(std, pixels.device, pixels.dtype)
    return (pixels - shift) / scale


@lru_cache(maxsize=16)
def _on_device(values: Channels, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return numbers of channels as [1,3,1,1]; sent to a GPU once, for every time would wait for it."""
    return torch.tensor(values, device=device, dtype=dtype).reshape(1, -1, 1, 1)
