"""networks.oft: outputs rotated in blocks."""

import logging

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
from networks import oft
from networks.oft import OftAdapter


def rotated(weight, blocks, alpha, strength=1.0):
    """The formula written out: one block of rows after another."""
    skew = blocks - blocks.transpose(1, 2)
    norm = skew.flatten().norm()
    skew = skew * ((norm.clamp(max=alpha * weight.shape[0]) + 1e-8) / (norm + 1e-8))
    size = blocks.shape[-1]
    result = torch.empty_like(weight)
    for number, q in enumerate(skew):
        eye = torch.eye(size, dtype=weight.dtype)
        turn = (eye + q) @ torch.linalg.inv(eye - q)
        turn = strength * (turn - eye) + eye
        rows = slice(number * size, (number + 1) * size)
        result[rows] = (turn.t() @ weight[rows].flatten(1)).view_as(weight[rows])
    return result


def make(layer, blocks=4, alpha=0.01, spread=0.3):
    return randomize(OftAdapter(target_of(layer), rank=blocks, alpha=alpha), spread)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("alpha", [0.01, 10.0])
def test_weights_are_turned_block_by_block(kind, alpha):
    layer, x = layer_and_input(kind)
    adapter = make(layer, alpha=alpha)
    for strength in (1.0, 0.5, 0.0):
        wanted = rotated(layer.weight, adapter.oft_blocks.detach(), alpha, strength)
        torch.testing.assert_close(adapter.merged(layer.weight, strength), wanted, atol=1e-5, rtol=1e-4)
        adapter.multiplier = strength
        adapter.attach()
        torch.testing.assert_close(layer(x), with_weight(layer, x, wanted), atol=1e-5, rtol=1e-4)
        adapter.detach()


def test_rotations_keep_lengths():
    layer, _ = layer_and_input("wide")
    adapter = make(layer, alpha=10.0, spread=1.0)
    turned = adapter.merged(layer.weight, 1.0)
    torch.testing.assert_close(turned.norm(dim=0), layer.weight.norm(dim=0))
    assert (turned - layer.weight).norm() > 0.5 * layer.weight.norm()


@pytest.mark.parametrize("kind", ["linear", "3x3"])
@pytest.mark.parametrize("alpha", [0.01, 10.0])
def test_gradients(kind, alpha):
    layer, x = layer_and_input(kind, torch.float64)
    adapter = make(layer, alpha=alpha).double()
    adapter.attach()
    assert torch.autograd.gradcheck(lambda x, _: layer(x), (x[:1].requires_grad_(), adapter.oft_blocks))


def test_two_networks_on_a_layer_turn_one_after_the_other():
    layer, x = layer_and_input("linear")
    first, second = make(layer, 2), make(layer, 4, alpha=1.0)
    for adapter in (first, second):
        adapter.attach()
    wanted = second.merged(first.merged(layer.weight, 1.0), 1.0)
    torch.testing.assert_close(layer(x), with_weight(layer, x, wanted))


def test_half_precision_keeps_small_rotations():
    layer, x = layer_and_input("wide")
    adapter = make(layer, alpha=1e-4)
    adapter.attach()
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(x)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [({}, "attn"), ({"enable_all_linear": "True"}, "linear"), ({"enable_conv": "1", "enable_all_linear": "0"}, "conv")],
)
def test_which_layers_are_turned(arguments, part):
    network = oft.create_network(1.0, 4, 1e-3, None, *tiny_models(), **arguments)
    names = [adapter.name for adapter in network.adapters]
    assert all(name.startswith("oft_unet_") for name in names)
    assert any("attn1_to_q" in name for name in names)
    assert any("attn2_to_out_0" in name for name in names)
    assert any("_ff_net_" in name or "proj_in" in name for name in names) == (part == "linear")
    assert any("resnets" in name for name in names) == (part == "conv")
    assert any(adapter.layer.weight.shape[2:] == (3, 3) for adapter in network.adapters) == (part == "conv")


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_a_saved_network_computes_the_same_again(tmp_path, family):
    models = tiny_models(family)
    before = outputs(*models)
    network = attached(oft, models, alpha=0.02, randomized=False, enable_conv="True", enable_all_linear="True")
    assert_same(outputs(*models), before, atol=1e-5, rtol=1e-5)
    randomize(network)
    wanted = outputs(*models)
    assert not torch.allclose(wanted[1], before[1], atol=1e-3)
    path = tmp_path / "oft.safetensors"
    network.save_weights(path, None, {})
    again, remade = reloaded(oft, path, family)
    assert_same(outputs(*again), wanted)
    assert sorted(remade.file_tensors()) == sorted(network.file_tensors())
    merged = tiny_models(family)
    fresh, tensors = oft.create_network_from_weights(1.0, str(path), None, *merged, for_inference=True)
    fresh.merge_to(*merged, tensors, torch.float32, "cpu")
    assert_same(outputs(*merged), wanted, atol=1e-4, rtol=1e-4)


def test_the_files_of_oft_are_known_to_the_tools(tmp_path):
    from library.checkpoints.lora_file import read_lora
    from library.checkpoints.lora_math import apply_delta

    network = attached(oft, tiny_models(), alpha=0.02)
    path = tmp_path / "oft.safetensors"
    network.save_weights(path, None, {})
    stored = read_lora(path)
    assert not stored.unknown
    for adapter in network.adapters[:3]:
        weights = stored.modules[adapter.name.replace("oft_", "lora_")]
        for strength in (1.0, 0.5):
            merged = apply_delta(adapter.layer.weight, weights, strength)
            torch.testing.assert_close(merged, adapter.merged(adapter.layer.weight, strength))


def test_learning_moves_every_block():
    models = tiny_models()
    network = attached(oft, models, randomized=False, alpha=None).train()
    models[1](torch.randn(1, 4, 8, 8), torch.tensor([3]), models[0](torch.arange(77)[None])).sample.sum().backward()
    assert all(float(adapter.alpha) == pytest.approx(1e-3) for adapter in network.adapters)
    assert all(bool((p.grad.flatten(1) != 0).any(1).all()) for p in network.parameters())


def test_the_number_of_blocks_must_divide_widths():
    text = str(next(oft.check_network_args(6, 1e-3, {})))
    assert "--network_dim" in text
    assert " 5," in text
    with pytest.raises(UserError, match="cut the 64 outputs of .* into 5"):
        oft.create_network(1.0, 5, 1e-3, None, *tiny_models())


@pytest.mark.parametrize(
    ("alpha", "arguments", "words"),
    [
        (1e-3, {"enable_conv": "maybe"}, "enable_conv"),
        (1e-3, {"conv_dim": "4"}, "no argument 'conv_dim'"),
        (1e-3, {"dropout": "0.5"}, "--network_dropout"),
        (0.0, {}, "--network_alpha"),
    ],
)
def test_bad_arguments(alpha, arguments, words):
    assert words in str(next(oft.check_network_args(4, alpha, arguments)))


def test_a_large_limit_is_worth_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        oft.create_network(1.0, 4, 1.0, None, *tiny_models())
    assert "1e-3 is usual" in caplog.text


def test_other_files_are_refused(tmp_path):
    from networks import loha

    path = tmp_path / "loha.safetensors"
    attached(loha, tiny_models()).save_weights(path, None, {})
    with pytest.raises(UserError, match="another model or another kind"):
        oft.create_network_from_weights(1.0, str(path), None, *tiny_models())
