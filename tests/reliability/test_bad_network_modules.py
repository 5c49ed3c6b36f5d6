"""Network modules of somebody else's that cannot be used: one line that names the module and what it did."""

from __future__ import annotations

from textwrap import dedent

import pytest

from tests.support import train_network

GOOD = '''
import torch
from safetensors.torch import save_file

class Factor(torch.nn.Module):
    """Multiplies what a layer returns."""

    def __init__(self, layer):
        super().__init__()
        self.layer = [layer]
        self.factor = torch.nn.Parameter(torch.ones(()))

    def attach(self):
        before = self.layer[0].forward
        self.layer[0].forward = lambda x: before(x) * self.factor

class Network(torch.nn.Module):
    def apply_to(self, text_encoder, unet, apply_text_encoder, apply_unet):
        self.only = Factor(unet.conv_in)
        self.only.attach()

    def load_weights(self, file):
        return "loaded"

    def prepare_optimizer_params(self, text_encoder_lr, unet_lr, default_lr):
        return [{"params": list(self.parameters()), "lr": unet_lr or default_lr}]

    def prepare_grad_etc(self, text_encoder, unet):
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder, unet):
        self.train()

    def get_trainable_params(self):
        return self.parameters()

    def save_weights(self, file, dtype, metadata):
        save_file({"my_unet_conv_in.factor": self.only.factor.detach()}, file, metadata)

def create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet, neuron_dropout=None, **kwargs):
    return Network()

def create_network_from_weights(multiplier, file, vae, text_encoder, unet, weights_sd=None, **kwargs):
    return Network(), {}
'''
"""The least that a network module needs."""


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """Write a module; returns its name."""
    name = f"module_{abs(hash(request.node.name))}"

    def write(text: str) -> str:
        folder = tmp_path / "modules"
        folder.mkdir()
        (folder / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(folder)
        return name

    return write


def changed(method: str, body: str) -> str:
    """GOOD with another body of a method or function."""
    lines = GOOD.splitlines()
    start = next(number for number, line in enumerate(lines) if line.strip().startswith(f"def {method}("))
    indent = len(lines[start]) - len(lines[start].lstrip()) + 4
    end = next(number for number in range(start + 1, len(lines) + 1) if number == len(lines) or not lines[number])
    new = [" " * indent + line for line in dedent(body).strip().splitlines()]
    return "\n".join([*lines[: start + 1], *new, *lines[end:]])


IMPORTS = {
    "a syntax error": ("def create_network(:\n", ["fails when it is imported", "SyntaxError"]),
    "a missing package": ("import surely_absent_package\n", ["fails when it is imported", "surely_absent_package"]),
    "an error": ("raise KeyError('nothing')\n", ["fails when it is imported", "KeyError", "nothing"]),
    "an exit": ("import sys\nsys.exit(3)\n", ["fails when it is imported", "SystemExit"]),
    "no function": ("x = 1\n", ["is no network module", "create_network and no create_network_from_weights"]),
    "one function": ("def create_network(*_, **__): ...\n", ["is no network module", "create_network_from_weights"]),
}


@pytest.mark.parametrize("name", IMPORTS)
def test_modules_that_cannot_be_imported(refused, module, no_loading, name):
    text, words = IMPORTS[name]
    found = module(text)
    said = refused(network_module=found)
    for word in (f"--network_module {found}", *words):
        assert word in said, said


METHODS = {
    "creates nothing": ("create_network", "return None", ["created no network"]),
    "fails to create": ("create_network", "raise ValueError('bad day')", ["create_network failed", "bad day"]),
    "creates no module": ("create_network", "return object()", ["no torch.nn.Module"]),
    "lacks a method": ("create_network", "return torch.nn.Linear(1, 1)", ["no method apply_to"]),
    "fails to attach": ("apply_to", "raise RuntimeError('no\\nlayer')", ["apply_to failed", "RuntimeError: no layer"]),
    "attaches nothing": ("apply_to", "pass", ["finds no layer of the model"]),
    "fails over the rates": ("prepare_optimizer_params", "raise TypeError('x')", ["prepare_optimizer_params failed"]),
    "has no groups": ("prepare_optimizer_params", "return []", ["has nothing to train"]),
    "has groups of another kind": ("prepare_optimizer_params", "return [1, 2]", ["prepare_optimizer_params failed"]),
    "fails in between": ("prepare_grad_etc", "raise OSError('x')", ["prepare_grad_etc failed"]),
    "saves nothing": ("save_weights", "pass", ["save_weights wrote no file"]),
    "saves something else": ("save_weights", "open(file, 'w').write('x')", ["save_weights wrote an unusable file"]),
    "fails to save": ("save_weights", "raise RuntimeError('x')", ["save_weights failed", "RuntimeError: x"]),
    "saves NaN": (
        "save_weights",
        "save_file({'my_unet_conv_in.factor': torch.tensor(float('nan'))}, file)",
        ["begins with NaN", "my_unet_conv_in.factor"],
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_networks_that_fail_do_so_before_training(refused, module, monkeypatch, name):
    def train(*_args):
        raise AssertionError("training begins")

    monkeypatch.setattr("library.training.loop.Loop.train", train)
    method, body, words = METHODS[name]
    found = module(changed(method, body))
    said = refused(network_module=found)
    for word in (f"--network_module {found}", *words):
        assert word in said, said


def test_a_forward_pass_that_fails(refused, module, monkeypatch):
    """The module's own failure is told from one of the toolkit."""
    found = module(changed("attach", "self.layer[0].forward = lambda x: x @ self.factor.expand(7, 7)"))
    said = refused(network_module=found)
    for word in (f"--network_module {found}", "forward pass failed", "RuntimeError"):
        assert word in said, said


def test_where_a_module_failed_is_shown_when_asked_for(network_command, module, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SD_TOOLKIT_TRACEBACK", "1")
    found = module(changed("apply_to", "raise RuntimeError('no layer')"))
    assert train_network(*network_command(tmp_path / "out", network_module=found)) == 2
    said = capsys.readouterr().err
    assert f"{found}.py" in said and "in apply_to" in said


def test_an_error_in_a_module_of_ours_is_a_bug(network_command, tmp_path, capsys, monkeypatch):
    def fail(*_args):
        raise KeyError("oh")

    monkeypatch.setattr("networks.adapter_network.AdapterNetwork.apply_to", fail)
    assert train_network(*network_command(tmp_path / "out")) == 1
    assert "this is a bug in the toolkit" in capsys.readouterr().err


def data_with(photos, tmp_path, line: str, where: str):
    config = tmp_path / "data.toml"
    lines = {"dataset": "", "subset": ""} | {where: line}
    config.write_text(
        f"[[datasets]]\nresolution = 64\n{lines['dataset']}\n"
        f"[[datasets.subsets]]\nimage_dir = '{photos / '1_sks duck'}'\n{lines['subset']}\n"
    )
    return {"train_data_dir": None, "resolution": None, "dataset_config": config}


@pytest.mark.parametrize(
    ("line", "where", "word"),
    [
        ("network_multiplier = 0.5", "dataset", "network_multiplier 0.5"),
        ("custom_attributes = {diff_output_preservation = true}", "subset", "diff_output_preservation"),
    ],
)
def test_data_that_ask_for_strengths_which_the_network_has_not(
    refused, module, few_photos, tmp_path, line, where, word
):
    found = module(GOOD)
    said = refused(network_module=found, **data_with(few_photos, tmp_path, line, where))
    for expected in (f"--network_module {found}", "set_multiplier", word):
        assert expected in said, said


def test_the_least_module_trains(network_command, module, tmp_path, capsys):
    """And goes on from files that nobody else understands, and is told of what it cannot do."""
    out, found = tmp_path / "out", module(GOOD)
    assert train_network(*network_command(out, "--scale_weight_norms=1", network_module=found)) == 0
    assert "--scale_weight_norms has no effect" in capsys.readouterr().err
    first = f"--network_weights={out / 'duck.safetensors'}"
    for way in ((), ("--dim_from_weights",)):
        assert train_network(*network_command(tmp_path / "again", first, *way, network_module=found)) == 0
    assert "loaded" in capsys.readouterr().err
