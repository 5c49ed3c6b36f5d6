"""Stable Cascade models with random weights and true structure, in real files: for tests, quickstart and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints import cascade_configs
from library.checkpoints.cascade_configs import CascadeConfig
from library.checkpoints.cascade_parts import (
    ControlNetConfig,
    EffNetConfig,
    MBStage,
    PreviewerConfig,
    StageAConfig,
    default_control_blocks,
)
from library.checkpoints.key_maps_cascade import Part
from library.checkpoints.parts import SaveSettings
from library.checkpoints.save_cascade import save_part
from library.contracts import END_ID, START_ID
from library.models.cascade.control_net import CascadeControlNet
from library.models.cascade.effnet import EffNetEncoder
from library.models.cascade.previewer import Previewer
from library.models.cascade.stage_a import StageA
from library.models.cascade.text import make_projected_text_encoder
from library.models.cascade.unet import CascadeUNet
from library.models.cascade.vision import make_image_encoder
from library.randomness import derive

_TEXT_WIDTH, _POOLED, _IMAGE = 32, 32, 16
_CALIBRATION = 8
_CALIBRATION_SIDE = 64

TINY_C = replace(
    cascade_configs.CONFIGS["c", "3.6B"],
    c_hidden=(32, 32),
    heads=(2, 2),
    blocks_down=(1, 1),
    blocks_up=(1, 1),
    c_cond=32,
    c_text=_TEXT_WIDTH,
    c_pooled=_POOLED,
    c_image=_IMAGE,
)
TINY_B = replace(
    cascade_configs.CONFIGS["b", "700M"],
    c_hidden=(16, 16, 32, 32),
    heads=(0, 0, 2, 2),
    blocks_down=(1, 1, 1, 1),
    blocks_up=(1, 1, 1, 1),
    c_cond=32,
    c_pooled=_POOLED,
)
TINY_A = StageAConfig(features=16, bottleneck=1, codebook=8)
TINY_EFFNET = EffNetConfig(
    stem=8, stages=tuple(MBStage(8, 1, expansion, fused) for expansion, fused in
                         ((1, True), (2, True), (2, True), (2, False), (2, False), (2, False))), width=16
)  # fmt: skip
TINY_PREVIEWER = PreviewerConfig(features=16)
TINY_TEXT: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": START_ID,
    "eos_token_id": END_ID,
    "pad_token_id": END_ID,
    "hidden_act": "gelu",
    "hidden_size": _TEXT_WIDTH,
    "intermediate_size": 2 * _TEXT_WIDTH,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "projection_dim": _POOLED,
    "vocab_size": 49408,
}
TINY_VISION: dict[str, Any] = {
    "hidden_act": "quick_gelu",
    "hidden_size": _IMAGE,
    "image_size": 28,
    "intermediate_size": 2 * _IMAGE,
    "layer_norm_eps": 1e-05,
    "model_type": "clip_vision_model",
    "num_attention_heads": 1,
    "num_channels": 3,
    "num_hidden_layers": 2,
    "patch_size": 14,
    "projection_dim": _IMAGE,
}
TINY_CONTROL = ControlNetConfig(
    "effnet", 1, 32, (0, 3), features=TINY_EFFNET.width, effnet=replace(TINY_EFFNET, c_in=1)
)


@dataclass(frozen=True, slots=True)
class CascadeFiles:
    """Where the files of one random model are, named as the options that take them."""

    stage_c: Path
    stage_b: Path
    stage_a: Path
    effnet: Path
    previewer: Path
    text: Path
    vision: Path
    controlnet: Path


@dataclass(frozen=True, slots=True)
class RandomPart:
    """A part with random weights: tensors by the names in memory, and its sizes."""

    tensors: dict[str, Tensor]
    config: Any


_MAKERS: dict[Part, tuple[Any, Callable[[Any], nn.Module]]] = {
    "stage_c": (TINY_C, CascadeUNet),
    "stage_b": (TINY_B, CascadeUNet),
    "stage_a": (TINY_A, StageA),
    "effnet": (TINY_EFFNET, EffNetEncoder),
    "previewer": (TINY_PREVIEWER, Previewer),
    "text": (TINY_TEXT, make_projected_text_encoder),
    "vision": (TINY_VISION, make_image_encoder),
    "controlnet": (TINY_CONTROL, CascadeControlNet),
}


def random_part(part: Part, config: Any = None, *, seed: int = 0) -> RandomPart:
    """Return a part with random weights; equal seeds give equal bits.

    Latents follow the picture and have about unit spread, as those of the trained encoders do.

    Args:
        part: which one.
        config: its sizes; None for tiny ones.
        seed: what the weights follow from.
    """
    usual, make = _MAKERS[part]
    config = usual if config is None else config
    with torch.device("meta"):
        module = make(config)
    tensors = {
        name: _random(name, like, torch.Generator().manual_seed(derive(seed, "random cascade", part, name) >> 1))
        for name, like in module.state_dict().items()
    }
    if part in ("effnet", "stage_a"):
        _calibrate(make(config), tensors, seed)
    return RandomPart(tensors, config)


def _random(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a tensor of the usual size for its kind: products keep the size of their input."""
    shape = tuple(like.shape)
    if name.endswith("num_batches_tracked"):
        return torch.ones((), dtype=torch.int64)
    if name.endswith("gammas"):
        # Scales and shifts of the norms near nothing; what a block adds, at half strength.
        return torch.tensor([0.0, 0.0, 0.5, 0.0, 0.0, 0.5])
    if len(shape) == 1 or name.endswith((".gamma", ".beta")):
        noise = torch.empty(shape).uniform_(-0.05, 0.05, generator=generator)
        return noise + 1 if name.endswith(("running_var", "norm.weight")) or _is_batch_norm(name, shape) else noise
    if "embedding.weight" in name or "codebook" in name:
        return torch.empty(shape).normal_(0, 0.02, generator=generator)
    bound = (3 / (like[0].numel() or 1)) ** 0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _is_batch_norm(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a row is the weight of a norm: linear layers and convolutions have weights of more dimensions."""
    return name.endswith("weight") and len(shape) == 1


@torch.no_grad()
def _calibrate(module: nn.Module, tensors: dict[str, Tensor], seed: int) -> None:
    """Give every batch norm the statistics that random pictures have there, layer by layer."""
    module.load_state_dict(tensors)
    generator = torch.Generator().manual_seed(derive(seed, "random cascade", "pictures") >> 1)
    coarse = torch.rand(_CALIBRATION, 3, 4, 4, generator=generator)
    pixels = nn.functional.interpolate(coarse, _CALIBRATION_SIDE, mode="bicubic").clamp(0, 1)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(_measure)
    module.encode(pixels) if isinstance(module, StageA) else module(pixels)
    state = module.state_dict()
    tensors.update({name: state[name] for name in tensors if "running_" in name})


def _measure(layer: Any, inputs: tuple[Tensor, ...]) -> None:
    (x,) = inputs
    layer.running_mean.copy_(x.mean((0, 2, 3)))
    layer.running_var.copy_(x.var((0, 2, 3)).clamp_min(1e-3))


def make_random_cascade(folder: str | Path, *, seed: int = 0, config_c: CascadeConfig = TINY_C) -> CascadeFiles:
    """Write all files of a tiny Stable Cascade model in the official layout and return their paths.

    Args:
        folder: where to; it is made.
        seed: equal seeds give equal bytes.
        config_c: sizes of stage C; the widths of text and image must stay those of `TINY_C`.
    """
    folder = Path(folder)
    blocks = default_control_blocks(config_c.residual_blocks)
    control = replace(TINY_CONTROL, c_out=config_c.c_hidden[0], blocks=blocks)
    chosen: dict[Part, tuple[str, Any]] = {
        "stage_c": ("stage_c", config_c),
        "stage_b": ("stage_b", None),
        "stage_a": ("stage_a", None),
        "effnet": ("effnet_encoder", None),
        "previewer": ("previewer", None),
        "text": ("text_model", None),
        "vision": ("image_model", None),
        "controlnet": ("controlnet", control),
    }
    paths = {}
    for part, (name, config) in chosen.items():
        made = random_part(part, config, seed=seed)
        metadata = {"modelspec.title": f"random {name}"}
        paths[part] = save_part(
            folder / f"{name}.safetensors", part, made.tensors, made.config, SaveSettings(metadata=metadata)
        )
    return CascadeFiles(**paths)
