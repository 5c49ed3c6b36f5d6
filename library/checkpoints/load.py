"""A checkpoint file, a Diffusers folder or a hub id -> parts in memory names, mapped from the files and not copied."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints import key_maps, model_configs
from library.checkpoints.detect import CheckpointInfo, classify, inspect, read_json
from library.checkpoints.folders import SMALL_FILES, open_folder_weights, read_small_files
from library.checkpoints.headers import file_kind, read_header
from library.checkpoints.hub import resolve_model
from library.checkpoints.parts import LoadedParts, SourceInfo
from library.checkpoints.pickles import StateDict, load_state_dict
from library.checkpoints.single_file import Part, Tensors, shapes_of, square_attention, text_part, unet_part, vae_part
from library.checkpoints.tensor_files import MappedTensors
from library.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)

_CARRIED_BYTES = 512 * 1024**2


def load_parts(name: str, family: str, vae: str | None = None, *, variant: str | None = None) -> LoadedParts:
    """Read a Stable Diffusion 1.x or 2.x model.

    Args:
        name: a file, a Diffusers folder, or a hub id.
        family: ``sd1`` or ``sd2``, as the options say.
        vae: another VAE in place of the model's own: a checkpoint, a VAE file, a folder or id (root or its `vae`).
        variant: which weights of a folder to read (``fp16`` for files named `*.fp16.safetensors`); None for the best.

    Raises:
        UserError: the model cannot be found or read, is damaged, of another family, or lacks a part.
    """
    path = resolve_model(name)
    if path.is_dir():
        loaded = _load_folder(path, name, family, vae, variant)
    else:
        loaded = _load_file(path, name, family, vae)
    where = str(path)
    for tensors, origin in ((loaded.unet, where), (loaded.text, where), (loaded.vae, vae or where)):
        check_tensors(tensors, origin)
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
        return _folder_vae(folder, None)
    return vae_part(_open_file(path).tensors, str(path))


def check_tensors(tensors: Mapping[str, Any], where: str) -> None:
    """Refuse parts that are no Stable Diffusion model: whole numbers for weights, or absurdly many of them."""
    odd = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if odd:
        kind = str(tensors[odd[0]].dtype).removeprefix("torch.")
        what = f"{len(odd)} weights are {kind}, such as {odd[0]}: quantized models cannot be trained"
        raise UserError(what, "Get the model in float32, float16 or bfloat16", where=where)
    count = model_configs.parameter_count(shapes_of(tensors))
    if count > model_configs.MAX_PARAMETERS:
        raise UserError(f"has {count} parameters (limit {model_configs.MAX_PARAMETERS})", where=where)


# Single files ------------------------------------------------------------------------------------------------------


def _open_file(path: Path) -> StateDict:
    if file_kind(path) == "safetensors":
        return StateDict(MappedTensors(read_header(path)))
    return load_state_dict(path)


def _load_file(path: Path, name: str, family: str, vae: str | None) -> LoadedParts:
    opened = _open_file(path)
    tensors = opened.tensors
    header = getattr(tensors, "header", None)
    shapes = header.shapes if header else shapes_of(tensors)
    kind = "safetensors" if header else "ckpt"
    info = classify(path, shapes, header.metadata if header else {}, kind=kind)
    require_family(info, family, replaced=("VAE",) if vae else ())
    used: set[str] = set()
    unet = unet_part(tensors, family, used)
    text = text_part(tensors, family, used)
    autoencoder = vae_part(tensors, str(path), used) if vae is None else load_vae(vae)
    if vae is not None:
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
    return LoadedParts(*unet, *text, *autoencoder, source=source)


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


def _carry(tensors: Tensors, used: set[str], info: CheckpointInfo) -> dict[str, Tensor]:
    """Keep what no part uses for later saves: copies up to a limit, so that the source may change or vanish."""
    if info.ema_tensors:
        _log.info("%s: its %d EMA tensors are not used and will not be saved", info.path.name, info.ema_tensors)
    carried: dict[str, Tensor] = {}
    room = _CARRIED_BYTES
    for name in tensors:
        if name in used or key_maps.is_average(name):
            continue
        tensor = tensors[name]
        room -= tensor.numel() * tensor.element_size()
        carried[name] = tensor.clone() if room >= 0 else tensor
    return carried


# Diffusers folders -------------------------------------------------------------------------------------------------


def _load_folder(path: Path, name: str, family: str, vae: str | None, variant: str | None) -> LoadedParts:
    info = inspect(path)
    require_family(info, family, replaced=("VAE",) if vae else ())
    unet = dict(open_folder_weights(path / "unet", variant))
    unet_config = _configured(path / "unet", unet, model_configs.unet_config(shapes_of(unet), family))
    stored = open_folder_weights(path / "text_encoder", variant)
    names = {key: key_maps.text_name_to_memory(key) for key in stored}
    text = {name: stored[key] for key, name in names.items() if name is not None}
    text_config = _configured(path / "text_encoder", text, model_configs.text_config(shapes_of(text), family))
    autoencoder = _folder_vae(path / "vae", variant) if vae is None else load_vae(vae)
    source = SourceInfo(
        name=name,
        path=path,
        kind="diffusers",
        carried={f"text_encoder/{key}": stored[key].clone() for key, name in names.items() if name is None},
        files=read_small_files(path, SMALL_FILES),
        prediction_type=info.prediction_type,
    )
    return LoadedParts(unet, unet_config, text, text_config, *autoencoder, source=source)


def _configured(folder: Path, tensors: Tensors, derived: dict[str, Any]) -> dict[str, Any]:
    given = read_json(folder / "config.json")
    model_configs.check_config(given, derived, str(folder / "config.json"))
    return {**derived, **given}


def _folder_vae(folder: Path, variant: str | None) -> Part:
    raw = open_folder_weights(folder, variant)
    table = key_maps.vae_to_memory(raw)
    vae, derived = square_attention({table[name]: tensor for name, tensor in raw.items()})
    return vae, _configured(folder, vae, derived)
