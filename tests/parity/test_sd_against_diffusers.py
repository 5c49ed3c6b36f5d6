"""The Stable Diffusion family equals diffusers and transformers on the same weights."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from library.contracts import Batch, BatchKey, StepKey
from library.models.family import WeightPlan
from library.models.options import TextOptions
from library.models.random_models import random_parts
from library.models.sd import StableDiffusion
from library.models.specs import SD1, SD2

pytestmark = pytest.mark.compat

SPECS = {"sd1": SD1, "sd2": SD2}
CAPTIONS = ["a photo of a cat!", ", ".join(f"word {number}" for number in range(70))]


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def parts(request):
    return request.param, random_parts(request.param)


def family_of(parts, **text):
    name, tensors = parts
    return StableDiffusion(SPECS[name], TextOptions(**text), tensors, WeightPlan())


def clip_of(parts):
    clip = CLIPTextModel(CLIPTextConfig(**parts[1].text_config)).eval()
    stripped = {name.removeprefix("text_model."): tensor for name, tensor in parts[1].text.items()}
    getattr(clip, "text_model", clip).load_state_dict(stripped)
    return clip


def clip_states(clip, ids, clip_skip):
    """What the reference computes for [N,77] ids: hidden_states[-n], then the final norm."""
    with torch.no_grad():
        out = clip(ids, output_hidden_states=True)
        if clip_skip is None:
            return out.last_hidden_state
        return getattr(clip, "text_model", clip).final_layer_norm(out.hidden_states[-clip_skip])


def batch_of(family, weights=False):
    encoded = [tokenizer.encode(text) for tokenizer in family.tokenizers for text in CAPTIONS]
    ids = torch.stack([torch.from_numpy(ids) for ids, _ in encoded])
    factors = torch.stack([torch.from_numpy(factor) for _, factor in encoded]) if weights else None
    key = BatchKey(StepKey(0, 0), 0, 0, True, True, 1.0, ())
    return Batch(
        key=key,
        captions=tuple(CAPTIONS),
        record_keys=("a", "b"),
        loss_weight=torch.ones(2),
        token_ids=(ids,),
        token_weights=None if factors is None else (factors,),
    )


@pytest.mark.parametrize("clip_skip", [None, 1, 2])
@pytest.mark.parametrize("length", [None, 150, 225])
def test_condition(parts, clip_skip, length):
    family = family_of(parts, clip_skip=clip_skip, max_token_length=length)
    batch = batch_of(family)
    hidden = family.condition(batch, None).hidden
    ids = batch.token_ids[0]
    clip = clip_of(parts)
    for row, caption in enumerate(ids):
        states = clip_states(clip, caption, clip_skip)
        expected = [states[0, 0], *(state for chunk in states for state in chunk[1:76]), states[-1, 76]]
        if length is None:
            expected = list(states[0])
        torch.testing.assert_close(hidden[row], torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert hidden.shape[1] == {None: 77, 150: 152, 225: 227}[length]


@pytest.mark.parametrize("length", [None, 150])
def test_weighted_condition(parts, length):
    family = family_of(parts, max_token_length=length, weighted_captions=True)
    batch = batch_of(family, weights=True)
    plain = family.condition(replace(batch, token_weights=None), None).hidden
    weights = torch.ones_like(batch.token_weights[0])
    weights[0, 0, 3] = 1.5
    weights[0, -1, 2] = 0.5
    hidden = family.condition(replace(batch, token_weights=(weights,)), None).hidden
    factors = torch.ones(plain.shape[:2])
    factors[0, 3] = 1.5
    factors[0, 2 if length is None else 77] = 0.5
    torch.testing.assert_close(hidden, plain * factors.unsqueeze(-1))


def test_cached_condition(parts):
    family = family_of(parts)
    batch = batch_of(family)
    arrays = family.text_arrays(batch.token_ids, None)
    cached = replace(batch, token_ids=(), text_arrays=arrays)
    torch.testing.assert_close(family.condition(cached, None).hidden, family.condition(batch, None).hidden)


def test_denoise(parts):
    family = family_of(parts)
    unet = UNet2DConditionModel(**parts[1].unet_config).eval()
    unet.load_state_dict(parts[1].unet)
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, 4, 8, 16, generator=generator)
    t = torch.tensor([3, 981])
    condition = family.condition(batch_of(family), None)
    with torch.no_grad():
        expected = unet(noisy, t, condition.hidden).sample
        torch.testing.assert_close(family.denoise(noisy, t, condition), expected)


def test_encode_and_decode(parts):
    family = family_of(parts)
    vae = AutoencoderKL(**parts[1].vae_config).eval()
    vae.load_state_dict(parts[1].vae)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.rand(2, 3, 64, 32, generator=generator) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        expected = posterior.sample(generator=torch.Generator().manual_seed(5))
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(5))
        latents = family.encode_latents(pixels, noise)
        torch.testing.assert_close(latents, expected)
        torch.testing.assert_close(family.scale_latents(latents), expected * 0.18215)
        torch.testing.assert_close(family.decode(latents * 0.18215), vae.decode(latents).sample, atol=1e-5, rtol=1e-4)
