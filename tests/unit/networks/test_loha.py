"""networks.loha: LyCORIS' numbers and names, in cheaper forms."""

import logging

import pytest
import torch
from kind_helpers import (
    LAYERS,
    assert_same,
    attached,
    continued_by_lycoris,
    differs,
    layer_and_input,
    outputs,
    randomize,
    reloaded,
    target_of,
    tiny_models,
    trained_by_lycoris,
    with_weight,
)

from library.errors import UserError
from networks import loha
from networks.adapter_base import Dropouts
from networks.loha import LohaAdapter

FORMS = [(kind, rank, tucker) for kind in LAYERS for rank in (1, 3) for tucker in (False, "3x3" in kind)]
FORMS = sorted(set(FORMS))


def make(layer, rank=3, tucker=False, **common):
    return randomize(LohaAdapter(target_of(layer), rank=rank, alpha=2.0, tucker=tucker, **common))


@pytest.mark.parametrize(("kind", "rank", "tucker"), FORMS)
def test_output_and_change_equal_those_of_lycoris(kind, rank, tucker):
    from lycoris.modules.loha import LohaModule

    layer, x = layer_and_input(kind)
    adapter = make(layer, rank, tucker)
    theirs = LohaModule("name", layer, lora_dim=rank, alpha=2.0, use_tucker=tucker)
    theirs.load_state_dict(adapter.state_dict())
    torch.testing.assert_close(adapter.delta(), theirs.get_weight(theirs.shape))
    adapter.attach()
    torch.testing.assert_close(layer(x), with_weight(layer, x, layer.weight + adapter.delta()), atol=1e-5, rtol=1e-4)
    adapter.detach()
    wanted = theirs(x)
    adapter.attach()
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "tucker"), [("linear", False), ("3x3", False), ("3x3", True)])
def test_gradients(kind, tucker):
    layer, x = layer_and_input(kind, torch.float64)
    adapter = make(layer, 2, tucker, dropouts=Dropouts(rank=0.3)).double()
    adapter.attach()
    rows = torch.linspace(0.5, 2.0, layer.weight.shape[0], dtype=torch.float64)
    for low_rank in (False, True) if not tucker else (False,):
        adapter.as_low_rank = low_rank
        assert torch.autograd.gradcheck(
            lambda x, *_: adapter.adapted(x, rows), (x[:1].requires_grad_(), *adapter.parameters())
        )


def test_whole_weights_are_not_kept_for_the_backward_pass():
    layer, x = layer_and_input("wide")
    adapter = make(layer, 12)
    assert not adapter.as_low_rank
    adapter.attach()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x.requires_grad_())
    whole = [t for t in kept if t.shape == layer.weight.shape]
    assert all(t.data_ptr() == layer.weight.data_ptr() for t in whole)


@pytest.mark.parametrize("low_rank", [False, True])
def test_two_networks_on_a_layer_add_up(low_rank):
    layer, x = layer_and_input("linear")
    first, second = make(layer, 2), make(layer, 3)
    first.as_low_rank = second.as_low_rank = low_rank
    for adapter in (first, second):
        adapter.attach()
    second.multiplier = 0.5
    wanted = with_weight(layer, x, layer.weight + first.delta() + 0.5 * second.delta())
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("low_rank", [False, True])
def test_rank_dropout_leaves_rows_out_and_keeps_the_mean(low_rank):
    layer, x = layer_and_input("linear")
    adapter = make(layer, 2, dropouts=Dropouts(rank=0.25))
    adapter.as_low_rank = low_rank
    base = layer(x)
    adapter.attach()
    full = adapter.eval()(x) - base
    torch.manual_seed(0)
    change = adapter.train()(x) - base
    left_out = (change.abs().amax(dim=(0, 1)) < 1e-6).tolist()
    assert 0 < sum(left_out) < len(left_out)
    kept = [not out for out in left_out]
    torch.testing.assert_close(change[..., kept], full[..., kept] / 0.75)


def test_module_dropout_leaves_everything_out_at_its_rate():
    layer, x = layer_and_input("linear")
    adapter = make(layer, 2, dropouts=Dropouts(module=0.5))
    base = layer(x)
    adapter.attach()
    adapter.train()
    torch.manual_seed(0)
    missing = sum(torch.allclose(layer(x), base, atol=1e-6) for _ in range(100))
    assert 30 < missing < 70


def test_norms_are_limited():
    layer, _ = layer_and_input("3x3")
    for tucker in (False, True):
        adapter = make(layer, 3, tucker)
        limit = float(adapter.delta().norm()) / 4
        with torch.no_grad():
            norm, changed = adapter.limit_norm(limit).tolist()
            assert (norm, changed) == (pytest.approx(limit), 1)
            assert float(adapter.delta().norm()) == pytest.approx(limit, rel=1e-4)
            assert adapter.limit_norm(limit * 2).tolist() == [pytest.approx(limit, rel=1e-4), 0]


def test_a_new_network_changes_nothing_and_all_of_it_learns():
    models = tiny_models()
    before = outputs(*models)
    for arguments in ({}, {"conv_dim": "2", "use_tucker": "True"}):
        network = attached(loha, models, randomized=False, **arguments)
        assert_same(outputs(*models), before, atol=1e-5, rtol=1e-5)
        moving = {"hada_w1_a"} if arguments else {"hada_w2_a"}
        network.train()
        models[1](torch.randn(1, 4, 8, 8), torch.tensor([3]), models[0](torch.arange(77)[None])).sample.sum().backward()
        for adapter in network.adapters:
            tucker = hasattr(adapter, "hada_t1") and adapter.tucker
            with_gradient = {name for name, p in adapter.named_parameters() if p.grad is not None and p.grad.any()}
            assert with_gradient == (moving if tucker or not arguments else {"hada_w2_a"})
        network.set_enabled(False)


def test_a_saved_network_computes_the_same_again(tmp_path):
    models = tiny_models()
    before = outputs(*models)
    network = attached(loha, models, conv_dim="2", use_tucker="True")
    wanted = outputs(*models)
    assert differs(wanted, before)
    path = tmp_path / "loha.safetensors"
    network.save_weights(path, None, {})
    again, remade = reloaded(loha, path)
    assert_same(outputs(*again), wanted)
    assert sorted(remade.file_tensors()) == sorted(network.file_tensors())
    merged = tiny_models()
    fresh, tensors = loha.create_network_from_weights(1.0, str(path), None, *merged, for_inference=True)
    fresh.merge_to(*merged, tensors, torch.float32, "cpu")
    assert_same(outputs(*merged), wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("tucker", ["False", "True"])
def test_files_of_lycoris_continue_here(tmp_path, tucker):
    path, wanted = trained_by_lycoris(tmp_path, "loha", tiny_models(), use_tucker=tucker)
    models, network = reloaded(loha, path)
    assert_same(outputs(*models), wanted, atol=1e-4, rtol=1e-4)
    created = tiny_models()
    own = attached(loha, created, conv_dim="4", conv_alpha="2", use_tucker=tucker)
    own.load_weights(path)
    assert_same(outputs(*created), wanted, atol=1e-4, rtol=1e-4)
    assert {n: t.shape for n, t in own.file_tensors().items()} == {
        n: t.shape for n, t in network.file_tensors().items()
    }


@pytest.mark.parametrize("tucker", ["False", "True"])
def test_lycoris_continues_our_files(tmp_path, tucker):
    models = tiny_models()
    network = attached(loha, models, conv_dim="4", use_tucker=tucker)
    path = tmp_path / "ours.safetensors"
    network.save_weights(path, None, {})
    assert_same(continued_by_lycoris(path, tiny_models()), outputs(*models), atol=1e-4, rtol=1e-4)


def test_patterns_choose_layers_ranks_and_rates():
    arguments = {
        "exclude_patterns": "['.*attn2.*', 'text_model.*']",
        "include_patterns": "[r'.*attn2\\.to_q', '.*self_attn.*']",
        "network_reg_dims": r".*attn1\.to_[qk]{1,1}=8, .*ff.*=0",
        "network_reg_lrs": r".*attn1.*=1e-3,.*self_attn.*=0",
        "loraplus_lr_ratio": "4",
    }
    assert not list(loha.check_network_args(4, 1.0, arguments))
    network = loha.create_network(1.0, 4, 1.0, None, *tiny_models(), **arguments)
    layers = {adapter.name: adapter for adapter in network.adapters}
    assert not any("attn2_to_k" in name or "_ff_" in name or "mlp" in name for name in layers)
    assert any("self_attn" in name for name in layers)
    for name, adapter in layers.items():
        assert adapter.rank == (8 if name.endswith(("attn1_to_q", "attn1_to_k")) else 4)
    groups, names = network.prepare_optimizer_params(1e-4, 1e-5, 1e-6)
    rates = dict(zip(names, (group["lr"] for group in groups), strict=True))
    assert rates == pytest.approx({"unet": 1e-5, "unet plus": 4e-5, "unet_reg_lr_0": 1e-3, "unet_reg_lr_0 plus": 4e-3})
    own = {id(p) for n, a in layers.items() if "attn1" in n for p in a.parameters()}
    assert {id(p) for g, n in zip(groups, names, strict=True) if "reg_lr" in n for p in g["params"]} == own


def test_a_pattern_that_fits_no_layer_is_worth_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        loha.create_network(1.0, 4, 1.0, None, *tiny_models(), network_reg_dims=r"attn1=8,.*attn2\.to_q=2")
    assert "'attn1' fits no layer" in caplog.text
    assert "attn2" not in caplog.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"exclude_patterns": "attn"}, ["exclude_patterns", "list"]),
        ({"exclude_patterns": "__import__('os').getcwd()"}, ["exclude_patterns", "list"]),
        ({"exclude_patterns": "[1]"}, ["list of texts"]),
        ({"exclude_patterns": "['(']"}, ["regular expression"]),
        ({"include_patterns": "['.*']"}, ["include_patterns", "exclude_patterns=['.*']"]),
        ({"network_reg_dims": "attn"}, ["network_reg_dims", "pairs"]),
        ({"network_reg_dims": "attn=many"}, ["'many'"]),
        ({"network_reg_dims": "attn=-1"}, ["'-1'"]),
        ({"network_reg_lrs": "attn=nan"}, ["'nan'"]),
        ({"factor": "4"}, ["no argument 'factor'"]),
        ({"use_tuker": "1"}, ["Did you mean use_tucker"]),
        ({"dropout": "0.1"}, ["--network_dropout", "rank_dropout"]),
        ({"rank_dropout": "2"}, ["rank_dropout", "less than 1"]),
    ],
)
def test_bad_arguments(arguments, words):
    text = " ".join(str(problem) for problem in loha.check_network_args(4, 1.0, arguments))
    assert all(word in text for word in words), text


def test_files_of_another_kind_are_refused(tmp_path):
    from networks import lokr

    models = tiny_models()
    path = tmp_path / "lokr.safetensors"
    attached(lokr, models).save_weights(path, None, {})
    with pytest.raises(UserError, match="kind"):
        loha.create_network_from_weights(1.0, str(path), None, *tiny_models())
    with pytest.raises(UserError, match="another kind"):
        attached(loha, tiny_models()).load_weights(path)
