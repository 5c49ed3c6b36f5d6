"""Folders of the original Stable Cascade trainer as states: weights, optimizer, averages, adaptive weights, updates.

It keeps one folder for each run: `generator.safetensors`, `generator_ema.safetensors`, `generator_optim.pt` and
`info.json`. Its optimizer knows parameters by their number in the order of its modules, which is that of ours but for
queries, keys and values, there one tensor and here three; under FSDP it knows them by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.pickles import load_pickle
from library.contracts import Position
from library.errors import UserError
from library.training.state_files import (
    EMA_NUMBERS,
    EMA_WEIGHTS,
    OBJECTIVE,
    OPTIMIZER,
    StateInfo,
    StoredState,
    model_names,
    read_json,
)

if TYPE_CHECKING:
    from torch import Tensor

    from library.checkpoints.load_cascade import LoadedPart

INFO, WEIGHTS, AVERAGES, STEPS = "info.json", "generator.safetensors", "generator_ema.safetensors", "generator_optim.pt"
_OTHERS = {
    "lora.safetensors": "Convert it by networks/convert_stable_cascade_lora.py and begin with --network_weights.",
    "controlnet.safetensors": "Begin with it as --controlnet_checkpoint_path.",
}
"""What other trainings of its leave there, whose optimizers know nothing that ours has."""
_NOTICE = (
    "a run of the original trainer: weights, optimizer, averages and number of updates are taken over; which pictures "
    "it has seen is unknown, so data go on as if it had taken them in the order of this run"
)
_EDGES = (-10.0, 10.0)
_PART = "unet"


def is_official(folder: Path) -> bool:
    """Whether the original trainer kept the state of a run in `folder`, one that can be continued or another."""
    return (folder / INFO).is_file() and any((folder / name).is_file() for name in (WEIGHTS, *_OTHERS))


def read_official_state(folder: Path) -> StoredState:
    """Look over a folder of the original trainer.

    Raises:
        UserError: it is of a training whose optimizer cannot be taken over, or its files do not belong together.
    """
    info = read_json(folder / INFO)
    if not (folder / WEIGHTS).is_file():
        name = next(name for name in _OTHERS if (folder / name).is_file())
        what = f"a run of the original trainer with {name} cannot be continued exactly"
        raise UserError(what, _OTHERS[name], where=str(folder))
    updates, run_id = info.get("total_steps"), info.get("wandb_run_id")
    if not isinstance(updates, int) or isinstance(updates, bool) or updates < 0:
        raise UserError("does not tell how many updates were done (total_steps)", where=str(folder / INFO))
    if updates and not (folder / STEPS).is_file():
        hint = f"To begin anew with its weights, name {WEIGHTS} as the model and start without --resume."
        raise UserError(f"has no {STEPS}", hint, where=str(folder))
    tracker = {"wandb_id": run_id} if isinstance(run_id, str) else {}
    state = StateInfo(Position(updates), modules=(_PART,), tracker=tracker, exact=False)
    return StoredState(folder, state, notes=(_NOTICE,), content=OfficialContent(folder, info))


class OfficialContent:
    """What a folder holds, under the names of the files of a state; see `library.training.state_content`."""

    optimizer = "AdamW"

    def __init__(self, folder: Path, info: Mapping[str, Any]) -> None:
        self._folder, self._info = folder, info

    def has(self, name: str) -> bool:
        """Whether there is what a state keeps under `name`."""
        if name == OBJECTIVE:
            return bool(self._info.get("adaptive_loss"))
        files = {model_names(1)[0]: WEIGHTS, EMA_WEIGHTS: AVERAGES, EMA_NUMBERS: AVERAGES, OPTIMIZER: STEPS}
        return name in files and (self._folder / files[name]).is_file()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return weights, or averages, by their names in memory."""
        if name == EMA_WEIGHTS:
            return {f"{_PART}.{key}": tensor for key, tensor in self._stage(AVERAGES).tensors.items()}
        return self._stage(WEIGHTS).tensors

    def json(self, name: str) -> dict[str, Any]:
        """Return the numbers of the average."""
        return {"updates": self._info["total_steps"]}

    def pickle(self, name: str) -> Any:
        """Return the adaptive weights, or the state of the optimizer, parameter by parameter."""
        if name == OBJECTIVE:
            return _adaptive(self._info["adaptive_loss"], self._folder / INFO)
        path = self._folder / STEPS
        names = _parameter_names(self._stage(WEIGHTS))
        return _by_parameter(load_pickle(path), names, str(path))

    def _stage(self, name: str) -> LoadedPart[Any]:
        from library.checkpoints.detect_cascade import inspect_cascade
        from library.checkpoints.load_cascade import load_stage

        path = self._folder / name
        return load_stage(path, "b" if "stage_b" in inspect_cascade(path).parts else "c")


def _adaptive(stored: Any, path: Path) -> dict[str, Any]:
    ranges = stored.get("bucket_ranges") if isinstance(stored, dict) else None
    if ranges is not None and not (isinstance(ranges, list) and ranges and (ranges[0], ranges[-1]) == _EDGES):
        raise UserError(
            "adaptive_loss counts other levels of noise", "Train without adaptive weights.", where=str(path)
        )
    return stored


def _parameter_names(stage: LoadedPart[Any]) -> list[str]:
    """Return the names of the parameters of a stage in the order of its modules."""
    import torch

    from library.models.cascade.unet import CascadeUNet

    with torch.device("meta"):
        return [name for name, _ in CascadeUNet(stage.config).named_parameters()]


def _by_parameter(state: Any, names: Sequence[str], where: str) -> dict[str, Any]:
    """Return the state of the original's optimizer as one of ours: by number, for parameters in the order of `names`.

    Raises:
        UserError: it is none, or one of another model.
    """
    from library.checkpoints.key_maps import split_rows
    from library.checkpoints.key_maps_cascade import stage_to_official

    table = stage_to_official(names)
    known = {number: name for number, name in enumerate(table)} | {name: name for name in table}
    entries, groups = (state.get(key) if isinstance(state, dict) else None for key in ("state", "param_groups"))
    group = groups[0] if isinstance(groups, list) and len(groups) == 1 else None
    if not isinstance(entries, dict) or not isinstance(group, dict):
        raise UserError("is not the state of an optimizer of the original trainer", where=where)
    count = len(group.get("params", ()))
    if count != len(table) or not all(key in known and isinstance(entries[key], dict) for key in entries):
        what = f"is for {count} parameters, the model has {len(table)}"
        raise UserError(what, "Do the files belong to one run?", where=where)
    numbers, found = {name: number for number, name in enumerate(names)}, {}
    for key, values in entries.items():
        targets = table[known[key]]
        for part, target in enumerate(targets):
            found[numbers[target]] = {
                name: split_rows(name, value)[part] if len(targets) > 1 and getattr(value, "ndim", 0) > 0 else value
                for name, value in values.items()
            }
    return {"state": found, "param_groups": [{**group, "params": list(range(len(names)))}]}
