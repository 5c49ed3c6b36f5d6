"""ControlNets of stage C: a backbone over a condition, and a projection for each residual block that is steered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints.cascade_parts import ControlNetConfig
from library.errors import UserError
from library.models.assemble import build_module
from library.models.cascade.effnet import make_features
from library.randomness import derive

_SLOPE = 0.2


class ChannelNorm(nn.LayerNorm):
    """Normalizes the features of each pixel of [N,C,H,W], with weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ControlResBlock(nn.Module):
    """Two convolutions with norm and activation before each, and a residual."""

    def __init__(self, features: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [ChannelNorm(features), nn.GELU(), nn.Conv2d(features, features, 3, padding=1)]
        self.blocks = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        return x + self.blocks(x)


def _backbone(config: ControlNetConfig) -> nn.Sequential:
    c_in, ends = config.c_in, config.features
    if config.mode == "effnet":
        return make_features(config.effnet)
    if config.mode == "simple":
        return nn.Sequential(
            nn.Conv2d(c_in, ends * 4, 3, padding=1), nn.LeakyReLU(_SLOPE), nn.Conv2d(ends * 4, ends, 3, padding=1)
        )
    first, second = config.wide
    return nn.Sequential(
        nn.Conv2d(c_in, first, 1),
        nn.LeakyReLU(_SLOPE),
        nn.Conv2d(first, second, 1),
        *(ControlResBlock(second) for _ in range(config.depth)),
        nn.Conv2d(second, ends, 1),
    )


class CascadeControlNet(nn.Module):
    """A condition [N,c_in,H,W] to residuals for stage C."""

    projections: Any

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = _backbone(config)
        ends = config.features
        self.projections = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(ends, ends, 1, bias=False),
                nn.LeakyReLU(_SLOPE),
                nn.Conv2d(ends, config.c_out, 1, bias=False),
            )
            for _ in config.blocks
        )

    def forward(self, condition: Tensor) -> dict[int, Tensor]:
        """Return residuals [N,c_out,h,w] by the number of the residual block that they are added before."""
        condition = condition.to(self.projections[0][0].weight.dtype)
        features = self.backbone(condition.contiguous(memory_format=torch.channels_last))
        return {
            block: projection(features) for block, projection in zip(self.config.blocks, self.projections, strict=True)
        }


def add_controls(
    controls: Sequence[Mapping[int, Tensor]], strengths: Sequence[float] | None = None
) -> dict[int, Tensor]:
    """Add the residuals of several ControlNets, each times its strength; their maps have one size."""
    total: dict[int, Tensor] = {}
    for control, strength in zip(controls, strengths or [1.0] * len(controls), strict=True):
        for block, residual in control.items():
            scaled = residual if strength == 1 else residual * strength
            total[block] = total[block] + scaled if block in total else scaled
    return total


def build_control_net(
    config: ControlNetConfig, tensors: Mapping[str, Tensor], *, device: torch.device, dtype: torch.dtype
) -> CascadeControlNet:
    """Build a ControlNet around its tensors; frozen, in evaluation mode.

    Raises:
        UserError: names or shapes do not fit.
    """
    return build_module(lambda: CascadeControlNet(config), tensors, what="ControlNet", device=device, dtype=dtype)


@torch.no_grad()
def new_control_net(
    config: ControlNetConfig,
    seed: int,
    backbone: Mapping[str, Tensor] | None = None,
    *,
    device: torch.device,
) -> CascadeControlNet:
    """Make a ControlNet to train, which changes nothing at first: the last convolutions are zero.

    Args:
        config: its sizes.
        seed: each tensor is a function of it and of the tensor's name.
        backbone: for the mode ``effnet``: tensors named `backbone.…` of a trained EfficientNet with three channels.
            Its first convolution is cut, or filled up with zeros, to the channels of the condition.
        device: where the weights shall be.

    Raises:
        UserError: the mode is ``effnet`` and there is no fitting backbone: batch norms cannot be trained from nothing.
    """
    with torch.device("meta"):
        network = CascadeControlNet(config)
    network.to_empty(device=device)
    _draw(network, seed)
    if config.mode == "effnet":
        _take_backbone(network, backbone or {})
    return network


def _draw(network: CascadeControlNet, seed: int) -> None:
    for name, tensor in network.state_dict().items():
        owner = network.get_submodule(name.rpartition(".")[0])
        if name.startswith("projections.") and name.endswith(".2.weight"):
            tensor.zero_()
        elif isinstance(owner, nn.Conv2d):
            fan_in = owner.weight[0].numel()
            generator = torch.Generator().manual_seed(derive(seed, "init", name) >> 1)
            value = torch.empty(tensor.shape).uniform_(-1, 1, generator=generator)
            tensor.copy_(value / math.sqrt(fan_in))
        else:
            tensor.fill_(1 if name.endswith(("weight", "running_var")) else 0)


def _take_backbone(network: CascadeControlNet, given: Mapping[str, Tensor]) -> None:
    own = network.state_dict()
    wanted = [name for name in own if name.startswith("backbone.")]
    first = "backbone.0.0.weight"
    lost = [n for n in wanted if n not in given or (n != first and given[n].shape != own[n].shape)]
    if lost:
        raise UserError(
            f"the ControlNet's backbone needs trained weights, and {len(lost)} tensors are not there ({lost[0]})",
            "Give an EfficientNet file with --controlnet_backbone_path, for example effnet_encoder.safetensors",
        )
    for name in wanted:
        if name != first:
            own[name].copy_(given[name])
    shared = min(own[first].shape[1], given[first].shape[1])
    own[first].zero_()
    own[first][:, :shared].copy_(given[first][:, :shared])
