"""Checkpointing and compilation change time and memory, not results."""

import pytest
import torch

from library.errors import UserError
from library.models.family import WeightPlan
from library.models.memory import has_dropout
from library.models.options import TextOptions
from library.models.random_models import random_parts
from library.models.sd import StableDiffusion
from library.models.specs import SD1

pytestmark = pytest.mark.compat


def family_with_gradients():
    family = StableDiffusion(SD1, TextOptions(), random_parts("sd1"), WeightPlan())
    for part in family.parts().values():
        part.requires_grad_(True).train()
    return family


def gradients(family):
    ids = torch.from_numpy(family.tokenizers[0].encode("a photo")[0])[None]
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    family.denoise(noisy, torch.tensor([7]), family.encode_text((ids,))).square().mean().backward()
    return [p.grad.clone() for part in family.parts().values() for p in part.parameters()]


def saved_bytes(family):
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ids = torch.zeros(1, 1, 77, dtype=torch.long)
        hidden = family.encode_text((ids,)).hidden
        text = total
        family.denoise(torch.ones(1, 4, 8, 8), torch.tensor([7]), type("C", (), {"hidden": hidden})())
    return text, total - text


def test_checkpointing_gives_the_same_gradients_with_less_memory():
    plain, checkpointed = family_with_gradients(), family_with_gradients()
    checkpointed.enable_gradient_checkpointing()
    for before, after in zip(saved_bytes(plain), saved_bytes(checkpointed), strict=True):
        assert after < 0.6 * before
    for one, two in zip(gradients(plain), gradients(checkpointed), strict=True):
        assert torch.equal(one, two)


def test_checkpointing_draws_dropout_again():
    family = family_with_gradients()
    assert not has_dropout(family.unet, family.text_encoder)
    for module in family.unet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    assert has_dropout(family.unet)
    torch.manual_seed(1)
    expected = gradients(family)
    for part in family.parts().values():
        part.zero_grad()
    family.enable_gradient_checkpointing()
    torch.manual_seed(1)
    for one, two in zip(expected, gradients(family), strict=True):
        assert torch.equal(one, two)


def test_compiled_blocks_keep_names_and_results():
    plain, compiled = family_with_gradients(), family_with_gradients()
    compiled.compile("eager")
    assert list(plain.unet.state_dict()) == list(compiled.unet.state_dict())
    for one, two in zip(gradients(plain), gradients(compiled), strict=True):
        torch.testing.assert_close(one, two)


def test_a_device_without_numbers_of_8_bits_is_refused_before_anything_changes(monkeypatch):
    family = family_with_gradients()
    monkeypatch.setattr(torch, "float8_e4m3fn", torch.quint8)  # a type that nothing converts to
    with pytest.raises(UserError, match="--fp8_base: weights of 8 bits cannot be used on this device, cpu"):
        family.store_in_float8(("unet", "text_encoder"))
    assert all(weight.dtype == torch.float32 for weight in family.unet.parameters())
