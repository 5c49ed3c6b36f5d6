"""Embedding files: the vectors of words that textual inversion found, in every layout that programs write.

| layout | content |
|---|---|
| `kohya` | `emb_params` [n,d] |
| `sdxl` | `clip_l` [n,768] and `clip_g` [n,1280] |
| `a1111` | a pickle with `string_to_param`: one table [n,d], and a name |
| `diffusers` | one tensor [d] or [n,d] that is called like the word |
| `onetrainer` | as `sdxl`, one of both or both, with `clip_l_out` or `clip_g_out`, which nothing else can use |
| `bundle` | `bundle_emb.<word>.clip_l` in a LoRA file, possibly of several words |
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints import detect
from library.checkpoints.ckpt_writer import write_ckpt
from library.checkpoints.headers import file_kind
from library.checkpoints.lora_layouts import BUNDLED
from library.checkpoints.pickles import load_pickle
from library.checkpoints.tensor_files import MappedTensors, all_finite, open_tensors, write_safetensors
from library.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_log = logging.getLogger(__name__)

TENSOR_NAME = "emb_params"
"""Name of the only tensor in a file for a model with one text encoder."""

ENCODERS = ("clip_l", "clip_g")
"""Names of the tensors for a model with two text encoders, in their order."""

_OUTPUTS = tuple(f"{name}_out" for name in ENCODERS)
_BY_WIDTH = {1280: "clip_g"}
_BY_LAYER = {"MID", "IN01", "OUT11"}
"""Some of the names in files that have vectors for each layer of the U-Net."""
_LONGEST = 75 * 32
"""More vectors than any caption could hold: such a tensor is no embedding."""


@dataclass(frozen=True)
class Embedding:
    """The vectors of one word.

    Attributes:
        name: what the file calls the word, else the stem of its name.
        rows: vectors [n,d], float32, by `clip_l` or `clip_g`; a file that does not say what its only tensor is for has
            `clip_g` if the vectors have 1280 values, else `clip_l`.
        layout: one of those above.
        metadata: strings of the header.
        path: the file.
    """

    name: str
    rows: dict[str, Tensor]
    layout: str
    metadata: dict[str, str] = field(default_factory=dict)
    path: Path = Path()

    @property
    def count(self) -> int:
        """Number of vectors, of each text encoder."""
        return len(next(iter(self.rows.values())))

    def rows_for(self, widths: Sequence[int], where: str = "") -> tuple[Tensor, ...]:
        """Return the vectors [n,d] for each text encoder of a model, given the width of each.

        Raises:
            UserError: the embedding is for another kind of model; the message names both widths.
        """
        found = list(self.rows.values()) if len(widths) == 1 else [self.rows.get(name) for name in ENCODERS]
        own = [int(tensor.shape[-1]) for tensor in found if tensor is not None]
        if own != list(widths):
            has = " and ".join(str(tensor.shape[-1]) for tensor in self.rows.values())
            what = f"holds vectors of {has} values, but those of this model have {' and '.join(map(str, widths))}"
            raise UserError(what, "It was trained for another kind of model.", where=where or str(self.path))
        return tuple(tensor for tensor in found if tensor is not None)


def read_embedding(path: str | Path) -> Embedding:
    """Read the only word of a file of any layout.

    Raises:
        UserError: the file is damaged, a pickle that is not allowed, no embedding, holds several words, or its vectors
            are not finite.
    """
    found = read_embeddings(path)
    if len(found) != 1:
        words = ", ".join(embedding.name for embedding in found)
        raise UserError(f"holds several words ({words})", "Give a file with one.", where=str(path))
    return found[0]


def read_embeddings(path: str | Path) -> list[Embedding]:
    """Read all words of a file of any layout: one, but for LoRA files with words beside them.

    Raises:
        UserError: as `read_embedding`.
    """
    path = Path(path)
    if file_kind(path) == "safetensors":
        tensors = open_tensors(path)
        metadata = dict(tensors.header.metadata) if isinstance(tensors, MappedTensors) else {}
    else:
        tensors, metadata = _pickled(path), {}
    found = _bundled(path, tensors, metadata)
    return found or [_single(path, tensors, metadata)]


def _pickled(path: Path) -> Mapping[str, Any]:
    content = load_pickle(path, mmap=False)
    if isinstance(content, Mapping):
        return content
    raise UserError("is no embedding: it holds no table of tensors", where=str(path))


def _single(path: Path, content: Mapping[str, Any], metadata: dict[str, str]) -> Embedding:
    name, layout = path.stem, "kohya"
    tensors: dict[str, Any] = {}
    if "string_to_param" in content:
        name, tensors, layout = _webui(path, content)
    elif any(key in content for key in (*ENCODERS, *_OUTPUTS)):
        layout = "onetrainer" if any(key in content for key in _OUTPUTS) else "sdxl"
        if layout == "onetrainer":
            _log.warning("%s: its vectors for the outputs of text encoders are left out: nothing can use them", path)
        tensors = {key: content[key] for key in ENCODERS if key in content}
    elif len(content) == 1:
        key, tensor = next(iter(content.items()))
        if key != TENSOR_NAME:
            name, layout = str(key), "diffusers"
        tensors = {"": tensor}
    rows = {key: _checked(path, key, tensor) for key, tensor in tensors.items()}
    if not rows or any(tensor is None for tensor in rows.values()):
        raise _not_an_embedding(path, content, metadata)
    named = {
        key or _BY_WIDTH.get(tensor.shape[1], "clip_l"): tensor for key, tensor in rows.items() if tensor is not None
    }
    return _finished(Embedding(name, named, layout, metadata, path))


def _webui(path: Path, content: Mapping[str, Any]) -> tuple[str, dict[str, Any], str]:
    """Return name and vectors of a pickle of the A1111 web interface."""
    parameters = content["string_to_param"]
    # torch before 1.12 pickled a table of parameters that is a module, which newer classes do not restore.
    table = getattr(parameters, "__dict__", {}).get("_parameters") or parameters
    if not isinstance(table, Mapping) and not hasattr(table, "items"):
        raise UserError("is a damaged embedding: it has no table of vectors", where=str(path))
    tensors = [tensor for _, tensor in table.items()]
    if len(tensors) != 1:
        raise UserError(f"holds {len(tensors)} words, where an embedding has one", where=str(path))
    name = content.get("name")
    return name if isinstance(name, str) and name else path.stem, {"": tensors[0]}, "a1111"


def _bundled(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str]) -> list[Embedding]:
    """Return the words that came along with a LoRA."""
    words: dict[str, dict[str, Tensor]] = {}
    for key in tensors:
        if not str(key).startswith(BUNDLED):
            continue
        word, _, encoder = str(key).removeprefix(BUNDLED).rpartition(".")
        rows = _checked(path, key, tensors[key])
        if encoder in ENCODERS and word and rows is not None:
            words.setdefault(word, {})[encoder] = rows
    return [
        _finished(Embedding(word, {name: rows[name] for name in ENCODERS if name in rows}, "bundle", metadata, path))
        for word, rows in words.items()
    ]


def _checked(path: Path, key: str, tensor: Any) -> Tensor | None:
    """Return vectors [n,d] as float32 numbers in memory, or None for something else."""
    import torch

    if not torch.is_tensor(tensor) or not tensor.is_floating_point() or tensor.dim() not in (1, 2):
        return None
    rows = tensor.detach().reshape(-1, tensor.shape[-1]).float().clone()
    if not rows.numel() or len(rows) > _LONGEST:
        return None
    if all_finite({key: rows}):
        raise UserError("its vectors hold NaN or infinity", "The training that made it failed.", where=str(path))
    return rows


def _finished(embedding: Embedding) -> Embedding:
    counts = {name: len(rows) for name, rows in embedding.rows.items()}
    if len(set(counts.values())) > 1:
        listed = " and ".join(f"{count} in {name}" for name, count in counts.items())
        raise UserError(f"has not as many vectors for each text encoder: {listed}", where=str(embedding.path))
    return embedding


def _not_an_embedding(path: Path, content: Mapping[str, Any], metadata: Mapping[str, str]) -> UserError:
    if _BY_LAYER & set(content):
        what = "holds a vector for each layer of the U-Net (extended textual inversion), which nothing here can use"
        return UserError(what, where=str(path))
    inner = content.get("state_dict")
    tables = inner if isinstance(inner, Mapping) else content
    shapes = {str(key): tuple(item.shape) for key, item in tables.items() if hasattr(item, "shape")}
    family = detect.classify(path, shapes, metadata).family
    what = detect.family_label(family) if family not in ("unknown", "embedding") else f"a file of {len(shapes)} tensors"
    return UserError(f"is no embedding but {what}", "Give a file that textual inversion made.", where=str(path))


def write_embedding(
    path: Path,
    rows: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    tensor_name: str = TENSOR_NAME,
    precision: torch.dtype | None = None,
) -> Path:
    """Write the vectors of one word; the suffix of the name decides between safetensors and pickle.

    Args:
        path: the final name: `.safetensors`, `.pt`, `.ckpt` or `.bin`.
        rows: [n,d] by `clip_l` and `clip_g`; a single one is written as `tensor_name`.
        metadata: strings for the header; pickles have none.
        tensor_name: name of a single tensor. diffusers takes any but `emb_params` for the word.
        precision: type of the numbers; None: as they are.

    Returns:
        The path.

    Raises:
        NonFiniteWeights: there is NaN or infinity in it; nothing was written.
        CannotSave: the file cannot be written.
    """
    tensors = {name: rows[name] for name in ENCODERS if name in rows}
    if len(tensors) == 1:
        tensors = {tensor_name: next(iter(tensors.values()))}
    if path.suffix == ".safetensors":
        write_safetensors(path, tensors, metadata, precision=precision, require_finite=True)
    else:
        write_ckpt(path, tensors, None, precision=precision, require_finite=True)
    return path
