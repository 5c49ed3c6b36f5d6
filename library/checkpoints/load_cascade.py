"""Stable Cascade parts from files: official and ComfyUI single files, pickles, Diffusers folders -> memory names.

Tensors are views of the mapped file. Every function refuses a file that holds another part, by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from library.checkpoints import cascade_configs, cascade_parts, key_maps, model_configs
from library.checkpoints import key_maps_cascade as keys
from library.checkpoints.cascade_configs import CascadeConfig
from library.checkpoints.cascade_parts import (
    ControlNetConfig,
    EffNetConfig,
    PreviewerConfig,
    StageAConfig,
    count_of,
    shape_of,
)
from library.checkpoints.detect import read_json
from library.checkpoints.detect_cascade import (
    CascadeFile,
    CascadePart,
    component_parts,
    inspect_cascade,
    part_folder,
    require_part,
)
from library.checkpoints.detect_cascade import cascade_parts as find_parts
from library.checkpoints.folders import open_folder_weights
from library.checkpoints.key_maps_cascade import Part, Table
from library.checkpoints.load import check_tensors
from library.checkpoints.single_file import shapes_of
from library.checkpoints.tensor_files import open_tensors
from library.contracts import END_ID, START_ID
from library.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[str, "Tensor"]
Config = TypeVar("Config")

TEXT_HEADS_KEY = "stable_cascade.text_heads"


@dataclass(frozen=True, slots=True)
class LoadedPart(Generic[Config]):
    """A part as it was read.

    Attributes:
        tensors: by the names in memory; views of the mapped file.
        config: sizes.
        metadata: strings of the file's header.
        path: the file or folder.
        version: ``3.6B``, ``1B``, ``3B``, ``700M`` for stages of these structures, else empty.
    """

    tensors: dict[str, Tensor]
    config: Config
    metadata: Mapping[str, str]
    path: Path
    version: str = ""


@dataclass(frozen=True, slots=True)
class _Opened:
    """The tensors of a part by their names in the file without prefix, and what stood beside them."""

    tensors: dict[str, Tensor]
    found: CascadePart
    metadata: Mapping[str, str]
    path: Path
    config: Mapping[str, Any]


def load_stage(path: str | Path, stage: str, *, version: str | None = None) -> LoadedPart[CascadeConfig]:
    """Read stage C or B.

    Args:
        path: a file, or a Diffusers folder (the model, or `prior` / `decoder` inside).
        stage: ``c`` or ``b``.
        version: `--model_version`; another structure is refused.

    Raises:
        UserError: nothing is there, it is damaged, another part or another version.
    """
    opened = _open(path, "stage_c" if stage == "c" else "stage_b", version)
    tensors = _mapped(opened, keys.stage_to_memory)
    where = str(opened.path)
    config = cascade_configs.config_from_shapes(shapes_of(tensors), opened.metadata, where)
    if opened.config:
        config = cascade_configs.from_diffusers_config(config, opened.config, where)
    return LoadedPart(tensors, config, opened.metadata, opened.path, cascade_configs.version_of(config))


def load_effnet(path: str | Path) -> LoadedPart[EffNetConfig]:
    """Read the EfficientNet encoder, alone or from an all-in-one stage C checkpoint.

    Raises:
        UserError: nothing is there, it is damaged or another part, or it is the encoder of Würstchen v2.
    """
    return _load(path, "effnet", keys.effnet_to_memory, cascade_parts.effnet_config)


def load_stage_a(path: str | Path) -> LoadedPart[StageAConfig]:
    """Read stage A, alone, from an all-in-one stage B checkpoint, or from a Diffusers folder.

    Raises:
        UserError: nothing is there, it is damaged or another part.
    """
    return _load(path, "stage_a", keys.stage_a_to_memory, cascade_parts.stage_a_config)


def load_previewer(path: str | Path) -> LoadedPart[PreviewerConfig]:
    """Read the previewer, alone or from an all-in-one stage C checkpoint.

    Raises:
        UserError: nothing is there, it is damaged or another part.
    """
    return _load(path, "previewer", _same_names, cascade_parts.previewer_config)


def load_control_net(
    path: str | Path, residual_blocks: int, blocks: Sequence[int] | None = None
) -> LoadedPart[ControlNetConfig]:
    """Read a ControlNet for a stage C with so many residual blocks.

    Args:
        path: the file.
        residual_blocks: of the stage C, from its configuration.
        blocks: `--controlnet_blocks`; None takes the file's own, or the usual ones where their number fits.

    Raises:
        UserError: nothing is there, it is damaged or another part, or the block numbers do not fit.
    """
    opened = _open(path, "controlnet")
    tensors = _mapped(opened, _same_names)
    shapes = shapes_of(tensors)
    config = cascade_parts.control_net_config(shapes, opened.metadata, residual_blocks, blocks, str(opened.path))
    return LoadedPart(tensors, config, opened.metadata, opened.path)


def load_text(path: str | Path) -> LoadedPart[dict[str, Any]]:
    """Read the text encoder with its projection; the configuration is one of transformers' `CLIPTextConfig`.

    Raises:
        UserError: nothing is there, it is damaged or another part, or an encoder without projection.
    """
    opened = _open(path, "text")
    given = opened.tensors
    tensors = {name: given[key] for key in given if (name := key_maps.text_name_to_memory(key)) is not None}
    name = keys.projection_name(given, "")
    projection = given[name or keys.TEXT_PROJECTION]
    if projection.dim() != 2:
        raise UserError(
            f"its projection has the shape {list(projection.shape)}", "Get the file again", where=str(opened.path)
        )
    tensors[keys.TEXT_PROJECTION] = projection.t() if keys.is_transposed_projection(name or "") else projection
    check_tensors(tensors, str(opened.path))
    return LoadedPart(tensors, _text_config(tensors, opened), opened.metadata, opened.path)


def load_vision(path: str | Path) -> LoadedPart[dict[str, Any]]:
    """Read the CLIP image encoder, alone, from an all-in-one stage C checkpoint, or from a folder.

    The configuration is one of transformers' `CLIPVisionConfig`.

    Raises:
        UserError: nothing is there, it is damaged or another part.
    """
    return _load(path, "vision", keys.vision_to_memory, _vision_config)


def _vision_config(shapes: cascade_parts.Shapes, where: str) -> dict[str, Any]:
    part, inner = "CLIP image encoder", "vision_model."
    width, channels, patch = shape_of(shapes, f"{inner}embeddings.patch_embedding.weight", 4, part, where)[:3]
    places = shape_of(shapes, f"{inner}embeddings.position_embedding.weight", 2, part, where)[0]
    return {
        "hidden_act": "quick_gelu",
        "hidden_size": width,
        "image_size": math.isqrt(places - 1) * patch,
        "intermediate_size": shape_of(shapes, f"{inner}encoder.layers.0.mlp.fc1.weight", 2, part, where)[0],
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_attention_heads": max(1, width // cascade_configs.HEAD_WIDTH),
        "num_channels": channels,
        "num_hidden_layers": count_of(shapes, r"vision_model\.encoder\.layers\.(\d+)\.", part, where),
        "patch_size": patch,
        "projection_dim": shape_of(shapes, "visual_projection.weight", 2, part, where)[0],
    }


def _text_config(tensors: Tensors, opened: _Opened) -> dict[str, Any]:
    derived = model_configs.text_config(shapes_of(tensors), "sd2")
    heads = _text_heads(opened, derived["num_attention_heads"])
    if heads < 1 or derived["hidden_size"] % heads:
        raise UserError(f"cannot have {heads} attention heads", "The file is damaged", where=str(opened.path))
    return {
        **derived,
        "num_attention_heads": heads,
        "projection_dim": tensors[keys.TEXT_PROJECTION].shape[0],
        # Given explicitly: the old default of 2 makes transformers pool at the largest id, an added token's.
        "bos_token_id": START_ID,
        "eos_token_id": END_ID,
        "pad_token_id": END_ID,
    }


def _text_heads(opened: _Opened, derived: int) -> int:
    stored = opened.config.get("num_attention_heads", opened.metadata.get(TEXT_HEADS_KEY, derived))
    try:
        return int(json.loads(stored) if isinstance(stored, str) else stored)
    except (ValueError, TypeError, RecursionError):
        return 0


def parts_at(path: str | Path) -> tuple[Part, ...]:
    """Return the parts that a file, the folder of one component, or a Diffusers model holds; none is no error.

    Raises:
        UserError: nothing is there, or it is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        return tuple(inspect_cascade(path).parts)
    if (path / "config.json").is_file():
        return tuple(find_parts(shapes_of(open_folder_weights(path))))
    return component_parts(path)


# Opening -----------------------------------------------------------------------------------------------------------


def _load(
    path: str | Path,
    part: Part,
    rename: Callable[[Tensors], Table],
    configure: Callable[[cascade_parts.Shapes, str], Config],
) -> LoadedPart[Config]:
    opened = _open(path, part)
    tensors = _mapped(opened, rename)
    return LoadedPart(tensors, configure(shapes_of(tensors), str(opened.path)), opened.metadata, opened.path)


def _same_names(names: Tensors) -> Table:
    return {name: (name,) for name in names}


def _open(path: str | Path, part: Part, version: str | None = None) -> _Opened:
    path = Path(path)
    if path.is_dir():
        folder = part_folder(path, part)
        weights: Tensors = open_folder_weights(folder)
        parts = find_parts(shapes_of(weights))
        file, config = CascadeFile(folder, parts, {}, "another kind of model"), read_json(folder / "config.json")
    else:
        file, config = inspect_cascade(path), {}
        weights = open_tensors(path)
    found = require_part(file, part, version=version)
    tensors = {short: weights[name] for name, short in keys.without_prefix(weights, found.prefix).items()}
    if part == "text":
        # Its projection may lie one level above the transformer.
        name = keys.projection_name(weights, found.prefix) or ""
        tensors[name[name.index("text_projection") :]] = weights[name]
    empty = [name for name, tensor in tensors.items() if not tensor.numel()]
    if empty:
        raise UserError(
            f"{len(empty)} tensors have no values, such as {empty[0]}", "Get the file again", where=str(path)
        )
    return _Opened(tensors, found, file.metadata, file.path, config)


def _mapped(opened: _Opened, rename: Callable[[Tensors], Table]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, targets in rename(opened.tensors).items():
        tensor = opened.tensors[name]
        pieces = (tensor,) if len(targets) == 1 else key_maps.split_rows(name, tensor)
        tensors.update(zip(targets, pieces, strict=True))
    check_tensors({name: t for name, t in tensors.items() if t.is_floating_point() or t.dim()}, str(opened.path))
    return tensors
