"""ControlNet files of Stable Diffusion 1.x and 2.x: the original layout, diffusers' single files and folders.

The original layout (`control_model.*`) names the downward half as the U-Net of a checkpoint does; the rest are the
convolutions that read the guide picture (`input_hint_block`) and those that start at zero (`zero_convs`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints import key_maps, model_configs
from library.checkpoints.detect import inspect, read_json
from library.checkpoints.folders import open_folder_weights
from library.checkpoints.hub import resolve_model
from library.checkpoints.single_file import shapes_of
from library.checkpoints.tensor_files import open_tensors
from library.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

ORIGINAL_PREFIX = "control_model."
OPTION = "--control_net_models"
_FAMILY_WORDS = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x"}
_PLAIN = "Give a ControlNet of Stable Diffusion 1.x or 2.x"


@dataclass(frozen=True, slots=True)
class ControlNetFile:
    """A ControlNet as it was read: tensors by diffusers' names (views of the file), `ControlNetModel`'s arguments."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    where: str


def _starts(*starts: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(starts)


_OTHER_KINDS: tuple[tuple[Callable[[str], bool], str, str], ...] = (
    (_starts("lllite_"), "a ControlNet-LLLite", "LLLite works with SDXL models only. " + _PLAIN),
    (lambda name: name == "lora_controlnet", "a Control-LoRA", _PLAIN),
    (_starts("adapter.", "body.", "conv_in.adapter"), "a T2I-Adapter", _PLAIN),
    (
        lambda name: name == "difference",
        "only the difference between a ControlNet and a model",
        "Give the complete ControlNet that it was made from",
    ),
    (_starts("task_embedding", "control_add_embedding"), "a ControlNet for several tasks (union)", _PLAIN),
    (
        lambda name: name.startswith(("add_embedding.", "label_emb.", f"{ORIGINAL_PREFIX}label_emb.")),
        "a ControlNet for SDXL",
        _PLAIN,
    ),
)


def read_control_net(name: str, family: str, *, option: str = OPTION) -> ControlNetFile:
    """Read a ControlNet.

    Args:
        name: a file of the original or of diffusers' layout (safetensors or pickle), a folder of diffusers, or a hub
            id of such a folder.
        family: ``sd1`` or ``sd2``: what the base model is.
        option: the option that named it, for messages.

    Raises:
        UserError: it cannot be found or read, is no ControlNet, or one for another family.
    """
    path = resolve_model(name, option=option)
    where = f"{option} {name}"
    if path.is_dir():
        _require_folder(path, where)
        return _checked(dict(open_folder_weights(path)), family, where, read_json(path / "config.json"))
    opened = open_tensors(path)
    _refuse_other_kinds(opened, where)
    # Published files hold the whole model beside its ControlNet; only the ControlNet is wanted.
    inner = dict(key_maps.iter_prefixed(opened, ORIGINAL_PREFIX)) or {key: key for key in opened}
    table = control_net_to_memory(inner.values())
    if not any(name.startswith("controlnet_cond_embedding.") for name in table.values()):
        raise UserError(f"is no ControlNet: it looks like {inspect(path).label}", _PLAIN, where=where)
    return _checked({table[short]: opened[full] for full, short in inner.items()}, family, where)


def control_net_to_memory(names: Iterable[str]) -> dict[str, str]:
    """Map ControlNet names of the original layout (without prefix) to diffusers' names; those stay as they are."""
    names = list(names)
    if any(name.startswith("controlnet_") for name in names):
        return {name: name for name in names}
    hints = [int(match[1]) for name in names if (match := re.match(r"input_hint_block\.(\d+)\.", name))]
    own = {name: _own_name(name, max(hints, default=0)) for name in names}
    shared = key_maps.unet_to_memory([name for name, new in own.items() if new is None])
    return {name: new if new is not None else shared[name] for name, new in own.items()}


def _own_name(name: str, last_hint: int) -> str | None:
    """Return diffusers' name of a tensor that a U-Net has not; None for the others."""
    match = re.match(r"(input_hint_block|zero_convs|middle_block_out)\.(\d+)\.(.*)", name)
    if match is None:
        return None
    kind, number, rest = match[1], int(match[2]), match[3]
    if kind == "zero_convs":
        return f"controlnet_down_blocks.{number}.{rest.removeprefix('0.')}"
    if kind == "middle_block_out":
        return f"controlnet_mid_block.{rest}"
    # Convolutions and activations alternate.
    place = {0: "conv_in", last_hint: "conv_out"}.get(number, f"blocks.{number // 2 - 1}")
    return f"controlnet_cond_embedding.{place}.{rest}"


def _refuse_other_kinds(names: Iterable[str], where: str) -> None:
    for name in names:
        for test, kind, hint in _OTHER_KINDS:
            if test(name):
                raise UserError(f"is {kind}", hint, where=where)


def _require_folder(path: Path, where: str) -> None:
    config = path / "config.json"
    name = read_json(config).get("_class_name", "") if config.is_file() else ""
    if name == "ControlNetModel":
        return
    found = f"a folder of {name}" if name else "a folder without the config.json of a ControlNet"
    raise UserError(f"is {found}", _PLAIN, where=where)


def _checked(
    tensors: dict[str, Tensor], family: str, where: str, given: Mapping[str, Any] | None = None
) -> ControlNetFile:
    _refuse_other_kinds(tensors, where)
    shapes = shapes_of(tensors)
    try:
        derived = model_configs.control_net_config(shapes, family)
    except UserError as error:
        raise UserError(error.problems[0].what, error.problems[0].hint, where=where) from error
    made_for = "sd2" if derived["use_linear_projection"] else "sd1"
    if made_for != family:
        what = f"is a ControlNet for {_FAMILY_WORDS[made_for]}, and the model is {_FAMILY_WORDS[family]}"
        raise UserError(what, "Give one that was made for this kind of model", where=where)
    if given is not None:
        model_configs.check_config(given, derived, where)
    return ControlNetFile(tensors, {**derived, **(given or {})}, where)
