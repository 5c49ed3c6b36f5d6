"""Sizes of the smaller Stable Cascade parts, read off tensor shapes: EfficientNet, stage A, previewer, ControlNet.

Light: names and shapes only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from library.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
ControlMode = Literal["effnet", "simple", "large"]

CONTROL_BLOCKS_KEY = "stable_cascade.controlnet_blocks"
CONTROL_MODE_KEY = "stable_cascade.controlnet_bottleneck_mode"
CONTROL_FILTER_KEY = "stable_cascade.controlnet_filter"
CONTROL_PARAMS_KEY = "stable_cascade.controlnet_filter_params"
STAGE_A_SCALE = 0.43
"""Latents of stage A are divided by it after encoding. Diffusers' class has another default, that of Würstchen v2."""
_DEFAULT_BLOCKS = (0, 4, 8, 12)
_REFERENCE_BLOCKS = 64
_MAX_LAYERS = 64


@dataclass(frozen=True, slots=True)
class MBStage:
    """A stage of EfficientNet: features after it, layers, factor by which they widen inside, kind of convolution."""

    width: int
    layers: int
    expansion: int
    fused: bool


@dataclass(frozen=True, slots=True)
class EffNetConfig:
    """The sizes of an EfficientNet; the defaults are those of V2-S and of its encoder.

    Attributes:
        c_in: channels of the picture.
        stem: features after the first convolution.
        stages: the six stages.
        width: features of the last convolution.
        channels: of the latents that the encoder maps to.
        strides: of the first layer of each stage.
    """

    c_in: int = 3
    stem: int = 24
    stages: tuple[MBStage, ...] = (
        MBStage(24, 2, 1, True),
        MBStage(48, 4, 4, True),
        MBStage(64, 4, 4, True),
        MBStage(128, 6, 4, False),
        MBStage(160, 9, 6, False),
        MBStage(256, 15, 6, False),
    )
    width: int = 1280
    channels: int = 16
    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2)


@dataclass(frozen=True, slots=True)
class StageAConfig:
    """The sizes of stage A: inner features, blocks of the decoder, latent channels, codebook entries, input patch."""

    features: int = 384
    bottleneck: int = 12
    channels: int = 4
    codebook: int = 8192
    patch: int = 2


@dataclass(frozen=True, slots=True)
class PreviewerConfig:
    """The sizes of the previewer: widest features, latent channels."""

    features: int = 512
    channels: int = 16


@dataclass(frozen=True, slots=True)
class ControlNetConfig:
    """The sizes of a ControlNet for stage C.

    Attributes:
        mode: kind of the backbone.
        c_in: channels of the condition.
        c_out: features of the stage that it is for.
        blocks: numbers of the residual blocks that get a residual.
        features: what the backbone ends with.
        effnet: its sizes in the mode ``effnet``.
        wide: first and second width of the mode ``large``.
        depth: residual blocks of the mode ``large``.
    """

    mode: ControlMode
    c_in: int
    c_out: int
    blocks: tuple[int, ...]
    features: int = 1280
    effnet: EffNetConfig = EffNetConfig()
    wide: tuple[int, int] = (16384, 1024)
    depth: int = 8


def shape_of(shapes: Shapes, name: str, dimensions: int, part: str, where: str) -> tuple[int, ...]:
    """Return the shape of a tensor that a part must have.

    Raises:
        UserError: it is missing, or has another number of dimensions.
    """
    found = shapes.get(name)
    if found is None or len(found) != dimensions:
        what = "is missing" if found is None else f"has the shape {list(found)}"
        raise UserError(f"not a whole {part}: {name!r} {what}", "Get the file again", where=where)
    return found


def count_of(shapes: Shapes, pattern: str, part: str, where: str) -> int:
    """Return how many numbers, from 0 on, `pattern` captures among the names.

    Raises:
        UserError: there is a gap, or there are absurdly many.
    """
    expression = re.compile(pattern)
    found = sorted({int(match[1]) for name in shapes if (match := expression.match(name))})
    if found != list(range(len(found))) or len(found) > _MAX_LAYERS:
        raise UserError(f"not a whole {part}: parts {pattern!r} are missing", "Get the file again", where=where)
    return len(found)


def effnet_config(shapes: Shapes, where: str = "") -> EffNetConfig:
    """Derive the sizes of the EfficientNet encoder.

    Raises:
        UserError: tensors are missing, or it is the encoder of another model.
    """
    if "mapper.1.weight" in shapes:
        what = "its last norm has weights: this is the EfficientNet of Würstchen v2, not that of Stable Cascade"
        raise UserError(what, "Use effnet_encoder.safetensors from stabilityai/stable-cascade", where=where)
    channels = shape_of(shapes, "mapper.0.weight", 4, "EfficientNet encoder", where)[0]
    return replace(features_config(shapes, where), channels=channels)


def features_config(shapes: Shapes, where: str = "") -> EffNetConfig:
    """Derive the sizes of an EfficientNet backbone from tensors named `backbone.…`.

    Raises:
        UserError: tensors are missing.
    """
    part = "EfficientNet"
    stem, c_in = shape_of(shapes, "backbone.0.0.weight", 4, part, where)[:2]
    count = count_of(shapes, r"backbone\.(\d+)\.", part, where)
    if count != len(EffNetConfig().strides) + 2:
        raise UserError(f"not a whole {part}: it has {count} parts", "Get the file again", where=where)
    stages, width = [], stem
    for number in range(1, count - 1):
        stages.append(_mb_stage(shapes, f"backbone.{number}", width, where))
        width = stages[-1].width
    last = shape_of(shapes, f"backbone.{count - 1}.0.weight", 4, part, where)[0]
    return EffNetConfig(c_in=c_in, stem=stem, stages=tuple(stages), width=last)


def _mb_stage(shapes: Shapes, start: str, c_in: int, where: str) -> MBStage:
    part = "EfficientNet"
    layers = count_of(shapes, rf"{re.escape(start)}\.(\d+)\.", part, where)
    blocks = count_of(shapes, rf"{re.escape(start)}\.0\.block\.(\d+)\.", part, where)
    wide = shape_of(shapes, f"{start}.0.block.0.0.weight", 4, part, where)[0]
    fused = blocks < 4
    last = shape_of(shapes, f"{start}.0.block.{blocks - 1}.0.weight", 4, part, where)[0]
    return MBStage(last, layers, 1 if blocks == 1 else wide // c_in, fused)


def stage_a_config(shapes: Shapes, where: str = "") -> StageAConfig:
    """Derive the sizes of stage A.

    Raises:
        UserError: tensors are missing.
    """
    part = "stage A"
    features = shape_of(shapes, "down_blocks.1.weight", 4, part, where)[0]
    pixels = shape_of(shapes, "in_block.1.weight", 4, part, where)[1]
    codebook, channels = shape_of(shapes, "vquantizer.codebook.weight", 2, part, where)
    blocks = count_of(shapes, r"up_blocks\.(\d+)\.", part, where)
    return StageAConfig(features, blocks - 3, channels, codebook, int((pixels // 3) ** 0.5))


def previewer_config(shapes: Shapes, where: str = "") -> PreviewerConfig:
    """Derive the sizes of the previewer.

    Raises:
        UserError: tensors are missing.
    """
    features, channels = shape_of(shapes, "blocks.0.weight", 4, "previewer", where)[:2]
    return PreviewerConfig(features, channels)


# ControlNets -------------------------------------------------------------------------------------------------------


def default_control_blocks(residual_blocks: int) -> tuple[int, ...]:
    """Return the usual eight block numbers: four at each end, as far apart as in the official ControlNets."""
    start = {block * residual_blocks // _REFERENCE_BLOCKS for block in _DEFAULT_BLOCKS}
    return tuple(sorted(start | {residual_blocks - 1 - block for block in start}))


def check_control_blocks(blocks: Sequence[int], residual_blocks: int, where: str = "--controlnet_blocks") -> None:
    """Refuse block numbers that the stage does not have, and repeated ones.

    Raises:
        UserError: naming the wrong numbers.
    """
    wrong = [block for block in blocks if not 0 <= block < residual_blocks]
    usual = f"The usual ones are {' '.join(map(str, default_control_blocks(residual_blocks)))}"
    if wrong:
        what = f"this stage C has residual blocks 0 to {residual_blocks - 1}, not {', '.join(map(str, wrong))}"
        raise UserError(what, usual, where=where)
    if len(set(blocks)) != len(blocks) or not blocks:
        raise UserError("no block number" if not blocks else "a block number is given twice", usual, where=where)


def control_net_config(
    shapes: Shapes,
    metadata: Mapping[str, str],
    residual_blocks: int,
    blocks: Sequence[int] | None = None,
    where: str = "",
) -> ControlNetConfig:
    """Derive the sizes of a ControlNet, and which blocks it is for, from its tensors.

    Args:
        shapes: by name.
        metadata: of the file; `CONTROL_BLOCKS_KEY` is used.
        residual_blocks: how many the stage C has that it is used with.
        blocks: numbers that the user gives; they win over the metadata.
        where: file for messages.

    Raises:
        UserError: tensors are missing, or the block numbers do not fit.
    """
    part = "ControlNet"
    count = count_of(shapes, r"projections\.(\d+)\.", part, where)
    c_out, features = shape_of(shapes, "projections.0.2.weight", 4, part, where)[:2]
    numbers = _control_blocks(count, metadata, residual_blocks, blocks, where)
    base = ControlNetConfig("effnet", 3, c_out, numbers, features=features)
    if "backbone.0.0.weight" in shapes:
        effnet = features_config(shapes, where)
        return replace(base, c_in=effnet.c_in, effnet=effnet)
    first = shape_of(shapes, "backbone.0.weight", 4, part, where)
    if "backbone.3.blocks.0.weight" not in shapes:
        return replace(base, mode="simple", c_in=first[1])
    second = shape_of(shapes, "backbone.2.weight", 4, part, where)
    depth = len({name.split(".")[1] for name in shapes if re.match(r"backbone\.\d+\.blocks\.", name)})
    return replace(base, mode="large", c_in=first[1], wide=(first[0], second[0]), depth=depth)


def _control_blocks(
    count: int, metadata: Mapping[str, str], residual_blocks: int, given: Sequence[int] | None, where: str
) -> tuple[int, ...]:
    numbers = tuple(given) if given is not None else _stored_blocks(metadata, where)
    if numbers is None:
        usual = default_control_blocks(residual_blocks)
        candidates = (usual, tuple(range(residual_blocks)))
        numbers = next((found for found in candidates if len(found) == count), None)
    if numbers is None:
        what = f"this ControlNet is for {count} blocks of stage C and does not say which"
        raise UserError(what, "Give their numbers with --controlnet_blocks", where=where)
    if len(numbers) != count:
        what = f"{len(numbers)} block numbers for a ControlNet that has {count} projections"
        raise UserError(what, "Give one number for each with --controlnet_blocks", where=where)
    check_control_blocks(numbers, residual_blocks)
    return numbers


def _stored_blocks(metadata: Mapping[str, str], where: str) -> tuple[int, ...] | None:
    if CONTROL_BLOCKS_KEY not in metadata:
        return None
    try:
        values: Any = json.loads(metadata[CONTROL_BLOCKS_KEY])
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
        raise UserError(f"its metadata entry {CONTROL_BLOCKS_KEY} is not a list of numbers", where=where)
    return tuple(values)


def control_net_metadata(config: ControlNetConfig) -> dict[str, str]:
    """Return what a ControlNet's file says of itself beside its tensors."""
    return {CONTROL_BLOCKS_KEY: json.dumps(list(config.blocks)), CONTROL_MODE_KEY: config.mode}


def control_filter_metadata(name: str, params: Sequence[str]) -> dict[str, str]:
    """Return what a ControlNet's file says of the filter that it was trained with; paths are left out."""
    return {CONTROL_FILTER_KEY: name, CONTROL_PARAMS_KEY: json.dumps(_without_paths(params))}


def _without_paths(params: Sequence[str]) -> list[str]:
    return [item for item in params if not item.partition("=")[0].endswith("_path")]


def stored_control_filter(metadata: Mapping[str, str]) -> tuple[str | None, tuple[str, ...]]:
    """Return name and arguments of the filter that a ControlNet was trained with, as far as its file tells.

    A class of somebody's own is not told, nor are paths: a file must not decide which code is run or what is opened.
    """
    name = metadata.get(CONTROL_FILTER_KEY)
    if name is None or not name.isidentifier():
        return None, ()
    try:
        params = json.loads(metadata.get(CONTROL_PARAMS_KEY, "[]"))
    except (ValueError, RecursionError):
        params = None
    usable = isinstance(params, list) and all(isinstance(item, str) for item in params)
    return name, tuple(_without_paths(params)) if usable else ()
