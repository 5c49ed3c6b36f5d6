"""`--initial_step`, `--initial_epoch` and `--skip_until_initial_step`: where counts and data begin."""

from __future__ import annotations

import pytest

import train_network
from library import cli
from library.contracts import Position
from library.errors import UserError
from library.training.beginning import named_position
from library.training.options import LengthOptions
from library.training.options_progress import StartOptions
from library.training.run_length import resolve_length
from tests.support import tensor_digest

LENGTH = resolve_length(LengthOptions(max_train_steps=10), batches_per_epoch=4)


def test_nothing_named_is_nowhere():
    assert named_position(StartOptions(), LENGTH) is None
    assert named_position(StartOptions(skip_until_initial_step=True), LENGTH) is None


@pytest.mark.parametrize(
    ("options", "position"),
    [
        ({"initial_step": 0}, Position()),
        ({"initial_epoch": 1}, Position()),
        ({"initial_epoch": 3}, Position(8, 2, 0)),
        ({"initial_epoch": 3, "skip_until_initial_step": True}, Position(8, 2, 0)),
        ({"initial_step": 6}, Position(6, 1, 0)),
        ({"initial_step": 6, "skip_until_initial_step": True}, Position(6, 1, 2)),
        ({"initial_step": 6, "initial_epoch": 3}, Position(6, 1, 0)),
    ],
)
def test_positions(options, position):
    assert named_position(StartOptions(**options), LENGTH) == position


def test_epochs_are_counted_in_updates_of_all_processes():
    length = resolve_length(
        LengthOptions(max_train_steps=10, gradient_accumulation_steps=2), batches_per_epoch=9, world_size=2
    )
    assert named_position(StartOptions(initial_epoch=2), length) == Position(3, 1, 0)


@pytest.mark.parametrize(("options", "name"), [({"initial_step": 10}, "step"), ({"initial_epoch": 4}, "epoch")])
def test_a_beginning_after_the_end_is_refused(options, name):
    with pytest.raises(UserError, match=rf"--initial_{name}: begins after 1\d updates, but the whole run has 10"):
        named_position(StartOptions(**options), LENGTH)


@pytest.fixture
def run(tiny_sd1, photo_folders, tmp_path):
    """Train six updates, four an epoch; returns losses and learning rates by update."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def go(name, *words):
        argv = [
            f"--pretrained_model_name_or_path={tiny_sd1}",
            f"--train_data_dir={photo_folders}",
            f"--output_dir={tmp_path / 'out'}",
            f"--output_name={name}",
            f"--logging_dir={tmp_path / name}",
            "--resolution=64",
            "--train_batch_size=2",
            "--max_data_loader_n_workers=0",
            "--seed=7",
            "--max_train_steps=6",
            "--learning_rate=1e-3",
            "--lr_scheduler=linear",
            "--network_module=networks.lora",
            "--network_train_unet_only",
            *words,
        ]
        assert cli.run_script(train_network.Options, train_network.train, argv) == 0
        (events,) = (tmp_path / name).glob("*/network_train/events*")
        read = EventAccumulator(str(events)).Reload()
        return [{event.step: event.value for event in read.Scalars(tag)} for tag in ("loss/current", "lr/unet")]

    return go


def test_counting_begins_there_without_a_state(run, tmp_path):
    """Untrained weights: the loss of an update tells which data and noise it saw."""
    still, whole_rates = run("whole", "--learning_rate=1e-20")
    there = ("--initial_step=3", "--skip_until_initial_step")
    skipping, rates = run("skipping", "--learning_rate=1e-20", "--save_every_n_steps=2", *there)
    assert skipping == {step: still[step] for step in (4, 5, 6)}
    assert rates == {step: whole_rates[step] for step in (4, 5, 6)}
    assert {path.name for path in (tmp_path / "out").glob("skipping*")} == {
        "skipping.safetensors",
        "skipping-step00000004.safetensors",
        "skipping-step00000006.safetensors",
    }
    again, _ = run("again", "--learning_rate=1e-20", "--initial_step=3")
    assert sorted(again) == [4, 5, 6]
    assert again != skipping
    by_epoch, _ = run("by_epoch", "--learning_rate=1e-20", "--initial_epoch=2")
    assert by_epoch == {step: still[step] for step in (5, 6)}


def test_a_state_goes_on_where_the_user_says(run, tmp_path):
    run("whole", "--save_state", "--save_every_n_steps=4")
    state = f"--resume={tmp_path / 'out' / 'whole-step00000004-state'}"
    exact, rates = run("exact", state)
    assert sorted(exact) == [5, 6]
    same, _ = run("same", state, "--initial_step=4", "--skip_until_initial_step")
    assert same == exact
    digests = {tensor_digest(tmp_path / "out" / f"{name}.safetensors") for name in ("exact", "same", "whole")}
    assert len(digests) == 1
    back, back_rates = run("back", state, "--initial_step=2", "--skip_until_initial_step")
    assert sorted(back) == [3, 4, 5, 6]
    assert back_rates[6] == rates[6]
    assert back_rates[3] > back_rates[4] > rates[5]
