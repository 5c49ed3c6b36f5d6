"""Optimizer and learning rate schedule: taking over what a state holds, exactly or with allowed changes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from library.errors import UserError

if TYPE_CHECKING:
    import torch

    from library.training.state_files import StateInfo
    from library.training.state_parts import Layout

_log = logging.getLogger(__name__)
# States that have the shape of their parameter in every optimizer that has them.
_SHAPED = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "z", "state1", "state2"})
# Tables of bitsandbytes, which all its parameters share.
_TABLES = frozenset({"qmap1", "qmap2"})
# Which implementation of an optimizer runs is a matter of this machine, not of the state.
_IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")
_SAME_OPTIMIZER = "Resume with the --optimizer_type and --optimizer_args of the saved run"


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    state: Any,
    *,
    where: str,
    keep: Collection[str] = (),
    layout: Layout | None = None,
    exact_types: bool = True,
) -> None:
    """Load `state` (of `state_dict()`, perhaps mapped from a file) into `optimizer`, bit for bit.

    torch casts states to the type of their parameters; with `exact_types` what was saved in another type is put back as
    it was. Nothing remains mapped from the file.

    Args:
        optimizer: built for the same parameters in the same order.
        state: what `pickles.load_pickle` returned.
        where: the file, for messages.
        keep: group entries that keep their present value (`weight_decay`).
        layout: the rows or pieces that stand for the parameters in the optimizer; states know the parameters.
        exact_types: the optimizer may keep values in other types than those of their parameters.

    Raises:
        UserError: it is the state of another optimizer or another model.
    """
    kept = [{name: group[name] for name in keep if name in group} for group in optimizer.param_groups]
    if layout is None:
        shapes = [[tuple(parameter.shape) for parameter in group["params"]] for group in optimizer.param_groups]
    else:
        shapes = layout.shapes
    _check_groups([len(of_group) for of_group in shapes], state, where)
    _check_shapes(state["state"], [shape for of_group in shapes for shape in of_group], where)
    state = state if layout is None else layout.gather(state)
    groups = [
        {**saved, **{name: group[name] for name in _IMPLEMENTATION if name in group}}
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    try:
        optimizer.load_state_dict({**state, "param_groups": groups})
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(f"does not fit this optimizer ({error})", _SAME_OPTIMIZER, where=where) from error
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    order = [index for group in state["param_groups"] for index in group["params"]]
    tables: dict[str, Any] = {}
    for index, parameter in zip(order, parameters, strict=True):
        if parameter in optimizer.state:
            saved = state["state"].get(index, {}) if exact_types else None
            own = optimizer.state[parameter]
            for name, value in own.items():
                own[name] = _own_copy(value, saved.get(name) if isinstance(saved, Mapping) else None)
            _share_tables(own, tables)
    for group, values in zip(optimizer.param_groups, kept, strict=True):
        group.update(values)


def _check_groups(now: Sequence[int], state: Any, where: str) -> None:
    if not isinstance(state, Mapping) or not isinstance(state.get("state"), Mapping) or "param_groups" not in state:
        raise UserError("is not the state of an optimizer", _SAME_OPTIMIZER, where=where)
    try:
        saved = [len(group["params"]) for group in state["param_groups"]]
    except (KeyError, TypeError) as error:
        raise UserError("is not the state of an optimizer", _SAME_OPTIMIZER, where=where) from error
    if saved != list(now):
        what = f"is for {_groups(saved)}, this run has {_groups(now)}"
        raise UserError(what, "Train the same parts with the same groups of learning rates", where=where)


def _groups(counts: Sequence[int]) -> str:
    return f"{len(counts)} group{'s' * (len(counts) != 1)} of {', '.join(map(str, counts))} parameters"


def _check_shapes(states: Mapping[Any, Any], shapes: Sequence[tuple[int, ...]], where: str) -> None:
    for index, entries in states.items():
        if not isinstance(index, int) or not 0 <= index < len(shapes) or not isinstance(entries, Mapping):
            continue
        for name, value in entries.items():
            shape = getattr(value, "shape", None)
            if name in _SHAPED and shape is not None and tuple(shape) != shapes[index] and value.numel() > 1:
                what = f"is of another model: {name} of parameter {index} is {tuple(shape)}, not {shapes[index]}"
                raise UserError(what, where=where)


def _own_copy(value: Any, saved: Any) -> Any:
    """Return a state value with memory of its own, and in the type that it was saved in."""
    import torch

    if isinstance(value, torch.Tensor):
        if isinstance(saved, torch.Tensor) and saved.dtype != value.dtype and saved.shape == value.shape:
            return saved.to(value.device, copy=True)
        return value.clone() if value.device.type == "cpu" else value
    if isinstance(value, dict):
        return {
            name: _own_copy(item, saved.get(name) if isinstance(saved, Mapping) else None)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [_own_copy(item, None) for item in value]
    return value


def _share_tables(values: dict[str, Any], tables: dict[str, Any]) -> None:
    """Put those of `tables` in place of equal ones: they take memory once, and states keep the same bytes."""
    for name in _TABLES & values.keys():
        known = tables.setdefault(name, values[name])
        own = values[name]
        if (known.shape, known.device) == (own.shape, own.device) and bool((known == own).all()):
            values[name] = known


def take_schedule(schedule: Any, state: Any, info: StateInfo) -> None:
    """Continue a learning rate schedule where the saved one was.

    Of a reference state only the position and the rates are taken, since its schedule may be of another class and, with
    several processes, counts several steps per update.
    """
    if info.exact:
        schedule.load_state_dict(state)
        return
    rates = [float(rate) for rate in state.get("base_lrs", [])]
    if rates and hasattr(schedule, "base_lrs") and len(rates) == len(schedule.base_lrs):
        if rates != [float(rate) for rate in schedule.base_lrs]:
            _log.warning("the learning rates of the state are used: %s instead of %s", rates, schedule.base_lrs)
        schedule.base_lrs = rates
    groups = [
        {"lr": rate, "initial_lr": rate}
        for rate in (rates or [group["lr"] for group in schedule.optimizer.param_groups])
    ]
    rewind_schedule(schedule, schedule.optimizer, groups, info.position.step)


def rewind_schedule(
    schedule: Any, optimizer: torch.optim.Optimizer, rates: Sequence[Mapping[Any, Any]], step: int
) -> None:
    """Bring a freshly built `schedule` to update `step` with this run's `rates` (of each group)."""
    for group, values in zip(optimizer.param_groups, rates, strict=True):
        group.update(values)
    advance_schedule(schedule, step)


def advance_schedule(schedule: Any, updates: int) -> None:
    """Bring a schedule forward as if `updates` more had been done."""
    with warnings.catch_warnings():
        # torch warns about schedules that are stepped before their optimizer, which is the point here.
        warnings.simplefilter("ignore")
        for _ in range(updates):
            schedule.step()
