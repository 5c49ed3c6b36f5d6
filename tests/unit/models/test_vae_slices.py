"""Working in bands changes no picture, whatever the sizes, and needs less memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from library.models.random_models import random_parts
from library.models.vae import ImageCoder

pytestmark = pytest.mark.compat
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts(one_torch_thread):
    return random_parts("sd1")


def coder(parts, slices, dtype=torch.float32, **how):
    made = ImageCoder(parts.vae, parts.vae_config, device=CPU, dtype=dtype)
    made.work_in(slices=slices, **how)
    return made


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("slices", [2, 3, 5, 64])
@pytest.mark.parametrize("size", [(2, 9, 4), (1, 8, 11)])
def test_bands_change_nothing(parts, slices, size):
    batch, height, width = size
    whole, banded = coder(parts, 1), coder(parts, slices)
    latents = noise(batch, 4, height, width)
    pictures = whole.decode(latents)
    torch.testing.assert_close(banded.decode(latents), pictures, rtol=0, atol=2e-5)
    pixels = noise(batch, 3, 8 * height, 8 * width, seed=1).clamp(-1, 1)
    torch.testing.assert_close(banded.encode(pixels, latents), whole.encode(pixels, latents), rtol=1e-4, atol=1e-4)
    assert pictures.std() > 0.02


def test_odd_sizes_are_encoded_alike(parts):
    """Pictures whose sides are no multiples of 8 lose their last rows and columns, in both ways the same."""
    pixels, none = noise(1, 3, 75, 83).clamp(-1, 1), torch.zeros(1, 4, 9, 10)
    torch.testing.assert_close(
        coder(parts, 4).encode(pixels, none), coder(parts, 1).encode(pixels, none), rtol=1e-4, atol=1e-4
    )


def test_half_precision_and_channels_last(parts):
    latents = noise(1, 4, 6, 6)
    wanted = coder(parts, 1, torch.bfloat16).decode(latents)
    for how in ({}, {"channels_last": True}):
        torch.testing.assert_close(coder(parts, 3, torch.bfloat16, **how).decode(latents), wanted, rtol=0.1, atol=0.1)
    laid_out = coder(parts, 1, channels_last=True)
    assert laid_out.model.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(laid_out.decode(latents), coder(parts, 1).decode(latents), rtol=0, atol=2e-5)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation makes, and counts those of the full size."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.count = limit, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        views = ("view", "slice", "alias", "detach", "reshape", "t.", "expand", "add_", "copy_", "transpose")
        if isinstance(result, torch.Tensor) and not any(name in str(function) for name in views):
            self.count += result.numel() >= self.limit
        return result


def test_bands_make_fewer_large_tensors(parts):
    latents = noise(1, 4, 16, 8)
    full = 32 * 128 * 64
    counts = []
    for slices in (1, 8):
        vae = coder(parts, slices)
        with Largest(full) as seen:
            vae.decode(latents)
        counts.append(seen.count)
    assert counts[1] < counts[0] / 2


def test_changing_the_way_takes_effect_at_once(parts):
    vae, latents = coder(parts, 1), noise(1, 4, 4, 4)
    vae.decode(latents)
    vae.work_in(slices=2)
    assert not vae.loaded
    vae.decode(latents)
    assert "forward" in vars(vae.model.decoder.mid_block.resnets[0])
