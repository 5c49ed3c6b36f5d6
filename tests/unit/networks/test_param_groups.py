"""Learning rates: which parameters share one, what each group is called, and what happens to what has none."""

import pytest
import torch
from small_models import attached, outputs, small_models

from networks import lora


@pytest.fixture
def models():
    return small_models()


def names_in(network, group):
    by_id = {id(p): name for name, p in network.named_parameters()}
    return [by_id[id(p)] for p in group["params"]]


def test_text_encoder_comes_first_then_the_unet(models):
    network = attached(lora, models)
    groups, names = network.prepare_optimizer_params(1e-4, 1e-3, 1e-5)
    assert names == ["textencoder", "unet"]
    assert [group["lr"] for group in groups] == [1e-4, 1e-3]
    listed = [name for group in groups for name in names_in(network, group)]
    assert listed == [name for name, _ in network.named_parameters()]


def test_rates_that_are_not_given_are_the_general_one(models):
    network = attached(lora, models)
    groups, _ = network.prepare_optimizer_params(None, None, 1e-5)
    assert [group["lr"] for group in groups] == [1e-5, 1e-5]
    groups, _ = network.prepare_optimizer_params_with_multiple_te_lrs([], 1e-3, 1e-5)
    assert [group["lr"] for group in groups] == [1e-5, 1e-3]
    groups, _ = network.prepare_optimizer_params_with_multiple_te_lrs([2e-4], None, 1e-5)
    assert [group["lr"] for group in groups] == [2e-4, 1e-5]


def test_every_text_encoder_may_have_its_rate():
    first, unet = small_models()
    models = ([first, small_models(1)[0]], unet)
    torch.manual_seed(0)
    network = lora.create_network(1.0, 4, 1, None, *models)
    network.apply_to(*models, True, True)
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([1e-4, 2e-4], 1e-3, None)
    assert names == ["textencoder 1", "textencoder 2", "unet"]
    assert [group["lr"] for group in groups] == [1e-4, 2e-4, 1e-3]
    assert all(name.startswith("lora_te2_") for name in names_in(network, groups[1]))
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([1e-4], 1e-3, None)
    assert names == ["textencoder", "unet"]


@pytest.mark.parametrize(
    ("ratios", "wanted"),
    [
        ({"loraplus_lr_ratio": "16"}, [1, 16, 10, 160]),
        ({"loraplus_unet_lr_ratio": "2"}, [1, 10, 20]),
        ({"loraplus_lr_ratio": "16", "loraplus_text_encoder_lr_ratio": "4"}, [1, 4, 10, 160]),
    ],
)
def test_lora_plus_gives_the_second_factor_its_own_rate(models, ratios, wanted):
    network = attached(lora, models, **ratios)
    groups, names = network.prepare_optimizer_params(1.0, 10.0, None)
    assert [group["lr"] for group in groups] == wanted
    for name, group in zip(names, groups, strict=True):
        kinds = {"lora_up" in parameter for parameter in names_in(network, group)}
        if name.endswith(" plus"):
            assert kinds == {True}
        else:
            assert kinds == ({False} if f"{name} plus" in names else {True, False})


@pytest.mark.parametrize("rate", [0, 0.0])
def test_a_rate_of_zero_freezes_a_part_and_spares_its_work(models, rate):
    network = attached(lora, models, filled=False)
    groups, names = network.prepare_optimizer_params(1e-4, rate, 1e-5)
    assert names == ["textencoder"]
    assert all(not p.requires_grad for adapter in network.unet_adapters for p in adapter.parameters())
    assert all("forward" not in vars(module) for module in models[1].modules())
    network.prepare_grad_etc(*models)
    assert {id(p) for p in network.get_trainable_params()} == {id(p) for p in groups[0]["params"]}
    assert any(name.startswith("lora_unet_") for name in network.file_tensors())


def test_what_is_frozen_but_does_something_goes_on(models):
    network = attached(lora, models)
    wanted = outputs(models)
    network.prepare_optimizer_params(0, 1e-4, None)
    for got, want in zip(outputs(models), wanted, strict=True):
        assert torch.equal(got, want)


def test_weights_loaded_later_work_again(models, tmp_path):
    network = attached(lora, models)
    wanted = outputs(models)
    network.save_weights(tmp_path / "a.safetensors", None, None)
    fresh = small_models()
    other = attached(lora, fresh, filled=False)
    other.prepare_optimizer_params(0, 1e-4, None)
    other.load_weights(tmp_path / "a.safetensors")
    for got, want in zip(outputs(fresh), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_nothing_has_a_rate(models):
    network = attached(lora, models)
    assert network.prepare_optimizer_params(None, None, None) == ([], [])
    assert network.get_trainable_params() == []


def test_blocks_with_weights_have_groups_of_their_own(models):
    network = attached(lora, models, down_lr_weight="0.5", mid_lr_weight="2", loraplus_unet_lr_ratio="10")
    groups, names = network.prepare_optimizer_params(1.0, 1.0, None)
    assert names == [
        "textencoder", "unet_block1", "unet_block1 plus", "unet_block16", "unet_block16 plus", "unet_block12",
        "unet_block12 plus",
    ]  # fmt: skip
    assert [group["lr"] for group in groups] == [1, 0.5, 5, 1, 10, 2, 20]
    for name, group in zip(names, groups, strict=True):
        if "block12" in name:
            assert all("mid_block" in parameter for parameter in names_in(network, group))


def test_the_protocol_of_epochs_and_gradients(models):
    network = attached(lora, models)
    network.eval()
    network.on_epoch_start(*models)
    assert all(adapter.training for adapter in network.adapters)
    network.prepare_grad_etc(*models)
    assert len(network.get_trainable_params()) == len(list(network.parameters()))
    network.enable_gradient_checkpointing()
    assert network.is_mergeable()
