"""Our LoRA files in diffusers: they load whole, and fused they give W + alpha / rank * up @ down."""

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from library.checkpoints.lora_file import read_lora
from library.models.random_models import random_parts
from library.models.specs import SD1
from networks import lora

pytest.importorskip("peft")

ALPHA = 2.0


def diffusers_pipeline(parts):
    """A pipeline of diffusers' and transformers' own classes on the weights of our random model."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = UNet2DConditionModel.from_config(parts.unet_config)
    unet.load_state_dict(parts.unet)
    clip = CLIPTextModel(CLIPTextConfig(**parts.text_config))
    inner = getattr(clip, "text_model", clip)
    inner.load_state_dict({name.removeprefix("text_model."): tensor for name, tensor in parts.text.items()})
    vae = AutoencoderKL.from_config(parts.vae_config)
    return StableDiffusionPipeline(vae, clip, None, unet, DDIMScheduler(), None, None, requires_safety_checker=False)


def network_file(parts, folder, **arguments):
    """Save a network with values in all of its tensors; return its path."""
    from library.models.family import WeightPlan
    from library.models.options import TextOptions
    from library.models.sd import StableDiffusion

    family = StableDiffusion(SD1, TextOptions(), parts, WeightPlan())
    torch.manual_seed(0)
    network = lora.create_network(1.0, 4, ALPHA, None, family.text_encoder, family.unet, **arguments)
    network.apply_to(family.text_encoder, family.unet, True, True)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    network.save_weights(folder / "network.safetensors", None, {"ss_network_module": "networks.lora"})
    return folder / "network.safetensors"


@pytest.mark.parametrize("arguments", [{}, {"conv_dim": "2", "conv_alpha": "1"}], ids=["linear", "conv"])
def test_fused_weights_are_the_sum(tmp_path, arguments):
    parts = random_parts("sd1")
    path = network_file(parts, tmp_path, **arguments)
    pipeline = diffusers_pipeline(parts)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    fused = {**pipeline.unet.state_dict()}
    inner = getattr(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    fused |= {f"text_model.{name}": tensor for name, tensor in inner.state_dict().items()}
    before = {**parts.unet, **parts.text}
    read = read_lora(path)
    changed = set()
    for name, module in read.modules.items():
        key = f"{read.places[name][1]}.weight"
        changed.add(key)
        up, down = (module.tensors[f"lora_{side}.weight"].flatten(1) for side in ("up", "down"))
        rank = down.shape[0]
        scale = float(module.tensors["alpha"]) / rank
        assert scale == (ALPHA / 4 if rank == 4 else 1 / 2)
        wanted = before[key] + (scale * up @ down).view(before[key].shape)
        torch.testing.assert_close(fused[key], wanted, rtol=1e-5, atol=1e-6)
    assert len(changed) == len(read.modules)
    assert any(key.startswith("text_model.") for key in changed)
    assert any(".conv1." in key for key in changed) == bool(arguments)
    for key in set(before) - changed:
        torch.testing.assert_close(fused[key], before[key], rtol=0, atol=0)
