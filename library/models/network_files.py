"""Network files of any kind and layout, brought into a model: merged into its weights, or loaded into its networks."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.checkpoints.lora_file import LoraFile, read_lora, require_base, write_lora
from library.checkpoints.lora_math import apply_delta, bias_delta, changes_weight
from library.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from library.checkpoints.lora_file import AdapterWeights
    from library.models.family import ModelFamily

logger = logging.getLogger(__name__)

_SHOWN = 5


def merge_networks(family: ModelFamily, networks: Iterable[tuple[str, float]], option: str) -> None:
    """Merge network files into the model in memory: computed in float32, stored in the model's types.

    Args:
        family: its denoiser and text encoders change, before anything is cached or attached.
        networks: (file, strength).
        option: that named them.

    Raises:
        UserError: a file cannot be read, is for another model, or none of its modules fits.
    """
    for path, strength in networks:
        where = f"{option} {path}"
        file = read_lora(path, base=family.spec.name)
        require_base(file, family.spec.name, option)
        unmatched = _merge(family, file, strength)
        matched = len(file.modules) - len(unmatched)
        if not matched:
            raise UserError("none of its modules has a counterpart in the model", where=where)
        logger.info("merged %s at strength %g: %d modules", path, strength, matched)
        _report([*unmatched, *file.unknown], where)
        for part in family.parts():
            family.note_change(part, f"{Path(path).name}:{strength}:{_digest(file)}")


def _merge(family: ModelFamily, file: LoraFile, strength: float) -> list[str]:
    """Merge one file; return the names of modules without counterpart."""
    parts = family.parts()
    unmatched = []
    for name, weights in file.modules.items():
        part, path = file.places[name]
        layer = _layer(parts.get(part), path)
        if layer is None:
            unmatched.append(name)
            continue
        with torch.no_grad():
            if changes_weight(weights):
                layer.weight.copy_(apply_delta(layer.weight.float(), _beside(weights, layer.weight), strength))
            bias = bias_delta(weights)
            if bias is not None and layer.bias is not None:
                layer.bias.copy_(layer.bias.float() + strength * bias.to(layer.bias.device))
    return unmatched


def _beside(weights: AdapterWeights, weight: Tensor) -> AdapterWeights:
    """Return an adapter on the device of the weight that it changes; single numbers stay where Python reads them."""
    moved = {suffix: tensor.to(weight.device) if tensor.dim() else tensor for suffix, tensor in weights.tensors.items()}
    return replace(weights, tensors=moved)


def _layer(root: Any, path: str) -> Any:
    """Return the layer at `path`, or None."""
    if root is None:
        return None
    try:
        layer = root.get_submodule(path)
    except AttributeError:
        return None
    return layer if getattr(layer, "weight", None) is not None else None


def _digest(file: LoraFile) -> str:
    from library.checkpoints.hashes import file_sha256

    return file_sha256(file.path)[:16]


def _report(names: Sequence[str], where: str) -> None:
    if names:
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        logger.warning("%s: %d entries were not used: %s", where, len(names), shown)


def load_network_weights(network: Any, path: str, family_name: str, *, foreign: bool = False) -> None:
    """Load `--network_weights` into a network that is attached already.

    Modules know files in kohya's layout, so a file of another one is translated into a temporary file first.

    Raises:
        UserError: the file cannot be read or is for another model, or the module refuses it.
    """
    with KohyaFile(path, family_name, "--network_weights", foreign=foreign) as readable:
        load_readable(network, readable, path, hint="Try --dim_from_weights")


def load_readable(network: Any, readable: Path, path: str, *, hint: str = "") -> None:
    """Load a file in a layout that network modules know, which `path` was brought to, into an attached network.

    Raises:
        UserError: the module refuses it; `hint` says what may help.
    """
    where = f"--network_weights {path}"
    try:
        info = network.load_weights(str(readable))
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"does not fit the network ({error})", hint, where=where) from error
    logger.info("%s: %s", where, info or "loaded")


class KohyaFile:
    """Context of a network file in kohya's layout: the file itself, or a temporary translation of it.

    Args:
        path: the file.
        family_name: of the model it is for.
        option: that named it.
        foreign: it is for a network module that is not known here, which may understand what nobody else does.
    """

    def __init__(self, path: str, family_name: str, option: str, *, foreign: bool = False) -> None:
        self._path, self._family, self._option, self._foreign = path, family_name, option, foreign
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Path:
        try:
            file = read_lora(self._path, base=self._family)
        except UserError:
            if self._foreign:
                return Path(self._path)
            raise
        require_base(file, self._family, self._option)
        if file.unknown:
            _report(file.unknown, f"{self._option} {self._path}")
        if file.layout in ("kohya", "lycoris"):
            return file.path
        self._folder = tempfile.TemporaryDirectory(prefix="sd-network-")
        return write_lora(Path(self._folder.name) / "network.safetensors", file.tensors(), file.metadata)

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()
