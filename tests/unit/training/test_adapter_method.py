"""Parts of the method of network training, each by itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from library.checkpoints.lora_file import AdapterWeights
from library.contracts import Condition, Noised
from library.models.network_files import _merge
from library.training.methods.adapter import Adapter
from library.training.network_norms import NetworkNorms
from library.training.scalars import DeferredScalars

PRESERVED, PLAIN = {"diff_output_preservation": True}, {}


class Strength:
    """A network that knows nothing but its strength."""

    multiplier = 1.0

    def set_multiplier(self, multiplier):
        self.multiplier = multiplier


@pytest.mark.parametrize("adapts_text", [True, False])
@pytest.mark.parametrize("rows", [(), (1,), (0, 2), (0, 1, 2)])
def test_the_output_of_the_bare_model_is_the_target_of_those_pictures_alone(rows, adapts_text):
    network = Strength()

    def denoise(noisy, t, condition):
        assert network.multiplier == 0
        return noisy + 100 * t[:, None, None, None] + condition.hidden.mean((1, 2))[:, None, None, None]

    method = object.__new__(Adapter)
    method.network, method._multiplier = network, 1.0
    method.plan = SimpleNamespace(adapts_text=adapts_text)
    bare = torch.full((3, 2, 2), -7.0)
    method.family = SimpleNamespace(denoise=denoise, encode_text=lambda ids, weights: Condition(bare))
    batch = SimpleNamespace(
        custom_attributes=tuple(PRESERVED if row in rows else PLAIN for row in range(3)),
        token_ids=(),
        token_weights=None,
    )
    noisy, t, hidden = torch.randn(3, 4, 2, 2), torch.tensor([3, 5, 9]), torch.randn(3, 2, 2)
    noised = Noised(noisy=noisy, target=torch.randn(3, 4, 2, 2), t=t, weight=torch.ones(3), huber_c=None)
    found = method.target(noised, Condition(hidden), batch)
    assert network.multiplier == 1
    text = bare if adapts_text else hidden
    for row in range(3):
        wanted = noisy[row] + 100 * t[row] + text[row].mean() if row in rows else noised.target[row]
        torch.testing.assert_close(found[row], wanted)


def test_networks_are_merged_where_the_weights_are():
    """Their files are mapped to main memory; a mixture of devices would fail."""
    layer = nn.Linear(4, 3, device="meta")
    weights = AdapterWeights(
        "lora_unet_x",
        "lora",
        {"lora_up.weight": torch.ones(3, 2), "lora_down.weight": torch.ones(2, 4), "alpha": torch.tensor(1.0)},
    )

    file = SimpleNamespace(modules={"lora_unet_x": weights}, places={"lora_unet_x": ("unet", "x")})
    family = SimpleNamespace(parts=lambda: {"unet": nn.ModuleDict({"x": layer})})
    assert _merge(family, file, 1.0) == []


def test_norms_told_by_a_module_of_somebody_else_are_no_tensors_to_be_stacked():
    """They would lie in main memory, and the loss beside them on a device."""
    network = SimpleNamespace(apply_max_norm_regularization=lambda limit, device: (3, torch.tensor(0.5), None))
    norms = NetworkNorms(network, 1.0, torch.device("cpu"))
    norms.after_update()
    assert norms.scalars() == {"max_norm/keys_scaled": 3.0, "norm/avg_key_norm": 0.5, "max_norm/max_key_norm": 0.0}
    assert all(isinstance(value, float) for value in norms.scalars().values())


def test_numbers_in_main_memory_are_read_when_they_are_pushed():
    scalars, loss = DeferredScalars(), torch.tensor(2.0)
    scalars.push("first", {"loss": loss, "other": 1.5})
    loss.fill_(9)
    assert list(scalars.ready()) == []
    assert list(scalars.drain()) == [("first", {"loss": 2.0, "other": 1.5})]
