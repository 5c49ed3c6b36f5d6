"""Hypernetworks: files as NovelAI and the A1111 web UI have them, and what they do to keys and values."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.checkpoints.hypernetwork_file import read_hypernetwork
from library.errors import UserError
from networks.hypernetwork import check_network_args, create_network, create_network_from_weights
from tests.support import tensor_digest, train_network

MODULE = "--network_module=networks.hypernetwork"


class Attention(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)


class Unet(nn.Module):
    """Two widths of context: 4 inside, 6 of the text."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.text = Attention(4, 4), Attention(4, 6)


def novelai_file(path, *, old_names: bool = False, **more) -> dict:
    """Write what those programs write, with random values, and return it."""
    generator = torch.Generator().manual_seed(3)
    names = ("linear1", "linear2") if old_names else ("linear.0", "linear.1")

    def mlp(width: int) -> dict:
        shapes = ((2 * width, width), (2 * width,), (width, 2 * width), (width,))
        keys = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
        return {key: torch.randn(shape, generator=generator) for key, shape in zip(keys, shapes, strict=True)}

    content = {width: (mlp(width), mlp(width)) for width in (4, 6)}
    torch.save({**content, **more}, path)
    return content


def expected(mlp: dict, x, strength: float):
    first, second = list(mlp.values())[:2], list(mlp.values())[2:]
    return x + strength * ((x @ first[0].T + first[1]) @ second[0].T + second[1])


@pytest.mark.parametrize("old_names", [False, True])
def test_keys_and_values_are_made_from_changed_contexts(tmp_path, old_names):
    content = novelai_file(tmp_path / "h.pt", old_names=old_names, step=10, name="h", activation_func="linear")
    unet = Unet()
    network, _ = create_network_from_weights(0.5, tmp_path / "h.pt", None, None, unet)
    network.apply_to(None, unet)
    for attention, width in ((unet.inside, 4), (unet.text, 6)):
        x = torch.randn(2, 3, width)
        for layer, mlp in ((attention.to_k, content[width][0]), (attention.to_v, content[width][1])):
            torch.testing.assert_close(layer(x), expected(mlp, x, 0.5) @ layer.weight.T)
    x = torch.randn(2, 3, 4)
    assert torch.equal(unet.inside.to_q(x), x @ unet.inside.to_q.weight.T)
    network.set_multiplier(0.0)
    assert torch.equal(unet.inside.to_k(x), x @ unet.inside.to_k.weight.T)
    network.set_multiplier(1.0)
    network.set_enabled(False)
    assert torch.equal(unet.inside.to_k(x), x @ unet.inside.to_k.weight.T)


def test_a_new_one_begins_close_to_nothing_and_depends_on_the_seed_alone():
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        torch.rand(seed)
        found.append(create_network(1.0, None, 1.0, None, None, Unet()).state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    weights = found[0]["widths.6.k.linear.0.weight"]
    assert not torch.equal(weights, found[2]["widths.6.k.linear.0.weight"])
    assert 0.005 < weights.std() < 0.015
    assert not found[0]["widths.6.k.linear.0.bias"].any()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_saved_files_hold_the_same_values_in_the_layout_of_novelai(tmp_path, suffix):
    content = novelai_file(tmp_path / "h.pt")
    unet = Unet()
    network, _ = create_network_from_weights(1.0, tmp_path / "h.pt", None, None, unet)
    target = tmp_path / f"again{suffix}"
    network.save_weights(target, None, {"a": "b"})
    again = read_hypernetwork(target).widths
    for width, pair in content.items():
        for role, mlp in zip(("k", "v"), pair, strict=True):
            assert all(torch.equal(again[width][role][name], tensor) for name, tensor in mlp.items())
    if suffix == ".pt":
        raw = torch.load(target, weights_only=True)
        assert {type(width) for width in raw} == {int}
        assert [list(mlp) for mlp in raw[6]] == [list(content[6][0])] * 2


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"layer_structure": [1, 2, 2, 1]}, "layer_structure"),
        ({"activation_func": "relu"}, "activation_func 'relu'"),
        ({"is_layer_norm": True}, "is_layer_norm"),
        ({4: [{}]}, "under 4"),
        ({4: [{"linear.0.weight": torch.zeros(3, 3)}] * 2}, "linear.0.bias"),
    ],
)
def test_other_structures_are_refused(tmp_path, more, words):
    novelai_file(tmp_path / "h.pt", **{name: value for name, value in more.items() if isinstance(name, str)})
    if 4 in more:
        torch.save(more, tmp_path / "h.pt")
    with pytest.raises(UserError, match=words):
        read_hypernetwork(tmp_path / "h.pt")


def test_what_is_no_hypernetwork_is_refused(tmp_path, tiny_sd1):
    with pytest.raises(UserError, match="no hypernetwork"):
        read_hypernetwork(tiny_sd1)
    content = novelai_file(tmp_path / "h.pt")
    content[4][0]["linear.0.bias"][0] = float("nan")
    torch.save(content, tmp_path / "h.pt")
    with pytest.raises(UserError, match="NaN"):
        read_hypernetwork(tmp_path / "h.pt")


def test_a_hypernetwork_for_another_model_is_refused(tmp_path):
    novelai_file(tmp_path / "h.pt")
    unet = nn.ModuleList([Attention(8, 8)])
    network, _ = create_network_from_weights(1.0, tmp_path / "h.pt", None, None, unet)
    with pytest.raises(UserError, match=r"width 4, 6, but the model has 8"):
        network.apply_to(None, unet)


def test_arguments_without_meaning_are_refused():
    found = [problem.where for problem in check_network_args(8, 1.0, {"dropout": "0.1", "sizes": "4,4", "x": "1"})]
    assert found == ["--network_args", "--network_args", "--network_dropout", "--network_dim"]
    assert not list(check_network_args(None, 1.0, {"sizes": "4,6"}))


def options(model, photos, out) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={model}",
        f"--train_data_dir={photos}",
        f"--output_dir={out}",
        "--output_name=hyper",
        "--resolution=64",
        MODULE,
        "--learning_rate=1e-2",
        "--max_train_steps=4",
        "--max_data_loader_n_workers=0",
        "--seed=7",
    ]


def test_training_moves_every_matrix_and_goes_on_from_a_state(tiny_sd1, photo_folders, tmp_path):
    straight, again = tmp_path / "straight", tmp_path / "again"
    saving = ["--save_state", "--save_every_n_steps=2"]
    assert train_network(*options(tiny_sd1, photo_folders, straight), *saving) == 0
    halfway, end = (load_file(straight / name) for name in ("hyper-step00000002.safetensors", "hyper.safetensors"))
    assert all(not torch.equal(end[name], halfway[name]) for name in end if name.endswith("weight"))
    state = straight / "hyper-step00000002-state"
    assert train_network(*options(tiny_sd1, photo_folders, again), f"--resume={state}") == 0
    assert tensor_digest(again / "hyper.safetensors") == tensor_digest(straight / "hyper.safetensors")


def test_training_goes_on_from_a_file(tiny_sd1, photo_folders, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train_network(*options(tiny_sd1, photo_folders, first), "--save_model_as=pt") == 0
    more = [f"--network_weights={first / 'hyper.pt'}", "--learning_rate=1e-30"]
    assert train_network(*options(tiny_sd1, photo_folders, second), *more) == 0
    before, after = read_hypernetwork(first / "hyper.pt"), read_hypernetwork(second / "hyper.safetensors")
    assert all(
        torch.equal(tensor, after.widths[width][role][name])
        for width, roles in before.widths.items()
        for role, tensors in roles.items()
        for name, tensor in tensors.items()
    )
    capsys.readouterr()
    assert train_network(*options(tiny_sd1, photo_folders, second), f"--network_weights={tiny_sd1}") == 2
    assert "is no hypernetwork" in capsys.readouterr().err.strip().splitlines()[-1]
