"""networks.dylora: a LoRA trained a few ranks at a time."""

import math

import pytest
import torch
from kind_helpers import (
    LAYERS,
    assert_same,
    attached,
    layer_and_input,
    outputs,
    randomize,
    reloaded,
    target_of,
    tiny_models,
    with_weight,
)

from library.errors import UserError
from networks import dylora, lora
from networks.adapter_base import Dropouts
from networks.dylora import DyloraAdapter


def make(layer, rank=6, unit=2, **common):
    return randomize(DyloraAdapter(target_of(layer), rank=rank, alpha=3.0, unit=unit, **common))


def product(adapter, ranks):
    """up @ down over the first ranks, in the shape of the layer's weight."""
    up, down = adapter.lora_up.weight.flatten(1), adapter.lora_down.weight.flatten(1)
    return (up[:, :ranks] @ down[:ranks]).view(adapter.layer.weight.shape)


def draw(adapter, monkeypatch, block):
    monkeypatch.setattr(dylora, "number_below", lambda count: block)
    assert len(adapter.gains) == 3


@pytest.mark.parametrize("kind", LAYERS)
def test_all_ranks_work_outside_of_training(kind):
    layer, x = layer_and_input(kind)
    adapter = make(layer)
    adapter.multiplier = 0.5
    adapter.attach()
    adapter.eval()
    wanted = with_weight(layer, x, layer.weight + 0.5 * 3 / 6 * product(adapter, 6))
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(adapter.delta(), 3 / 6 * product(adapter, 6))


@pytest.mark.parametrize("kind", ["linear", "3x3"])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_ranks_up_to_the_drawn_ones_work_in_training(monkeypatch, kind, block):
    layer, x = layer_and_input(kind)
    adapter = make(layer)
    adapter.multiplier = 0.5
    adapter.attach()
    adapter.train()
    draw(adapter, monkeypatch, block)
    used = 2 * (block + 1)
    strength = 0.5 * 3 / 6 * math.sqrt(6 / used)
    wanted = with_weight(layer, x, layer.weight + strength * product(adapter, used))
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "3x3"])
def test_only_the_drawn_ranks_get_gradients(monkeypatch, kind):
    layer, x = layer_and_input(kind, torch.float64)
    adapter = make(layer).double()
    adapter.attach()
    adapter.train()
    draw(adapter, monkeypatch, 1)
    layer(x).square().sum().backward()
    moving = [name for name, parameter in adapter.named_parameters() if parameter.grad is not None]
    assert moving == ["lora_down.1", "lora_up.1"]
    own = (adapter.lora_down.get_parameter("1"), adapter.lora_up.get_parameter("1"))
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x[:1].requires_grad_(), *own))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_momentum_and_decay_leave_other_ranks_alone(monkeypatch, optimizer):
    layer, x = layer_and_input("linear")
    adapter = make(layer)
    adapter.attach()
    adapter.train()
    settings = {"weight_decay": 0.1, **({"momentum": 0.9} if optimizer is torch.optim.SGD else {})}
    steps = optimizer(adapter.parameters(), lr=0.01, **settings)
    for block in (0, 1, 2, 1):
        draw(adapter, monkeypatch, block)
        before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
        layer(x).square().sum().backward()
        steps.step()
        steps.zero_grad()
        changed = {name for name, tensor in adapter.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed == {f"lora_down.{block}", f"lora_up.{block}"}


def test_every_number_of_ranks_is_drawn_and_a_seed_decides(monkeypatch):
    layer, x = layer_and_input("linear")
    adapter = make(layer)
    adapter.attach()
    adapter.train()
    seen = []
    up_to = adapter.lora_down.up_to
    monkeypatch.setattr(adapter.lora_down, "up_to", lambda drawn: seen.append(drawn) or up_to(drawn))
    for _ in range(2):
        torch.manual_seed(0)
        for _ in range(30):
            layer(x)
    assert set(seen) == {0, 1, 2}
    assert seen[:30] == seen[30:]


def test_a_recomputed_forward_draws_the_same():
    from torch.utils.checkpoint import checkpoint

    layer, x = layer_and_input("linear")
    adapter = make(layer)
    adapter.attach()
    adapter.train()
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(3)
        adapter.zero_grad()
        run(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in adapter.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_files_are_those_of_a_lora(tmp_path):
    models = tiny_models()
    before = outputs(*models)
    network = attached(dylora, models, randomized=False, unit="2", conv_dim="4")
    assert_same(outputs(*models), before)
    randomize(network, 0.2)
    wanted = outputs(*models)
    path = tmp_path / "dylora.safetensors"
    network.save_weights(path, None, {})
    plain = lora.create_network(1.0, 4, 2.0, None, *tiny_models(), conv_dim="4")
    assert {n: t.shape for n, t in network.file_tensors().items()} == {
        n: t.shape for n, t in plain.file_tensors().items()
    }
    for module, arguments in ((lora, {}), (dylora, {"unit": "4"})):
        again, _ = reloaded(module, path, **arguments)
        assert_same(outputs(*again), wanted)
    merged = tiny_models()
    fresh, tensors = dylora.create_network_from_weights(1.0, str(path), None, *merged, for_inference=True)
    fresh.merge_to(*merged, tensors, torch.float32, "cpu")
    assert_same(outputs(*merged), wanted, atol=1e-3, rtol=1e-3)
    loaded = tiny_models()
    other = attached(dylora, loaded, unit="1", conv_dim="4", randomized=False)
    assert not other.load_state_dict(tensors, strict=False).unexpected_keys
    assert_same(outputs(*loaded), wanted)


def test_a_state_holds_what_is_trained():
    layer, _ = layer_and_input("linear")
    adapter, other = make(layer), make(layer)
    randomize(other, seed=5)
    # A state is written into the tensors of a state dict: they must be the parameters themselves.
    for name, tensor in other.state_dict().items():
        tensor.copy_(adapter.state_dict()[name])
    assert torch.equal(other.delta(), adapter.delta())


def test_a_file_of_another_rank_is_refused(tmp_path):
    path = tmp_path / "dylora.safetensors"
    attached(dylora, tiny_models()).save_weights(path, None, {})
    network = attached(dylora, tiny_models(), dim=8)
    with pytest.raises(UserError, match="--dim_from_weights"):
        network.load_weights(path)
    tensors = attached(dylora, tiny_models()).file_tensors()
    with pytest.raises(RuntimeError, match="4 ranks, not 8"):
        network.load_state_dict(tensors, strict=False)
    with pytest.raises(UserError, match="unit 3 does not divide the 4 ranks"):
        dylora.create_network_from_weights(1.0, str(path), None, *tiny_models(), unit="3")


def test_several_text_encoders_have_names_of_their_own():
    first, unet = tiny_models()
    second, _ = tiny_models()
    network = dylora.create_network(1.0, 4, 1.0, None, [first, second], unet)
    names = [adapter.name for adapter in network.text_adapters]
    assert len(set(names)) == len(names)
    assert {name[:8] for name in names} == {"lora_te1", "lora_te2"}


def test_neurons_and_modules_can_be_left_out():
    layer, x = layer_and_input("linear")
    base = layer(x)
    adapter = make(layer, dropouts=Dropouts(module=1.0))
    adapter.attach()
    adapter.train()
    torch.testing.assert_close(layer(x), base)
    adapter.detach()
    adapter = make(layer, dropouts=Dropouts(neuron=0.5))
    adapter.attach()
    adapter.train()
    torch.manual_seed(0)
    assert not torch.allclose(layer(x), layer(x))


def test_norms_are_limited():
    layer, _ = layer_and_input("3x3")
    adapter = make(layer)
    limit = float(adapter.delta().norm()) / 3
    with torch.no_grad():
        assert adapter.limit_norm(limit).tolist() == [pytest.approx(limit, rel=1e-4), 1]
    assert float(adapter.delta().norm()) == pytest.approx(limit, rel=1e-4)


def test_what_the_trainer_must_know():
    network = dylora.create_network(1.0, 4, 1.0, None, *tiny_models(), loraplus_lr_ratio="4")
    assert network.may_skip_parameters
    assert network.uses_global_randomness
    groups, names = network.prepare_optimizer_params(1e-4, 1e-4, 1e-4)
    assert names == ["textencoder", "textencoder plus", "unet", "unet plus"]
    ups = {id(p) for adapter in network.adapters for p in adapter.lora_up.parameters()}
    assert {id(p) for group in groups[1::2] for p in group["params"]} == ups


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"unit": "3"}, ["unit", "3 does not divide 4"]),
        ({"unit": "0"}, ["unit", "at least 1"]),
        ({"conv_dim": "2"}, ["conv_dim", "--network_dim"]),
        ({"rank_dropout": "0.1"}, ["rank_dropout"]),
        ({"units": "2"}, ["Did you mean unit"]),
    ],
)
def test_bad_arguments(arguments, words):
    text = " ".join(str(problem) for problem in dylora.check_network_args(4, 1.0, arguments))
    assert all(word in text for word in words), text
    with pytest.raises(UserError):
        dylora.create_network(1.0, 4, 1.0, None, *tiny_models(), **arguments)
