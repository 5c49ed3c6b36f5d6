"""Learning rate schedules: factors of the learning rate as functions of the number of updates done.

A schedule is stepped once per optimizer update, whatever the number of processes. Warm-up and decay given as integers
count updates, given as fractions they are shares of the run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.errors import Problem, UserError, raise_problems
from library.training.class_lookup import NotFound, import_class, nearest, read_signature
from library.training.key_values import parse_arguments
from library.training.optimizers import find_row, is_relative_adafactor, optimizer_name

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

    from library.training.optimizers import BuiltOptimizer
    from library.training.options import OptimizerOptions, ScheduleOptions

logger = logging.getLogger(__name__)

Factor = Callable[[int], float]
"""Updates done so far -> factor of the learning rate."""

_ARGS = "--lr_scheduler_args"
_NO_WARMUP = "drop --lr_warmup_steps."
_POLYNOMIAL_END = 1e-7
_DEFAULT_TIMESCALE = 10_000


@dataclass(frozen=True, slots=True)
class Curve:
    """What the shape of a schedule depends on; `warmup`, `decay` and `total` count updates."""

    options: ScheduleOptions
    arguments: Mapping[str, Any]
    learning_rate: float
    warmup: int
    decay: int
    total: int

    def progress(self, step: int) -> float:
        """Return the share of the time after the warm-up that has passed: 1 at the end of the run."""
        return (step - self.warmup) / max(1, self.total - self.warmup)

    def rising(self, step: int) -> float:
        """Return the share of the warm-up that has passed."""
        return min(1.0, (step + self.options.warmup_begins_at) / max(1, self.warmup))


@dataclass(frozen=True, slots=True)
class ScheduleRow:
    """One schedule.

    Attributes:
        make: Returns the factor after the warm-up, as a function of the updates done.
        arguments: Names that `--lr_scheduler_args` may set.
        warms_up: Whether the learning rate rises during `--lr_warmup_steps`.
    """

    make: Callable[[Curve], Factor]
    arguments: tuple[str, ...] = ()
    warms_up: bool = True


def _constant(curve: Curve) -> Factor:
    return lambda step: 1.0


def _linear(curve: Curve) -> Factor:
    return lambda step: max(0.0, (curve.total - step) / max(1, curve.total - curve.warmup))


def _cosine(curve: Curve) -> Factor:
    waves = curve.arguments.get("num_cycles", 0.5)
    return lambda step: max(0.0, _wave(waves, curve.progress(step)))


def _cosine_with_restarts(curve: Curve) -> Factor:
    cycles = curve.options.lr_scheduler_num_cycles

    def factor(step: int) -> float:
        progress = curve.progress(step)
        return 0.0 if progress >= 1 else max(0.0, _wave(0.5, (cycles * progress) % 1.0))

    return factor


def _polynomial(curve: Curve) -> Factor:
    start, end = curve.learning_rate, curve.arguments.get("lr_end", _POLYNOMIAL_END)
    power = curve.options.lr_scheduler_power

    def factor(step: int) -> float:
        left = max(0.0, 1 - curve.progress(step))
        return ((start - end) * left**power + end) / start

    return factor


def _inverse_sqrt(curve: Curve) -> Factor:
    scale = curve.options.lr_scheduler_timescale or curve.warmup or _DEFAULT_TIMESCALE
    return lambda step: 1.0 / math.sqrt((step + scale - curve.warmup) / scale)


def _cosine_with_min_lr(curve: Curve) -> Factor:
    waves, lowest = curve.options.lr_scheduler_num_cycles / 2, curve.options.lr_scheduler_min_lr_ratio
    if lowest is None:
        lowest = curve.arguments["min_lr"] / curve.learning_rate
    return lambda step: max(0.0, _above(lowest, _wave(waves, curve.progress(step))))


def _warmup_stable_decay(curve: Curve) -> Factor:
    start = curve.total - curve.decay
    lowest = curve.options.lr_scheduler_min_lr_ratio or 0.0
    waves = curve.options.lr_scheduler_num_cycles / 2
    rise = _RISES[curve.arguments.get("warmup_type", "linear")]
    fall = _FALLS[curve.arguments.get("decay_type", "cosine")]

    def factor(step: int) -> float:
        if step < curve.warmup:
            return max(0.0, _above(lowest, rise(curve.rising(step))))
        if step < start:
            return 1.0
        if step < curve.total:
            return max(0.0, _above(lowest, fall((step - start) / max(1, curve.decay), waves)))
        return lowest

    return factor


def _piecewise_constant(curve: Curve) -> Factor:
    pieces, last = _read_step_rules(curve.arguments["step_rules"])
    return lambda step: next((value for end, value in pieces if step < end), last)


_RISES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: progress,
    "cosine": lambda progress: 0.5 * (1.0 - math.cos(math.pi * progress)),
    "1-sqrt": lambda progress: 1.0 - math.sqrt(1.0 - progress),
}
_FALLS: dict[str, Callable[[float, float], float]] = {
    "linear": lambda progress, waves: 1.0 - progress,
    "cosine": lambda progress, waves: _wave(waves, progress),
    "1-sqrt": lambda progress, waves: 1.0 - math.sqrt(progress),
}

LR_SCHEDULES: dict[str, ScheduleRow] = {
    "constant": ScheduleRow(_constant, warms_up=False),
    "constant_with_warmup": ScheduleRow(_constant),
    "linear": ScheduleRow(_linear),
    "cosine": ScheduleRow(_cosine, ("num_cycles",)),
    "cosine_with_restarts": ScheduleRow(_cosine_with_restarts),
    "polynomial": ScheduleRow(_polynomial, ("lr_end",)),
    "inverse_sqrt": ScheduleRow(_inverse_sqrt),
    "cosine_with_min_lr": ScheduleRow(_cosine_with_min_lr, ("min_lr",)),
    "warmup_stable_decay": ScheduleRow(_warmup_stable_decay, ("warmup_type", "decay_type")),
    "piecewise_constant": ScheduleRow(_piecewise_constant, ("step_rules",), warms_up=False),
    "adafactor": ScheduleRow(_constant, warms_up=False),
}
"""Schedules by the name of `--lr_scheduler`."""


def check_lr_schedule(schedule: ScheduleOptions, optimizer: OptimizerOptions) -> Iterator[Problem]:
    """Yield what is wrong with the choice of schedule and its arguments, without importing anything."""
    arguments, problems = parse_arguments(schedule.lr_scheduler_args, _ARGS)
    yield from problems
    if schedule.lr_scheduler_type:
        yield from _check_class(schedule, arguments)
    elif schedule.lr_scheduler not in LR_SCHEDULES:
        near = nearest(schedule.lr_scheduler, LR_SCHEDULES)
        hint = f"Did you mean {near}?" if near else f"Choose one of {', '.join(LR_SCHEDULES)}."
        yield Problem("--lr_scheduler", f"there is no schedule {schedule.lr_scheduler!r}", hint)
    else:
        yield from _check_curve(schedule, optimizer, arguments)
    yield from _check_warmup(schedule, optimizer)


def build_lr_schedule(
    schedule: ScheduleOptions, optimizer: OptimizerOptions, built: BuiltOptimizer, total_steps: int
) -> LRScheduler:
    """Make the schedule that the options name; the loop steps it once after every update.

    Args:
        schedule: Its name and settings.
        optimizer: The base learning rate.
        built: What it controls.
        total_steps: Updates of the whole run.

    Raises:
        UserError: if its arguments do not fit it or the length of the run.
    """
    from torch.optim.lr_scheduler import LambdaLR

    if built.is_relative_adafactor:
        from library.training.adafactor_schedule import AdafactorSchedule

        if schedule.lr_scheduler_type or schedule.lr_scheduler not in ("constant", "adafactor"):
            logger.warning("Adafactor with relative_step=True replaces the learning rate schedule")
        return AdafactorSchedule(built.optimizer, optimizer.learning_rate)
    if built.row.is_schedule_free:
        if schedule.lr_scheduler_type or schedule.lr_scheduler != "constant" or schedule.lr_warmup_steps:
            logger.warning(
                "a schedule-free optimizer replaces the learning rate schedule, which is ignored; for a warm-up give "
                "--optimizer_args warmup_steps=..."
            )
        return LambdaLR(built.optimizer, lambda step: 1.0)
    arguments, problems = parse_arguments(schedule.lr_scheduler_args, _ARGS)
    raise_problems(problems)
    if schedule.lr_scheduler_type:
        return _build_class(schedule, arguments, built)
    raise_problems(_check_curve(schedule, optimizer, arguments))
    _advise(schedule, built)
    return LambdaLR(built.optimizer, _factor(schedule, optimizer, arguments, total_steps))


def updates_of(value: int | float, total_steps: int) -> int:
    """Return a number of updates: an integer as it is, a fraction as that share of the run."""
    return int(value * total_steps) if isinstance(value, float) and value <= 1 else int(value)


def _factor(
    schedule: ScheduleOptions, optimizer: OptimizerOptions, arguments: Mapping[str, Any], total_steps: int
) -> Factor:
    warmup = updates_of(schedule.lr_warmup_steps, total_steps)
    decay = updates_of(schedule.lr_decay_steps, total_steps)
    row = LR_SCHEDULES[schedule.lr_scheduler]
    if row.warms_up and warmup >= total_steps:
        logger.warning("the warm-up of %d updates does not end before the run (%d updates)", warmup, total_steps)
    if row.make is _warmup_stable_decay and warmup + decay > total_steps:
        raise UserError(
            f"warm-up ({warmup}) and decay ({decay}) together are longer than the run ({total_steps} updates)",
            where="--lr_decay_steps",
        )
    curve = Curve(schedule, arguments, optimizer.learning_rate, warmup, decay, total_steps)
    after = row.make(curve)
    if row.make is _warmup_stable_decay or not row.warms_up:
        return after
    return lambda step: curve.rising(step) if step < warmup else after(step)


def _wave(waves: float, progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * waves * 2.0 * progress))


def _above(lowest: float, factor: float) -> float:
    return factor * (1 - lowest) + lowest


def _check_curve(
    schedule: ScheduleOptions, optimizer: OptimizerOptions, arguments: Mapping[str, Any]
) -> Iterator[Problem]:
    name, row, rate = schedule.lr_scheduler, LR_SCHEDULES[schedule.lr_scheduler], optimizer.learning_rate
    for argument in arguments:
        if argument not in row.arguments:
            hint = f"It takes {', '.join(row.arguments) or 'none'}."
            yield Problem(_ARGS, f"{name} has no argument {argument}", hint)
    for argument in ("num_cycles", "lr_end", "min_lr"):
        if not isinstance(arguments.get(argument, 0), (int, float)):
            yield Problem(_ARGS, f"{argument} must be a number")
            return
    if name == "polynomial" and arguments.get("lr_end", _POLYNOMIAL_END) >= rate:
        yield Problem("--lr_scheduler polynomial", f"the learning rate {rate:g} is not above its end lr_end")
    if name == "cosine_with_min_lr":
        given = (schedule.lr_scheduler_min_lr_ratio is not None) + ("min_lr" in arguments)
        if given != 1 or not rate:
            hint = f"Give --lr_scheduler_min_lr_ratio 0.1, or {_ARGS} min_lr=1e-7."
            yield Problem("--lr_scheduler cosine_with_min_lr", "needs one lowest learning rate", hint)
    for argument, choices in (("warmup_type", _RISES), ("decay_type", _FALLS)):
        if arguments.get(argument, "linear") not in tuple(choices):
            yield Problem(_ARGS, f"{argument} must be one of {', '.join(choices)}")
    if name == "piecewise_constant":
        try:
            _read_step_rules(arguments.get("step_rules"))
        except (ValueError, AttributeError):
            hint = f"Give {_ARGS} \"step_rules='1:10,0.1:20,0.01'\": 1 up to update 10, 0.1 up to 20, then 0.01."
            yield Problem("--lr_scheduler piecewise_constant", "needs step_rules", hint)


def _check_warmup(schedule: ScheduleOptions, optimizer: OptimizerOptions) -> Iterator[Problem]:
    row = find_row(optimizer_name(optimizer))
    if not schedule.lr_warmup_steps or row.is_schedule_free:
        return
    if is_relative_adafactor(row, parse_arguments(optimizer.optimizer_args, "")[0]):
        what, hint = "Adafactor with relative_step=True", f"Give --optimizer_args warmup_init=True, or {_NO_WARMUP}"
    elif schedule.lr_scheduler_type:
        what, hint = f"--lr_scheduler_type {schedule.lr_scheduler_type}", _NO_WARMUP.capitalize()
    elif schedule.lr_scheduler in LR_SCHEDULES and not LR_SCHEDULES[schedule.lr_scheduler].warms_up:
        what, hint = f"--lr_scheduler {schedule.lr_scheduler}", f"Use constant_with_warmup, or {_NO_WARMUP}"
    else:
        return
    yield Problem("--lr_warmup_steps", f"there is no warm-up with {what}", hint)


def _class_path(schedule: ScheduleOptions) -> str:
    name = schedule.lr_scheduler_type
    return name if "." in name else f"torch.optim.lr_scheduler.{name}"


def _check_class(schedule: ScheduleOptions, arguments: Mapping[str, Any]) -> Iterator[Problem]:
    where, path = "--lr_scheduler_type", _class_path(schedule)
    if path.endswith(".ReduceLROnPlateau"):
        yield Problem(where, "ReduceLROnPlateau needs a validation loss after every update", "Use --lr_scheduler.")
        return
    try:
        signature = read_signature(path)
    except NotFound as error:
        yield Problem(where, error.what, error.hint)
        return
    if signature is not None:
        for complaint in signature.complaints(arguments):
            yield Problem(_ARGS, f"{schedule.lr_scheduler_type}: {complaint}")


def _build_class(schedule: ScheduleOptions, arguments: Mapping[str, Any], built: BuiltOptimizer) -> LRScheduler:
    found = import_class(_class_path(schedule), "--lr_scheduler_type")
    try:
        return found(built.optimizer, **arguments)
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise UserError(f"{schedule.lr_scheduler_type} does not work like this ({error})", where=_ARGS) from error


def _advise(schedule: ScheduleOptions, built: BuiltOptimizer) -> None:
    if schedule.lr_scheduler == "adafactor":
        raise UserError(
            "belongs to --optimizer_type Adafactor with relative_step=True", where="--lr_scheduler adafactor"
        )
    if built.row.is_adafactor and schedule.lr_scheduler != "constant_with_warmup":
        logger.warning("Adafactor with relative_step=False: --lr_scheduler constant_with_warmup is recommended")


def _read_step_rules(rules: Any) -> tuple[list[tuple[int, float]], float]:
    """Read "1:10,0.1:20,0.01": pairs of (first update that is beyond the piece, factor), and the factor of the rest.

    Raises:
        ValueError, AttributeError: if `rules` is not of that form.
    """
    *pieces, last = rules.split(",")
    read = (piece.split(":") for piece in pieces)
    return sorted((int(end), float(value)) for value, end in read), float(last)
