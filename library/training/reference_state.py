"""State folders of the reference implementation: weights, optimizer and step are taken, the rest is not in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from library.checkpoints.pickles import load_pickle
from library.contracts import Position
from library.errors import Problem, UserError
from library.training.state_files import (
    OPTIMIZER,
    SCHEDULER,
    TRAIN_STATE,
    StateInfo,
    StoredState,
    model_names,
    read_json,
)

_STEP_IN_NAME = re.compile(r"-step(\d{8,})-state$")
_NOTICE = (
    "a state without resume.json, as other trainers write them: weights, optimizer and step are taken over; "
    "the position in the epoch is unknown, so the run does not continue exactly"
)


def read_reference_state(folder: Path) -> StoredState:
    """Look over a folder that `accelerator.save_state` wrote and find out how far its run was.

    Raises:
        UserError: files of that layout are missing, or nothing tells the number of updates.
    """
    needed = (*model_names(1), OPTIMIZER, SCHEDULER, "random_states_0.pkl")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        hint = "It may be incomplete, or not a state at all; the names of state folders end in -state"
        raise UserError.of([Problem(str(folder), f"has neither resume.json nor {', '.join(missing)}", hint)])
    step = _step(folder)
    info = StateInfo(Position(step), modules=tuple(_modules(folder)), exact=False)
    return StoredState(folder, info, notes=(_NOTICE,))


def _modules(folder: Path) -> list[str]:
    names: list[str] = []
    while (folder / model_names(len(names) + 1)[-1]).is_file():
        names.append(f"model {len(names)}")
    return names


def _step(folder: Path) -> int:
    """The number of updates: from `train_state.json`, the folder's name, the optimizer, or the schedule."""
    if (folder / TRAIN_STATE).is_file():
        step = read_json(folder / TRAIN_STATE).get("current_step")
        if isinstance(step, int) and step >= 0:
            return step
    if match := _STEP_IN_NAME.search(folder.name):
        return int(match[1])
    optimizer = load_pickle(folder / OPTIMIZER)
    if steps := [number for number in map(_step_of, _values(optimizer, "state")) if number is not None]:
        return max(steps)
    step = load_pickle(folder / SCHEDULER)
    last = step.get("last_epoch") if isinstance(step, dict) else None
    if isinstance(last, int) and last >= 0:
        return last
    raise UserError("does not tell how many steps were done", "Resume from another state", where=str(folder))


def _values(state: Any, key: str) -> list[Any]:
    entries = state.get(key) if isinstance(state, dict) else None
    return list(entries.values()) if isinstance(entries, dict) else []


def _step_of(entry: Any) -> int | None:
    step = entry.get("step") if isinstance(entry, dict) else None
    return None if step is None else int(step)
