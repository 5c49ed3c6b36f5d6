"""Files of hypernetworks in NovelAI's layout: for every width of context, an MLP for keys and one for values.

As pickles they hold `{320: [state dict of keys, state dict of values], 640: ..., 768: ..., 1280: ...}`, which the
A1111 web UI reads; as safetensors the same tensors are called `320.k.linear.0.weight` and so on, which only this
toolkit reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROLES = ("k", "v")
"""What the two MLPs of a width act on, in the order of files."""

_NAMES = {
    "linear1.weight": "linear.0.weight",
    "linear1.bias": "linear.0.bias",
    "linear2.weight": "linear.1.weight",
    "linear2.bias": "linear.1.bias",
}
"""Older names of the tensors of an MLP, and those of today."""

_FLAT = re.compile(r"(\d+)\.([kv])\.(linear\.[01]\.(?:weight|bias))")
_PLAIN = {"layer_structure": ([1, 2, 1], (1, 2, 1), None), "activation_func": ("linear", None)}
_SWITCHES = ("is_layer_norm", "activate_output")
_NOT_ONE = "is no hypernetwork"
_HINT = "Expected is a file that holds two MLPs for each of some widths, such as 320, 640, 768 and 1280."


@dataclass(frozen=True)
class HypernetworkFile:
    """A hypernetwork: width -> role (`k`, `v`) -> tensors `linear.{0,1}.{weight,bias}` of its MLP."""

    widths: Mapping[int, Mapping[str, Mapping[str, Tensor]]]
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_hypernetwork(path: str | Path) -> HypernetworkFile:
    """Read a hypernetwork, pickled or safetensors.

    Raises:
        UserError: the file is damaged, holds something else, or an MLP of another structure.
    """
    from library.checkpoints.tensor_files import MappedTensors, all_finite, open_tensors

    where = str(path)
    if Path(path).suffix.lower() == ".safetensors":
        tensors = open_tensors(path)
        widths = _from_flat(tensors, where)
        metadata = tensors.header.metadata if isinstance(tensors, MappedTensors) else {}
    else:
        from library.checkpoints.pickles import load_pickle

        widths, metadata = _from_pickle(load_pickle(path), where), {}
    for width, roles in widths.items():
        for role in ROLES:
            _check_shapes(width, roles.get(role, {}), f"{where}: width {width}, {role}")
    bad = all_finite(_flat(widths))
    if bad:
        raise UserError(f"{len(bad)} tensors hold NaN or infinity ({', '.join(bad[:3])})", where=where)
    return HypernetworkFile(widths, metadata)


def write_hypernetwork(path: str | Path, file: HypernetworkFile, *, precision: torch.dtype | None = None) -> Path:
    """Write a hypernetwork; the suffix decides the format.

    Args:
        path: the final name.
        file: what to write; its metadata only fit into safetensors.
        precision: type of the values; None: as they are.

    Raises:
        NonFiniteWeights: a value is NaN or infinite; nothing was written.
    """
    from library.checkpoints.ckpt_writer import write_ckpt
    from library.checkpoints.tensor_files import write_safetensors

    flat = _flat(file.widths)
    if Path(path).suffix.lower() == ".safetensors":
        write_safetensors(path, flat, dict(file.metadata), precision=precision, require_finite=True)
        return Path(path)

    def arrange(described: Mapping[str, Any]) -> dict[int, list[dict[str, Any]]]:
        return {
            width: [{name: described[f"{width}.{role}.{name}"] for name in roles[role]} for role in ROLES]
            for width, roles in file.widths.items()
        }

    write_ckpt(path, flat, None, precision=precision, require_finite=True, arrange=arrange)
    return Path(path)


def _flat(widths: Mapping[int, Mapping[str, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    return {
        f"{width}.{role}.{name}": tensor
        for width, roles in widths.items()
        for role, tensors in roles.items()
        for name, tensor in tensors.items()
    }


def _from_flat(tensors: Mapping[str, Tensor], where: str) -> dict[int, dict[str, dict[str, Tensor]]]:
    widths: dict[int, dict[str, dict[str, Tensor]]] = {}
    for name in tensors:
        found = _FLAT.fullmatch(name)
        if found is None:
            raise UserError(f"{_NOT_ONE}: it holds {name!r}", _HINT, where=where)
        widths.setdefault(int(found[1]), {}).setdefault(found[2], {})[found[3]] = tensors[name]
    return widths


def _from_pickle(content: Any, where: str) -> dict[int, dict[str, dict[str, Tensor]]]:
    if not isinstance(content, Mapping):
        raise UserError(_NOT_ONE, _HINT, where=where)
    for name, known in _PLAIN.items():
        if content.get(name) not in known:
            what = f"its MLPs have {name} {content[name]!r}, which is not supported"
            raise UserError(
                what, "Supported are two linear layers without activation, as NovelAI has them.", where=where
            )
    for name in _SWITCHES:
        if content.get(name):
            raise UserError(f"it was made with {name}, which is not supported", where=where)
    widths: dict[int, dict[str, dict[str, Tensor]]] = {}
    for width, pair in content.items():
        if not isinstance(width, int):
            continue
        if not isinstance(pair, (list, tuple)) or len(pair) != len(ROLES) or not all(_is_table(one) for one in pair):
            raise UserError(f"{_NOT_ONE}: under {width} there is no pair of MLPs", _HINT, where=where)
        widths[width] = {
            role: {_NAMES.get(name, name): tensor for name, tensor in one.items()}
            for role, one in zip(ROLES, pair, strict=True)
        }
    if not widths:
        raise UserError(_NOT_ONE, _HINT, where=where)
    return widths


def _is_table(value: Any) -> bool:
    import torch

    return isinstance(value, Mapping) and all(torch.is_tensor(tensor) for tensor in value.values())


def _check_shapes(width: int, tensors: Mapping[str, Tensor], where: str) -> None:
    expected = {
        "linear.0.weight": (2 * width, width),
        "linear.0.bias": (2 * width,),
        "linear.1.weight": (width, 2 * width),
        "linear.1.bias": (width,),
    }
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise UserError(f"missing, unknown or of another shape: {', '.join(wrong)}", _HINT, where=where)
