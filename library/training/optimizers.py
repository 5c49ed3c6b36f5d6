"""Optimizers by name: one table, checks that need no torch, and their making."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from library.errors import Problem, UserError, raise_problems
from library.training.class_lookup import NotFound, import_class, install_hint, read_signature
from library.training.key_values import parse_arguments

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from library.contracts import ParamGroup
    from library.training.flat_parameters import FlatParameters
    from library.training.options import OptimizerOptions, ScheduleOptions

logger = logging.getLogger(__name__)

_ARGS = "--optimizer_args"


@dataclass(frozen=True, slots=True)
class OptimizerRow:
    """One optimizer and what the loop must know of it.

    Attributes:
        import_path: Where the class is.
        names: Values of `--optimizer_type`, however they are capitalised.
        defaults: Arguments that the user may override.
        fixed: Arguments that belong to the name.
        steps_one_parameter: Stepping one parameter after the other gives the bits of one whole step, so gradients can
            be used up one by one during the backward pass.
        skips_on_device: The device itself can leave out a step whose gradients are not finite. All others cost one
            read of the gradients' norm by the host per update.
        has_eval_mode: Evaluation mode moves the weights to where they are to be used, training mode moves them back.
        adapts_rate: Finds the learning rate itself; `--learning_rate` only scales it.
        one_rate: Fails when groups have different learning rates.
        elementwise: Treats each number by itself, so parameters may lie in one long row (see `FlatParameters`).
        instead: What works without the package.
        refusal: Why this class cannot be used here.
    """

    import_path: str
    names: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    steps_one_parameter: bool = False
    skips_on_device: bool = False
    has_eval_mode: bool = False
    adapts_rate: bool = False
    one_rate: bool = False
    elementwise: bool = False
    instead: str = "AdamW"
    refusal: str = ""

    @property
    def package(self) -> str:
        """Package that must be installed."""
        return self.import_path.partition(".")[0]

    @property
    def is_schedule_free(self) -> bool:
        """Whether the optimizer replaces the learning rate schedule."""
        return self.import_path.lower().endswith("schedulefree")

    @property
    def is_adafactor(self) -> bool:
        """Whether it is transformers' Adafactor, which has rules of its own."""
        return self.import_path in ("transformers.optimization.Adafactor", "transformers.Adafactor")


def _bitsandbytes(*names: str, class_name: str = "", **more: Any) -> OptimizerRow:
    return OptimizerRow(f"bitsandbytes.optim.{class_name or names[0]}", names, steps_one_parameter=True, **more)


def _adapting(import_path: str, *names: str, one_rate: bool) -> OptimizerRow:
    return OptimizerRow(import_path, names, adapts_rate=True, one_rate=one_rate)


def _torch(name: str, *names: str, **more: Any) -> OptimizerRow:
    return OptimizerRow(f"torch.optim.{name}", names, **{"steps_one_parameter": True, **more})


_NESTEROV: dict[str, Any] = {"defaults": {"momentum": 0.9}, "fixed": {"nesterov": True}}

OPTIMIZERS: tuple[OptimizerRow, ...] = (
    _torch("AdamW", "AdamW", skips_on_device=True, elementwise=True),
    _torch("SGD", "SGDNesterov", elementwise=True, **_NESTEROV),
    _bitsandbytes("AdamW8bit"),
    _bitsandbytes("PagedAdamW"),
    _bitsandbytes("PagedAdamW8bit"),
    _bitsandbytes("PagedAdamW32bit"),
    _bitsandbytes("Lion8bit", instead="Lion"),
    _bitsandbytes("PagedLion8bit", instead="Lion"),
    _bitsandbytes("SGDNesterov8bit", class_name="SGD8bit", instead="SGDNesterov", **_NESTEROV),
    OptimizerRow("lion_pytorch.Lion", ("Lion",), steps_one_parameter=True, elementwise=True),
    OptimizerRow("transformers.optimization.Adafactor", ("Adafactor",), steps_one_parameter=True),
    _adapting("dadaptation.experimental.DAdaptAdamPreprint", "DAdaptation", "DAdaptAdamPreprint", one_rate=True),
    _adapting("dadaptation.DAdaptAdaGrad", "DAdaptAdaGrad", one_rate=False),
    _adapting("dadaptation.DAdaptAdam", "DAdaptAdam", one_rate=True),
    _adapting("dadaptation.DAdaptAdan", "DAdaptAdan", one_rate=False),
    _adapting("dadaptation.experimental.DAdaptAdanIP", "DAdaptAdanIP", one_rate=False),
    _adapting("dadaptation.DAdaptLion", "DAdaptLion", one_rate=True),
    _adapting("dadaptation.DAdaptSGD", "DAdaptSGD", one_rate=True),
    _adapting("prodigyopt.Prodigy", "Prodigy", one_rate=True),
    OptimizerRow("schedulefree.RAdamScheduleFree", ("RAdamScheduleFree",), has_eval_mode=True),
    OptimizerRow("schedulefree.AdamWScheduleFree", ("AdamWScheduleFree",), has_eval_mode=True),
    OptimizerRow("schedulefree.SGDScheduleFree", ("SGDScheduleFree",), has_eval_mode=True),
)
"""Optimizers with names of their own. Any class of torch.optim and any import path work too."""

_KNOWN_CLASSES: tuple[OptimizerRow, ...] = (
    _torch("Adam", skips_on_device=True, elementwise=True),
    *(_torch(name) for name in ("SGD", "RMSprop", "NAdam", "RAdam", "Adagrad", "Adamax", "Adadelta", "ASGD", "Rprop")),
    _torch("LBFGS", refusal="it evaluates the loss several times in each step"),
    _torch("SparseAdam", refusal="it works on sparse gradients only"),
)
"""Classes without a name of their own of which more is known than nothing."""


def _index() -> tuple[dict[str, OptimizerRow], dict[str, OptimizerRow]]:
    by_name: dict[str, OptimizerRow] = {}
    by_path: dict[str, OptimizerRow] = {}
    for row in OPTIMIZERS:
        for name in row.names:
            if name.lower() in by_name:
                raise ValueError(f"two optimizers are called {name}")
            by_name[name.lower()] = row
        if not row.fixed:
            by_path[row.import_path] = row
    by_path.update({row.import_path: row for row in _KNOWN_CLASSES})
    return by_name, by_path


_BY_NAME, _BY_PATH = _index()


@dataclass(frozen=True, slots=True)
class BuiltOptimizer:
    """An optimizer ready to step.

    Attributes:
        optimizer: The torch optimizer.
        row: What is known of it; its flags are those of this object, not of the class in general.
        description: Class and arguments, as stored in models: `torch.optim.adamw.AdamW(weight_decay=0.1)`.
        kwargs: The arguments in the description.
        flat: The rows that stand for the parameters, if the optimizer was made for such.
    """

    optimizer: Optimizer
    row: OptimizerRow
    description: str
    kwargs: Mapping[str, Any]
    flat: FlatParameters | None = None

    def zero_grad(self) -> None:
        """Free all gradients; those in rows stay, and become zero."""
        if self.flat is None:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.flat.zero_grad()

    @property
    def is_relative_adafactor(self) -> bool:
        """Whether the optimizer is Adafactor that sets its learning rate itself."""
        return is_relative_adafactor(self.row, self.kwargs)


def optimizer_name(optimizer: OptimizerOptions) -> str:
    """Return the optimizer's name, whichever of the options names it."""
    if optimizer.use_8bit_adam:
        return "AdamW8bit"
    if optimizer.use_lion_optimizer:
        return "Lion"
    return optimizer.optimizer_type or "AdamW"


def find_row(name: str) -> OptimizerRow:
    """Return the row of an optimizer: by name, by import path, or a new one for a class of which nothing is known."""
    known = _BY_NAME.get(name.lower())
    if known is not None:
        return known
    path = name if "." in name else f"torch.optim.{name}"
    return _BY_PATH.get(path) or OptimizerRow(path, has_eval_mode=path.lower().endswith("schedulefree"))


def settled_arguments(row: OptimizerRow, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that the optimizer gets besides the learning rate, those of the user first."""
    settled = {**given, **{name: value for name, value in row.defaults.items() if name not in given}}
    if row.is_adafactor:
        settled["relative_step"] = bool(settled.get("relative_step", True) or settled.get("warmup_init"))
    return settled


def is_relative_adafactor(row: OptimizerRow, given: Mapping[str, Any]) -> bool:
    """Whether the optimizer is Adafactor that, with the arguments given, sets its learning rate itself."""
    return row.is_adafactor and settled_arguments(row, given)["relative_step"]


def check_optimizer(optimizer: OptimizerOptions, schedule: ScheduleOptions) -> Iterator[Problem]:
    """Yield what is wrong with the choice of optimizer and its arguments, without importing it."""
    where = _where(optimizer)
    legacy = [flag for flag in ("use_8bit_adam", "use_lion_optimizer") if getattr(optimizer, flag)]
    named = [f"--{flag}" for flag in legacy] + (["--optimizer_type"] if optimizer.optimizer_type else [])
    if len(named) > 1:
        yield Problem(" and ".join(named), "name two optimizers", "Keep --optimizer_type alone.")
        return
    name = optimizer_name(optimizer)
    row = find_row(name)
    if row.refusal:
        yield Problem(where, f"{name} cannot be used: {row.refusal}", "AdamW is a good choice.")
        return
    arguments, problems = parse_arguments(optimizer.optimizer_args, _ARGS)
    yield from problems
    yield from _check_class(row, name, arguments, where)
    if schedule.lr_scheduler == "adafactor" and not schedule.lr_scheduler_type:
        if not row.is_adafactor:
            yield Problem("--lr_scheduler adafactor", f"belongs to --optimizer_type Adafactor, not to {name}")
        elif not is_relative_adafactor(row, arguments):
            yield Problem(
                "--lr_scheduler adafactor",
                "reports the learning rate that Adafactor chooses, but relative_step=False keeps it from choosing",
                "Use --lr_scheduler constant_with_warmup, or drop relative_step=False.",
            )


def build_optimizer(optimizer: OptimizerOptions, groups: Sequence[ParamGroup], *, flat: bool = False) -> BuiltOptimizer:
    """Make the optimizer that the options name.

    Args:
        optimizer: Name, arguments and learning rate.
        groups: What it trains; groups keep their order.
        flat: Whether the parameters of a group may become one row, where the optimizer can work on rows.

    Raises:
        UserError: if the class cannot be imported or refuses its arguments.
    """
    name, where = optimizer_name(optimizer), _where(optimizer)
    row = find_row(name)
    given, problems = parse_arguments(optimizer.optimizer_args, _ARGS)
    raise_problems(problems)
    kwargs = settled_arguments(row, given)
    optimizer_class = import_class(row.import_path, where)
    _advise(name, row, optimizer, kwargs, groups)
    rows = _rows(groups) if flat and row.elementwise and not optimizer.fused_backward_pass else None
    groups = groups if rows is None else rows.groups()
    parameters: list[dict[str, Any]] = [
        {**group.settings, "params": list(group.params), "lr": group.lr} for group in groups
    ]
    rate: float | None = optimizer.learning_rate
    if is_relative_adafactor(row, kwargs):
        for entries in parameters:
            del entries["lr"]
        rate = None
    try:
        made = optimizer_class(parameters, lr=rate, **row.fixed, **kwargs, **_fused(row, kwargs, groups))
    except (TypeError, ValueError, AssertionError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"{name} does not work with these settings ({error})", where=_ARGS if given else where
        ) from error
    row = _observed(row, made)
    if row.has_eval_mode:
        made.train()
    return BuiltOptimizer(made, row, describe(optimizer_class, kwargs), kwargs, rows)


def _rows(groups: Sequence[ParamGroup]) -> FlatParameters:
    from library.training.flat_parameters import FlatParameters

    return FlatParameters(groups)


def describe(optimizer_class: type, kwargs: Mapping[str, Any]) -> str:
    """Return the text stored in models: class and arguments."""
    arguments = ",".join(f"{name}={value}" for name, value in kwargs.items())
    text = f"{optimizer_class.__module__}.{optimizer_class.__name__}"
    return f"{text}({arguments})" if arguments else text


def _where(optimizer: OptimizerOptions) -> str:
    if optimizer.use_8bit_adam:
        return "--use_8bit_adam"
    return "--use_lion_optimizer" if optimizer.use_lion_optimizer else "--optimizer_type"


def _check_class(row: OptimizerRow, name: str, arguments: Mapping[str, Any], where: str) -> Iterator[Problem]:
    try:
        signature = read_signature(row.import_path)
    except NotFound as error:
        if row.names:
            hint = f"{install_hint(row.import_path)}, or use --optimizer_type {row.instead}."
            yield Problem(where, f"{name} needs {row.package}: {error.what}", hint)
        else:
            yield Problem(where, f"{name}: {error.what}", error.hint)
        return
    for reserved in ("lr", "params", *row.fixed):
        if reserved in arguments:
            hint = "Use --learning_rate." if reserved == "lr" else ""
            yield Problem(_ARGS, f"{reserved} is set by this program", hint)
    if signature is not None:
        given = [argument for argument in (*arguments, *row.defaults) if argument not in ("lr", "params")]
        for complaint in signature.complaints([*given, "lr"]):
            yield Problem(_ARGS, f"{name}: {complaint}")


def _advise(
    name: str,
    row: OptimizerRow,
    optimizer: OptimizerOptions,
    kwargs: Mapping[str, Any],
    groups: Sequence[ParamGroup],
) -> None:
    """Warn of settings that work but are seldom meant."""
    rates = [group.lr for group in groups]
    if row.adapts_rate:
        if min(rates, default=1.0) <= 0.1:
            logger.warning("%s finds the learning rate itself and scales it by --learning_rate: use 1.0", name)
        if len(set(rates)) > 1 and row.one_rate:
            raise UserError(
                f"{name} finds one learning rate for all weights and stops when groups have different ones",
                "Give all parts the same learning rate.",
                where="--learning_rate",
            )
        if len(set(rates)) > 1:
            logger.warning("%s finds one learning rate for all weights: only the first of %s counts", name, rates)
    if row.is_adafactor:
        _advise_adafactor(optimizer, kwargs)


def _advise_adafactor(optimizer: OptimizerOptions, kwargs: Mapping[str, Any]) -> None:
    if kwargs["relative_step"]:
        logger.warning(
            "Adafactor with relative_step=True chooses the learning rate itself; --learning_rate %g is only what the "
            "first update reports",
            optimizer.learning_rate,
        )
        return
    if optimizer.max_grad_norm:
        logger.warning("Adafactor limits its updates itself: --max_grad_norm 0 is recommended")
    if kwargs.get("clip_threshold", 1.0) != 1.0:
        logger.warning("Adafactor: clip_threshold=1.0 is recommended")


def _fused(row: OptimizerRow, kwargs: Mapping[str, Any], groups: Sequence[ParamGroup]) -> dict[str, Any]:
    """Return `fused=True` for one kernel per step, where class, arguments and tensors allow it."""
    if not row.skips_on_device or any(kwargs.get(name) is not None for name in ("fused", "foreach", "differentiable")):
        return {}
    tensors = [tensor for group in groups for tensor in group.params]
    devices = {tensor.device for tensor in tensors}
    one_device = len(devices) == 1 and next(iter(devices)).type in ("cpu", "cuda")
    return {"fused": True} if one_device and all(tensor.is_floating_point() for tensor in tensors) else {}


def _observed(row: OptimizerRow, made: Any) -> OptimizerRow:
    """Return `row` with the flags as they are for this object."""
    modes = all(callable(getattr(made, name, None)) for name in ("train", "eval"))
    skips = row.skips_on_device and bool(made.defaults.get("fused"))
    return replace(row, has_eval_mode=modes, skips_on_device=skips)
