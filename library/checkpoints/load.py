"""A checkpoint file, a Diffusers folder or a hub id -> parts in memory names, mapped from the files and not copied."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints import key_maps, model_configs
from library.checkpoints.detect import CheckpointInfo, classify, inspect, read_json
from library.checkpoints.folders import SMALL_FILES, open_folder_weights, read_small_files
from library.checkpoints.headers import file_kind, read_header
from library.checkpoints.hub import resolve_model
from library.checkpoints.parts import LoadedParts, SourceInfo
from library.checkpoints.pickles import StateDict, load_state_dict
from library.checkpoints.tensor_files import MappedTensors
from library.errors import Problem, UserError

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)

_CARRIED_BYTES = 512 * 1024**2
Tensors = Mapping[str, "Tensor"]
Part = tuple[dict[str, "Tensor"], dict[str, Any]]


def load_parts(name: str, family: str, vae: str | None = None) -> LoadedParts:
    """Read a Stable Diffusion 1.x or 2.x model.

    Args:
        name: a file, a Diffusers folder, or a hub id.
        family: ``sd1`` or ``sd2``, as the options say.
        vae: another VAE in place of the model's own: a checkpoint, a VAE file, a folder or id (root or its `vae`).

    Raises:
        UserError: the model cannot be found or read, is damaged, of another family, or lacks a part.
    """
    path = resolve_model(name)
    loaded = _load_folder(path, name, family, vae) if path.is_dir() else _load_file(path, name, family, vae)
    where = str(path)
    check_size(loaded.unet, where)
    check_size(loaded.text, where)
    check_size(loaded.vae, vae or where)
    return loaded


def load_vae(name: str) -> Part:
    """Read a VAE in any form: full checkpoint, VAE file of either layout, folder (root or `vae` inside), hub id.

    Returns:
        Tensors by diffusers' names, and the arguments of `AutoencoderKL`.

    Raises:
        UserError: it cannot be found or read, or holds no VAE.
    """
    path = resolve_model(name, option="--vae")
    if path.is_dir():
        folder = path if (path / "config.json").is_file() else path / "vae"
        return _folder_vae(folder)
    return _vae_from_file(_open_file(path).tensors, str(path))


def check_size(tensors: Mapping[str, Any], where: str) -> None:
    """Refuse parts too large to be a Stable Diffusion model, before anything is allocated for them."""
    count = model_configs.parameter_count({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if count > model_configs.MAX_PARAMETERS:
        raise UserError(f"has {count} parameters (limit {model_configs.MAX_PARAMETERS})", where=where)


def name_problems(
    part: str, where: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> list[Problem]:
    """Compare the names and shapes that a model has with those of a file; counts and the first five of each.

    Returns:
        Nothing, or one problem for each of: missing, unexpected, wrong shape.
    """
    lists = {
        "are missing": [name for name in expected if name not in found],
        "are unexpected": [name for name in found if name not in expected],
        "have another shape": [
            f"{name} {found[name]} instead of {expected[name]}"
            for name in expected
            if name in found and tuple(found[name]) != tuple(expected[name])
        ],
    }
    hint = "Is this the right model, and complete?"
    return [
        Problem(where, f"{part}: {len(names)} tensors {what}: {_first(names)}", hint)
        for what, names in lists.items()
        if names
    ]


def _first(names: Iterable[str], count: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


# Single files ------------------------------------------------------------------------------------------------------


def _open_file(path: Path) -> StateDict:
    if file_kind(path) == "safetensors":
        return StateDict(MappedTensors(read_header(path)))
    return load_state_dict(path)


def _load_file(path: Path, name: str, family: str, vae: str | None) -> LoadedParts:
    opened = _open_file(path)
    tensors = opened.tensors
    header = getattr(tensors, "header", None)
    shapes = header.shapes if header else {key: tuple(value.shape) for key, value in tensors.items()}
    kind = "safetensors" if header else "ckpt"
    info = classify(path, shapes, header.metadata if header else {}, kind=kind)
    require_family(info, family, replaced=("VAE",) if vae else ())
    used: set[str] = set()
    unet = _unet_from_file(tensors, family, used)
    text = _text_from_file(tensors, family, used)
    vae_part = load_vae(vae) if vae else _vae_from_file(tensors, str(path))
    used.update(key for key in tensors if key.startswith(key_maps.VAE_PREFIX))
    source = SourceInfo(
        name=name,
        path=path,
        kind=kind,
        carried=_carry(tensors, used, info),
        counters=opened.counters,
        metadata=header.metadata if header else {},
        prediction_type=info.prediction_type,
    )
    return LoadedParts(*unet, *text, *vae_part, source=source)


def require_family(info: CheckpointInfo, family: str, replaced: tuple[str, ...] = ()) -> None:
    """Refuse a model of another family, a U-Net with other inputs, or one without a part that nothing replaces."""
    where = str(info.path)
    if info.family != family:
        hint = {
            "sd1": "Remove --v2",
            "sd2": "Add --v2",
            "sdxl": "SDXL has its own scripts (sdxl_train.py, sdxl_train_network.py)",
            "lora": "Give the base model here, and the network with the network options",
        }.get(info.family, "Give a Stable Diffusion 1.x or 2.x checkpoint")
        raise UserError(f"looks like {info.label}", hint, where=where)
    missing = [part for part in info.missing if part not in replaced]
    if missing:
        hint = "Give one with --vae" if missing == ["VAE"] else "Give a complete checkpoint"
        raise UserError(f"has no {' and no '.join(missing)}", hint, where=where)
    if info.in_channels not in (None, 4):
        what = f"its U-Net takes {info.in_channels} channels ({info.label}), not 4"
        raise UserError(what, "Such models cannot be trained here", where=where)


def _unet_from_file(tensors: Tensors, family: str, used: set[str]) -> Part:
    inner = dict(key_maps.iter_prefixed(tensors, key_maps.UNET_PREFIX))
    used.update(inner)
    table = key_maps.unet_to_memory(inner.values())
    unet = {table[short]: tensors[full] for full, short in inner.items()}
    return unet, model_configs.unet_config(_shapes(unet), family)


def _text_from_file(tensors: Tensors, family: str, used: set[str]) -> Part:
    text = _text_v2(tensors, used) if family == "sd2" else _text_v1(tensors, used)
    return text, model_configs.text_config(_shapes(text), family)


def _text_v1(tensors: Tensors, used: set[str]) -> dict[str, Tensor]:
    inner = dict(key_maps.iter_prefixed(tensors, key_maps.TEXT_V1_PREFIX))
    text = {}
    for full, short in inner.items():
        if not key_maps.is_position_ids(short):
            text[key_maps.text_name_to_memory(short)] = tensors[full]
            used.add(full)
    return text


def _text_v2(tensors: Tensors, used: set[str]) -> dict[str, Tensor]:
    inner = dict(key_maps.iter_prefixed(tensors, key_maps.TEXT_V2_PREFIX))
    layers = key_maps.used_openclip_layers(inner.values())
    text: dict[str, Tensor] = {}
    for full, short in inner.items():
        names = key_maps.openclip_to_memory(short)
        if not names or key_maps.openclip_layer(short) >= layers:
            continue
        used.add(full)
        if len(names) == 1:
            text[names[0]] = tensors[full]
        else:
            text.update(zip(names, key_maps.split_rows(full, tensors[full]), strict=True))
    return text


def _vae_from_file(tensors: Tensors, where: str) -> Part:
    inner = dict(key_maps.iter_prefixed(tensors, key_maps.VAE_PREFIX)) or {key: key for key in tensors}
    wanted = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    inner = {full: short for full, short in inner.items() if short.startswith(wanted)}
    if not inner:
        raise UserError("holds no VAE", "Give a VAE or a full checkpoint", where=where)
    table = key_maps.vae_to_memory(inner.values())
    return _vae_part({table[short]: tensors[full] for full, short in inner.items()})


def _vae_part(vae: dict[str, Tensor]) -> Part:
    vae = {name: key_maps.as_matrix(t) if key_maps.is_vae_attention_weight(name) else t for name, t in vae.items()}
    return vae, model_configs.vae_config(_shapes(vae))


def _carry(tensors: Tensors, used: set[str], info: CheckpointInfo) -> dict[str, Tensor]:
    """Keep what no part uses for later saves: copies up to a limit, so that the source may change or vanish."""
    if info.ema_tensors:
        _log.info("%s: its %d EMA tensors are not used and will not be saved", info.path.name, info.ema_tensors)
    carried: dict[str, Tensor] = {}
    room = _CARRIED_BYTES
    for name in tensors:
        if name in used or name.startswith(key_maps.EMA_PREFIX):
            continue
        tensor = tensors[name]
        room -= tensor.numel() * tensor.element_size()
        carried[name] = tensor.clone() if room >= 0 else tensor
    return carried


def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


# Diffusers folders -------------------------------------------------------------------------------------------------


def _load_folder(path: Path, name: str, family: str, vae: str | None) -> LoadedParts:
    info = inspect(path)
    require_family(info, family, replaced=("VAE",) if vae else ())
    unet = dict(open_folder_weights(path / "unet"))
    unet_config = _configured(path / "unet", unet, model_configs.unet_config(_shapes(unet), family))
    text = {
        key_maps.text_name_to_memory(key): tensor
        for key, tensor in open_folder_weights(path / "text_encoder").items()
        if not key_maps.is_position_ids(key)
    }
    text_config = _configured(path / "text_encoder", text, model_configs.text_config(_shapes(text), family))
    vae_part = load_vae(vae) if vae else _folder_vae(path / "vae")
    source = SourceInfo(
        name=name,
        path=path,
        kind="diffusers",
        files=read_small_files(path, SMALL_FILES),
        prediction_type=info.prediction_type,
    )
    return LoadedParts(unet, unet_config, text, text_config, *vae_part, source=source)


def _configured(folder: Path, tensors: Tensors, derived: dict[str, Any]) -> dict[str, Any]:
    given = read_json(folder / "config.json")
    model_configs.check_config(given, derived, str(folder / "config.json"))
    return {**derived, **given}


def _folder_vae(folder: Path) -> Part:
    raw = open_folder_weights(folder)
    table = key_maps.vae_to_memory(raw)
    vae, derived = _vae_part({table[name]: tensor for name, tensor in raw.items()})
    return vae, _configured(folder, vae, derived)
