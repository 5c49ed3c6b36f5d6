"""Parts in memory -> a Diffusers folder that opens offline, in old and new versions of the libraries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints import key_maps, model_configs
from library.checkpoints.ckpt_writer import write_ckpt
from library.checkpoints.folders import as_json, without_paths
from library.checkpoints.parts import ModelParts, SaveSettings, SourceInfo
from library.checkpoints.tensor_files import NonFiniteWeights, stored_size, write_safetensors
from library.files import atomic_folder, write_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from library.contracts import FamilySpec

Tensors = Mapping[str, "Tensor"]

_VOCABULARY = Path(__file__).parent.parent / "assets" / "clip_vocab"
_COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
_INDEX = "model_index.json"
_SCHEDULER = "scheduler/scheduler_config.json"


def save_folder(
    target: Path,
    kind: str,
    parts: ModelParts,
    spec: FamilySpec,
    source: SourceInfo | None,
    settings: SaveSettings,
) -> None:
    """Write a Diffusers folder; it appears complete or not at all.

    Args:
        target: the folder.
        kind: ``diffusers_safetensors``, or ``diffusers`` for pickled ``.bin`` weights.
        parts: state dicts by memory name and configurations.
        spec: family and prediction type.
        source: its small files and unused tensors are carried over if it is a Diffusers folder.
        settings: precision, and whether the schedule was rescaled.
    """
    options = write_options(settings)
    weights = _weights(parts, source, safetensors=kind == "diffusers_safetensors")
    size = sum(stored_size(tensor, settings.precision) for table in weights.values() for tensor in table.values())
    with atomic_folder(target, size=size) as folder:
        for name, data in small_files(parts, spec, source, settings).items():
            write_bytes(folder / name, data)
        try:
            for name, tensors in weights.items():
                if name.endswith(".bin"):
                    write_ckpt(folder / name, tensors, None, **options)
                else:
                    write_safetensors(folder / name, tensors, {"format": "pt"}, **options)
        except NonFiniteWeights as error:
            raise NonFiniteWeights(error.names, target, error.cause) from error


def write_options(settings: SaveSettings) -> dict[str, Any]:
    """Return the arguments that `write_safetensors` and `write_ckpt` take from the settings of a save."""
    return {
        "precision": settings.precision,
        "require_finite": not settings.allow_nan,
        "progress": settings.progress,
    }


def _weights(parts: ModelParts, source: SourceInfo | None, *, safetensors: bool) -> dict[str, Tensors]:
    ending = "safetensors" if safetensors else "bin"
    text = {name: tensor for name, tensor in parts.text.items() if not key_maps.is_position_ids(name)}
    if source is not None and source.kind == "diffusers":
        carried = key_maps.iter_prefixed(source.carried, "text_encoder/")
        text = {**{short: source.carried[full] for full, short in carried}, **text}
    rule = key_maps.as_matrix if parts.unet_config.get("use_linear_projection") else key_maps.as_kernel
    return {
        f"unet/diffusion_pytorch_model.{ending}": {
            name: rule(tensor) if key_maps.is_projection(name) else tensor for name, tensor in parts.unet.items()
        },
        f"vae/diffusion_pytorch_model.{ending}": parts.vae,
        f"text_encoder/{'model' if safetensors else 'pytorch_model'}.{ending}": text,
    }


def small_files(
    parts: ModelParts, spec: FamilySpec, source: SourceInfo | None, settings: SaveSettings
) -> dict[str, bytes]:
    """Return the small files of a Diffusers folder by path: the source's own where it has them, else the family's."""
    files = dict(source.files) if source is not None else {}
    files.update({f"{part}/config.json": as_json(table) for part, table in _configs(parts, spec, source).items()})
    keeps_scheduler = _SCHEDULER in files and not settings.zero_terminal_snr
    files[_INDEX] = as_json(_index(files.get(_INDEX), own_scheduler=not keeps_scheduler))
    if keeps_scheduler:
        scheduler = {**json.loads(files[_SCHEDULER]), "prediction_type": spec.prediction_type}
    else:
        zero_terminal_snr = settings.zero_terminal_snr
        scheduler = model_configs.scheduler_config(spec.prediction_type, zero_terminal_snr=zero_terminal_snr)
    files[_SCHEDULER] = as_json(scheduler)
    if not {"tokenizer/vocab.json", "tokenizer/merges.txt"} <= set(files) and "tokenizer/tokenizer.json" not in files:
        for name in ("vocab.json", "merges.txt"):
            files[f"tokenizer/{name}"] = (_VOCABULARY / name).read_bytes()
        for name, table in model_configs.tokenizer_files(spec.name).items():
            files[f"tokenizer/{name}"] = as_json(table)
    return files


def _configs(parts: ModelParts, spec: FamilySpec, source: SourceInfo | None) -> dict[str, dict[str, Any]]:
    version = {"_diffusers_version": model_configs.DIFFUSERS_VERSION}
    unet = {"_class_name": "UNet2DConditionModel", **version, **parts.unet_config}
    vae = {"_class_name": "AutoencoderKL", **version, **parts.vae_config}
    if source is None or source.kind != "diffusers":
        unet["sample_size"] = spec.default_resolution_wh[0] // spec.latent_downscale
        unet["upcast_attention"] = spec.name == "sd2" and spec.prediction_type == "v_prediction"
    # The weights tell their type themselves; the source's may be another one.
    text = {name: value for name, value in parts.text_config.items() if name not in ("dtype", "torch_dtype")}
    text = {**text, "architectures": ["CLIPTextModel"]}
    return {"unet": without_paths(unet), "vae": without_paths(vae), "text_encoder": without_paths(text)}


def _index(kept: bytes | None, *, own_scheduler: bool) -> dict[str, Any]:
    """Return `model_index.json`; parts that are not written (safety checker...) are switched off."""
    fresh = model_configs.model_index()
    if kept is None:
        return fresh
    index: dict[str, Any] = {
        name: [None, None] if isinstance(value, list) and name not in _COMPONENTS else value
        for name, value in json.loads(kept).items()
    }
    if own_scheduler:
        index["scheduler"] = fresh["scheduler"]
    return {**index, "requires_safety_checker": False}
