"""Tiny ControlNets of every layout, with random weights; the original layout is written independently of the reader."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file


def control_net(family="sd1", seed=0, **changes):
    """A ControlNet of diffusers that fits the tiny models, whose convolutions do not start at zero."""
    from diffusers import ControlNetModel

    heads, linear, channels = (
        (8, False, (64, 32, 64, 64)) if family == "sd1" else ((1, 2, 1, 1), True, (64, 128, 64, 64))
    )
    settings = {
        "block_out_channels": channels,
        "cross_attention_dim": 64,
        "attention_head_dim": heads,
        "use_linear_projection": linear,
        "conditioning_embedding_out_channels": (8, 16, 24, 32),
        **changes,
    }
    net = ControlNetModel(**settings).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        fan = parameter[0].numel() if parameter.dim() > 1 else 100
        noise = torch.randn(parameter.shape, generator=generator) * fan**-0.5
        parameter.data = noise if parameter.dim() > 1 else noise + 0.5
    return net


def original_names(net) -> dict[str, torch.Tensor]:
    """The state dict under the names of the original layout, without prefix."""
    from library.checkpoints.key_maps import unet_to_file

    state = net.state_dict()
    own = ("controlnet_cond_embedding.", "controlnet_down_blocks.", "controlnet_mid_block.")
    shared = unet_to_file(name for name in state if not name.startswith(own))
    last = 2 * len(net.controlnet_cond_embedding.blocks) + 2
    places = {"conv_in": 0, "conv_out": last}
    renamed = {}
    for name, tensor in state.items():
        if name in shared:
            new = shared[name]
        elif match := re.match(r"controlnet_down_blocks\.(\d+)\.(.*)", name):
            new = f"zero_convs.{match[1]}.0.{match[2]}"
        elif match := re.match(r"controlnet_mid_block\.(.*)", name):
            new = f"middle_block_out.0.{match[1]}"
        else:
            place, kind = name.removeprefix("controlnet_cond_embedding.").rsplit(".", 1)
            number = places[place] if place in places else 2 * int(place.removeprefix("blocks.")) + 2
            new = f"input_hint_block.{number}.{kind}"
        renamed[new] = tensor.contiguous()
    return renamed


def write_control_net(net, target: Path, layout: str) -> Path:
    """Write a ControlNet: `folder`, `diffusers` (single file), `original`, `bare` (no prefix) or `ckpt`."""
    if layout == "folder":
        net.save_pretrained(target)
        return target
    if layout == "diffusers":
        save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, target)
        return target
    prefix = "" if layout == "bare" else "control_model."
    tensors = {prefix + name: tensor for name, tensor in original_names(net).items()}
    if layout == "ckpt":
        torch.save({"state_dict": tensors}, target)
    else:
        save_file(tensors, target)
    return target
