"""Configurations of SD1 and SD2 parts, read off tensor shapes, and the constant files of a Diffusers folder.

A single-file checkpoint holds no configuration; everything that shapes cannot tell (heads, activation, ids) is what all
models of the family share. Names here are the memory names of `key_maps`. Light.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from library.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]

MAX_PARAMETERS = 20_000_000_000
DIFFUSERS_VERSION = "0.35.0"
_MAX_BLOCKS = 8
_CHANNELS_PER_HEAD = 64
_SD1_HEADS = 8

TOKENIZER_CONFIG_V1: dict[str, Any] = {
    "add_prefix_space": False,
    "bos_token": "<|startoftext|>",
    "do_lower_case": True,
    "eos_token": "<|endoftext|>",
    "errors": "replace",
    "model_max_length": 77,
    "pad_token": "<|endoftext|>",
    "tokenizer_class": "CLIPTokenizer",
    "unk_token": "<|endoftext|>",
}
SPECIAL_TOKENS_V1: dict[str, Any] = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
}


def tokenizer_files(family: str) -> dict[str, dict[str, Any]]:
    """Return the JSON files of a Diffusers `tokenizer` folder besides vocabulary and merges; SD2 pads with ``!``."""
    pad = "!" if family == "sd2" else "<|endoftext|>"
    return {
        "tokenizer_config.json": {**TOKENIZER_CONFIG_V1, "pad_token": pad},
        "special_tokens_map.json": {**SPECIAL_TOKENS_V1, "pad_token": pad},
    }


def scheduler_config(prediction_type: str, *, zero_terminal_snr: bool = False) -> dict[str, Any]:
    """Return the `scheduler_config.json` of the family's training schedule, for DDIM.

    Args:
        prediction_type: ``epsilon`` or ``v_prediction``.
        zero_terminal_snr: the model was trained with betas rescaled to a terminal SNR of zero.
    """
    config: dict[str, Any] = {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": prediction_type,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    }
    if zero_terminal_snr:
        config.update(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    return config


def model_index() -> dict[str, Any]:
    """Return the `model_index.json` of a Stable Diffusion folder without safety checker."""
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _count(shapes: Shapes, pattern: str) -> int:
    """Return one more than the highest number that `pattern` captures among the names."""
    expression = re.compile(pattern)
    return max((int(match[1]) for name in shapes if (match := expression.match(name))), default=-1) + 1


def _has(shapes: Shapes, start: str) -> bool:
    return any(name.startswith(start) for name in shapes)


def _shape(shapes: Shapes, name: str, part: str) -> tuple[int, ...]:
    if name not in shapes:
        raise UserError(
            f"the {part} is incomplete: {name!r} is missing", "Is this a Stable Diffusion 1.x or 2.x model?"
        )
    return shapes[name]


def unet_config(shapes: Shapes, family: str, *, sample_size: int = 64) -> dict[str, Any]:
    """Derive the arguments of diffusers' `UNet2DConditionModel` from tensor shapes.

    Args:
        shapes: shapes by diffusers' names.
        family: ``sd1`` (8 heads at every level) or ``sd2`` (one head per 64 channels).
        sample_size: height and width of the latents that the model was made for.

    Raises:
        UserError: a tensor that the structure depends on is missing, or the number of blocks is absurd.
    """
    encoder = unet_encoder_config(shapes, family)
    up = [_has(shapes, f"up_blocks.{i}.attentions.") for i in range(len(encoder["block_out_channels"]))]
    return {
        "sample_size": sample_size,
        "out_channels": _shape(shapes, "conv_out.weight", "U-Net")[0],
        "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in up],
        **encoder,
    }


def unet_encoder_config(shapes: Shapes, family: str, part: str = "U-Net") -> dict[str, Any]:
    """Derive those arguments of `unet_config` that the downward half determines, which a ControlNet shares.

    Args:
        shapes: shapes by diffusers' names.
        family: as for `unet_config`.
        part: name of the model for messages.

    Raises:
        UserError: a tensor that the structure depends on is missing, or the number of blocks is absurd.
    """
    levels = _count(shapes, r"down_blocks\.(\d+)\.resnets\.0\.conv1\.weight$")
    if not 1 <= levels <= _MAX_BLOCKS:
        raise UserError(f"the {part} has {levels} levels", "Is this a Stable Diffusion 1.x or 2.x model?")
    convolutions = [_shape(shapes, f"down_blocks.{i}.resnets.0.conv1.weight", part) for i in range(levels)]
    channels = [shape[0] for shape in convolutions]
    context = {shape[-1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")}
    if len(context) != 1:
        raise UserError(
            f"the {part}'s cross attention has widths {sorted(context)}", "Is this a Stable Diffusion model?"
        )
    linear = any(len(shape) == 2 for name, shape in shapes.items() if name.endswith(".proj_in.weight"))
    down = [_has(shapes, f"down_blocks.{i}.attentions.") for i in range(levels)]
    heads = [max(1, width // _CHANNELS_PER_HEAD) for width in channels] if family == "sd2" else _SD1_HEADS
    return {
        "in_channels": _shape(shapes, "conv_in.weight", part)[1],
        "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in down],
        "block_out_channels": channels,
        "layers_per_block": _count(shapes, r"down_blocks\.0\.resnets\.(\d+)\."),
        "cross_attention_dim": context.pop(),
        "attention_head_dim": heads,
        "use_linear_projection": linear,
    }


def control_net_config(shapes: Shapes, family: str) -> dict[str, Any]:
    """Derive the arguments of diffusers' `ControlNetModel` from tensor shapes by diffusers' names.

    Raises:
        UserError: a tensor that the structure depends on is missing, or the number of blocks is absurd.
    """
    part, picture = "ControlNet", "controlnet_cond_embedding"
    stages = _count(shapes, picture + r"\.blocks\.(\d+)\.weight$") // 2
    if not 1 <= stages <= _MAX_BLOCKS:
        raise UserError(f"the {part} reads its guide picture in {stages} stages", "Is the file complete?")
    first = _shape(shapes, f"{picture}.conv_in.weight", part)
    # Each stage is one convolution that keeps the width and one that changes it to that of the next stage.
    wider = [_shape(shapes, f"{picture}.blocks.{2 * stage + 1}.weight", part)[0] for stage in range(stages)]
    return {
        **unet_encoder_config(shapes, family, part),
        "conditioning_channels": first[1],
        "conditioning_embedding_out_channels": [first[0], *wider],
    }


def vae_config(shapes: Shapes, *, sample_size: int = 512) -> dict[str, Any]:
    """Derive the arguments of diffusers' `AutoencoderKL` from tensor shapes by diffusers' names.

    Raises:
        UserError: a tensor that the structure depends on is missing, or the number of blocks is absurd.
    """
    levels = _count(shapes, r"encoder\.down_blocks\.(\d+)\.resnets\.0\.conv1\.weight$")
    if not 1 <= levels <= _MAX_BLOCKS:
        raise UserError(f"the VAE has {levels} levels", "Is this a Stable Diffusion 1.x or 2.x model?")
    blocks = [_shape(shapes, f"encoder.down_blocks.{i}.resnets.0.conv1.weight", "VAE") for i in range(levels)]
    return {
        "in_channels": _shape(shapes, "encoder.conv_in.weight", "VAE")[1],
        "out_channels": _shape(shapes, "decoder.conv_out.weight", "VAE")[0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [shape[0] for shape in blocks],
        "layers_per_block": _count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": _shape(shapes, "decoder.conv_in.weight", "VAE")[1],
        "act_fn": "silu",
        "norm_num_groups": 32,
        "sample_size": sample_size,
        "scaling_factor": 0.18215,
    }


def text_config(shapes: Shapes, family: str) -> dict[str, Any]:
    """Derive the arguments of transformers' `CLIPTextConfig` from tensor shapes by memory names.

    One head per 64 channels; SD1 uses the quick GELU, SD2 the exact one.

    Raises:
        UserError: a tensor that the structure depends on is missing.
    """
    part = "text encoder"
    vocabulary, hidden = _shape(shapes, "text_model.embeddings.token_embedding.weight", part)[:2]
    sd2 = family == "sd2"
    return {
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "gelu" if sd2 else "quick_gelu",
        "hidden_size": hidden,
        "intermediate_size": _shape(shapes, "text_model.encoder.layers.0.mlp.fc1.weight", part)[0],
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": _shape(shapes, "text_model.embeddings.position_embedding.weight", part)[0],
        "model_type": "clip_text_model",
        "num_attention_heads": max(1, hidden // _CHANNELS_PER_HEAD),
        "num_hidden_layers": _count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        "pad_token_id": 1,
        "projection_dim": 512 if sd2 else hidden,
        "vocab_size": vocabulary,
    }


def check_config(given: Mapping[str, Any], derived: Mapping[str, Any], where: str) -> None:
    """Compare a `config.json` with what the weights beside it are, before anything is built from it.

    Numbers of heads and other things that shapes do not tell are left alone. This also catches absurd sizes.

    Raises:
        UserError: a size in the file contradicts the weights.
    """
    compared = (
        "in_channels",
        "out_channels",
        "block_out_channels",
        "layers_per_block",
        "cross_attention_dim",
        "latent_channels",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "vocab_size",
        "max_position_embeddings",
    )
    for name in compared:
        if name not in derived or name not in given:
            continue
        expected, found = derived[name], given[name]
        if isinstance(found, (list, tuple)) and not isinstance(expected, (list, tuple)):
            found = found[0] if len(set(map(str, found))) == 1 else found
        if found != expected and found is not None:
            shown = repr(found)[:80]
            hint = "The configuration belongs to another model"
            raise UserError(f"says {name} {shown}, but the weights have {expected}", hint, where=where)


def parameter_count(shapes: Shapes) -> int:
    """Return the number of numbers in all tensors."""
    total = 0
    for shape in shapes.values():
        count = 1
        for length in shape:
            count *= length
        total += count
    return total
