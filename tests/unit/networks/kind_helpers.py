"""Tiny models to attach networks to, and layers on their own."""

import copy
from functools import cache
from pathlib import Path

import torch
from torch import nn

LAYERS = {
    "linear": (lambda: nn.Linear(12, 20), (2, 5, 12)),
    "wide": (lambda: nn.Linear(64, 96, bias=False), (2, 5, 64)),
    "1x1": (lambda: nn.Conv2d(8, 12, 1), (2, 8, 4, 4)),
    "3x3": (lambda: nn.Conv2d(8, 12, 3, padding=1, stride=2), (2, 8, 6, 6)),
    "wide 3x3": (lambda: nn.Conv2d(48, 64, 3, padding=1), (1, 48, 5, 5)),
}


def layer_and_input(kind, dtype=torch.float32):
    """A frozen layer with random weights and something to feed it with."""
    torch.manual_seed(1)
    make, shape = LAYERS[kind]
    layer = make().to(dtype).requires_grad_(False)
    return layer, torch.randn(shape, dtype=dtype)


def target_of(layer):
    from networks.targets import Target

    return Target("lora_unet_layer", "layer", layer)


def with_weight(layer, x, weight):
    """What the layer computes with another weight."""
    other = copy.copy(layer)
    other._parameters = dict(layer._parameters)
    other.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)
    return type(layer).forward(other, x)


def randomize(module, spread=0.3, seed=0):
    """Give every parameter values that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, spread, generator=generator)
    return module


@cache
def _models(family):
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from library.models.assemble import from_config
    from library.models.clip_text import build_text_encoder
    from library.models.random_models import random_parts
    from library.models.sd_attention import name_modules

    parts = random_parts(family)
    unet = from_config(UNet2DConditionModel, parts.unet_config)
    unet.load_state_dict(parts.unet)
    name_modules(unet)
    place = {"device": torch.device("cpu"), "dtype": torch.float32}
    text = build_text_encoder(parts.text_config, parts.text, **place)
    return text.requires_grad_(False).eval(), unet.requires_grad_(False).eval()


def tiny_models(family="sd1"):
    """A text encoder and a U-Net that may be changed."""
    return copy.deepcopy(_models(family))


@torch.no_grad()
def outputs(text, unet, seed=0):
    """What both compute for a fixed input."""
    generator = torch.Generator().manual_seed(seed)
    hidden = text(torch.arange(77)[None])
    latents = torch.randn((1, 4, 8, 8), generator=generator)
    return hidden, unet(latents, torch.tensor([10]), hidden).sample


def assert_same(one, other, **tolerance):
    for first, second in zip(one, other, strict=True):
        torch.testing.assert_close(first, second, **tolerance)


def differs(one, other):
    return all(not torch.allclose(first, second, atol=1e-3) for first, second in zip(one, other, strict=True))


def attached(module, models, dim=4, alpha=2.0, randomized=True, **arguments):
    """A new network of a network module, in the models' forward passes."""
    network = module.create_network(1.0, dim, alpha, None, *models, **arguments)
    network.apply_to(*models, True, True)
    if randomized:
        randomize(network, 0.2)
    return network.eval()


def reloaded(module, path, family="sd1", **arguments):
    """Models with a network made from a file and loaded with it, and the network."""
    models = tiny_models(family)
    network, _ = module.create_network_from_weights(1.0, str(path), None, *models, **arguments)
    network.apply_to(*models, True, True)
    network.load_weights(path)
    return models, network.eval()


def lycoris_preset(folder: Path) -> str:
    """A preset of LyCORIS that adapts the layers that networks here adapt with conv_dim."""
    path = folder / "preset.toml"
    path.write_text(
        "enable_conv = true\n"
        'unet_target_module = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]\n'
        "unet_target_name = []\n"
        'text_encoder_target_module = ["CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"]\n'
        "text_encoder_target_name = []\n"
    )
    return str(path)


def trained_by_lycoris(folder, algo, models, **arguments):
    """Attach a network of LyCORIS with random values, save it, and return (path, outputs)."""
    import lycoris.kohya

    arguments = {"preset": lycoris_preset(folder), "conv_dim": "4", "conv_alpha": "2", **arguments}
    network = lycoris.kohya.create_network(1.0, 4, 2.0, None, *models, algo=algo, **arguments)
    network.apply_to(*models, True, True)
    randomize(network, 0.2)
    path = folder / f"{algo}.safetensors"
    network.eval().save_weights(str(path), None, {})
    return path, outputs(*models)


def continued_by_lycoris(path, models):
    """Let LyCORIS make a network from a file, load it, and return what the models compute with it."""
    import lycoris.kohya

    with torch.no_grad():
        network, _ = lycoris.kohya.create_network_from_weights(1.0, str(path), None, *models)
    network.apply_to(*models, True, True)
    network.load_weights(str(path))
    network.eval()
    return outputs(*models)
