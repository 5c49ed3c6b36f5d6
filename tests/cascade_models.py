"""Small Stable Cascade networks with every parameter random, for tests that compare or run them."""

from __future__ import annotations

from dataclasses import replace

import torch

from library.checkpoints.cascade_configs import CONFIGS
from library.models.cascade.unet import CascadeUNet, StageInputs

SMALL_C = replace(
    CONFIGS["c", "1B"],
    c_hidden=(64, 64),
    heads=(4, 4),
    blocks_down=(1, 2),
    blocks_up=(2, 1),
    c_cond=64,
    c_text=32,
    c_pooled=32,
    c_image=16,
)
SMALL_B = replace(
    CONFIGS["b", "3B"],
    c_hidden=(16, 32, 64, 64),
    heads=(0, 0, 4, 4),
    blocks_down=(1, 1, 2, 1),
    blocks_up=(1, 2, 1, 1),
    c_cond=64,
    c_pooled=32,
)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomize(module, seed=0):
    """Give every parameter a random value of a harmless size; zeros would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.dim() in (2, 4) and parameter.shape[0] > 1 else 12
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    return module


def small_stage(config, seed=0):
    return randomize(CascadeUNet(config), seed).eval()


def inputs_c(batch=3):
    condition = StageInputs(noise(batch, 1, 32, seed=1), noise(batch, 77, 32, seed=2), noise(batch, 1, 16, seed=3))
    return noise(batch, 16, 6, 8), torch.linspace(0.1, 0.93, batch), condition


def inputs_b(size=(34, 50), batch=2):
    condition = StageInputs(noise(batch, 1, 32, seed=1), effnet=noise(batch, 16, 5, 7, seed=2))
    return noise(batch, 4, *size), torch.linspace(0.1, 0.93, batch), condition
