"""What DeepSpeed is told of a run, and what it must have on this machine: settled before models are loaded."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from library.errors import UserError

if TYPE_CHECKING:
    from library.training.options import DistributedOptions, TrainingOptions


def uses_engine(distributed: DistributedOptions) -> bool:
    """Whether DeepSpeed's engine trains: stage 0 shares nothing, which is what plain training does."""
    return distributed.deepspeed and distributed.zero_stage > 0


def make_plugin(options: TrainingOptions, *, micro_batch: int, world_size: int) -> Any:
    """Return accelerate's `DeepSpeedPlugin` for the options.

    Args:
        options: All options.
        micro_batch: Images of a batch; the largest, where data sets differ.
        world_size: Number of processes.
    """
    from accelerate import DeepSpeedPlugin

    distributed, accumulation = options.distributed, options.length.gradient_accumulation_steps
    plugin = DeepSpeedPlugin(
        hf_ds_config="none",
        gradient_accumulation_steps=accumulation,
        gradient_clipping=options.optimizer.max_grad_norm,
        zero_stage=distributed.zero_stage,
        offload_optimizer_device=distributed.offload_optimizer_device or "none",
        offload_optimizer_nvme_path=distributed.offload_optimizer_nvme_path or "none",
        offload_param_device=distributed.offload_param_device or "none",
        offload_param_nvme_path=distributed.offload_param_nvme_path or "none",
        zero3_init_flag=distributed.zero3_init_flag and distributed.zero_stage == 3,
        zero3_save_16bit_model=distributed.zero3_save_16bit_model,
    )
    config = plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = micro_batch
    config["train_batch_size"] = micro_batch * accumulation * world_size
    precision = options.precision.mixed_precision
    config["bf16"] = {"enabled": precision == "bf16", "check_grad_overflow": True}
    config["fp16"] = {"enabled": precision == "fp16"}
    if precision == "fp16":
        master = distributed.fp16_master_weights_and_gradients
        config["fp16"] |= {"initial_scale_power": 0, "fp16_master_weights_and_grads": master}
    return plugin


def prepare_environment(distributed: DistributedOptions) -> None:
    """Let DeepSpeed start in a single process without a launcher, and compile what it needs before models are loaded.

    Raises:
        UserError: Something that the options need cannot be built on this machine.
    """
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ.update({name: value for name, value in alone.items() if name not in os.environ})
    if distributed.offload_optimizer_device:
        _compile("CPUAdamBuilder", "--offload_optimizer_device", "A C++ compiler and ninja are needed.")
    for name in ("offload_optimizer_device", "offload_param_device"):
        if getattr(distributed, name) == "nvme":
            _compile("AsyncIOBuilder", f"--{name} nvme", "The package libaio-dev is needed.")


def engine_backend() -> str | None:
    """Return how processes talk to each other where accelerate would not know: on the CPU.

    Raises:
        UserError: accelerate is told to leave out everything but the CPU, and then leaves out DeepSpeed too.
    """
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "t", "on"):
        what = "accelerate is set to the CPU (ACCELERATE_USE_CPU or accelerate config) and then does not use DeepSpeed"
        raise UserError(what, "Drop one of them.", where="--deepspeed")
    from deepspeed.accelerator import get_accelerator

    return "gloo" if get_accelerator().device_name() == "cpu" else None


def _compile(builder: str, where: str, hint: str) -> None:
    import subprocess

    from deepspeed.ops import op_builder

    try:
        getattr(op_builder, builder)().load()
    except (RuntimeError, OSError, ImportError, AssertionError, subprocess.SubprocessError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"DeepSpeed cannot build what it needs ({reason})", hint, where=where) from error
