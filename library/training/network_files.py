"""Saved networks: written by their own method, complete and with their hashes, or not at all."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.checkpoints.lora_file import write_lora
from library.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_SHOWN = 5


def save_network(
    network: Any,
    target: Path,
    precision: torch.dtype | None,
    metadata: Mapping[str, str],
    *,
    extra: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a network by its own method, and see to it that the file appears complete, with its hashes, or not at all.

    Args:
        network: offers `save_weights(file, dtype, metadata)`.
        target: the final name; its suffix decides the format.
        precision: type of the values; None: as they are.
        metadata: strings for the header.
        extra: further tensors of the file, in types of their own.
    """
    if extra is None and getattr(network, "saves_whole_files", False):
        network.save_weights(str(target), precision, dict(metadata))
        return target
    from library.checkpoints.tensor_files import MappedTensors
    from library.files import remove_tree, temporary_beside

    folder = temporary_beside(target)
    folder.mkdir(parents=True)
    try:
        raw = folder / f"network{target.suffix}"
        network.save_weights(str(raw), precision, dict(metadata))
        tensors = _written(network, raw)
        header = tensors.header.metadata if isinstance(tensors, MappedTensors) else {}
        return write_lora(target, {**tensors, **(extra or {})}, {**metadata, **header})
    finally:
        remove_tree(folder)


def _written(network: Any, path: Path) -> Mapping[str, Tensor]:
    """Open what a network has written itself."""
    from library.checkpoints.tensor_files import open_tensors

    where = f"--network_module {type(network).__module__}"
    if not path.is_file():
        raise UserError("its save_weights wrote no file", where=where)
    try:
        return open_tensors(path)
    except UserError as error:
        raise UserError(f"its save_weights wrote an unusable file: {error.problems[0].what}", where=where) from error


def try_saving(network: Any) -> None:
    """Save a network once for nothing, so that one that cannot be saved is known before it is trained.

    Raises:
        UserError: its `save_weights` writes nothing of use.
    """
    from library.checkpoints.tensor_files import NonFiniteWeights

    with tempfile.TemporaryDirectory(prefix="sd-network-") as folder:
        try:
            save_network(network, Path(folder) / "trial.safetensors", None, {})
        except NonFiniteWeights as error:
            where = f"--network_module {type(network).__module__}"
            raise UserError(f"begins with {error.cause} ({', '.join(error.names[:_SHOWN])})", where=where) from error
