"""Models with random weights and true structure, for the quickstart, tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints.parts import ModelParts, SaveSettings
from library.checkpoints.save import is_folder_kind, save_checkpoint
from library.contracts import END_ID, START_ID
from library.models.assemble import from_config
from library.models.clip_text import make_text_encoder
from library.models.specs import stable_diffusion_family
from library.randomness import derive


@dataclass(frozen=True, slots=True)
class _Shape:
    """Widths and depths of a model; file layers of the text encoder of SD2 are one more than those in use."""

    unet: tuple[int, int, int, int]
    unet_head_width: int | None
    vae: tuple[int, int, int, int]
    text_width: int
    text_layers: int


_SHAPES = {
    ("sd1", "tiny"): _Shape((64, 32, 64, 64), None, (32, 64, 32, 32), 64, 2),
    ("sd2", "tiny"): _Shape((64, 128, 64, 64), 64, (32, 64, 32, 32), 64, 2),
    ("sd1", "thin"): _Shape((64, 32, 64, 64), None, (32, 64, 32, 32), 64, 12),
    ("sd1", "full"): _Shape((320, 640, 1280, 1280), None, (128, 256, 512, 512), 768, 12),
    ("sd2", "full"): _Shape((320, 640, 1280, 1280), 64, (128, 256, 512, 512), 1024, 23),
}

_SD1_HEADS = 8
_HEAD_WIDTH = 64
_VOCABULARY = 49408
_LATENT_SPREAD = 16.0
_LATENT_LOG_VARIANCE = -8.0
_V_SPREAD = 5.0


def random_parts(family: str = "sd1", size: str = "tiny", *, seed: int = 0) -> ModelParts:
    """Return the parts of a random Stable Diffusion model; equal seeds give equal bits."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    shape = _SHAPES[family, size]
    configs = (_unet_config(shape), _text_config(shape), _vae_config(shape))
    with torch.device("meta"):
        modules: tuple[nn.Module, ...] = (
            from_config(UNet2DConditionModel, configs[0]),
            make_text_encoder(configs[1]),
            from_config(AutoencoderKL, configs[2]),
        )
    unet, text, vae = (_fill(part, module, seed) for part, module in zip(("unet", "text", "vae"), modules, strict=True))
    _spread_latents(vae)
    return ModelParts(unet, configs[0], text, configs[1], vae, configs[2])


def _fill(part: str, module: nn.Module, seed: int) -> dict[str, Tensor]:
    tensors = {}
    for name, like in module.state_dict().items():
        generator = torch.Generator().manual_seed(derive(seed, "random model", part, name) >> 1)
        tensors[name] = _random(name, tuple(like.shape), generator)
    return tensors


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw a tensor of the usual size for its kind: products keep the size of their input."""
    if len(shape) == 1:
        noise = torch.empty(shape).uniform_(-0.05, 0.05, generator=generator)
        return noise + 1 if "norm" in name and name.endswith("weight") else noise
    if "embedding" in name and name.startswith("text_model"):
        return torch.empty(shape).normal_(0, 0.02, generator=generator)
    bound = (shape[1] * (shape[2] * shape[3] if len(shape) == 4 else 1)) ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _spread_latents(vae: dict[str, Tensor]) -> None:
    """Let latents follow the picture, with the spread and the small posterior noise of a trained VAE."""
    weight, bias = vae["quant_conv.weight"], vae["quant_conv.bias"]
    channels = weight.shape[0] // 2
    weight[:channels] = 0
    weight[:channels, :channels, 0, 0] = _LATENT_SPREAD * torch.eye(channels)
    weight[channels:] *= 0.1
    bias[channels:] = _LATENT_LOG_VARIANCE


def _unet_config(shape: _Shape) -> dict[str, Any]:
    heads: int | list[int] = _SD1_HEADS
    if shape.unet_head_width is not None:
        heads = [width // shape.unet_head_width for width in shape.unet]
    return {
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "block_out_channels": list(shape.unet),
        "layers_per_block": 2,
        "cross_attention_dim": shape.text_width,
        "attention_head_dim": heads,
        "use_linear_projection": shape.unet_head_width is not None,
    }


def _vae_config(shape: _Shape) -> dict[str, Any]:
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": list(shape.vae),
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 512,
        "scaling_factor": 0.18215,
    }


def _text_config(shape: _Shape) -> dict[str, Any]:
    return {
        "vocab_size": _VOCABULARY,
        "hidden_size": shape.text_width,
        "intermediate_size": shape.text_width * 4,
        "num_hidden_layers": shape.text_layers,
        "num_attention_heads": shape.text_width // _HEAD_WIDTH,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu" if shape.unet_head_width is None else "gelu",
        "bos_token_id": START_ID,
        "eos_token_id": END_ID,
    }


def make_random_sd(
    target: str | Path,
    family: str = "sd1",
    size: str = "tiny",
    layout: str = "safetensors",
    *,
    seed: int = 0,
    v_prediction: bool = False,
) -> Path:
    """Write a Stable Diffusion model with random weights and return its path.

    Args:
        target: file or folder to write; a file gets the suffix of its layout if it has another one.
        family: `sd1` or `sd2`.
        size: `tiny` (a few megabytes), `full`, or `thin` (`sd1` only: all layers of `full`, as narrow as `tiny`).
        layout: `safetensors`, `ckpt`, `diffusers` (`.bin` weights) or `diffusers_safetensors`.
        seed: equal seeds give equal bytes.
        v_prediction: mark the model as one that predicts velocity.
    """
    spec = stable_diffusion_family(family, v_prediction=v_prediction)
    target = Path(target)
    if not is_folder_kind(layout) and target.suffix != f".{layout}":
        target = target.with_name(f"{target.name}.{layout}")
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": spec.architecture,
        "modelspec.prediction_type": "v" if v_prediction else "epsilon",
        "modelspec.title": f"random {size} {family}",
    }
    parts = random_parts(family, size, seed=seed)
    if v_prediction:
        # By the spread of this tensor other programs tell which prediction an SD2 file makes.
        parts.unet["up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"].mul_(_V_SPREAD)
    return save_checkpoint(target, layout, parts, spec=spec, settings=SaveSettings(metadata=metadata))
