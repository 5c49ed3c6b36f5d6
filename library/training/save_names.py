"""When models and states are saved, what they are called, and which old ones go: pure functions of the options.

Names and rules are the reference's, since users' scripts and programs look for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from library.training.state_files import DEFAULT_NAMES

if TYPE_CHECKING:
    from library.contracts import Position, RunLength
    from library.training.options import SaveOptions, StateOptions

Kind = Literal["epoch", "step", "backup", "final", "interrupted"]

EMA_SUFFIX = "_ema"
"""Ends the names of models that hold averaged weights."""


@dataclass(frozen=True, slots=True)
class SavePoint:
    """One save: after epoch `number` (from 1), after update `number`, at the end, or where a signal ended the run.

    A backup is what is saved after an update and stays.
    """

    kind: Kind
    number: int = 0

    def stem(self, output_name: str | None) -> str:
        """Return the file name without suffix: ``name-000002``, ``name-step00000400``, ``name``."""
        epoch, at, last = DEFAULT_NAMES
        if self.kind == "epoch":
            return f"{output_name or epoch}-{self.number:06d}"
        if self.kind == "step":
            return f"{output_name or at}-step{self.number:08d}"
        if self.kind == "backup":
            return f"{output_name or at}-backup-step{self.number:08d}"
        return f"{output_name or last}-interrupted" if self.kind == "interrupted" else output_name or last

    def state_name(self, output_name: str | None) -> str:
        """Return the name of the state folder."""
        return f"{self.stem(output_name)}-state"


def epochs_between_saves(save: SaveOptions, epochs: int) -> int | None:
    """Return after how many epochs a model is saved; None: not after epochs."""
    if save.save_n_epoch_ratio:
        return max(1, epochs // save.save_n_epoch_ratio)
    return save.save_every_n_epochs or None


def due(save: SaveOptions, length: RunLength, position: Position, *, epoch_ended: bool) -> Iterator[SavePoint]:
    """Yield the saves that are due after the update that led to `position`.

    The last epoch has none, since the final model follows; a step save may coincide with the final one.
    """
    every = save.save_every_n_steps
    if every and position.step % every == 0:
        yield SavePoint("step", position.step)
    if save.backup_every and position.step % save.backup_every == 0:
        yield SavePoint("backup", position.step)
    between = epochs_between_saves(save, length.epochs)
    if epoch_ended and between and position.epoch % between == 0 and position.epoch < length.epochs:
        yield SavePoint("epoch", position.epoch)


def outdated_model(save: SaveOptions, length: RunLength, point: SavePoint) -> SavePoint | None:
    """Return the save whose model goes now that `point` is complete."""
    return _outdated(save, length, point, save.save_last_n_epochs, save.save_last_n_steps)


def outdated_state(save: SaveOptions, state: StateOptions, length: RunLength, point: SavePoint) -> SavePoint | None:
    """Return the save whose state goes now that the state of `point` is complete."""
    epochs = state.save_last_n_epochs_state or save.save_last_n_epochs
    return _outdated(save, length, point, epochs, state.save_last_n_steps_state or save.save_last_n_steps)


def _outdated(
    save: SaveOptions, length: RunLength, point: SavePoint, last_epochs: int | None, last_steps: int | None
) -> SavePoint | None:
    number = -1
    if point.kind == "epoch" and last_epochs:
        number = point.number - (epochs_between_saves(save, length.epochs) or 1) * last_epochs
    elif point.kind == "step" and last_steps and save.save_every_n_steps:
        number = point.number - last_steps - 1
        number -= number % save.save_every_n_steps
    return SavePoint(point.kind, number) if number > 0 else None


@dataclass(frozen=True, slots=True)
class Planned:
    """How many models and states a run keeps at most at one time."""

    models: int
    states: int


def planned_saves(save: SaveOptions, state: StateOptions, length: RunLength) -> Planned:
    """Count what lies in the output folder at the end, the final model and state included."""
    backups = length.total_steps // save.backup_every if save.backup_every else 0
    models = 1 + backups + _kept(save, length, save.save_last_n_epochs, save.save_last_n_steps)
    if not state.save_state:
        return Planned(models, backups + int(state.save_state_on_train_end))
    epochs = state.save_last_n_epochs_state or save.save_last_n_epochs
    kept = _kept(save, length, epochs, state.save_last_n_steps_state or save.save_last_n_steps)
    return Planned(models, 1 + backups + kept)


def _kept(save: SaveOptions, length: RunLength, last_epochs: int | None, last_steps: int | None) -> int:
    kept = 0
    if between := epochs_between_saves(save, length.epochs):
        count = (length.epochs - 1) // between
        kept += min(count, last_epochs) if last_epochs else count
    if every := save.save_every_n_steps:
        count = length.total_steps // every
        kept += min(count, last_steps // every + 1) if last_steps else count
    return kept
