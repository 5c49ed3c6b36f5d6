"""Stable Cascade's networks without the toolkit: those of diffusers and transformers, and EfficientNet by hand.

Stages keep diffusers' names; EfficientNet and ControlNets are functions of the tensors in their files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as functional
from safetensors.torch import load_file
from torch import Tensor, nn

SHARED = {"clip_seq": 4, "kernel_size": 3, "dropout": 0.0, "self_attn": True, "conditioning_dim": 32}
SIZES = {
    "c": {
        "block_out_channels": (32, 32),
        "num_attention_heads": (2, 2),
        "block_types_per_layer": (("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
        "clip_text_in_channels": 32,
        "clip_text_pooled_in_channels": 32,
        "clip_image_in_channels": 16,
        "switch_level": (False,),
    },
    "b": {
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 2,
        "block_out_channels": (16, 16, 32, 32),
        "num_attention_heads": (-1, -1, 2, 2),
        "down_num_layers_per_block": (1, 1, 1, 1),
        "up_num_layers_per_block": (1, 1, 1, 1),
        "down_blocks_repeat_mappers": (1, 1, 1, 1),
        "up_blocks_repeat_mappers": (2, 2, 2, 2),
        "block_types_per_layer": (("SDCascadeResBlock", "SDCascadeTimestepBlock"),) * 2
        + (("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
        "clip_text_pooled_in_channels": 32,
        "effnet_in_channels": 16,
        "pixel_mapper_in_channels": 3,
        "timestep_conditioning_type": ("sca",),
    },
}
"""What diffusers is told of the tiny models of `library.models.random_cascade`."""


def read_stage(path: Path) -> dict[str, Tensor]:
    """The tensors of an official file in the names of diffusers, by diffusers' own conversion."""
    from diffusers.loaders.single_file_utils import convert_stable_cascade_unet_single_file_to_diffusers

    return convert_stable_cascade_unet_single_file_to_diffusers(load_file(path))


def make_stage(path: Path, stage: str = "c", blocks: tuple[int, int] = (1, 1)) -> nn.Module:
    """The network of diffusers with the weights of an official file; `blocks` of stage C, down path."""
    from diffusers import StableCascadeUNet

    layers = {"down_num_layers_per_block": blocks, "up_num_layers_per_block": blocks[::-1]} if stage == "c" else {}
    network = StableCascadeUNet(**SHARED, **SIZES[stage], **layers)
    network.load_state_dict(read_stage(path), strict=True)
    return network


def make_stage_a(path: Path) -> nn.Module:
    from diffusers.pipelines.stable_cascade.pipeline_stable_cascade import PaellaVQModel

    tensors = {name.replace("codebook", "embedding"): tensor for name, tensor in load_file(path).items()}
    model = PaellaVQModel(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=8, scale_factor=0.43)
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def make_text(path: Path) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPTextConfig(**sizes, projection_dim=32, vocab_size=49408, hidden_act="gelu", eos_token_id=49407)
    model = CLIPTextModelWithProjection(config).eval()
    model.load_state_dict(load_file(path), strict=True)
    return model


def make_vision(path: Path) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = CLIPVisionConfig(**sizes, projection_dim=16, image_size=28, patch_size=14, hidden_act="quick_gelu")
    model = CLIPVisionModelWithProjection(config).eval()
    model.load_state_dict(load_file(path), strict=True)
    return model


def _conv(x: Tensor, tensors: Mapping[str, Tensor], name: str, stride: int = 1, *, active: bool = True) -> Tensor:
    weight = tensors[f"{name}.0.weight"]
    # Official ControlNets that do not look at RGB have no padding at the first convolution.
    bare = name == "backbone.0" and weight.shape[1] != 3
    padding = 0 if bare else weight.shape[-1] // 2
    y = functional.conv2d(x, weight, stride=stride, padding=padding, groups=x.shape[1] // weight.shape[1])
    mean, var, gain, bias = (tensors[f"{name}.1.{end}"] for end in ("running_mean", "running_var", "weight", "bias"))
    y = (y - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + 1e-3).sqrt() * gain.view(-1, 1, 1) + bias.view(-1, 1, 1)
    return y * y.sigmoid() if active else y


def features(x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """EfficientNet-V2 with one block for each of the six groups, down to 1/32 of the size."""
    x = _conv(x, tensors, "backbone.0", 2)
    for group, stride in enumerate((1, 2, 2, 2, 1, 2), start=1):
        block = f"backbone.{group}.0.block"
        if group <= 3:
            y = _conv(x, tensors, f"{block}.0", stride)
            y = _conv(y, tensors, f"{block}.1", active=False) if group > 1 else y
        else:
            y = _conv(_conv(x, tensors, f"{block}.0"), tensors, f"{block}.1", stride)
            inner, outer = ([tensors[f"{block}.2.{layer}.{kind}"] for kind in ("weight", "bias")] for layer in
                            ("fc1", "fc2"))  # fmt: skip
            squeezed = functional.silu(functional.conv2d(y.mean((2, 3), keepdim=True), *inner))
            y = _conv(y * functional.conv2d(squeezed, *outer).sigmoid(), tensors, f"{block}.3", active=False)
        x = x + y if stride == 1 and x.shape == y.shape else y
    return _conv(x, tensors, "backbone.7")


def effnet_latents(pixels: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Latents of stage C for pixels in [0,1]."""
    mean, std = (torch.tensor(row).view(3, 1, 1) for row in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    mapped = functional.conv2d(features((pixels - mean) / std, tensors), tensors["mapper.0.weight"])
    shift, spread = (tensors[f"mapper.1.running_{kind}"].view(-1, 1, 1) for kind in ("mean", "var"))
    return (mapped - shift) / (spread + 1e-5).sqrt()


def inject(stage: nn.Module, residuals: Callable[[], Mapping[int, Tensor]]) -> None:
    """Add what a ControlNet makes before the residual blocks of diffusers' network, by their numbers."""
    from diffusers.models.unets.unet_stable_cascade import SDCascadeResBlock

    blocks = [block for block in stage.modules() if isinstance(block, SDCascadeResBlock)]
    for number, block in enumerate(blocks):

        def add(_, inputs, number=number):
            residual = residuals().get(number)
            if residual is None:
                return inputs
            size = inputs[0].shape[-2:]
            return (
                inputs[0] + functional.interpolate(residual, size, mode="bilinear", align_corners=True),
                *inputs[1:],
            )

        block.register_forward_pre_hook(add)


def control_residuals(guide: Tensor, tensors: Mapping[str, Tensor], blocks: tuple[int, ...]) -> dict[int, Tensor]:
    seen = features(guide, tensors)
    found = {}
    for place, block in enumerate(blocks):
        first, last = (tensors[f"projections.{place}.{layer}.weight"] for layer in (0, 2))
        found[block] = functional.conv2d(functional.leaky_relu(functional.conv2d(seen, first), 0.2), last)
    return found
