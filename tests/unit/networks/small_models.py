"""A U-Net and a text encoder of a few layers, with the class names and the paths by which networks choose layers."""

from __future__ import annotations

import torch
from torch import nn

WIDTH = 8


class CLIPAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        return self.out_proj(self.k_proj(x) * self.v_proj(x) + self.q_proj(x))


class TextEncoder(nn.Module):
    """Paths `text_model.encoder.layers.<n>.self_attn.<k>_proj`."""

    def __init__(self):
        super().__init__()
        layers = [nn.ModuleDict({"self_attn": CLIPAttention()}) for _ in range(2)]
        self.text_model = nn.ModuleDict({"encoder": nn.ModuleDict({"layers": nn.ModuleList(layers)})})

    def forward(self, x):
        for layer in self.text_model["encoder"]["layers"]:
            x = x + layer["self_attn"](x)
        return x


class Transformer2DModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj_in = nn.Conv2d(WIDTH, WIDTH, 1)
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.proj_out = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x):
        inner = self.to_q(self.proj_in(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.proj_out(inner.sigmoid())


class ResnetBlock2D(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.time_emb_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.conv1(x) + self.time_emb_proj(x.mean((2, 3)))[:, :, None, None]


class Downsample2D(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


class Block(nn.Module):
    def __init__(self, *, down=False):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock2D()])
        self.attentions = nn.ModuleList([Transformer2DModel()])
        if down:
            self.downsamplers = nn.ModuleList([Downsample2D()])

    def forward(self, x):
        x = self.attentions[0](self.resnets[0](x))
        return self.downsamplers[0](x) if hasattr(self, "downsamplers") else x


class UNet(nn.Module):
    """Blocks 1 (and 3, the downsampler), 12 and 16 of the numbering of SD1."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(4, WIDTH, 1)
        self.down_blocks = nn.ModuleList([Block(down=True)])
        self.up_blocks = nn.ModuleList([Block(), Block()])
        self.mid_block = Block()
        del self.up_blocks[0].attentions

    def forward(self, x):
        x = self.mid_block(self.down_blocks[0](self.conv_in(x)))
        return self.up_blocks[1](self.up_blocks[0].resnets[0](x))


def small_models(seed=0, dtype=torch.float32):
    """A text encoder and a U-Net with frozen random weights."""
    torch.manual_seed(seed)
    models = TextEncoder().to(dtype), UNet().to(dtype)
    for model in models:
        model.requires_grad_(False)
    return models


def inputs(seed=1, batch=2, dtype=torch.float32):
    """States for the text encoder [B,5,8] and latents for the U-Net [B,4,6,6]."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 5, WIDTH, generator=generator).to(dtype),
        torch.randn(batch, 4, 6, 6, generator=generator).to(dtype),
    )


def outputs(models, seed=1, batch=2):
    states, latents = inputs(seed, batch, models[1].conv_in.bias.dtype)
    return models[0](states), models[1](latents)


def fill(network, seed=2, spread=0.3):
    """Give all parameters values other than the initial ones, which change nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator) * spread
                parameter.add_(noise.to(parameter.dtype))


def attached(module, models, *, dim=4, alpha=2.0, multiplier=1.0, filled=True, **kwargs):
    """A network of a module on small models, attached, with values that change something."""
    torch.manual_seed(3)
    network = module.create_network(multiplier, dim, alpha, None, *models, **kwargs)
    network.apply_to(*models, True, True)
    if filled:
        fill(network)
    return network
