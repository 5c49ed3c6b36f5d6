"""Norms of a network: keeping those of its weights below a limit, and what other people's modules say about theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LIMITED = ("max_norm/keys_scaled", "norm/avg_key_norm", "max_norm/max_key_norm")
_TOLD = {
    "weight_norms": "norm/avg_key_norm",
    "grad_norms": "norm/avg_grad_norm",
    "combined_weight_norms": "norm/avg_combined_norm",
}
"""Methods that a network may have -> what the mean of the norms that they return is drawn as."""


class NetworkNorms:
    """What a run does with the norms of its network, after every update.

    Args:
        network: of any module; nothing happens to one without the methods that this needs.
        limit: `--scale_weight_norms`; 0 or None: none.
        device: that the network is on.
    """

    def __init__(self, network: Any, limit: float | None, device: torch.device) -> None:
        self._network, self._device = network, device
        can = getattr(network, "limits_norms", hasattr(network, "apply_max_norm_regularization"))
        self._limit = limit if can else None
        self.limit_is_idle = bool(limit) and not can
        """Whether a limit is asked for that the network cannot keep."""
        self._scalars: dict[str, Tensor | float] = {}

    def see_gradients(self) -> None:
        """Let the network look at the gradients of an update, clipped, while they are there."""
        for name in ("update_grad_norms", "update_norms"):
            if hasattr(self._network, name):
                getattr(self._network, name)()

    def after_update(self) -> None:
        """Shrink the weights to the limit, or else ask for their norms."""
        network = self._network
        if not self._limit:
            norms = {drawn: getattr(network, name)() for name, drawn in _TOLD.items() if hasattr(network, name)}
            self._scalars = {drawn: found.mean() for drawn, found in norms.items() if found is not None}
        elif hasattr(network, "limit_norms"):
            self._scalars = dict(zip(_LIMITED, network.limit_norms(self._limit).unbind(), strict=True))
        else:
            found = network.apply_max_norm_regularization(self._limit, self._device)
            self._scalars = {name: float(value or 0) for name, value in zip(_LIMITED, found, strict=True)}

    def scalars(self) -> dict[str, Tensor | float]:
        """Return the numbers of the last update, to be drawn beside the loss."""
        return self._scalars
