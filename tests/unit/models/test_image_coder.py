import logging

import pytest
import torch

from library.models.random_models import random_parts
from library.models.vae import ImageCoder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts():
    return random_parts("sd1")


def coder(parts, dtype=torch.float16, **changes):
    return ImageCoder({**parts.vae, **changes}, parts.vae_config, device=CPU, dtype=dtype)


def overflowing(parts):
    """Weights that leave the range of float16, and come back to it, inside encoder and decoder."""
    return {
        "encoder.conv_in.weight": parts.vae["encoder.conv_in.weight"] * 2e5,
        "decoder.conv_in.weight": parts.vae["decoder.conv_in.weight"] * 2e5,
    }


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_overflowing_batches_are_repeated_in_float32(parts, pixels, caplog):
    changes = {name: tensor.clamp(-6e4, 6e4) for name, tensor in overflowing(parts).items()}
    half, full = coder(parts, **changes), coder(parts, torch.float32, **changes)
    noise = torch.zeros(2, 4, 4, 4)
    with caplog.at_level(logging.WARNING):
        latents = half.encode(pixels, noise)
        half.encode(pixels, noise)
        pictures = half.decode(latents)
    assert half.model.dtype == torch.float16
    torch.testing.assert_close(latents, full.encode(pixels, noise), rtol=0.05, atol=0.1)
    torch.testing.assert_close(pictures, full.decode(latents), rtol=0.05, atol=0.1)
    assert len(caplog.records) == 1
    assert "--no_half_vae" in caplog.text


def test_a_batch_in_between_does_not_change_the_next(parts, pixels):
    changes = {name: tensor.clamp(-6e4, 6e4) for name, tensor in overflowing(parts).items()}
    dark = pixels * 1e-4
    noise = torch.zeros(2, 4, 4, 4)
    fresh = coder(parts, **changes).encode(dark, noise)
    used = coder(parts, **changes)
    used.encode(pixels, noise)
    assert torch.equal(used.encode(dark, noise), fresh)


def test_pictures_that_are_not_numbers_stay_visible(parts, pixels):
    pixels[1, 0, 0, 0] = float("nan")
    latents = coder(parts).encode(pixels, torch.zeros(2, 4, 4, 4))
    assert latents.isfinite().flatten(1).all(1).tolist() == [True, False]


def test_released_models_come_back(parts, pixels):
    one = coder(parts, torch.float32)
    assert not one.loaded
    first = one.encode(pixels, torch.zeros(2, 4, 4, 4))
    assert one.loaded
    one.release()
    assert not one.loaded
    assert torch.equal(one.encode(pixels, torch.zeros(2, 4, 4, 4)), first)


@pytest.mark.parametrize("keep", [False, True])
def test_freed_gpu_memory_is_given_back_unless_kept(monkeypatch, keep):
    given_back = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(True))
    vae = ImageCoder({}, {}, device=torch.device("cuda"), dtype=torch.float16, keep_cache=keep)
    vae.release()
    assert not given_back
    vae._model = object()
    vae.release()
    assert not vae.loaded and bool(given_back) is not keep
