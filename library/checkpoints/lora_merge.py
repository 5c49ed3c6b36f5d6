"""Merges LoRA files into a checkpoint: W += ratio * change, tensor by tensor, while the result is being written.

The base is mapped and never loaded as a whole; sums are made in float32 and rounded once, to the type of the file.
Several files add up: each change is computed from the base's own weight, so their order makes no difference.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from library.checkpoints import lora_math
from library.checkpoints.ckpt_writer import write_ckpt
from library.checkpoints.detect import CheckpointInfo
from library.checkpoints.folders import choose_weights, is_weights_file, open_folder_weights
from library.checkpoints.headers import file_kind, read_header
from library.checkpoints.lora_file import AdapterWeights, LoraFile
from library.checkpoints.lora_places import Place, find_places
from library.checkpoints.pickles import load_state_dict
from library.checkpoints.tensor_files import LazyTensor, MappedTensors, NonFiniteWeights, stored_size, write_safetensors
from library.errors import UserError
from library.files import atomic_folder, write_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_log = logging.getLogger(__name__)

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
ALL_COMPONENTS = (*COMPONENTS, "vae")
_BLOCK = 4 * 1024**2
Tensors = Mapping[str, "Tensor"]
Written = dict[str, "Tensor | LazyTensor"]


@dataclass(frozen=True, slots=True)
class Ingredient:
    """A LoRA file and how much of it is wanted.

    Attributes:
        file: as it was read.
        ratio: its strength; negative ones take it out again.
        block_weight: factor of the ratio by module name, or None.
    """

    file: LoraFile
    ratio: float
    block_weight: Callable[[str], float] | None = None

    def strength(self, name: str) -> float:
        """Return the strength of one module."""
        return self.ratio if self.block_weight is None else self.ratio * self.block_weight(name)


class _Edit(NamedTuple):
    third: int | None
    weights: AdapterWeights
    strength: float
    bias: Tensor | None


@dataclass
class MergePlan:
    """What will be changed: edits by tensor name, and for each file the modules without a counterpart."""

    edits: dict[str, list[_Edit]] = field(default_factory=dict)
    unmatched: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OpenBase:
    """A checkpoint to merge into; the tensors of a folder are named with their component in front."""

    info: CheckpointInfo
    tensors: Tensors
    counters: Mapping[str, int] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_folder(self) -> bool:
        """Whether it is a Diffusers folder."""
        return self.info.layout == "diffusers"


class _FolderTensors(Mapping[str, "Tensor"]):
    """The tensors of several components under one roof, read on access."""

    def __init__(self, parts: Mapping[str, Tensors]) -> None:
        self.parts = parts

    def __getitem__(self, name: str) -> Tensor:
        part, _, short = name.partition("/")
        return self.parts[part][short]

    def __iter__(self) -> Iterator[str]:
        return (f"{part}/{name}" for part, tensors in self.parts.items() for name in tensors)

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))


def open_base(info: CheckpointInfo, components: Sequence[str] = COMPONENTS) -> OpenBase:
    """Open what `detect.inspect` found; nothing is read but headers.

    Raises:
        UserError: the checkpoint is damaged or incomplete.
    """
    path = info.path
    if info.layout == "diffusers":
        parts = {part: open_folder_weights(path / part) for part in components if (path / part).is_dir()}
        return OpenBase(info, _FolderTensors(parts))
    if file_kind(path) == "safetensors":
        header = read_header(path)
        return OpenBase(info, MappedTensors(header), {}, header.metadata)
    state = load_state_dict(path)
    return OpenBase(info, state.tensors, state.counters if state.wrapped else None)


# Planning ----------------------------------------------------------------------------------------------------------


def plan_merge(base: OpenBase, ingredients: Sequence[Ingredient]) -> MergePlan:
    """Find the tensors that each file changes, before anything large is read.

    Raises:
        UserError: a file has no module in common with the base, or one does not fit the weight it is for.
    """
    places = find_places(base.tensors, base.info.family, folder=base.is_folder)
    shapes = {name: tuple(base.tensors[name].shape) for name in {place.tensor for place in places.values()}}
    plan = MergePlan()
    for ingredient in ingredients:
        missing = [name for name in ingredient.file.modules if not _plan_module(plan, ingredient, name, places, shapes)]
        if len(missing) == len(ingredient.file.modules):
            some = f", such as {missing[0]}" if missing else ""
            hint = "Was it made for another kind of model?"
            what = f"none of its {len(missing)} modules exists in {base.info.path.name}{some}"
            raise UserError(what, hint, where=str(ingredient.file.path))
        plan.unmatched[str(ingredient.file.path)] = missing
    return plan


def _plan_module(
    plan: MergePlan,
    ingredient: Ingredient,
    name: str,
    places: Mapping[str, Place],
    shapes: Mapping[str, tuple[int, ...]],
) -> bool:
    """Add the edits of one module to the plan; False if a tensor that it changes does not exist."""
    weights, strength = ingredient.file.modules[name], ingredient.strength(name)
    if not lora_math.is_supported(weights):
        what = f"{name} is an adapter of the kind {weights.kind}, which cannot be merged"
        raise UserError(what, "Merge it with the program that made it", where=str(ingredient.file.path))
    bias = lora_math.bias_delta(weights)
    wanted = {".weight": lora_math.changes_weight(weights), ".bias": bias is not None}
    endings = [ending for ending, used in wanted.items() if used]
    if not endings or any(name + ending not in places for ending in endings):
        return False
    for ending in endings:
        place = places[name + ending]
        if ending == ".weight":
            _check_fit(weights, place, shapes[place.tensor], str(ingredient.file.path))
        if strength:
            edit = _Edit(place.third, weights, strength, bias if ending == ".bias" else None)
            plan.edits.setdefault(place.tensor, []).append(edit)
    return True


def _check_fit(weights: AdapterWeights, place: Place, shape: tuple[int, ...], where: str) -> None:
    found = lora_math.factor_shape(weights)
    if found is None or not shape:
        return
    rows = shape[0] if place.third is None else shape[0] // 3
    if found != (rows, math.prod(shape[1:])):
        what = f"{weights.name} {list(found)} does not fit {place.tensor} {[rows, *shape[1:]]}"
        raise UserError(what, "Was it made for another kind of model?", where=where)


# Merging -----------------------------------------------------------------------------------------------------------


def merged_tensors(tensors: Tensors, plan: MergePlan, on_change: Callable[[], object] | None = None) -> Written:
    """Return all tensors of a checkpoint, each made when it is written; `on_change` is called after a changed one.

    Raises:
        UserError: a tensor that shall change holds whole numbers.
    """
    written: Written = {}
    for name in tensors:
        like, edits = tensors[name], plan.edits.get(name)
        if edits and not like.dtype.is_floating_point:
            kind = str(like.dtype).removeprefix("torch.")
            raise UserError(f"tensor {name!r} is {kind}: nothing can be merged into quantized models")
        read = partial(tensors.__getitem__, name)
        make = partial(_merge_one, read, edits, on_change) if edits else read
        written[name] = LazyTensor(tuple(like.shape), like.dtype, make)
    return written


def _merge_one(read: Callable[[], Tensor], edits: Sequence[_Edit], on_change: Callable[[], object] | None) -> Tensor:
    import torch

    base = read()
    merged = base.to(torch.float32, copy=True).contiguous()
    for edit in edits:
        before, after = base, merged
        if edit.third is not None:
            before, after = base.chunk(3)[edit.third], merged.chunk(3)[edit.third]
        if edit.bias is not None:
            after.add_(edit.bias, alpha=edit.strength)
        else:
            lora_math.add_change_(after, before, edit.weights, edit.strength)
    if on_change is not None:
        on_change()
    return merged


# Writing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """How the result is written.

    Attributes:
        precision: dtype of all floating point tensors; None keeps those of the base.
        metadata: strings for the header of a safetensors file.
        on_change: called after each changed tensor, for a progress bar.
    """

    precision: torch.dtype | None = None
    metadata: Mapping[str, str] | None = None
    on_change: Callable[[], object] | None = None


def write_merged(base: OpenBase, plan: MergePlan, target: Path, settings: MergeSettings) -> None:
    """Write the merged checkpoint in the layout of the base: a folder, or a file of the kind that its suffix says.

    Raises:
        NonFiniteWeights: the result holds NaN or infinity; nothing was written.
        CannotSave: the disk is full or the place cannot be written.
        UserError: an adapter does not fit after all.
    """
    if base.is_folder:
        _write_folder(base, plan, target, settings)
        return
    tensors = merged_tensors(base.tensors, plan, settings.on_change)
    if target.suffix == ".safetensors":
        write_safetensors(target, tensors, settings.metadata, precision=settings.precision, require_finite=True)
    else:
        write_ckpt(target, tensors, base.counters, precision=settings.precision, require_finite=True)


def _write_folder(base: OpenBase, plan: MergePlan, target: Path, settings: MergeSettings) -> None:
    root = base.info.path
    changed = {name.partition("/")[0] for name in plan.edits}
    if settings.precision is not None:
        changed |= {part for part in ALL_COMPONENTS if (root / part).is_dir()}
    everything = open_base(base.info, tuple(sorted(changed)))
    tensors = merged_tensors(everything.tensors, plan, settings.on_change)
    size = sum(stored_size(tensor, settings.precision) for tensor in tensors.values())
    with atomic_folder(target, size=size) as folder:
        for path in _kept_files(root, changed):
            write_bytes(folder / path.relative_to(root), _blocks(path))
        for part in sorted(changed):
            table = {name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{part}/")}
            file = folder / part / _weights_name(root / part, keep_variant=settings.precision is None)
            try:
                if file.suffix == ".safetensors":
                    write_safetensors(file, table, {"format": "pt"}, precision=settings.precision, require_finite=True)
                else:
                    write_ckpt(file, table, None, precision=settings.precision, require_finite=True)
            except NonFiniteWeights as error:
                raise NonFiniteWeights(error.names, target, error.cause) from error


def _kept_files(root: Path, changed: set[str]) -> Iterator[Path]:
    """Yield the files that go over as they are: everything but hidden ones and the weights of changed components."""
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if not path.is_file() or any(part.startswith(".") for part in parts):
            continue
        if parts[0] not in changed or len(parts) != 2 or not is_weights_file(parts[1]):
            yield path


def _weights_name(folder: Path, *, keep_variant: bool) -> str:
    """Return the name for the merged weights of a component: that of the source, in one piece."""
    chosen = choose_weights(item.name for item in folder.iterdir()) or "model.safetensors"
    stem, _, rest = chosen.partition(".")
    kind = "bin" if ".bin" in chosen else "safetensors"
    variant = rest.split(".")[0] if keep_variant and rest.split(".")[0] not in (kind, "index") else ""
    return ".".join(filter(None, (stem, variant, kind)))


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block
