"""What the trainer calls in a network module of somebody else: in which order, with what, and how often."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support import train_network

MODULE = """
import torch
from safetensors.torch import save_file

CALLS = []

class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(()))

    def prepare_network(self, args):
        CALLS.append(("prepare_network", args.network_dim, args.learning_rate))

    def apply_to(self, *given):
        CALLS.append(("apply_to", *given[2:]))
        layer = given[1].conv_in
        before = layer.forward
        layer.forward = lambda x: before(x) * self.factor

    def load_weights(self, file):
        CALLS.append(("load_weights",))

    def enable_gradient_checkpointing(self):
        CALLS.append(("enable_gradient_checkpointing",))

    def prepare_optimizer_params_with_multiple_te_lrs(self, text_rates, unet_rate, rate):
        CALLS.append(("prepare_optimizer_params", text_rates, unet_rate, rate))
        return [{"params": self.parameters(), "lr": unet_rate}], ["unet"]

    prepare_optimizer_params = prepare_optimizer_params_with_multiple_te_lrs

    def prepare_grad_etc(self, text_encoder, unet):
        CALLS.append(("prepare_grad_etc", isinstance(text_encoder, torch.nn.Module)))

    def on_epoch_start(self, text_encoder, unet):
        CALLS.append(("epoch",))

    def on_step_start(self, text_encoder, unet):
        CALLS.append(("micro step",))

    def get_trainable_params(self):
        return self.parameters()

    def save_weights(self, file, dtype, metadata):
        save_file({"my_unet_conv_in.factor": self.factor.detach()}, file, metadata)
"""
NORMS = """
    def update_grad_norms(self):
        CALLS.append(("update_grad_norms", self.factor.grad.item() != 0))

    def update_norms(self):
        CALLS.append(("update_norms",))

    def weight_norms(self):
        return torch.tensor([1.0, 3.0])

    def grad_norms(self):
        return None

    def combined_weight_norms(self):
        return torch.tensor([5.0])
"""
LIMIT = """
    def apply_max_norm_regularization(self, limit, device):
        CALLS.append(("limit", limit, str(device)))
        return 7, torch.tensor(0.25), 0.5
"""
FUNCTIONS = """
def create_network(*given, neuron_dropout=None, **arguments):
    CALLS.append(("create_network", *given[:4], isinstance(given[4], torch.nn.Module), neuron_dropout, arguments))
    return Network()

def create_network_from_weights(*given, **arguments):
    return Network(), {}
"""


@pytest.fixture
def run(tiny_sd1, photo_folders, tmp_path, monkeypatch, request):
    """Train with a module of the given text; returns its calls and what was logged."""

    def start(text: str, *more: str):
        name = f"module_{abs(hash(request.node.name))}"
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        status = train_network(
            f"--pretrained_model_name_or_path={tiny_sd1}",
            f"--train_data_dir={photo_folders}",
            f"--output_dir={tmp_path / 'out'}",
            f"--logging_dir={tmp_path / 'logs'}",
            f"--network_module={name}",
            "--resolution=64",
            "--train_batch_size=4",
            "--max_data_loader_n_workers=0",
            "--unet_lr=1e-3",
            "--seed=3",
            *more,
        )
        assert status == 0
        events = EventAccumulator(str(next((tmp_path / "logs").rglob("events.*")).parent)).Reload()
        scalars = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        return __import__(name).CALLS, scalars

    return start


def test_calls_come_in_the_order_of_the_protocol(run, tmp_path):
    weights = tmp_path / "start.safetensors"
    weights.write_bytes(b"its own business")
    calls, scalars = run(
        MODULE + NORMS + FUNCTIONS,
        "--max_train_epochs=2",
        "--gradient_accumulation_steps=2",
        "--gradient_checkpointing",
        "--network_dim=5",
        "--network_alpha=2.5",
        "--network_dropout=0.5",
        "--network_args",
        "word=a=b",
        f"--network_weights={weights}",
        "--text_encoder_lr=2e-4",
    )
    first = calls.index(("epoch",))
    assert calls[:first] == [
        ("create_network", 1.0, 5, 2.5, None, True, 0.5, {"word": "a=b", "dropout": "0.5"}),
        ("prepare_network", 5, 2e-6),
        ("apply_to", True, True),
        ("load_weights",),
        ("enable_gradient_checkpointing",),
        ("prepare_optimizer_params", [2e-4], 1e-3, 2e-6),
        ("prepare_grad_etc", True),
    ]
    names = [name for name, *_ in calls[first:]]
    assert names.count("epoch") == 2
    assert names.count("update_norms") == len(scalars["loss/current"]) < names.count("micro step")
    assert names[-3:] == ["micro step", "update_grad_norms", "update_norms"]
    assert ("update_grad_norms", True) in calls and ("update_grad_norms", False) not in calls
    assert set(scalars["norm/avg_key_norm"]) == {2.0} and set(scalars["norm/avg_combined_norm"]) == {5.0}
    assert "norm/avg_grad_norm" not in scalars


def test_norms_are_limited_after_updates_alone(run):
    calls, scalars = run(
        MODULE + LIMIT + FUNCTIONS, "--scale_weight_norms=0.5", "--gradient_accumulation_steps=2", "--max_train_steps=2"
    )
    assert calls.count(("limit", 0.5, "cpu")) == 2
    assert calls[-1] == ("limit", 0.5, "cpu")
    drawn = ("max_norm/keys_scaled", "norm/avg_key_norm", "max_norm/max_key_norm")
    assert [scalars[name] for name in drawn] == [[7.0, 7.0], [0.25, 0.25], [0.5, 0.5]]


def test_a_limit_that_a_network_of_ours_cannot_keep_is_told(tiny_sd1, photo_folders, tmp_path, capsys):
    status = train_network(
        f"--pretrained_model_name_or_path={tiny_sd1}",
        f"--train_data_dir={photo_folders}",
        f"--output_dir={tmp_path}",
        "--network_module=networks.oft",
        "--network_alpha=0.01",
        "--resolution=64",
        "--max_data_loader_n_workers=0",
        "--max_train_steps=1",
        "--scale_weight_norms=1",
    )
    assert status == 0
    assert "--scale_weight_norms has no effect" in capsys.readouterr().err
