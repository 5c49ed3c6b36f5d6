"""Sizes of the Stable Cascade networks: those of the released models, and those that tensor shapes tell.

Shapes tell everything but the number of attention heads, for which heads of 64 features are taken, and whether a joint
between levels also resizes; the metadata of a file may say otherwise (`HEADS_KEY`, `SWITCH_KEY`). Light.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from library.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
Stage = Literal["c", "b"]

HEAD_WIDTH = 64
HEADS_KEY = "stable_cascade.nhead"
SWITCH_KEY = "stable_cascade.switch_level"
TIME_CONDITIONS = ("sca", "crp")
_MAX_LEVELS, _MAX_BLOCKS = 8, 512
_DROPOUT = 0.1


@dataclass(frozen=True, slots=True)
class CascadeConfig:
    """The sizes of stage B or C. Tuples of the up path begin at its first, innermost level.

    Attributes:
        stage: ``c`` (text to the small latents) or ``b`` (those to the latents of stage A).
        c_hidden: features of each level, outermost first.
        heads: attention heads of each level; 0 where a level has no attention.
        blocks_down: groups of blocks in each level of the down path.
        blocks_up: the same in the order of the up path.
        repeats_down: how often each level runs.
        repeats_up: the same in the order of the up path.
        levels: kinds of blocks in a group of each level: ``C`` residual, ``T`` time, ``A`` attention.
        dropout: of each level in training mode, on attention probabilities and inside residual blocks.
        c_cond: features of a token of the condition.
        c_pooled: features of the pooled text.
        c_text: features of a text token, None for stage B.
        c_image: features of an image embedding, None for stage B.
        c_effnet: channels of the EfficientNet latents that stage B takes, None for stage C.
        c_pixels: channels of the pixel condition of stage B, None for stage C.
        channels: of the latents that are denoised.
        patch: side of the square of latent pixels that is one pixel inside.
        time_conditions: names of further embeddings beside that of the time.
        switch: for each joint of two levels whether a 1x1 convolution also resizes by two; None: strided convolutions.
        c_time: features of one time embedding.
        tokens: tokens that the pooled text and the image each become.
        kernel: side of the depthwise convolutions.
    """

    stage: Stage
    c_hidden: tuple[int, ...]
    heads: tuple[int, ...]
    blocks_down: tuple[int, ...]
    blocks_up: tuple[int, ...]
    repeats_down: tuple[int, ...]
    repeats_up: tuple[int, ...]
    levels: tuple[str, ...]
    dropout: tuple[float, ...]
    c_cond: int
    c_pooled: int = 1280
    c_text: int | None = None
    c_image: int | None = None
    c_effnet: int | None = None
    c_pixels: int | None = None
    channels: int = 16
    patch: int = 1
    time_conditions: tuple[str, ...] = TIME_CONDITIONS
    switch: tuple[bool, ...] | None = None
    c_time: int = 64
    tokens: int = 4
    kernel: int = 3

    @property
    def residual_blocks(self) -> int:
        """Number of residual blocks, which ControlNets count through: down path first."""
        return sum(self.blocks_down) + sum(self.blocks_up)


def _stage_c(width: int, blocks: tuple[int, int]) -> CascadeConfig:
    return CascadeConfig(
        stage="c",
        c_hidden=(width, width),
        heads=(width // HEAD_WIDTH,) * 2,
        blocks_down=blocks,
        blocks_up=blocks[::-1],
        repeats_down=(1, 1),
        repeats_up=(1, 1),
        levels=("CTA", "CTA"),
        dropout=(_DROPOUT, _DROPOUT),
        c_cond=width,
        c_text=1280,
        c_image=768,
        switch=(False,),
    )


def _stage_b(hidden: tuple[int, ...], blocks: tuple[int, ...], repeats_up: tuple[int, ...]) -> CascadeConfig:
    return CascadeConfig(
        stage="b",
        c_hidden=hidden,
        heads=(0, 0, hidden[2] // HEAD_WIDTH, hidden[3] // HEAD_WIDTH),
        blocks_down=blocks,
        blocks_up=blocks[::-1],
        repeats_down=(1, 1, 1, 1),
        repeats_up=repeats_up,
        levels=("CT", "CT", "CTA", "CTA"),
        dropout=(0.0, 0.0, _DROPOUT, _DROPOUT),
        c_cond=1280,
        c_effnet=16,
        c_pixels=3,
        channels=4,
        patch=2,
        time_conditions=("sca",),
    )


CONFIGS: Mapping[tuple[Stage, str], CascadeConfig] = {
    ("c", "3.6B"): _stage_c(2048, (8, 24)),
    ("c", "1B"): _stage_c(1536, (4, 12)),
    ("b", "3B"): _stage_b((320, 640, 1280, 1280), (2, 6, 28, 6), (3, 3, 2, 2)),
    ("b", "700M"): _stage_b((320, 576, 1152, 1152), (2, 4, 14, 4), (2, 2, 2, 2)),
}
"""The released models by stage and `model_version`."""


def version_of(config: CascadeConfig) -> str:
    """Return the `model_version` whose structure (levels, blocks, repeats) a network has; `""` for none."""

    def structure(item: CascadeConfig) -> tuple[Any, ...]:
        return (item.stage, item.levels, item.blocks_down, item.blocks_up, item.repeats_down, item.repeats_up)

    return next((version for (_, version), known in CONFIGS.items() if structure(known) == structure(config)), "")


# From shapes -------------------------------------------------------------------------------------------------------


class _Reader:
    """Shapes of one network, with one message for whatever is missing."""

    def __init__(self, shapes: Shapes, where: str) -> None:
        self.shapes = shapes
        self.where = where

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        found = self.shapes.get(name)
        if found is None or len(found) != dimensions:
            what = "is missing" if found is None else f"has the shape {list(found)}"
            raise UserError(
                f"not a whole Stable Cascade network: {name!r} {what}", "Get the file again", where=self.where
            )
        return found

    def numbers(self, pattern: str) -> list[int]:
        expression = re.compile(pattern)
        return sorted({int(match[1]) for name in self.shapes if (match := expression.match(name))})

    def count(self, pattern: str, most: int) -> int:
        found = self.numbers(pattern)
        if found != list(range(len(found))) or len(found) > most:
            what = f"not a whole Stable Cascade network: its parts {pattern!r} are not numbered 0 to {len(found) - 1}"
            raise UserError(what, "Get the file again", where=self.where)
        return len(found)


def config_from_shapes(shapes: Shapes, metadata: Mapping[str, str] | None = None, where: str = "") -> CascadeConfig:
    """Derive the sizes of stage B or C from the shapes of its tensors.

    Args:
        shapes: by the names in memory.
        metadata: of the file; `HEADS_KEY` and `SWITCH_KEY` (JSON lists) are used.
        where: file for messages.

    Raises:
        UserError: a tensor that the structure depends on is missing, or the metadata do not fit.
    """
    reader = _Reader(shapes, where)
    count = reader.count(r"down_blocks\.(\d+)\.", _MAX_LEVELS)
    down = [_level(reader, f"down_blocks.{level}") for level in range(count)]
    up = [_level(reader, f"up_blocks.{level}") for level in range(count)]
    if not down or [kinds for kinds, _, _ in down] != [kinds for kinds, _, _ in reversed(up)]:
        raise UserError("not a whole Stable Cascade network: its down and up path differ", where=where)
    levels = tuple(kinds for kinds, _, _ in down)
    hidden = tuple(width for _, _, width in down)
    is_c = "clip_txt_mapper.weight" in shapes
    attended = "".join(levels).find("A") >= 0
    switch = any(name.startswith("down_downscalers.1.1.blocks.") for name in shapes)
    base = CascadeConfig(
        stage="c" if is_c else "b",
        c_hidden=hidden,
        heads=tuple(max(1, c // HEAD_WIDTH) if "A" in kinds else 0 for c, kinds in zip(hidden, levels, strict=True)),
        blocks_down=tuple(groups for _, groups, _ in down),
        blocks_up=tuple(groups for _, groups, _ in up),
        repeats_down=tuple(reader.count(rf"down_repeat_mappers\.{i}\.(\d+)\.", 16) + 1 for i in range(count)),
        repeats_up=tuple(reader.count(rf"up_repeat_mappers\.{i}\.(\d+)\.", 16) + 1 for i in range(count)),
        levels=levels,
        dropout=tuple(_DROPOUT if "A" in kinds else 0.0 for kinds in levels),
        c_cond=_condition_width(reader, levels) if attended else 1280,
        switch=(False,) * (count - 1) if switch else None,
        kernel=reader.shape("down_blocks.0.0.depthwise.weight", 4)[3],
    )
    return _from_metadata(_with_inputs(base, reader), metadata or {}, where)


def _level(reader: _Reader, start: str) -> tuple[str, int, int]:
    """Return the kinds of one group, the number of groups and the features of a level."""
    blocks = reader.count(rf"{re.escape(start)}\.(\d+)\.", _MAX_BLOCKS)
    kinds = "".join(_kind(reader, f"{start}.{index}") for index in range(blocks))
    group = kinds[:1] + kinds[1:].split("C")[0]
    if group not in ("C", "CT", "CTA", "CA") or kinds != group * (len(kinds) // len(group)):
        raise UserError(f"{start} has blocks in an order that no Stable Cascade network has ({kinds[:24]})",
                        where=reader.where)  # fmt: skip
    return group, len(kinds) // len(group), reader.shape(f"{start}.0.depthwise.weight", 4)[0]


def _kind(reader: _Reader, block: str) -> str:
    kinds = {"C": "depthwise.weight", "T": "mapper.weight", "A": "kv_mapper.1.weight"}
    return next((kind for kind, name in kinds.items() if f"{block}.{name}" in reader.shapes), "?")


def _condition_width(reader: _Reader, levels: tuple[str, ...]) -> int:
    level = next(index for index, kinds in enumerate(levels) if "A" in kinds)
    return reader.shape(f"down_blocks.{level}.{levels[level].index('A')}.kv_mapper.1.weight", 2)[1]


def _with_inputs(base: CascadeConfig, reader: _Reader) -> CascadeConfig:
    is_c = base.stage == "c"
    patch = 1 if is_c else 2
    names = {name.split(".")[3][7:] for name in reader.shapes if re.match(r"down_blocks\.0\.1\.mapper_\w+\.w", name)}
    ordered = tuple(name for name in TIME_CONDITIONS if name in names) + tuple(sorted(names - set(TIME_CONDITIONS)))
    rows, pooled = reader.shape("clip_txt_pooled_mapper.weight" if is_c else "clip_mapper.weight", 2)
    sizes: dict[str, Any] = {
        "c_pooled": pooled,
        "tokens": rows // base.c_cond,
        "channels": reader.shape("embedding.1.weight", 4)[1] // patch**2,
        "patch": patch,
        "time_conditions": ordered,
    }
    if "T" in base.levels[0]:
        sizes["c_time"] = reader.shape("down_blocks.0.1.mapper.weight", 2)[1]
    if is_c:
        sizes["c_text"] = reader.shape("clip_txt_mapper.weight", 2)[1]
        sizes["c_image"] = reader.shape("clip_img_mapper.weight", 2)[1]
    else:
        sizes["c_effnet"] = reader.shape("effnet_mapper.0.weight", 4)[1]
        sizes["c_pixels"] = reader.shape("pixels_mapper.0.weight", 4)[1]
    return replace(base, **sizes)


def _from_metadata(config: CascadeConfig, metadata: Mapping[str, str], where: str) -> CascadeConfig:
    heads = _numbers(metadata, HEADS_KEY, len(config.heads), where)
    switch = _numbers(metadata, SWITCH_KEY, len(config.heads) - 1, where)
    if heads is not None:
        return with_heads(config if switch is None else replace(config, switch=tuple(map(bool, switch))), heads, where)
    return config if switch is None or config.switch is None else replace(config, switch=tuple(map(bool, switch)))


def _numbers(metadata: Mapping[str, str], key: str, count: int, where: str) -> tuple[int, ...] | None:
    if key not in metadata:
        return None
    try:
        values = json.loads(metadata[key])
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, list) or len(values) != count or not all(isinstance(value, int) for value in values):
        raise UserError(f"its metadata entry {key} is not a list of {count} numbers", where=where)
    return tuple(values)


def with_heads(config: CascadeConfig, heads: Iterable[int | None], where: str = "") -> CascadeConfig:
    """Return `config` with other numbers of heads; those of levels without attention do not matter.

    Raises:
        UserError: a level's features cannot be shared out among its heads.
    """
    chosen = tuple(int(n or 0) if "A" in kinds else 0 for n, kinds in zip(heads, config.levels, strict=True))
    for width, n, kinds in zip(config.c_hidden, chosen, config.levels, strict=True):
        if "A" in kinds and (n < 1 or width % n):
            raise UserError(f"{width} features cannot be shared out among {n} attention heads", where=where)
    return replace(config, heads=chosen)


def config_metadata(config: CascadeConfig) -> dict[str, str]:
    """Return the metadata that a file needs beside its shapes: nothing for a released model."""
    entries = {}
    usual = tuple(max(1, c // HEAD_WIDTH) if n else 0 for c, n in zip(config.c_hidden, config.heads, strict=True))
    if config.heads != usual:
        entries[HEADS_KEY] = json.dumps(list(config.heads))
    if config.switch is not None and any(config.switch):
        entries[SWITCH_KEY] = json.dumps([int(on) for on in config.switch])
    return entries


# Diffusers' class --------------------------------------------------------------------------------------------------

_BLOCK_NAMES = {"C": "SDCascadeResBlock", "T": "SDCascadeTimestepBlock", "A": "SDCascadeAttnBlock"}


def diffusers_config(config: CascadeConfig) -> dict[str, Any]:
    """Return the arguments of diffusers' `StableCascadeUNet` for these sizes."""
    return {
        "in_channels": config.channels,
        "out_channels": config.channels,
        "timestep_ratio_embedding_dim": config.c_time,
        "patch_size": config.patch,
        "conditioning_dim": config.c_cond,
        "block_out_channels": list(config.c_hidden),
        "num_attention_heads": [heads or -1 for heads in config.heads],
        "down_num_layers_per_block": list(config.blocks_down),
        "up_num_layers_per_block": list(config.blocks_up),
        "down_blocks_repeat_mappers": list(config.repeats_down),
        "up_blocks_repeat_mappers": list(config.repeats_up),
        "block_types_per_layer": [[_BLOCK_NAMES[kind] for kind in kinds] for kinds in config.levels],
        "clip_text_in_channels": config.c_text,
        "clip_text_pooled_in_channels": config.c_pooled,
        "clip_image_in_channels": config.c_image,
        "clip_seq": config.tokens,
        "effnet_in_channels": config.c_effnet,
        "pixel_mapper_in_channels": config.c_pixels,
        "kernel_size": config.kernel,
        "dropout": list(config.dropout),
        "self_attn": True,
        "timestep_conditioning_type": list(config.time_conditions),
        "switch_level": None if config.switch is None else list(config.switch),
    }


def from_diffusers_config(config: CascadeConfig, given: Mapping[str, Any], where: str) -> CascadeConfig:
    """Take what shapes do not tell from the `config.json` of a Diffusers folder, and compare the rest.

    Raises:
        UserError: the file contradicts the weights.
    """
    heads, switch = given.get("num_attention_heads"), given.get("switch_level")
    if isinstance(heads, list) and len(heads) == len(config.heads):
        config = with_heads(config, heads, where)
    if isinstance(switch, list) and len(switch) == len(config.heads) - 1 and config.switch is not None:
        config = replace(config, switch=tuple(map(bool, switch)))
    derived = diffusers_config(config)
    fixed = ("block_out_channels", "down_num_layers_per_block", "up_num_layers_per_block", "conditioning_dim")
    wrong = [key for key in fixed if key in given and given[key] != derived[key]]
    if wrong:
        what = f"{wrong[0]} is {given[wrong[0]]}, but the weights have {derived[wrong[0]]}"
        raise UserError(what, "The model folder is damaged or mixed from two models", where=where)
    return config
