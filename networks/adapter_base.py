"""What all adapters share: attaching to a layer, values in files, strength.

A network module (`networks.lora`, ...) is a Python module with `create_network` and `create_network_from_weights`; the
object that they return is an `AdapterNetwork` (`networks.adapter_network`) holding one `Adapter` per layer. A module
file holds only what makes its kind of adapter different.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from networks.chance import initial_generator
from networks.targets import Target

Region = Callable[[bool, Tensor], "Tensor | float"]
"""Where a network acts: (whether the layer reads words, its output) -> share of the adapter's effect, from 0 to 1.

A tensor is broadcast over the output; layers that read words are those of text encoders and the keys and values of
cross attention."""


@dataclass(frozen=True, slots=True)
class Dropouts:
    """Shares of what is left out in training: neurons of the low rank, whole ranks, whole adapters."""

    neuron: float = 0.0
    rank: float = 0.0
    module: float = 0.0

    @property
    def any(self) -> bool:
        """Whether anything is left out by chance."""
        return bool(self.neuron or self.rank or self.module)


class Adapter(nn.Module):
    """Changes what one layer computes. Subclasses make parameters and say what they do to an output.

    Attributes:
        name: in files.
        encoder: number of the text encoder whose layer this is; None: the U-Net.
        rank: the adapter's size; what alpha is divided by.
        alpha: buffer, 0-d; stored in files.
        multiplier: strength at which the adapter works now.
        scale: `alpha / rank`, a number, so that no step reads a tensor.
        dropping: whether anything is left out by chance now, that is, in training mode.
        bare: whether `inner` is what the layer's class computes, not another adapter: its weight may be used directly.
        reads_words: whether the layer's input is a text, not a picture.
        region: where the adapter acts, for several networks in one picture; None: everywhere.
        group: part of the name of the parameter group, such as `block3`; empty: one group for all.
        rate_factor: what the learning rate is multiplied by; the same in all of a group.
        rate: learning rate in place of the network's; the same in all of a group.
    """

    plus_names: tuple[str, ...] = ()
    """Beginnings of the names of those parameters that LoRA+ trains at a higher rate."""

    may_skip_parameters = False
    """Whether a parameter may get no gradient in a step."""

    layer: Any
    alpha: Any
    inner: Any
    """The layer's forward method as it was; None while the adapter is not attached."""
    region: Region | None

    def __init__(self, target: Target, *, rank: int, alpha: float | None, dropouts: Dropouts | None = None) -> None:
        super().__init__()
        self.name = target.name
        self.encoder = target.encoder
        self.reads_words = target.encoder is not None or target.name.endswith(("attn2_to_k", "attn2_to_v"))
        self.rank = rank
        self.dropouts = dropouts or Dropouts()
        self.dropping = self.dropouts.any
        self.multiplier = 1.0
        self.register_buffer("alpha", torch.tensor(float(alpha or rank), dtype=torch.float32))
        # From the buffer, which rounds it: a network that is loaded again has the same scale to the last bit.
        self.scale = float(self.alpha) / rank
        self.group, self.rate_factor, self.rate = "", 1.0, None  # type: tuple[str, float, float | None]
        # Held past nn.Module, which would take the model's layer for a part of the adapter.
        vars(self)["layer"] = target.layer
        vars(self)["region"] = None
        self._hook(None)

    @property
    def uses_global_randomness(self) -> bool:
        """Whether a step draws from torch's global generator."""
        return self.dropouts.any

    @property
    def is_conv(self) -> bool:
        """Whether the layer is a convolution (of any kernel)."""
        return isinstance(self.layer, nn.Conv2d)

    @property
    def attached(self) -> bool:
        """Whether the layer computes with the adapter."""
        return self.inner is not None

    def generator(self, what: str = "") -> torch.Generator:
        """Return the generator that initial values come from: a function of torch's seed and this adapter's name."""
        return initial_generator(self.name, what)

    def attach(self) -> None:
        """Put the adapter into the layer's forward pass; it adds to what other adapters there do."""
        if self.inner is None:
            self._hook(self.layer.forward)
            self.layer.forward = self._entry

    def detach(self) -> None:
        """Take the adapter out of the layer's forward pass, whatever was attached after it.

        Raises:
            RuntimeError: something that is no adapter of ours was attached after it.
        """
        if self.inner is None:
            return
        if self.layer.forward == self._entry:
            vars(self.layer).pop("forward")
            if self.layer.forward != self.inner:
                self.layer.forward = self.inner
        else:
            above = self.layer.forward
            while isinstance(owner := getattr(above, "__self__", None), Adapter) and owner.inner != self._entry:
                above = owner.inner
            if not isinstance(owner, Adapter):
                raise RuntimeError(f"{self.name}: another hook was attached after this adapter; remove that first")
            owner._hook(self.inner)
        self._hook(None)

    def _hook(self, inner: Any) -> None:
        vars(self)["inner"] = inner
        vars(self)["bare"] = inner is not None and getattr(inner, "__func__", None) is type(self.layer).forward

    @property
    def _entry(self) -> Callable[[Tensor], Tensor]:
        """What takes the place of the layer's forward method."""
        return self.forward if self.region is None else self._forward_in_region

    def limit_to(self, region: Region | None) -> None:
        """Act where `region` says, or everywhere again; without a region a forward pass knows nothing of all this."""
        attached = self.attached
        self.detach()
        vars(self)["region"] = region
        if attached:
            self.attach()

    def _forward_in_region(self, x: Tensor) -> Tensor:
        """Compute the layer without and with the adapter, and take of each what the region says."""
        plain = self.inner(x)
        share = 1.0 if self.region is None else self.region(self.reads_words, plain)
        if not isinstance(share, Tensor):
            return plain if share == 0 else torch.lerp(plain, self._on_top_of(plain, x), share)
        return torch.lerp(plain, self._on_top_of(plain, x), share.to(plain.dtype))

    def _on_top_of(self, plain: Tensor, x: Tensor) -> Tensor:
        """Return the layer's output with the adapter, given that without it.

        Computed anew, the layer would run twice for each of its networks with a region: 2^n times for n of them.
        """
        own, inner, bare = vars(self), self.inner, self.bare
        own.update(inner=lambda _: plain, bare=False)
        try:
            return self.forward(x)
        finally:
            own.update(inner=inner, bare=bare)

    def train(self, mode: bool = True) -> Adapter:  # noqa: FBT001, FBT002 - torch's signature
        """Set training mode, in which dropouts work."""
        self.dropping = mode and self.dropouts.any
        return super().train(mode)

    def _apply(self, *arguments: Any, **named: Any) -> Adapter:
        """Move or convert the tensors; the alpha keeps its type, or half precision would round it."""
        alpha = self.alpha
        super()._apply(*arguments, **named)
        self.alpha = alpha.to(self.alpha.device)
        return self

    def settle(self) -> None:
        """Take the scale from the `alpha` buffer, after weights were loaded."""
        self.scale = float(self.alpha) / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer with its adapter."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """Return what the adapter adds to the layer's weight at strength 1: float32, of that weight's shape."""
        raise NotImplementedError

    def merged(self, weight: Tensor, strength: float) -> Tensor:
        """Return `weight` with the adapter at `strength` in it, float32."""
        return weight.float() + strength * self.delta().to(weight.device)

    def accumulate_in_place(self) -> None:
        """Let backward passes add to the gradients that are there, past autograd, where the adapter can."""

    def limit_norm(self, max_norm: float) -> Tensor | None:
        """Scale the factors down until the norm of `delta()` is at most `max_norm`.

        Returns:
            [2] on the device: the norm afterwards, and 1 if it was changed; None for kinds without such a limit.
        """
        return None

    def is_idle(self) -> bool:
        """Whether the adapter changes nothing with its present values."""
        return False

    def file_tensors(self) -> dict[str, Tensor]:
        """Return what a file holds, by suffix (`lora_up.weight`, `alpha`)."""
        return self.state_dict()

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take values from a file, whose shapes fit; without an alpha there it is the rank."""
        alpha = torch.tensor(float(self.rank))
        self.load_state_dict({"alpha": alpha, **tensors}, strict=False)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if f"{prefix}alpha" in state_dict:
            self.settle()
