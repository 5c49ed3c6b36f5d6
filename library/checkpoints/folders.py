"""The files of a Diffusers folder: which weights to read, shards, and the small files that saves carry over."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.detect import read_json
from library.checkpoints.tensor_files import open_tensors
from library.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SMALL_FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
    "tokenizer/added_tokens.json",
    "tokenizer/tokenizer.json",
)
_LARGE_TABLES = ("vocab.json", "tokenizer.json", "added_tokens.json")
_PRIVATE = ("_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file")
_MAX_SMALL = 16 * 1024**2
_WEIGHTS = re.compile(
    r"^(diffusion_pytorch_model|model|pytorch_model)(\.[\w-]+?)??\.(safetensors|bin)(\.index(\.[\w-]+)?\.json)?$"
)


def choose_weights(names: Iterable[str], variant: str | None = None) -> str | None:
    """Choose among the file names of one component: safetensors before pickles, no variant before ``fp16``, others.

    Args:
        names: the files of its folder.
        variant: only files of this variant, such as ``fp16``; None for any.
    """
    candidates = []
    for name in names:
        match = _WEIGHTS.match(name)
        if match is None or re.search(r"-\d{5}-of-\d{5}", name):
            continue
        found = (match[2] or match[5] or "").lstrip(".")
        if variant not in (None, found):
            continue
        order = (match[3] != "safetensors", found != "", found != "fp16", match[4] is not None, name)
        candidates.append((order, name))
    return min(candidates)[1] if candidates else None


def is_weights_file(name: str) -> bool:
    """Whether a file of a component holds weights or lists their shards, in whatever variant."""
    return _WEIGHTS.match(name) is not None or re.search(r"-\d{5}-of-\d{5}\.(safetensors|bin)$", name) is not None


def open_folder_weights(folder: Path, variant: str | None = None) -> Mapping[str, Tensor]:
    """Open the weights of one component (`unet`, `vae`, `text_encoder`), sharded or not.

    Raises:
        UserError: there are none, or none of `variant`, or a shard is missing or lies elsewhere.
    """
    names = [item.name for item in folder.iterdir()] if folder.is_dir() else []
    chosen = choose_weights(names, variant)
    if chosen is None and variant is not None and (other := choose_weights(names)) is not None:
        raise UserError(f"no weights of the variant {variant!r} in this folder", f"It has {other}", where=str(folder))
    if chosen is None:
        hint = "Expected diffusion_pytorch_model.safetensors, model.safetensors or their .bin forms"
        raise UserError("no weights in this folder", hint, where=str(folder))
    if chosen.endswith(".json"):
        return _open_shards(folder, chosen)
    return open_tensors(folder / chosen)


def shard_names(index: Path) -> dict[str, str]:
    """Return the shard of every tensor that an index file lists.

    Raises:
        UserError: the index is damaged, or names a file that is not a plain name in its folder.
    """
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(shard, str) for shard in table.values()):
        raise UserError("no list of shards in it", "The model folder is damaged", where=str(index))
    for shard in sorted(set(table.values())):
        if not re.fullmatch(r"[\w][\w.\- ]*", shard) or ".." in shard:
            raise UserError(f"names the shard {shard!r}, which is not a plain file name", where=str(index))
    return table


def _open_shards(folder: Path, index: str) -> Mapping[str, Tensor]:
    table = shard_names(folder / index)
    opened = {}
    for shard in sorted(set(table.values())):
        if not (folder / shard).is_file():
            raise UserError(
                f"the shard {shard} is missing", "The model folder is incomplete", where=str(folder / index)
            )
        opened[shard] = open_tensors(folder / shard)
    lost = [name for name, shard in table.items() if name not in opened[shard]]
    if lost:
        raise UserError(f"{len(lost)} tensors are not in their shards, such as {lost[0]}", where=str(folder / index))
    return {name: opened[shard][name] for name, shard in table.items()}


def read_small_files(root: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Read those of the named files that exist and are small, to be written into saved folders; without their paths.

    Raises:
        UserError: one of the settings files is damaged.
    """
    found = {}
    for name in names:
        path = root / name
        if not path.is_file() or path.stat().st_size > _MAX_SMALL:
            continue
        settings = name.endswith(".json") and path.name not in _LARGE_TABLES
        found[name] = as_json(without_paths(read_json(path))) if settings else path.read_bytes()
    return found


def without_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a component without those that say where it lay on somebody's disk."""
    return {name: value for name, value in settings.items() if name not in _PRIVATE}


def as_json(value: Mapping[str, Any]) -> bytes:
    """Encode a settings file as the libraries write them."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8")
