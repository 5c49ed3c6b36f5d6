"""The validation loss: when it is measured, that runs can be compared by it, and that it leaves no trace."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

import train_network
from library import cli
from library.draws import ImageDraws
from library.training.options_progress import ValidationOptions
from library.training.validation import Validator
from tests.support import tensor_digest


@pytest.fixture
def run(tiny_sd1, photo_folders, tmp_path):
    """Train a network on five photographs; returns the curves and a digest of the network."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def go(name, *words):
        logs = tmp_path / name
        argv = [
            f"--pretrained_model_name_or_path={tiny_sd1}",
            f"--train_data_dir={photo_folders}",
            f"--output_dir={tmp_path / 'out' / name}",
            f"--logging_dir={logs}",
            "--output_name=duck",
            "--network_module=networks.lora",
            "--network_train_unet_only",
            "--resolution=64",
            "--learning_rate=1e-3",
            "--max_train_steps=1",
            "--max_data_loader_n_workers=0",
            "--seed=7",
            *words,
        ]
        assert cli.run_script(train_network.Options, train_network.train, argv) == 0
        (events,) = logs.glob("*/network_train/events*")
        read = EventAccumulator(str(events)).Reload()
        curves = {tag: {event.step: event.value for event in read.Scalars(tag)} for tag in read.Tags()["scalars"]}
        return curves, tensor_digest(tmp_path / "out" / name / "duck.safetensors")

    return go


def validator(options=None, *, split=0.5, images=4):
    subset = SimpleNamespace(validation_split=split, is_reg=False)
    spec = SimpleNamespace(validation_seed=None, subsets=[subset])
    data = SimpleNamespace(specs=[spec], validation=object() if images else None)
    return Validator(SimpleNamespace(seed=0, is_main=True), data, options or ValidationOptions())


class TestWhen:
    def test_after_every_epoch_unless_told_otherwise(self):
        due = validator().due
        assert due(5, 1, epoch_ended=False) == ()
        assert due(6, 1, epoch_ended=True) == ("epoch",)
        assert due(12, 2, epoch_ended=True) == ("epoch",)

    def test_after_every_nth_epoch_and_update(self):
        due = validator(ValidationOptions(validate_every_n_steps=4, validate_every_n_epochs=2)).due
        assert due(4, 1, epoch_ended=False) == ("step",)
        assert due(6, 1, epoch_ended=True) == ()
        assert due(8, 2, epoch_ended=True) == ("step", "epoch")

    def test_never_without_images(self):
        due = validator(ValidationOptions(validate_every_n_steps=1), images=0).due
        assert due(1, 1, epoch_ended=True) == ()

    def test_an_unanswered_wish_is_pointed_out(self, caplog):
        caplog.set_level(logging.WARNING)
        validator(split=0.01, images=0)
        assert "0.01 of so few images is not a single one" in caplog.text
        caplog.clear()
        validator(ValidationOptions(max_validation_steps=1), split=0, images=0)
        assert "no data set has a validation_split" in caplog.text
        caplog.clear()
        validator(split=0, images=0)
        assert not caplog.text


class TestNoise:
    def test_belongs_to_the_image_whatever_the_batch(self):
        def noise(*keys, number=0, seed=1):
            return ImageDraws(seed, keys, number, torch.device("cpu"), "val").normal("noise", (4, 8, 8))

        pair = noise("a.png", "b.png")
        assert torch.equal(pair[1:], noise("b.png"))
        assert not torch.equal(pair[0], pair[1])
        assert not torch.equal(noise("a.png"), noise("a.png", number=1))
        assert not torch.equal(noise("a.png"), noise("a.png", seed=2))

    def test_one_number_for_all_does_not_depend_on_the_batch_either(self):
        one, other = (ImageDraws(1, keys, 0, torch.device("cpu"), "val").scalar("offset") for keys in ("a", "bc"))
        assert one == other


SPLIT = ("--validation_split=0.4", "--validation_seed=1")


def test_names_and_moments(run):
    """An epoch is six updates long, and the run ends within the second one."""
    curves, _ = run("logs", *SPLIT, "--max_train_steps=8", "--validate_every_n_steps=3")
    assert {name: sorted(values) for name, values in curves.items() if "validation" in name} == {
        "loss/validation/step_average": [3, 6],
        "loss/validation/step_divergence": [3, 6],
        "loss/validation/epoch_average": [1, 2],
        "loss/validation/epoch_divergence": [1, 2],
    }
    divergence = curves["loss/validation/step_average"][3] - curves["loss/average"][3]
    assert curves["loss/validation/step_divergence"][3] == pytest.approx(divergence, abs=1e-6)
    assert curves["loss/validation/step_average"][6] == curves["loss/validation/epoch_average"][1]


def test_leaves_no_trace_in_training(run):
    """Also with dropout, and with an optimizer whose weights are others while it is judged."""
    words = ("--max_train_steps=3", "--optimizer_type=AdamWScheduleFree", "--network_dropout=0.5", *SPLIT)
    often, one = run("often", *words, "--validate_every_n_steps=1")
    rarely, other = run("rarely", *words, "--validate_every_n_epochs=100")
    assert len(often["loss/validation/step_average"]) == 3
    assert not any("validation" in name for name in rarely)
    assert often["loss/current"] == rarely["loss/current"]
    assert one == other


def test_runs_can_be_compared(run):
    """The untrained model is judged alike by runs that differ in seed, batch size and what else is in the data."""

    def loss(name, *words):
        curves, _ = run(name, "--learning_rate=1e-20", "--validation_split=0.6", "--validate_every_n_steps=1", *words)
        return curves["loss/validation/step_average"][1]

    one = loss("one", "--validation_seed=1")
    assert loss("other", "--validation_seed=1", "--seed=8", "--train_batch_size=3") == pytest.approx(one, rel=1e-5)
    assert loss("third", "--validation_seed=2") != one
    assert loss("fourth", "--validation_seed=1", "--max_validation_steps=1") != one


def test_without_a_seed_of_its_own_that_of_the_run_counts(run):
    words = ("--learning_rate=1e-20", "--validation_split=0.6", "--validate_every_n_steps=1")
    losses = [run(f"{number}", *words, f"--seed={seed}")[0] for number, seed in enumerate((3, 3, 4))]
    first, again, other = (curves["loss/validation/step_average"][1] for curves in losses)
    assert first == again
    assert first != other
