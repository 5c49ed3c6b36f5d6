"""Steps, epochs and images of a run."""

import pytest

from library.contracts import Position
from library.errors import UserError
from library.training.options import LengthOptions
from library.training.run_length import length_report, resolve_length


@pytest.mark.parametrize(
    ("options", "batches", "world", "expected"),
    [  # total steps, epochs, updates per epoch
        ({"max_train_steps": 100}, 30, 1, (100, 4, 30)),
        ({"max_train_steps": 90}, 30, 1, (90, 3, 30)),
        ({"max_train_steps": 91}, 30, 1, (91, 4, 30)),
        ({"max_train_steps": 100, "gradient_accumulation_steps": 4}, 30, 1, (100, 13, 8)),
        ({"max_train_steps": 100, "gradient_accumulation_steps": 2}, 30, 3, (100, 20, 5)),
        ({"max_train_epochs": 3}, 30, 1, (90, 3, 30)),
        ({"max_train_epochs": 3, "max_train_steps": 5}, 30, 1, (90, 3, 30)),
        ({"max_train_epochs": 3, "gradient_accumulation_steps": 4}, 30, 2, (12, 3, 4)),
        ({"max_train_steps": 7}, 1, 8, (7, 7, 1)),
        ({}, 400, 1, (1600, 4, 400)),
    ],
)
def test_lengths(options, batches, world, expected):
    run = resolve_length(LengthOptions(**options), batches_per_epoch=batches, world_size=world)
    assert (run.total_steps, run.epochs, run.updates_per_epoch) == expected
    assert run.micro_batches_per_update == options.get("gradient_accumulation_steps", 1) * world
    position = Position()
    for _ in range(run.total_steps - 1):
        position = position.advance(run)
    assert position.epoch == run.epochs - 1  # the last update falls into the last epoch


def test_nothing_to_train_on():
    with pytest.raises(UserError, match="not a single batch"):
        resolve_length(LengthOptions(), batches_per_epoch=0)


def test_processes_and_accumulation_are_interchangeable():
    one = resolve_length(LengthOptions(gradient_accumulation_steps=4), batches_per_epoch=30, world_size=1)
    four = resolve_length(LengthOptions(), batches_per_epoch=30, world_size=4)
    assert (one.total_steps, one.epochs, one.updates_per_epoch) == (
        four.total_steps,
        four.epochs,
        four.updates_per_epoch,
    )


def test_the_report_counts_images():
    length = LengthOptions(max_train_steps=1600, gradient_accumulation_steps=2)
    run = resolve_length(length, batches_per_epoch=100, world_size=2)
    first, second = length_report(run, samples_per_epoch=400)
    assert first == "1,600 updates in 64 epochs; an epoch: 400 images, 100 batches, 25 updates"
    assert "4 batches (2 processes x accumulation 2), 16 images on average; the run: about 25,600 images" in second


def test_the_report_mentions_a_short_last_update():
    run = resolve_length(LengthOptions(gradient_accumulation_steps=4), batches_per_epoch=30)
    assert "only 2 of 4 batches" in length_report(run, samples_per_epoch=30)[2]
    whole = resolve_length(LengthOptions(max_train_steps=1), batches_per_epoch=1)
    assert length_report(whole, samples_per_epoch=1)[0] == "1 update in 1 epoch; an epoch: 1 image, 1 batch, 1 update"
    assert len(length_report(whole, samples_per_epoch=1)) == 2
