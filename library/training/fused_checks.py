"""Which options keep weights from being updated during the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from library.errors import Problem
from library.training.optimizers import find_row, optimizer_name

if TYPE_CHECKING:
    from library.training.options import LengthOptions, OptimizerOptions, PrecisionOptions

_FUSED = "--fused_backward_pass"


def check_fused_backward(
    optimizer: OptimizerOptions,
    length: LengthOptions,
    precision: PrecisionOptions,
    *,
    world_size: int = 1,
    sharded: bool = False,
) -> Iterator[Problem]:
    """Yield why weights cannot be updated during the backward pass with these options.

    Args:
        optimizer: Must step one parameter like all.
        length: Without accumulation, as the gradient of a single batch would be stepped.
        precision: Without float16's loss scale, which is judged over all gradients.
        world_size: Processes; they would have to exchange each gradient first.
        sharded: Whether an engine (DeepSpeed, FSDP) owns gradients and optimizer.
    """
    if not optimizer.fused_backward_pass:
        return
    if length.gradient_accumulation_steps > 1:
        what = "cannot be combined with --gradient_accumulation_steps above 1: gradients cannot be accumulated"
        yield Problem(_FUSED, f"{what}, since each is used up at once", "Use a larger batch.")
    if precision.mixed_precision == "fp16":
        what = "cannot be used with float16, whose loss scaling needs all gradients"
        yield Problem(_FUSED, what, "Use --mixed_precision bf16.")
    if sharded:
        yield Problem(_FUSED, "the engine that shares the optimizer between GPUs needs the gradients")
    elif world_size > 1:
        what = f"cannot be used with {world_size} processes: it works in one process, and {world_size} run"
        yield Problem(_FUSED, what, "Start one process.")
    name = optimizer_name(optimizer)
    row = find_row(name)
    if not row.steps_one_parameter and not row.refusal:
        what = f"cannot be used with {name}: {name} needs all gradients at once"
        yield Problem(_FUSED, what, "Use AdamW, AdamW8bit, Lion, SGD or Adafactor, among others.")
