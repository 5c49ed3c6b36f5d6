"""What cannot be combined with DeepSpeed's ZeRO: refused before any file or model is opened."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from library.errors import Problem

if TYPE_CHECKING:
    from library.training.options import DistributedOptions, TrainingOptions

_WHERE = "--deepspeed"
_ON_CPU = ("torch.optim.AdamW", "torch.optim.Adam")
"""Optimizers that DeepSpeed's own one on the CPU can stand in for."""
_ON_CPU_ARGUMENTS = {"betas", "eps", "weight_decay"}


def deepspeed_problems(options: TrainingOptions) -> Iterator[Problem]:
    """Yield what stops a run with `--deepspeed`; nothing without it."""
    distributed = options.distributed
    if not distributed.deepspeed:
        return
    yield from _sharing(distributed)
    yield from _precision(options)
    yield from _optimizer(options)
    stop = getattr(getattr(options, "tune", None), "stop_text_encoder_training", None)
    if stop is not None and stop >= 0:
        what = "the engine of --deepspeed shares what trains at the start and cannot be made again"
        yield Problem("--stop_text_encoder_training", what, "Use -1 to not train the text encoder at all, or drop it.")
    if options.memory.torch_compile and distributed.zero_stage == 3:
        what = "compiled blocks miss the weights that --zero_stage 3 fetches when a block is about to run"
        yield Problem("--torch_compile", what, "Use --zero_stage 2.")
    if distributed.offload_optimizer_device == "nvme" and _wants_states(options):
        what = "a state cannot hold an optimizer whose values are on an NVMe disk"
        yield Problem("--offload_optimizer_device nvme", what, "Use cpu, or drop --save_state and --resume.")


def deepspeed_warnings(options: TrainingOptions) -> Iterator[Problem]:
    """Yield options that do nothing with `--deepspeed`."""
    distributed = options.distributed
    if not distributed.deepspeed:
        return
    if distributed.zero_stage == 0:
        yield Problem("--zero_stage 0", "shares nothing: training runs as it does without --deepspeed")
        return
    for name in ("ddp_gradient_as_bucket_view", "ddp_static_graph"):
        if getattr(distributed, name):
            yield Problem(f"--{name}", "has no effect with --deepspeed, which exchanges gradients itself")
    if distributed.zero_stage != 3:
        for name in ("zero3_init_flag", "zero3_save_16bit_model"):
            if getattr(distributed, name):
                yield Problem(f"--{name}", f"has no effect with --zero_stage {distributed.zero_stage}")


def _sharing(distributed: DistributedOptions) -> Iterator[Problem]:
    stage = distributed.zero_stage
    if distributed.offload_param_device and stage != 3:
        yield Problem("--offload_param_device", f"weights are not shared with --zero_stage {stage}", "Use 3.")
    if distributed.offload_optimizer_device and stage == 0:
        yield Problem("--offload_optimizer_device", "needs --zero_stage 1, 2 or 3")
    if distributed.offload_optimizer_device == "nvme" and stage in (1, 2):
        yield Problem("--offload_optimizer_device nvme", "needs --zero_stage 3", "Use cpu, or --zero_stage 3.")


def _precision(options: TrainingOptions) -> Iterator[Problem]:
    distributed, precision = options.distributed, options.precision
    if distributed.zero_stage > 0:
        for name in ("full_fp16", "full_bf16"):
            if getattr(precision, name):
                what = "--deepspeed keeps weights in the type of --mixed_precision, with exact ones in the optimizer"
                yield Problem(f"--{name}", what, f"Drop --{name}.")
    if distributed.fp16_master_weights_and_gradients and precision.mixed_precision != "fp16":
        yield Problem("--fp16_master_weights_and_gradients", "needs --mixed_precision fp16")


def _optimizer(options: TrainingOptions) -> Iterator[Problem]:
    """Each process steps a slice of all weights in one long row: only what treats each value by itself is the same."""
    from library.training.key_values import parse_arguments
    from library.training.optimizers import find_row, optimizer_name

    distributed = options.distributed
    if distributed.zero_stage == 0:
        return
    name = optimizer_name(options.optimizer)
    row = find_row(name)
    reason = ""
    if row.is_adafactor:
        reason = "it looks at rows and columns of each matrix, and a slice has none"
    elif row.adapts_rate:
        reason = "it judges all weights at once, and each process holds a slice of them"
    elif row.is_schedule_free or row.has_eval_mode:
        reason = "it moves the weights for samples and saves, which the engine holds in another type"
    if reason:
        yield Problem(_WHERE, f"cannot share {name}: {reason}", "Use AdamW, AdamW8bit, Lion or SGDNesterov.")
        return
    if not distributed.offload_optimizer_device:
        return
    where = "--offload_optimizer_device"
    if row.import_path not in _ON_CPU:
        yield Problem(where, f"on the CPU DeepSpeed steps AdamW and Adam only, not {name}", "Use AdamW.")
        return
    arguments, _ = parse_arguments(options.optimizer.optimizer_args, "--optimizer_args")
    for argument in sorted(set(arguments) - _ON_CPU_ARGUMENTS):
        yield Problem("--optimizer_args", f"{argument} is not known to DeepSpeed's {name} on the CPU")


def _wants_states(options: TrainingOptions) -> bool:
    state = options.state
    return bool(state.save_state or state.save_state_on_train_end or state.resume)
