"""What cannot be combined with FSDP: refused before any file or model is opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from library.errors import Problem

if TYPE_CHECKING:
    from library.training.options import DistributedOptions, TrainingOptions

_OPTION = "--fsdp"
_LAUNCHER = "accelerate launch --use_fsdp"
FSDP_VARIABLE = "ACCELERATE_USE_FSDP"
"""What accelerate's launcher sets."""
_TRUE = ("1", "true", "yes", "y", "t", "on")


def processes() -> int:
    """Return how many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launcher_shares() -> bool:
    """Whether accelerate's launcher, or its configuration, asks for FSDP."""
    return _is_set(FSDP_VARIABLE)


def asked_by(fsdp: bool) -> str:
    """Return who asks for FSDP, for messages; `fsdp` is the option."""
    return _OPTION if fsdp else _LAUNCHER if launcher_shares() else ""


def launcher_problems(distributed: DistributedOptions) -> Iterator[Problem]:
    """Yield why a launcher's FSDP stops a script that does not offer it; in one process there is nothing to share."""
    if launcher_shares() and processes() > 1 and not distributed.offers_fsdp:
        what = "this script cannot share weights so"
        yield Problem(_LAUNCHER, what, "Leave it out (see accelerate config), or use --deepspeed --zero_stage=3.")


def fsdp_problems(options: TrainingOptions, where: str) -> Iterator[Problem]:
    """Yield what stops a run whose weights are cut up; `where` names who asked for that."""
    from library.training.optimizers import find_row, optimizer_name

    if options.distributed.deepspeed:
        yield Problem(where, "cannot be combined with --deepspeed, which shares weights itself", "Drop one of them.")
    if options.precision.mixed_precision == "fp16":
        what = "cannot be combined with --mixed_precision fp16, whose loss scaling looks at all gradients"
        yield Problem(where, what, "Use bf16.")
    if options.memory.torch_compile:
        what = "cannot be combined with --torch_compile: weights are put together around compiled blocks"
        yield Problem(where, what, "Drop one of them.")
    name = optimizer_name(options.optimizer)
    if not find_row(name).elementwise:
        what = f"cannot share {name}, which may look at more than one value at a time"
        yield Problem(where, what, "Use AdamW, Adam, Lion or SGDNesterov.")
    if where == _LAUNCHER and _is_set("FSDP_OFFLOAD_PARAMS"):
        yield Problem(f"{_LAUNCHER} --fsdp_offload_params", "weights are not kept outside of the GPU", "Leave it out.")


def fsdp_warnings(options: TrainingOptions, where: str) -> Iterator[Problem]:
    """Yield options that do nothing where weights are cut up."""
    for name in ("ddp_gradient_as_bucket_view", "ddp_static_graph"):
        if getattr(options.distributed, name):
            yield Problem(f"--{name}", f"has no effect with {where}")
    if where == _LAUNCHER:
        what = "is understood as --fsdp; further settings of FSDP that accelerate has do nothing"
        version = os.environ.get("FSDP_VERSION", "2")
        yield Problem(where, what if version == "2" else f"{what}, and FSDP2 is used instead of version {version}")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in _TRUE
