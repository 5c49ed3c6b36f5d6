"""DoRA: the direction of a weight by LoRA, its length by a parameter of its own.

W' = m * V / |V| with V = W + alpha / rank * up @ down (Liu et al. 2024, eq. 5). As in section 4.3 there, |V| counts as
a constant in the backward pass, so that no more activations are stored than for LoRA. Files hold m as `dora_scale`, in
the shape of LyCORIS: a length per output [out, 1, ...], or per input [1, in, ...].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from networks.lora import LoraAdapter
from networks.low_rank import adapted_linear, layer_product
from networks.targets import Target


def is_on_output(dora_scale: Tensor, target: Target) -> bool:
    """Tell from its shape whether a file's `dora_scale` holds a length per output of the layer."""
    return dora_scale.dim() < 2 or dora_scale.shape[0] == target.layer.weight.shape[0]


class DoraAdapter(LoraAdapter):
    """LoRA with weight decomposition.

    Args:
        on_output: a length per output of the layer, as in the paper; per input otherwise.
    """

    def __init__(self, target: Target, *, on_output: bool = True, **common: Any) -> None:
        super().__init__(target, **common)
        self.on_output = on_output
        self.dora_scale = nn.Parameter(self._length(target.layer.weight.detach().float().cpu()))

    def _length(self, weight: Tensor) -> Tensor:
        kept = 0 if self.on_output else 1
        others = [dim for dim in range(weight.dim()) if dim != kept]
        return torch.linalg.vector_norm(weight, dim=others, keepdim=True)

    @torch.no_grad()
    def _sum(self, weight: Tensor) -> Tensor:
        # Outside autocast: a length in half precision would be wrong by more than a step of training changes it.
        with torch.autocast(weight.device.type, enabled=False):
            up, down = (factor.to(weight.device) for factor in self.factors())
            flat = torch.addmm(weight.float().flatten(1), up, down, alpha=self.scale)
        return flat.view(weight.shape)

    def _stretch(self) -> Tensor:
        """Return m / |V|: what outputs or inputs are multiplied by, shaped for broadcasting over activations."""
        weight = self.layer.weight
        length = self._length(self._sum(weight)) + torch.finfo(torch.float32).eps
        return (self.dora_scale / length).view(-1, *(1 for _ in range(weight.dim() - 2)))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer with its adapter."""
        if not (self.fused and self.bare and not self.dropping and self.multiplier == 1.0):
            return self.inner(x) + self.change(x)
        layer, stretch = self.layer, self._stretch()
        down, up = self.lora_down.weight, self.lora_up.weight
        if not self.on_output:
            return adapted_linear(x * stretch.to(x.dtype), layer.weight, layer.bias, down, up, self.scale)
        y = adapted_linear(x, layer.weight, None, down, up, self.scale)
        y = y * stretch.to(y.dtype)
        return y if layer.bias is None else y + layer.bias.to(y.dtype)

    def change(self, x: Tensor) -> Tensor:
        """Return multiplier * (W' - W) x."""
        stretch, weight = self._stretch().to(x.dtype), self.layer.weight
        if self.on_output:
            changed = layer_product(self.layer, x, weight) * (stretch - 1) + self.product(x, self.scale) * stretch
        else:
            changed = layer_product(self.layer, x * (stretch - 1), weight) + self.product(x * stretch, self.scale)
        return changed * (self.multiplier * self.kept(x))

    @torch.no_grad()
    def merged(self, weight: Tensor, strength: float) -> Tensor:
        """Return W + strength * (W' - W), float32."""
        total = self._sum(weight)
        length = self._length(total) + torch.finfo(torch.float32).eps
        changed = total * (self.dora_scale.float().to(weight.device) / length)
        return torch.lerp(weight.float(), changed, strength)

    def delta(self) -> Tensor:
        """Return W' - W for the layer's present weight."""
        weight = self.layer.weight.detach()
        return self.merged(weight, 1.0) - weight.float()

    def is_idle(self) -> bool:
        """Whether the second factor is zero and the lengths are the weight's own."""
        return super().is_idle() and bool((self._stretch() - 1).abs().max() < 1e-5)
