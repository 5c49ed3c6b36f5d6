"""Brings a LoRA of stage C into the layout of Stable Cascade's original trainer.

Every number of such a file stands for a pair of matrices up [out,r] and down [r,in] of strength 1/r, with one r for the
whole file. Queries, keys and values share a pair. Where theirs have the same down matrix, their up matrices are put one
below the other; otherwise the pair has three times the rank: the down matrices one below the other, the up matrices as
blocks on a diagonal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.checkpoints import cascade_lora
from library.checkpoints.cascade_configs import CONFIGS, CascadeConfig
from library.checkpoints.cascade_lora import WORD_CHANGES, WORD_IDS, Entry
from library.checkpoints.lora_kinds import DOWN, UP
from library.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from library.checkpoints.lora_file import AdapterWeights, LoraFile

Pair = tuple["Tensor", "Tensor"]


def to_official(
    file: LoraFile, filters: Sequence[str], config: CascadeConfig | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of the original layout.

    Args:
        file: a LoRA of stage C in any layout.
        filters: `module_filters` of the original trainer, which decide what the numbers stand for.
        config: sizes of stage C; None: those of the released model that the file fits.

    Raises:
        UserError: the file has modules that the filters leave out, of another kind than LoRA, or of a text encoder.
    """
    where = str(file.path)
    by_path = {path: file.modules[name] for name, (_, path) in file.places.items()}
    _check(file, where)
    entries = cascade_lora.walk(config or _fitting(by_path, where), filters)
    covered = {path for entry in entries for path in entry.layers}
    left = [path for path in by_path if path not in covered]
    if left:
        what = f"{len(left)} of its modules are none of module_filters {list(filters)}, such as {left[0]}"
        raise UserError(what, "Give --module_filters that cover them, such as --module_filters .", where=where)
    pairs = {place: _pair(entry, by_path, where) for place, entry in enumerate(entries)}
    rank = max((pair[1].shape[0] for pair in pairs.values() if pair is not None), default=1)
    tensors: dict[str, Tensor] = {}
    for place, entry in enumerate(entries):
        up, down = _of_rank(pairs[place], rank, entry)
        tensors[f"weights.{place}.lora_up"], tensors[f"weights.{place}.lora_down"] = up, down
    tensors.update({key: file.bundled[key] for key in (WORD_CHANGES, WORD_IDS) if key in file.bundled})
    return tensors, {**file.metadata, **cascade_lora.stated(entries)}


def _check(file: LoraFile, where: str) -> None:
    """Refuse what has no place in the original layout."""
    for name, weights in file.modules.items():
        if not name.startswith("lora_unet_"):
            hint = "Train with --network_train_unet_only for that layout"
            raise UserError(f"has modules of the text encoder ({name}), which have no place there", hint, where=where)
        extra = sorted(set(weights.tensors) - {DOWN, UP, "alpha"})
        if weights.kind != "lora" or extra:
            what = f"{name} is no plain LoRA ({', '.join(extra) or weights.kind}), which alone has a place there"
            raise UserError(what, where=where)


def _fitting(by_path: Mapping[str, AdapterWeights], where: str) -> CascadeConfig:
    """Return the released stage C whose layers have the sizes of the modules."""
    for (stage, _), config in CONFIGS.items():
        shapes = {path: _layer_shape(entry) for entry in cascade_lora.walk(config, ("",)) for path in entry.layers}
        if stage == "c" and all(shapes.get(path) == _own_shape(weights) for path, weights in by_path.items()):
            return config
    hint = "Give the stage C that it was trained on with --stage_c_checkpoint_path"
    raise UserError("its modules are not those of stage C 3.6B or 1B", hint, where=where)


def _layer_shape(entry: Entry) -> tuple[int, int]:
    """Return (out, in) of each layer that an entry stands for."""
    return entry.shape[0] // len(entry.layers), entry.shape[1]


def _own_shape(weights: AdapterWeights) -> tuple[int, int]:
    return weights.tensors[UP].shape[0], weights.tensors[DOWN].shape[1]


def _pair(entry: Entry, by_path: Mapping[str, AdapterWeights], where: str) -> Pair | None:
    """Return up [out,r] and down [r,in] with `up @ down / r` for what an entry stands for; None: nothing."""
    members = [by_path.get(path) for path in entry.layers]
    present = [member for member in members if member is not None]
    if not present:
        return None
    for member in present:
        if _own_shape(member) != _layer_shape(entry):
            own, wanted = list(_own_shape(member)), list(_layer_shape(entry))
            what = f"{member.name} is for a layer of {own}, where stage C has {wanted}"
            raise UserError(what, "Give the stage C that it was trained on", where=where)
    first = present[0]
    shared = len(present) == len(members) and all(
        member.alpha == first.alpha and torch.equal(member.tensors[DOWN], first.tensors[DOWN]) for member in present
    )
    if shared:
        ups = [_times(member.tensors[UP].flatten(1), member.alpha) for member in present]
        return torch.cat(ups), first.tensors[DOWN].flatten(1)
    rank, (outs, _) = sum(member.rank for member in present), _layer_shape(entry)
    up = torch.zeros(entry.shape[0], rank)
    column = 0
    for place, one in enumerate(members):
        if one is None:
            continue
        values = _times(one.tensors[UP].flatten(1).float(), one.alpha / one.rank * rank)
        up[place * outs : (place + 1) * outs, column : column + one.rank] = values
        column += one.rank
    return up, torch.cat([member.tensors[DOWN].flatten(1).float() for member in present])


def _of_rank(pair: Pair | None, rank: int, entry: Entry) -> Pair:
    """Fill a pair up with zeros to the rank of the file, which its strength depends on."""
    if pair is None:
        return torch.zeros(entry.shape[0], rank), torch.zeros(rank, entry.shape[1])
    up, down = pair
    missing = rank - down.shape[0]
    if missing:
        up = _times(up, rank / down.shape[0])
        up = torch.cat([up, up.new_zeros(len(up), missing)], dim=1)
        down = torch.cat([down, down.new_zeros(missing, down.shape[1])])
    return up.contiguous(), down.contiguous()


def _times(values: Tensor, factor: float) -> Tensor:
    """Return a product; bit by bit the same values for the factor 1."""
    return values if factor == 1 else values.float() * factor


def known_config(path: str | Path | None) -> CascadeConfig | None:
    """Return the sizes of a stage C from the head of its file; None without one."""
    if not path:
        return None
    from library.checkpoints.load_cascade import load_stage

    return load_stage(path, "c").config
