"""Builds models around tensors that are already there: nothing is initialised at random, nothing is copied in vain."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from library.checkpoints.tensor_files import all_finite, all_zero
from library.errors import UserError

logger = logging.getLogger(__name__)

_LOOK = 64

Module = TypeVar("Module", bound=nn.Module)


def build_module(
    make: Callable[[], Module],
    tensors: Mapping[str, Tensor],
    *,
    what: str,
    device: torch.device,
    dtype: torch.dtype,
) -> Module:
    """Build a module without storage and give it `tensors` as its weights; frozen, in evaluation mode.

    A tensor that has the right type and device already is taken as it is, so one that is mapped from a file stays
    mapped: its pages are read when they are first touched.

    Args:
        make: creates the module; called with the meta device as default, so its initialisation costs nothing.
        tensors: state dict of the module.
        what: name of the part for messages, e.g. `U-Net`.
        device: where the weights shall be.
        dtype: their floating-point type.

    Raises:
        UserError: names or shapes do not fit the module.
    """
    with torch.device("meta"):
        module = make()
    check_fit(module, tensors, what)
    placed = {
        # Whole numbers, such as the step counts of batch norms, stay what they are. `data`: thirds of one tensor of a
        # file would share its count of changes, and autograd would take an update of one for an update of all.
        name: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None).data
        for name, tensor in tensors.items()
    }
    module.load_state_dict(placed, strict=True, assign=True)
    for holder in module.modules():
        _restore_buffers(holder, device)
    module.requires_grad_(False)
    return module.eval()


def check_fit(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse tensors whose names and shapes are not those of a module, which may be on the meta device.

    Raises:
        UserError: names what is missing, unexpected or of another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    problems = []
    for label, names in (
        ("missing", [name for name in expected if name not in tensors]),
        ("unexpected", [name for name in tensors if name not in expected]),
        (
            "of another shape",
            [name for name, shape in expected.items() if name in tensors and tuple(tensors[name].shape) != shape],
        ),
    ):
        if names:
            problems.append(f"{len(names)} tensors are {label} ({_first(names)})")
    if problems:
        raise UserError(
            f"the {what} does not fit its configuration: {'; '.join(problems)}",
            "The file is incomplete or of another model family.",
        )


def _restore_buffers(module: nn.Module, device: torch.device) -> None:
    """Give buffers that no file holds their values: CLIP's position numbers are the only ones."""
    for name, buffer in list(module.named_buffers(recurse=False)):
        if not buffer.is_meta:
            continue
        if name != "position_ids":
            raise RuntimeError(f"{type(module).__name__}.{name} has no value: teach {__name__} how to make it")
        module.register_buffer(name, _numbers(buffer, device), persistent=False)


def _numbers(like: Tensor, device: torch.device) -> Tensor:
    return torch.arange(like.shape[-1], device=device).expand(like.shape)


def check_weights(tensors: Mapping[str, Tensor], where: str, *, allow_nan: bool) -> None:
    """Refuse weights that are not numbers and warn of matrices that hold nothing but zeros: signs of a damaged file.

    Raises:
        UserError: some tensors hold NaN or infinity and `allow_nan` is not set.
    """
    bad = [] if allow_nan else all_finite(tensors)
    if bad:
        raise UserError(
            f"{len(bad)} tensors hold NaN or infinity ({_first(bad)})",
            "The file is damaged, or its training failed. Training loads it all the same with --allow_nan_weights.",
            where=where,
        )
    empty = all_zero({name: tensor for name, tensor in tensors.items() if not _starts_with_numbers(tensor)})
    if empty:
        logger.warning("%s: %d tensors hold nothing but zeros (%s)", where, len(empty), _first(empty))


def _starts_with_numbers(tensor: Tensor) -> bool:
    """Tell whether a look at a few values settles that a tensor is not all zeros; on a GPU that look would wait."""
    return tensor.device.type != "cpu" or bool(tensor.reshape(-1)[:_LOOK].any())


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of tensors, their names and types included."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def from_config(model_class: Any, config: Mapping[str, Any]) -> Any:
    """Create a diffusers model from a configuration, whatever bookkeeping entries that holds."""
    return model_class.from_config(dict(config))
