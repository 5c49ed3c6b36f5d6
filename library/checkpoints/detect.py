"""What a model is, from names and shapes alone: family, layout, prediction type, and what is missing.

Light for safetensors files and Diffusers folders (headers and JSON only); a pickle has to be loaded, which maps it.
"""

from __future__ import annotations

import json
import math
import statistics
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.checkpoints import key_maps
from library.checkpoints.headers import SafetensorsHeader, file_kind, read_header, read_tensor_bytes
from library.checkpoints.key_maps_cascade import is_cascade_mark
from library.checkpoints.lora_names import looks_like_adapter
from library.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]

MAX_JSON_BYTES = 16 * 1024**2
_LABELS = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "SDXL base",
    "sdxl-refiner": "the SDXL refiner",
    "sd3": "Stable Diffusion 3",
    "flux": "FLUX",
    "cascade": "Stable Cascade",
    "stable_cascade": "Stable Cascade",
    "lora": "a LoRA or another adapter",
    "controlnet": "a ControlNet",
    "vae": "a VAE alone",
    "embedding": "a textual inversion embedding",
    "text-encoder": "a text encoder alone",
    "unet": "a U-Net alone",
    "unknown": "an unknown kind of model",
}
_HEURISTIC_NAME = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
_HEURISTIC_LIMIT = 0.09


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What was found out about a model.

    Attributes:
        path: the file or folder.
        family: a key such as ``sd1``, ``sd2``, ``sdxl``, ``lora``; ``unknown`` when nothing fits.
        layout: ``single`` or ``diffusers``.
        kind: ``safetensors``, ``ckpt`` or ``diffusers``: what a model saved "as it came" would be.
        prediction_type: ``epsilon`` or ``v_prediction`` where the model says so, else None.
        prediction_hint: a guess from the weights of an SD2 file, else None; only good for a warning.
        in_channels: input channels of the U-Net (4; 9 inpainting; 5 depth; 8 image-to-image), or None.
        cross_attention_dim: width of the text features that the U-Net takes, or None.
        missing: parts that a full checkpoint has and this one lacks (``VAE``, ``text encoder``, ``U-Net``).
        ema_tensors: number of averaged weights, which are neither trained nor saved.
    """

    path: Path
    family: str
    layout: str
    kind: str
    prediction_type: str | None = None
    prediction_hint: str | None = None
    in_channels: int | None = None
    cross_attention_dim: int | None = None
    missing: tuple[str, ...] = ()
    ema_tensors: int = 0

    @property
    def label(self) -> str:
        """The family in words, with the kind of U-Net where it is not the plain one."""
        special = {9: " for inpainting", 5: " for depth", 8: " for image editing"}.get(self.in_channels or 0, "")
        return family_label(self.family) + special


def family_label(family: str) -> str:
    """Return the name of a family for messages."""
    return _LABELS.get(family, family)


def inspect(path: str | Path) -> CheckpointInfo:
    """Find out what the model at `path` is.

    Raises:
        UserError: nothing is there, the file is damaged, or it is a pickle that is not allowed.
    """
    path = Path(path)
    if path.is_dir():
        return _inspect_folder(path)
    if file_kind(path) == "safetensors":
        header = read_header(path)
        return classify(path, header.shapes, header.metadata, bias=lambda: _bias_from_header(header))
    from library.checkpoints.pickles import load_state_dict

    tensors = load_state_dict(path).tensors
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return classify(path, shapes, {}, kind="ckpt", bias=lambda: _bias_from_tensors(tensors))


def classify(
    path: Path,
    shapes: Shapes,
    metadata: Mapping[str, str],
    *,
    kind: str = "safetensors",
    bias: Callable[[], list[float]] | None = None,
) -> CheckpointInfo:
    """Find out what a single file with these names, shapes and metadata is.

    Args:
        path: for messages.
        shapes: by name.
        metadata: strings of the header.
        kind: ``safetensors`` or ``ckpt``.
        bias: gives the values of the tensor that the prediction of SD2 is guessed from.
    """
    family = _family_of_names(shapes)
    first = shapes.get(f"{key_maps.UNET_PREFIX}input_blocks.0.0.weight")
    prediction = _declared_prediction(shapes, metadata)
    hint = None
    if family == "sd2" and prediction is None and bias is not None and _HEURISTIC_NAME in shapes:
        values = [value for value in bias() if math.isfinite(value)]
        hint = "v_prediction" if len(values) > 1 and statistics.pstdev(values) > _HEURISTIC_LIMIT else "epsilon"
    return CheckpointInfo(
        path=path,
        family=family,
        layout="single",
        kind=kind,
        prediction_type=prediction,
        prediction_hint=hint,
        in_channels=first[1] if first is not None and len(first) == 4 else None,
        cross_attention_dim=_context_width(shapes),
        missing=_missing_parts(shapes) if family in ("sd1", "sd2") else (),
        ema_tensors=sum(map(key_maps.is_average, shapes)),
    )


def _family_of_names(shapes: Shapes) -> str:
    for family, test in _NAME_TESTS:
        if any(test(name) for name in shapes):
            return family
    context = _context_width(shapes)
    if context is not None:
        return _family_of_unet(shapes, context)
    if any(name.startswith((key_maps.VAE_PREFIX, "encoder.down", "decoder.up")) for name in shapes):
        return "vae"
    if any("text_model.encoder.layers." in name or "transformer.resblocks." in name for name in shapes):
        return "text-encoder"
    return "unknown"


_NAME_TESTS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("sdxl", lambda name: name.startswith("conditioner.embedders.1.")),
    ("sdxl-refiner", lambda name: name.startswith("conditioner.embedders.0.model.")),
    ("lora", looks_like_adapter),
    ("cascade", is_cascade_mark),
    ("controlnet", lambda name: name.startswith(("control_model.", "controlnet_cond_embedding.", "input_hint_block."))),
    ("embedding", lambda name: name in ("emb_params", "clip_l", "clip_g")),
)


def _family_of_unet(shapes: Shapes, context: int) -> str:
    """Tell SD1 from SD2: by the text encoder where there is one (sizes may be anything), else by the U-Net."""
    if any(name.startswith(f"{key_maps.UNET_PREFIX}label_emb.") for name in shapes):
        return "sdxl" if context == 2048 else "sdxl-refiner"
    if any(name.startswith(key_maps.TEXT_V2_PREFIX) for name in shapes):
        return "sd2"
    if any(name.startswith(key_maps.TEXT_V1_PREFIX) for name in shapes):
        return "sd1"
    if not any(name.startswith(key_maps.UNET_PREFIX) for name in shapes):
        return "unet"
    return {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl-refiner"}.get(context, "unknown")


def _context_width(shapes: Shapes) -> int | None:
    for name, shape in shapes.items():
        if name.endswith("attn2.to_k.weight") and not key_maps.is_average(name) and len(shape) == 2:
            return shape[1]
    return None


def _missing_parts(shapes: Shapes) -> tuple[str, ...]:
    parts = {"U-Net": key_maps.UNET_PREFIX, "text encoder": "cond_stage_model.", "VAE": key_maps.VAE_PREFIX}
    return tuple(part for part, prefix in parts.items() if not any(name.startswith(prefix) for name in shapes))


def _declared_prediction(shapes: Shapes, metadata: Mapping[str, str]) -> str | None:
    declared = metadata.get("modelspec.prediction_type", "").strip().lower()
    if declared in ("v", "v_prediction", "velocity"):
        return "v_prediction"
    if declared in ("epsilon", "eps"):
        return "epsilon"
    if "v_pred" in shapes:
        return "v_prediction"
    return None


def _bias_from_header(header: SafetensorsHeader) -> list[float]:
    info, raw = header.tensors[_HEURISTIC_NAME], read_tensor_bytes(header, _HEURISTIC_NAME)
    if info.dtype == "BF16":
        halves = struct.unpack(f"<{len(raw) // 2}H", raw)
        raw = struct.pack(f"<{len(halves)}I", *(value << 16 for value in halves))
    code = {"F64": "d", "F32": "f", "F16": "e", "BF16": "f"}.get(info.dtype)
    if code is None:
        return []
    return list(struct.unpack(f"<{len(raw) // struct.calcsize(code)}{code}", raw))


def _bias_from_tensors(tensors: Mapping[str, Any]) -> list[float]:
    return tensors[_HEURISTIC_NAME].float().reshape(-1).tolist()


# Diffusers folders -------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON table of a model folder.

    Raises:
        UserError: the file is missing, too large, or no JSON table.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"larger than {MAX_JSON_BYTES} bytes", where=str(path))
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError("no such file", "The model folder is incomplete", where=str(path)) from error
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise UserError("not valid JSON", "The model folder is damaged", where=str(path)) from error
    if not isinstance(value, dict):
        raise UserError("not a table of settings", "The model folder is damaged", where=str(path))
    return value


def _inspect_folder(path: Path) -> CheckpointInfo:
    index = path / "model_index.json"
    if not index.is_file():
        return _inspect_component(path)
    names = read_json(index)
    pipeline = str(names.get("_class_name", ""))
    parts = {"unet": "U-Net", "text_encoder": "text encoder", "vae": "VAE"}
    missing = tuple(label for part, label in parts.items() if not (path / part / "config.json").is_file())
    unet = read_json(path / "unet" / "config.json") if "U-Net" not in missing else {}
    context = unet.get("cross_attention_dim")
    context = context[0] if isinstance(context, list) and context else context
    prediction = None
    if (path / "scheduler" / "scheduler_config.json").is_file():
        prediction = read_json(path / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")
    return CheckpointInfo(
        path=path,
        family=_family_of_folder(path, pipeline, unet, context),
        layout="diffusers",
        kind="diffusers",
        prediction_type=prediction if prediction in ("epsilon", "v_prediction") else None,
        in_channels=unet.get("in_channels", 4) if unet else None,
        cross_attention_dim=context if isinstance(context, int) else None,
        missing=missing,
    )


def _family_of_folder(path: Path, pipeline: str, unet: Mapping[str, Any], context: Any) -> str:
    if "Cascade" in pipeline or "Wuerstchen" in pipeline:
        return "cascade"
    if unet.get("addition_embed_type") == "text_time" or "StableDiffusionXL" in pipeline:
        refiner = context == 1280 or "Refiner" in pipeline
        return "sdxl-refiner" if refiner else "sdxl"
    config = path / "text_encoder" / "config.json"
    if not unet or not config.is_file():
        return {768: "sd1", 1024: "sd2"}.get(context, "unknown")
    activation = read_json(config).get("hidden_act", "quick_gelu")
    return "sd2" if activation == "gelu" else "sd1"


def _inspect_component(path: Path) -> CheckpointInfo:
    """Judge a folder without `model_index.json`: one part of a pipeline, or nothing."""
    family = "unknown"
    if (path / "config.json").is_file():
        name = str(read_json(path / "config.json").get("_class_name", ""))
        family = {"AutoencoderKL": "vae", "ControlNetModel": "controlnet", "UNet2DConditionModel": "unet"}.get(
            name, family
        )
    if family == "unknown":
        held = ", ".join(sorted(item.name for item in path.iterdir())[:6]) or "nothing"
        hint = "A Diffusers model has model_index.json and the folders unet, text_encoder, vae, tokenizer, scheduler"
        raise UserError(f"a folder without model_index.json (it holds {held})", hint, where=str(path))
    return CheckpointInfo(path=path, family=family, layout="diffusers", kind="diffusers")
