"""Carries out the saves of a run: retries, removal of outdated ones, what an earlier run left, free space.

The saver knows no model: it is given functions that write one. A new file is complete before an old one goes, and only
what this run (or the run that it continues) made is ever removed.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from library.errors import UserError
from library.files import CannotSave, fault_point, format_bytes, free_bytes, remove_tree
from library.training.ranks import Ranks
from library.training.save_names import SavePoint, due, outdated_model, outdated_state, planned_saves

if TYPE_CHECKING:
    from library.contracts import Position, RunLength
    from library.training.options import SaveOptions, StateOptions

_log = logging.getLogger(__name__)
_RETRY_SECONDS = 30.0


class SaveModel(Protocol):
    """Writes the model for use; a collective call."""

    def __call__(self, target: Path, *, epoch: int, step: int) -> Path | None:
        """Write to `target` plus a suffix and return the path (None on ranks that write nothing)."""


@dataclass(frozen=True, slots=True)
class SaveActions:
    """What the saver calls.

    Attributes:
        model: writes a model.
        state: writes a state folder; a collective call.
        upload: sends a complete file or folder away, or None; arguments: path, whether it is a state, whether it is
            the last save.
        suffix: of model files; empty for folders.
        beside: endings of the names of further files (or folders) that come and go with each model.
        sleep: waits; shorter in tests.
        give_up: whether to stop trying again (a second signal came).
    """

    model: SaveModel
    state: Callable[[Path], object]
    upload: Callable[[Path, bool, bool], object] | None = None
    suffix: str = ".safetensors"
    beside: tuple[str, ...] = ()
    sleep: Callable[[float], object] = time.sleep
    give_up: Callable[[], bool] = lambda: False


class Saver:
    """Saves models and states of one run. All ranks call its methods; rank 0 writes, all learn the outcome."""

    def __init__(
        self,
        save: SaveOptions,
        state: StateOptions,
        length: RunLength,
        actions: SaveActions,
        ranks: Ranks | None = None,
    ) -> None:
        self._save = save
        self._state = state
        self._length = length
        self._actions = actions
        self._ranks = ranks or Ranks()
        self._folder = Path(save.output_dir or ".")
        self._models: dict[str, str] = {}
        self._states: set[str] = set()
        self._step_of_last_state: int | None = None
        self.last_state: Path | None = None
        self.last_model: Path | None = None
        self.failures: list[str] = []

    def preflight(self, model_bytes: int, state_bytes: int) -> None:
        """Compare free space with what will be saved.

        Raises:
            UserError: not even one save fits.
        """
        planned = planned_saves(self._save, self._state, self._length)
        free = free_bytes(self._folder)
        one = model_bytes + (state_bytes if planned.states else 0)
        what = f"{format_bytes(free)} are free on the disk of {self._folder}"
        if free < one:
            raise UserError(
                f"{what}, one save needs about {format_bytes(one)}", "Free some space", where="--output_dir"
            )
        everything = planned.models * model_bytes + planned.states * state_bytes
        if free < everything:
            counted = f"{planned.models} models and {planned.states} states"
            hint = "keep fewer of them with --save_last_n_epochs or --save_last_n_steps"
            _log.warning("%s, but %s need about %s: %s", what, counted, format_bytes(everything), hint)

    def after_update(self, position: Position, *, epoch_ended: bool) -> None:
        """Save what is due after an update. Failures are reported, and the next save point tries again."""
        for point in due(self._save, self._length, position, epoch_ended=epoch_ended):
            failures = [self._model(point, position)]
            if self._state.save_state or point.kind == "backup":
                failures.append(self._state_of(point, position))
            for failure in filter(None, failures):
                self.failures.append(str(failure))
                _log.error("%s Training goes on; %d saves have failed so far.", failure, len(self.failures))

    def finish(self, position: Position) -> None:
        """Save the final model and, if asked for, the final state, trying again for `--save_retry_minutes`.

        Raises:
            CannotSave: one of them could not be saved.
        """
        point = SavePoint("final")
        failures = [self._insist(lambda: self._model(point, position))]
        if self._state.save_state or self._state.save_state_on_train_end:
            failures.append(self._insist(lambda: self._state_of(point, position)))
        found = [failure for failure in failures if failure is not None]
        self.failures += map(str, found)
        if found:
            raise found[0]

    def final_is_there(self) -> bool:
        """Whether the final model of the run that is continued was saved in this format and is still in place."""
        stem = SavePoint("final").stem(self._save.output_name)
        name = stem + self._actions.suffix
        return bool(self._ranks.broadcast(self._models.get(stem) == name and (self._folder / name).exists()))

    def save_state_now(self, position: Position, *, insist: bool = False) -> Path | None:
        """Save a state because of a signal or an error, named by its step; at most one per step.

        Args:
            position: where the run is.
            insist: try again for `--save_retry_minutes` and raise if it never works.

        Returns:
            The state folder, or None if it could not be saved.

        Raises:
            CannotSave: only with `insist`.
        """
        if self._step_of_last_state == position.step:
            return self.last_state
        point = SavePoint("step", position.step)
        failure = self._insist(lambda: self._state_of(point, position)) if insist else self._state_of(point, position)
        if failure is None:
            return self.last_state
        self.failures.append(str(failure))
        if insist:
            raise failure
        _log.error("%s", failure)
        return None

    def save_interrupted(self, position: Position) -> None:
        """Save the model as it is when a signal ends the run; a failure is reported, for the state has everything."""
        failure = self._model(SavePoint("interrupted"), position)
        if failure is not None:
            self.failures.append(str(failure))
            _log.error("%s", failure)

    def to_json(self) -> dict[str, Any]:
        """Return what a state must remember: the names that this run made."""
        return {"models": dict(self._models), "states": sorted(self._states)}

    def restore(self, saved: Mapping[str, Any], resumed_from: Path) -> None:
        """Go on as the run that saved the state: its models and states become outdated as this run's do."""
        models, states = saved.get("models", {}), saved.get("states", [])
        self._models.update({str(stem): str(name) for stem, name in models.items()} if isinstance(models, dict) else {})
        self._states.update(str(name) for name in states)
        if resumed_from.absolute().parent == self._folder.absolute():
            self._states.add(resumed_from.name)

    def _model(self, point: SavePoint, position: Position) -> CannotSave | None:
        """Save a model, then remove the outdated one. Return what went wrong."""
        stem = point.stem(self._save.output_name)
        target = self._folder / stem

        def write() -> Path | None:
            with ExitStack() as kept:
                for path in self._earlier_finals(point, target):
                    kept.enter_context(_Kept(path))
                return self._actions.model(target, epoch=position.epoch, step=position.step)

        path, failure = self._attempt(write)
        if failure is not None:
            return failure
        if path is not None:
            self.last_model = path
            self._models[stem] = path.name
            beside = [name for name in self._files(stem)[1:] if path.with_name(name).exists()]
            _log.info("saved %s", " and ".join([str(path), *beside]))
            self._remove(outdated_model(self._save, self._length, point), state=False)
            for name in dict.fromkeys((path.name, *self._files(stem))):
                if path.with_name(name).exists():
                    self._upload(path.with_name(name), point, state=False)
        return None

    def _state_of(self, point: SavePoint, position: Position) -> CannotSave | None:
        """Save a state, then remove the outdated one. Return what went wrong."""
        folder = self._folder / point.state_name(self._save.output_name)

        def write() -> Path:
            self._actions.state(folder)
            return folder

        _, failure = self._attempt(write)
        if failure is not None:
            return failure
        self.last_state, self._step_of_last_state = folder, position.step
        self._states.add(folder.name)
        if self._ranks.is_main:
            _log.info("saved %s", folder)
            self._remove(outdated_state(self._save, self._state, self._length, point), state=True)
            self._upload(folder, point, state=True)
        return None

    def _attempt(self, write: Callable[[], Path | None]) -> tuple[Path | None, CannotSave | None]:
        """Call `write` on every rank and let all know whether it worked on rank 0."""
        path, failure = None, None
        try:
            path = write()
        except CannotSave as error:
            failure = error
        except OSError as error:
            failure = CannotSave(f"cannot save: {error}", error.filename or "", error.errno)
        reason = self._ranks.broadcast(None if failure is None else failure.reason)
        if reason is not None and failure is None:
            failure = CannotSave(reason)
        return path, failure if reason is not None else None

    def _insist(self, save: Callable[[], CannotSave | None]) -> CannotSave | None:
        """Call `save` until it works or the minutes of `--save_retry_minutes` are over."""
        tries = 1 + round(self._save.save_retry_minutes * 60 / _RETRY_SECONDS)
        for left in reversed(range(tries)):
            failure = save()
            if failure is None or left == 0 or self._ranks.broadcast(self._actions.give_up()):
                return failure
            minutes = left * _RETRY_SECONDS / 60
            _log.error("%s Free some space: trying again every 30 s, for %.1f more minutes.", failure, minutes)
            self._actions.sleep(_RETRY_SECONDS)
        return None

    def _files(self, stem: str) -> list[str]:
        """Return the names of the files of a model, its own first."""
        return [f"{stem}{ending}{self._actions.suffix}" for ending in ("", *self._actions.beside)]

    def _earlier_finals(self, point: SavePoint, target: Path) -> list[Path]:
        """Return the files of the final model of an earlier run that are there and must be kept."""
        if point.kind != "final" or self._save.overwrite or not self._ranks.is_main:
            return []
        paths = [target.with_name(name) for name in self._files(target.name)]
        made_now = self.last_model is not None and self.last_model.name == paths[0].name
        return [] if made_now else [path for path in paths if path.exists()]

    def _remove(self, point: SavePoint | None, *, state: bool) -> None:
        """Remove an outdated model or state, if this run made it."""
        if point is None:
            return
        name: str | None = point.state_name(self._save.output_name) if state else None
        if state and name not in self._states:
            return
        if not state:
            name = self._models.get(point.stem(self._save.output_name))
        if not name or Path(name).name != name:
            return
        fault_point("retention.before_delete")
        # Others of its files go first: as long as the model itself is there, the next start finds and removes it.
        others = [] if state else self._files(point.stem(self._save.output_name))[1:]
        try:
            for path in (*map(self._folder.joinpath, others), self._folder / name):
                if path.exists():
                    remove_tree(path)
        except OSError as error:
            _log.warning("cannot remove the outdated %s: %s", self._folder / name, error)
            return
        self._states.discard(name)
        self._models = {stem: made for stem, made in self._models.items() if made != name}
        _log.info("removed the outdated %s", self._folder / name)

    def _upload(self, path: Path, point: SavePoint, *, state: bool) -> None:
        if self._actions.upload is not None:
            self._actions.upload(path, state, point.kind == "final")


class _Kept:
    """Keeps an existing model as `<name>.bak-<n>` while a new one takes its name; puts it back if that fails.

    A file gets a second name (a hard link) and is thus never without one; a folder is renamed.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._backup: Path | None = None

    def __enter__(self) -> None:
        if self._path is None:
            return
        numbers = (number for number in range(1, 10**6))
        backup = next(
            name
            for name in (self._path.with_name(f"{self._path.name}.bak-{number}") for number in numbers)
            if not name.exists()
        )
        try:
            os.link(self._path, backup)
        except OSError:
            self._path.rename(backup)
        self._backup = backup

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._path is None or self._backup is None:
            return
        if kind is None:
            kept = self._backup.name
            _log.warning("%s of an earlier run is kept as %s (--overwrite keeps nothing)", self._path.name, kept)
            return
        if self._path.exists():
            self._backup.unlink()
        else:
            self._backup.rename(self._path)
