"""LoRA of Stable Cascade's stage C: names of its layers, and the files of the original trainer. Light.

Files of kohya's scripts and ComfyUI name layers as in memory, with queries, keys and values apart. The original trainer
numbers its matrices in the order in which its program walks through the model: `weights.<i>.lora_up` [out,r] and
`weights.<i>.lora_down` [r,in], of strength 1/r, where one pair serves queries, keys and values together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from library.checkpoints.cascade_configs import CONFIGS, CascadeConfig
from library.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]

CASCADE = "stable_cascade"
"""The model family, as LoRA files and options call it."""

WORDS = (
    "clip_txt_mapper", "clip_txt_pooled_mapper", "clip_img_mapper", "mapper_sca", "mapper_crp", "kv_mapper",
    "down_downscalers", "up_upscalers", "down_repeat_mappers", "up_repeat_mappers", "in_proj",
)  # fmt: skip
"""Parts of module paths that hold underscores."""

ATTENTION = (".attn",)
"""The usual `module_filters` of the original trainer: attention alone."""

WORD_CHANGES, WORD_IDS = "embeddings.embeddings", "embeddings.indices"
"""What trained tokens add to rows of the text encoder's table [n,d], and the numbers of these rows [n]."""

MODULES_KEY = "stable_cascade.lora_modules"
"""Metadata: the modules that the numbers of an original file stand for, as JSON. Files of the original lack it."""

_QKV = ("to_q", "to_k", "to_v")
_LAYER = (
    r"clip_(txt|txt_pooled|img)_mapper|embedding\.1|clf\.1|"
    r"(down|up)_blocks\.\d+\.\d+\.(channelwise\.[04]|mapper(_sca|_crp)?|kv_mapper\.1|attention\.attn\.(to_[qkv]|out_proj))|"
    r"(down_downscalers|up_upscalers)\.\d+\.1(\.blocks\.[01])?|(down|up)_repeat_mappers\.\d+\.\d+"
)
_KNOWN = re.compile(_LAYER)
_KNOWN_NAME = re.compile(r"lora_unet_(" + _LAYER.replace(r"\.", "_") + ")")
_DIFFUSERS = re.compile(r"\.attention\.(to_[qkv]|to_out\.0)$")
_NUMBERED = re.compile(r"\.attention\.attn\.in_proj\.([012])$")
_OFFICIAL = re.compile(r"weights\.(\d+)\.lora_(up|down)")


def is_cascade_path(path: str) -> bool:
    """Whether a module path of memory is one of a layer of stage C (or B) that a LoRA can be for."""
    return _KNOWN.fullmatch(path) is not None


def is_cascade_name(name: str) -> bool:
    """Whether the name of a module in files is one of a layer of stage C (or B)."""
    return _KNOWN_NAME.fullmatch(name) is not None


def memory_path(path: str) -> str:
    """Return a module path as it is in memory, given diffusers' or OneTrainer's spelling; others stay as they are."""
    path = _NUMBERED.sub(lambda found: f".attention.attn.{_QKV[int(found[1])]}", path)
    return _DIFFUSERS.sub(lambda found: f".attention.attn.{found[1].replace('to_out.0', 'out_proj')}", path)


def word_changes(bundled: Mapping[str, Tensor], where: str) -> tuple[Tensor, Tensor] | None:
    """Return what a file adds to rows of the text encoder's table; None where it tells nothing of them.

    Returns:
        Numbers of the rows [n] int64, each once, and what is added to them [n,d] float32.

    Raises:
        UserError: the two do not belong together.
    """
    if not {WORD_IDS, WORD_CHANGES} <= set(bundled):
        return None
    ids, changes = bundled[WORD_IDS].long(), bundled[WORD_CHANGES].float()
    if ids.dim() != 1 or changes.dim() != 2 or len(ids) != len(changes) or len(ids.unique()) != len(ids):
        raise UserError("what it says about words is damaged", "Fetch or save it again.", where=where)
    return ids, changes


def check_word_width(rows: Tensor, width: int, where: str) -> None:
    """Refuse rows [n,d] of words that are none of a text encoder of this width.

    Raises:
        UserError: they have another one.
    """
    own = rows.shape[1] if rows.dim() == 2 else 0
    if own != width:
        what = f"its words have {own} values, but those of this model have {width}"
        raise UserError(what, "It was trained for another kind of model.", where=where)


# Files of the original trainer -------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """What one number of an original file stands for: a module, its parameter, and the shape of that."""

    module: str
    parameter: str
    shape: tuple[int, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of memory of the layers that share it: one, or queries, keys and values."""
        return tuple(f"{self.module}.{part}" for part in _QKV) if self.parameter == "in_proj_weight" else (self.module,)

    @property
    def is_plain(self) -> bool:
        """Whether a LoRA of kohya's kind can be the same: not for convolutions over several pixels."""
        return len(self.shape) == 2 or self.shape[2:] == (1, 1)


def is_official(names: Iterable[str]) -> bool:
    """Whether a file has the layout of the original trainer."""
    names = list(names)
    return any(map(_OFFICIAL.fullmatch, names)) and all(
        _OFFICIAL.fullmatch(name) or name in (WORD_CHANGES, WORD_IDS) for name in names
    )


def walk(config: CascadeConfig, filters: Sequence[str]) -> list[Entry]:
    """Return what the original trainer adapts of a stage C, in its order.

    Args:
        config: sizes of stage C.
        filters: `module_filters`: a module takes part if its name contains one of them.
    """
    found = (Entry(*row) for row in _weights(config))
    return [entry for entry in found if any(part in entry.module for part in filters)]


def _weights(config: CascadeConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield every weight of a stage C as the original's `named_modules` meets it, with children before their parent."""
    token = config.c_cond * config.tokens
    yield "clip_txt_mapper", "weight", (config.c_cond, config.c_text or 0)
    yield "clip_txt_pooled_mapper", "weight", (token, config.c_pooled)
    yield "clip_img_mapper", "weight", (token, config.c_image or 0)
    inside, outer, last = config.channels * config.patch**2, config.c_hidden[0], len(config.c_hidden) - 1
    yield "embedding.1", "weight", (outer, inside, 1, 1)
    for level, groups in enumerate(config.blocks_down):
        yield from _level(config, f"down_blocks.{level}", level, groups, skip=False)
    for level in range(1, last + 1):
        yield (
            f"down_downscalers.{level}.1.blocks.0",
            "weight",
            (config.c_hidden[level], config.c_hidden[level - 1], 1, 1),
        )
    for place, groups in enumerate(config.blocks_up):
        yield from _level(config, f"up_blocks.{place}", last - place, groups, skip=place > 0)
    for place in range(last):
        level = last - place
        yield f"up_upscalers.{place}.1.blocks.1", "weight", (config.c_hidden[level - 1], config.c_hidden[level], 1, 1)
    yield "clf.1", "weight", (inside, outer, 1, 1)


def _level(
    config: CascadeConfig, start: str, level: int, groups: int, *, skip: bool
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    width = config.c_hidden[level]
    for index, kind in enumerate(config.levels[level] * groups):
        block = f"{start}.{index}"
        if kind == "C":
            more = width if skip and index == 0 else 0
            yield f"{block}.depthwise", "weight", (width, 1, config.kernel, config.kernel)
            yield f"{block}.channelwise.0", "weight", (4 * width, width + more)
            yield f"{block}.channelwise.4", "weight", (width, 4 * width)
        elif kind == "T":
            for name in ("mapper", *(f"mapper_{name}" for name in config.time_conditions)):
                yield f"{block}.{name}", "weight", (2 * width, config.c_time)
        else:
            yield f"{block}.attention.attn.out_proj", "weight", (width, width)
            yield f"{block}.attention.attn", "in_proj_weight", (3 * width, width)
            yield f"{block}.kv_mapper.1", "weight", (width, config.c_cond)


def entries_of(shapes: Shapes, metadata: Mapping[str, str], where: str) -> list[Entry]:
    """Tell what the numbers of an original file stand for: by its metadata, else by the released models.

    Raises:
        UserError: neither tells; the message says what does.
    """
    if MODULES_KEY in metadata:
        entries = _stated(metadata[MODULES_KEY], where)
        if fits(entries, shapes):
            return entries
        raise UserError(f"its metadata entry {MODULES_KEY} does not fit its tensors", where=where)
    for (stage, _), config in CONFIGS.items():
        entries = walk(config, ATTENTION) if stage == "c" else []
        if entries and fits(entries, shapes):
            return entries
    hint = (
        "Convert it with networks/convert_stable_cascade_lora.py, giving the --module_filters that it was trained with "
        "and, for a stage C of another size than 3.6B and 1B, --stage_c_checkpoint_path"
    )
    raise UserError("its numbered matrices are not those of .attn in stage C 3.6B or 1B", hint, where=where)


def _stated(text: str, where: str) -> list[Entry]:
    try:
        return [
            Entry(str(module), str(parameter), tuple(map(int, shape))) for module, parameter, shape in json.loads(text)
        ]
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"its metadata entry {MODULES_KEY} is damaged", where=where) from error


def stated(entries: Iterable[Entry]) -> dict[str, str]:
    """Return the metadata that tell what the numbers of an original file stand for."""
    return {MODULES_KEY: json.dumps([[entry.module, entry.parameter, list(entry.shape)] for entry in entries])}


def fits(entries: Sequence[Entry], shapes: Shapes) -> bool:
    """Whether the matrices of an original file are those of `entries`, all of one rank."""
    numbered = {key: shape for key, shape in shapes.items() if _OFFICIAL.fullmatch(key)}
    if len(numbered) != 2 * len(entries):
        return False
    ranks = {shape[0] for key, shape in numbered.items() if key.endswith("lora_down") and shape}
    rank = next(iter(ranks), 0)
    wanted = {f"weights.{place}.lora_up": (entry.shape[0], rank) for place, entry in enumerate(entries)}
    wanted |= {f"weights.{place}.lora_down": (rank, entry.shape[1]) for place, entry in enumerate(entries)}
    return len(ranks) == 1 and wanted == numbered


@dataclass(frozen=True, slots=True)
class OfficialView:
    """An original file as one of kohya's names: nothing is copied, for queries, keys and values are rows of one matrix.

    Attributes:
        sources: key of kohya's layout -> (key in the file or empty for an alpha, rows or None for all, shape).
    """

    sources: Mapping[str, tuple[str, tuple[int, int] | None, tuple[int, ...]]]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by the keys of kohya's layout."""
        return {key: shape for key, (_, _, shape) in self.sources.items()}

    def tensors(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors by the keys of kohya's layout, given those of the file."""
        import torch

        found = {}
        for key, (source, rows, shape) in self.sources.items():
            whole = held[source] if source else torch.tensor(1.0)
            found[key] = (whole if rows is None else whole[rows[0] : rows[1]]).reshape(shape)
        return found


def official_view(shapes: Shapes, entries: Sequence[Entry], where: str) -> OfficialView:
    """Name the matrices of an original file as kohya's files do.

    Raises:
        UserError: it has a matrix for a convolution over several pixels, which no LoRA of other programs can be.
    """
    sources: dict[str, tuple[str, tuple[int, int] | None, tuple[int, ...]]] = {}
    for place, entry in enumerate(entries):
        if not entry.is_plain:
            what = f"has matrices for {entry.module}, a convolution over several pixels, which other programs lack"
            raise UserError(what, where=where)
        up, down = f"weights.{place}.lora_up", f"weights.{place}.lora_down"
        outs, rank = shapes[up]
        share, ones = outs // len(entry.layers), entry.shape[2:]
        for number, path in enumerate(entry.layers):
            name = f"lora_unet_{path.replace('.', '_')}"
            rows = None if len(entry.layers) == 1 else (number * share, (number + 1) * share)
            sources[f"{name}.lora_down.weight"] = (down, None, (rank, entry.shape[1], *ones))
            sources[f"{name}.lora_up.weight"] = (up, rows, (share, rank, *ones))
            sources[f"{name}.alpha"] = ("", None, ())
    sources.update({key: (key, None, shapes[key]) for key in (WORD_CHANGES, WORD_IDS) if key in shapes})
    return OfficialView(sources)
