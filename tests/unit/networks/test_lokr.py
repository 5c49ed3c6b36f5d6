"""networks.lokr: LyCORIS' numbers and names, without ever building the product."""

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

from networks import lokr
from networks.adapter_base import Dropouts
from networks.lokr import Form, LokrAdapter, split

FORMS = [
    (kind, rank, factor, tucker)
    for kind in LAYERS
    for rank, factor in ((1, -1), (2, 2), (3, 4), (5, 2), (100, -1), (100, 4))
    for tucker in ((False, True) if "3x3" in kind and rank < 100 else (False,))
]


def make(layer, rank=2, factor=2, tucker=False, form=None, **common):
    form = form or Form.for_layer(layer, rank, factor, tucker=tucker)
    return randomize(LokrAdapter(target_of(layer), form, rank=rank, alpha=3.0, **common))


def test_dimensions_are_split_as_by_lycoris():
    from lycoris.functional.general import factorization

    for size in (1, 2, 7, 12, 49, 77, 96, 127, 128, 250, 320, 360, 640, 768, 1024, 1280, 2560, 10240):
        for factor in (-1, 1, 2, 3, 4, 5, 8, 16, 30, 100, 2000):
            assert split(size, factor) == factorization(size, factor), (size, factor)


@pytest.mark.parametrize(("kind", "rank", "factor", "tucker"), FORMS)
def test_output_and_change_equal_those_of_lycoris(kind, rank, factor, tucker):
    from lycoris.modules.lokr import LokrModule

    layer, x = layer_and_input(kind)
    adapter = make(layer, rank, factor, tucker)
    theirs = LokrModule("name", layer, lora_dim=rank, alpha=3.0, use_tucker=tucker, factor=factor)
    assert {n: t.shape for n, t in theirs.state_dict().items()} == {n: t.shape for n, t in adapter.state_dict().items()}
    assert float(theirs.alpha) == float(adapter.alpha)
    theirs.load_state_dict(adapter.state_dict())
    torch.testing.assert_close(adapter.delta(), theirs.get_weight(theirs.shape))
    wanted = theirs(x)
    adapter.attach()
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("whole", [False, True])
def test_a_file_may_have_factored_its_first_tensor(whole):
    from lycoris.modules.lokr import LokrModule

    layer, x = layer_and_input("wide")
    # LyCORIS factors the first tensor, too, if it is asked to and the rank is small enough.
    theirs = randomize(LokrModule("name", layer, lora_dim=2, alpha=3.0, decompose_both=True))
    tensors = theirs.state_dict()
    if whole:
        tensors["lokr_w2"] = tensors.pop("lokr_w2_a") @ tensors.pop("lokr_w2_b")
    form = Form.of_file(layer, tensors)
    assert (form.first_rank, form.second_rank) == (2, None if whole else 2)
    adapter = LokrAdapter(target_of(layer), form, rank=form.rank, alpha=1.0)
    adapter.load_file_tensors(tensors)
    wanted = theirs(x)
    adapter.attach()
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "rank", "tucker"), [("linear", 1, False), ("linear", 9, False), ("3x3", 1, False), ("3x3", 1, True)]
)
def test_gradients(kind, rank, tucker):
    layer, x = layer_and_input(kind, torch.float64)
    adapter = make(layer, rank, 2, tucker).double()
    adapter.attach()
    rows = torch.linspace(0.5, 2.0, layer.weight.shape[0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, *_: adapter.adapted(x, rows), (x[:1].requires_grad_(), *adapter.parameters())
    )


def test_strength_multiplies_the_change():
    layer, x = layer_and_input("wide")
    first, second = make(layer, 2), make(layer, 3, -1)
    for adapter in (first, second):
        adapter.attach()
    second.multiplier = 0.5
    wanted = with_weight(layer, x, layer.weight + first.delta() + 0.5 * second.delta())
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "3x3"])
def test_rank_dropout_leaves_rows_out_and_keeps_the_mean(kind):
    layer, x = layer_and_input(kind)
    adapter = make(layer, 2, dropouts=Dropouts(rank=0.25))
    base = layer(x)
    adapter.attach()
    full = (adapter.eval()(x) - base).movedim(1, -1) if kind == "3x3" else adapter.eval()(x) - base
    torch.manual_seed(0)
    change = adapter.train()(x) - base
    change = (change.movedim(1, -1) if kind == "3x3" else change).flatten(0, -2)
    left_out = (change.abs().amax(dim=0) < 1e-6).tolist()
    assert 0 < sum(left_out) < len(left_out)
    kept = [not out for out in left_out]
    torch.testing.assert_close(change[:, kept], full.flatten(0, -2)[:, kept] / 0.75)


def test_norms_are_limited():
    for kind, rank, tucker in (("linear", 9, False), ("wide", 2, False), ("3x3", 1, True)):
        layer, _ = layer_and_input(kind)
        adapter = make(layer, rank, 2, tucker)
        limit = float(adapter.delta().norm()) / 4
        with torch.no_grad():
            assert adapter.limit_norm(limit).tolist() == [pytest.approx(limit), 1]
        assert float(adapter.delta().norm()) == pytest.approx(limit, rel=1e-4)


@pytest.mark.parametrize("arguments", [{}, {"conv_dim": "2", "use_tucker": "True", "factor": "4"}])
def test_a_new_network_changes_nothing_and_learns(arguments):
    models = tiny_models()
    before = outputs(*models)
    network = attached(lokr, models, randomized=False, **arguments)
    assert_same(outputs(*models), before)
    network.train()
    models[1](torch.randn(1, 4, 8, 8), torch.tensor([3]), models[0](torch.arange(77)[None])).sample.sum().backward()
    for adapter in network.adapters:
        with_gradient = {name for name, p in adapter.named_parameters() if p.grad is not None and p.grad.any()}
        assert with_gradient == {"lokr_w2" if adapter.form.second_rank is None else "lokr_w2_b"}
    assert network.may_skip_parameters is False


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_a_saved_network_computes_the_same_again(tmp_path, family):
    models = tiny_models(family)
    before = outputs(*models)
    network = attached(lokr, models, dim=2, conv_dim="1", use_tucker="True", factor="4")
    wanted = outputs(*models)
    assert differs(wanted, before)
    path = tmp_path / "lokr.safetensors"
    network.save_weights(path, None, {})
    again, remade = reloaded(lokr, path, family)
    assert_same(outputs(*again), wanted)
    assert {n: t.shape for n, t in remade.file_tensors().items()} == {
        n: t.shape for n, t in network.file_tensors().items()
    }
    merged = tiny_models(family)
    fresh, tensors = lokr.create_network_from_weights(1.0, str(path), None, *merged, for_inference=True)
    fresh.merge_to(*merged, tensors, torch.float32, "cpu")
    assert_same(outputs(*merged), wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "arguments",
    [{"use_tucker": "False"}, {"use_tucker": "True", "factor": "4"}, {"decompose_both": "1"}, {"full_matrix": "1"}],
)
def test_files_of_lycoris_continue_here(tmp_path, arguments):
    path, wanted = trained_by_lycoris(tmp_path, "lokr", tiny_models(), conv_dim="1", **arguments)
    models, _ = reloaded(lokr, path)
    assert_same(outputs(*models), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("factor", ["-1", "4"])
def test_lycoris_continues_our_files(tmp_path, factor):
    models = tiny_models()
    network = attached(lokr, models, dim=2, conv_dim="2", factor=factor)
    path = tmp_path / "ours.safetensors"
    network.save_weights(path, None, {})
    assert_same(continued_by_lycoris(path, tiny_models()), outputs(*models), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"factor": "0"}, ["factor", "-1", "at least 1"]),
        ({"factor": "-2"}, ["factor", "at least -1"]),
        ({"factor": "big"}, ["factor"]),
        ({"algo": "lokr"}, ["no argument 'algo'"]),
    ],
)
def test_bad_arguments(arguments, words):
    text = " ".join(str(problem) for problem in lokr.check_network_args(4, 1.0, arguments))
    assert all(word in text for word in words), text
