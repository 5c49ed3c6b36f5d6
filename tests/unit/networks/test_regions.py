"""Networks of every kind act where a region says, and cost nothing more where there is none."""

import importlib

import pytest
import torch
from kind_helpers import randomize, tiny_models

KINDS = ["lora", "lora_fa", "loha", "lokr", "oft", "dylora"]


@pytest.fixture(scope="module")
def unet(one_torch_thread):
    return tiny_models("sd1")[1]


@pytest.fixture
def network(unet):
    made = []

    def make(kind="lora", seed=0):
        network = importlib.import_module(f"networks.{kind}").create_network(1.0, 4, 4, None, None, unet)
        network.apply_to(None, unet, False, True)
        made.append(randomize(network, 0.2, seed).eval())
        return network

    yield make
    for one in reversed(made):
        one.limit_to(None)
        one.set_enabled(False)


def named(network, end):
    return next(adapter for adapter in network.unet_adapters if adapter.name.endswith(end))


def features(adapter, seed=9):
    return torch.randn(2, 6, adapter.layer.in_features, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_shares_of_the_effect(network, kind):
    made = network(kind)
    adapter = named(made, "attn1_to_q")
    x = features(adapter)
    full = adapter.layer(x)
    made.set_enabled(False)
    plain = adapter.layer(x)
    made.set_enabled(True)
    assert (full - plain).abs().max() > 1e-3
    half = torch.tensor([1.0, 1, 0, 0, 0.5, 0.5])[None, :, None]
    for share in (0.0, 1.0, 0.25, half):
        made.limit_to(lambda reads_words, output, share=share: share)
        torch.testing.assert_close(adapter.layer(x), plain + share * (full - plain), rtol=1e-4, atol=1e-5)
    made.limit_to(None)
    assert torch.equal(adapter.layer(x), full)
    assert adapter.layer.forward == adapter.forward, "without a region nothing stands between layer and adapter"


def test_layers_that_read_words_are_told_apart(network):
    words = {adapter.name for adapter in network().unet_adapters if adapter.reads_words}
    assert words
    assert words == {
        adapter.name
        for adapter in network().unet_adapters
        if "attn2_to_k" in adapter.name or "attn2_to_v" in adapter.name
    }


@torch.no_grad()
def test_several_networks_on_one_layer(network):
    one, two = network(seed=1), network(seed=50)
    layer, x = named(one, "attn1_to_q").layer, features(named(one, "attn1_to_q"))
    both = layer(x)
    two.set_enabled(False)
    only_one = layer(x)
    two.set_enabled(True)
    one.limit_to(lambda *_: 1.0)
    two.limit_to(lambda *_: 0.0)
    torch.testing.assert_close(layer(x), only_one)
    two.limit_to(None)
    one.limit_to(None)
    torch.testing.assert_close(layer(x), both)
    one.set_enabled(False)
    two.set_enabled(False)
    assert "forward" not in vars(layer)


def test_a_network_that_is_switched_off_stays_off(network):
    made = network()
    made.set_enabled(False)
    made.limit_to(lambda *_: 1.0)
    assert not any(adapter.attached for adapter in made.adapters)
    made.set_enabled(True)
    made.limit_to(None)
    assert all(adapter.layer.forward == adapter.forward for adapter in made.adapters)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lora", "oft"])
def test_the_layer_itself_runs_once_whatever_the_number_of_regions(network, kind, monkeypatch):
    made = [network(kind, seed) for seed in range(3)]
    adapter = named(made[0], "attn1_to_q")
    x, calls, product = features(adapter), [], torch.nn.functional.linear

    def counting(x, weight, *rest):
        calls.append(weight is adapter.layer.weight)
        return product(x, weight, *rest)

    for one in made:
        one.limit_to(lambda *_: 0.5)
    monkeypatch.setattr(torch.nn.functional, "linear", counting)
    adapter.layer(x)
    assert sum(calls) == 1
