"""OFT for Stable Diffusion: outputs of layers are rotated in blocks of channels (Qiu et al. 2023). U-Net only.

With B the trained blocks [k, n, n] (k is `--network_dim`, k * n the layer's outputs), Q = B - B^T with a norm over all
blocks of at most alpha * outputs, R = (I + Q)(I - Q)^-1, and W' = R_k^T W for the n rows of each block. At strength m,
R is m (R - I) + I. The bias is not rotated.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from library.errors import Problem, raise_problems
from networks.adapter_base import Adapter
from networks.adapter_network import AdapterNetwork
from networks.from_weights import alpha_in, network_from_weights
from networks.low_rank import compute_dtype
from networks.network_args import DEFAULT_RANK, WHERE, Keys, flag, problems_of, read_arguments, share
from networks.targets import CONV_CLASSES, TRANSFORMER_CLASSES, Target, unet_targets

logger = logging.getLogger(__name__)

KEYS: Keys = {"enable_all_linear": flag, "enable_conv": flag, "dropout": share}
"""The `network_args` of this module; `dropout` is there to be refused."""

UNET_ONLY = True
"""The trainer need not run the text encoder for this module's sake."""

DEFAULT_CONSTRAINT = 1e-3
PREFIX = "oft_unet"
WIDTH_UNIT = 320
"""What all widths of the U-Nets of Stable Diffusion are multiples of."""

_ATTENTION = ("CrossAttention", "Attention")
_TINY = 1e-8


class OftAdapter(Adapter):
    """Rotates what a layer computes. Its rank is the number of blocks, its alpha the limit of the rotation.

    Outputs are rotated, not rows of the weight: that is the same, costs less, and needs no gradient of a whole weight.
    """

    def __init__(self, target: Target, *, rank: int, alpha: float | None) -> None:
        super().__init__(target, rank=rank, alpha=alpha)
        outputs = target.layer.weight.shape[0]
        self.oft_blocks = nn.Parameter(torch.zeros(rank, outputs // rank, outputs // rank))
        self.settle()

    def settle(self) -> None:
        """Take the limit of the norm of Q from the `alpha` buffer, after weights were loaded."""
        self.scale = float(self.alpha) * self.layer.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer with its adapter."""
        layer = self.layer
        dtype = compute_dtype(x)
        if self.bare:
            weight = layer.weight.to(dtype)
            y = F.linear(x, weight) if weight.dim() == 2 else layer._conv_forward(x, weight, None)
        else:
            y = self.inner(x)
            y = y if layer.bias is None else y - self._shaped(layer.bias, y)
        with torch.autocast(x.device.type, enabled=False):
            y = self._rotated(y)
        return y if layer.bias is None else y + self._shaped(layer.bias, y)

    @staticmethod
    def _shaped(bias: Tensor, y: Tensor) -> Tensor:
        return bias.to(y.dtype) if y.dim() < 4 else bias.to(y.dtype)[:, None, None]

    def turn(self) -> Tensor:
        """Return R - I of every block, [k, n, n], in float32 or more."""
        blocks = self.oft_blocks if self.oft_blocks.dtype == torch.float64 else self.oft_blocks.float()
        skew = blocks - blocks.transpose(1, 2)
        norm = skew.norm()
        skew = skew * ((norm.clamp(max=self.scale) + _TINY) / (norm + _TINY))
        identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        # (I + Q)(I - Q)^-1 - I = 2 Q (I - Q)^-1; I - Q is regular for every skew Q, so nobody has to wait for a check.
        return 2 * skew @ torch.linalg.inv_ex(identity - skew).inverse

    def _rotated(self, y: Tensor) -> Tensor:
        turn = (self.multiplier * self.turn()).to(y.dtype)
        if self.is_conv:
            batch, _, *size = y.shape
            blocks = y.reshape(batch, self.rank, turn.shape[-1], -1)
            return (blocks + turn.transpose(1, 2) @ blocks).reshape(batch, -1, *size)
        blocks = y.unflatten(-1, (self.rank, -1)).reshape(-1, self.rank, turn.shape[-1]).transpose(0, 1)
        return torch.baddbmm(blocks, blocks, turn).transpose(0, 1).reshape(y.shape)

    def merged(self, weight: Tensor, strength: float) -> Tensor:
        """Return `weight` with the adapter at `strength` in it, float32."""
        turn = strength * self.turn().to(weight.device).float()
        rows = weight.float().reshape(self.rank, turn.shape[-1], -1)
        return (rows + turn.transpose(1, 2) @ rows).reshape(weight.shape)

    def delta(self) -> Tensor:
        """Return what the adapter adds to the layer's weight at strength 1: float32, of that weight's shape."""
        weight = self.layer.weight.float()
        return self.merged(weight, 1.0) - weight

    def is_idle(self) -> bool:
        """Whether the adapter changes nothing with its present values."""
        return not bool(self.oft_blocks.any())

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take values from a file, whose shapes fit; without an alpha there the limit stays."""
        self.load_state_dict(dict(tensors), strict=False)


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: Any,
    unet: Any,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> AdapterNetwork:
    """Make an OFT network for the U-Net of a model: `network_dim` blocks, rotated within a limit of `network_alpha`.

    Raises:
        UserError: an argument is not known or has no sense.
    """
    values = read_arguments(kwargs, KEYS)
    raise_problems(_problems(network_dim, network_alpha, values["dropout"] or neuron_dropout))
    alpha = DEFAULT_CONSTRAINT if network_alpha is None else float(network_alpha)
    if alpha >= 1:
        logger.warning("--network_alpha %g hardly limits rotations by OFT; 1e-3 is usual", alpha)
    classes = TRANSFORMER_CLASSES if values["enable_all_linear"] else _ATTENTION
    if values["enable_conv"]:
        classes = (*classes, *CONV_CLASSES)
    targets = [] if unet is None else unet_targets(unet, classes, PREFIX)
    targets = [target for target in targets if values["enable_conv"] or not target.is_conv]
    blocks = DEFAULT_RANK if network_dim is None else network_dim
    raise_problems(_undivided(targets, blocks))
    adapters = [OftAdapter(target, rank=blocks, alpha=alpha) for target in targets]
    return AdapterNetwork([], adapters, multiplier=multiplier)


def create_network_from_weights(
    multiplier: float,
    file: str | Path | None,
    vae: Any,
    text_encoder: Any,
    unet: Any,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,  # noqa: FBT001, FBT002 - the protocol's signature
    **kwargs: Any,
) -> tuple[AdapterNetwork, dict[str, Tensor]]:
    """Make a network with the layers, blocks and limits of a file, and return it with the file's tensors.

    Raises:
        UserError: the file does not fit the model, or an argument is not known.
    """
    values = read_arguments(kwargs, KEYS)
    raise_problems(_problems(None, None, values["dropout"]))
    useless = [name for name in ("enable_all_linear", "enable_conv") if values[name] is not None]
    if useless and not for_inference:
        logger.warning("%s: the file decides about %s; these have no effect", WHERE, ", ".join(useless))

    def make(target: Target, tensors: Mapping[str, Tensor]) -> OftAdapter | None:
        blocks = tensors.get("oft_blocks")
        if blocks is None or blocks.dim() != 3:
            return None
        limit = alpha_in(tensors)
        return OftAdapter(target, rank=blocks.shape[0], alpha=DEFAULT_CONSTRAINT if limit is None else limit)

    return network_from_weights(file, weights_sd, (None, unet), make, multiplier=multiplier, prefix="oft")


def check_network_args(
    network_dim: int | None, network_alpha: float | None, kwargs: Mapping[str, Any], *, base: str | None = None
) -> Iterator[Problem]:
    """Yield what is wrong with the arguments of a network, before any model is loaded."""
    found = list(problems_of(kwargs, KEYS))
    yield from found
    if not found:
        yield from _problems(network_dim, network_alpha, read_arguments(kwargs, KEYS)["dropout"])


def _problems(blocks: int | None, limit: float | None, dropout: float | None) -> Iterator[Problem]:
    if blocks is not None and (blocks < 1 or WIDTH_UNIT % blocks):
        hint = f"Choose one of {', '.join(str(n) for n in range(1, WIDTH_UNIT + 1) if WIDTH_UNIT % n == 0)}."
        what = f"OFT cuts widths, which are multiples of {WIDTH_UNIT}, into {blocks} blocks, and that does not work out"
        yield Problem("--network_dim", what, hint)
    if limit is not None and limit <= 0:
        what = f"it limits the rotations of OFT, and {limit:g} lets nothing rotate"
        yield Problem("--network_alpha", what, f"{DEFAULT_CONSTRAINT:g} is usual.")
    if dropout:
        yield Problem("--network_dropout", "OFT has nothing that could be left out")


def _undivided(targets: Sequence[Target], blocks: int) -> Iterator[Problem]:
    for target in targets:
        outputs = target.layer.weight.shape[0]
        if outputs % blocks:
            what = f"OFT cannot cut the {outputs} outputs of {target.path} into {blocks} equal blocks"
            yield Problem("--network_dim", what)
            return
