"""The processes that share a piece of work: ranks, devices, number formats, signals. For runs and for cache tools."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from library.models.family import WeightPlan
from library.signals import StopFlag
from library.training.fsdp_checks import FSDP_VARIABLE
from library.training.ranks import Ranks
from library.training.step import Autocast

if TYPE_CHECKING:
    from types import TracebackType

    from library.models.options import MemoryOptions, ModelOptions, TextOptions
    from library.training.options import DistributedOptions, PrecisionOptions

logger = logging.getLogger(__name__)

SETUP_TIMEOUT_MINUTES = 120
"""How long ranks wait for each other by default: one of them may be caching or saving for that long."""

_DTYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class ProcessOptions:
    """The groups of options that decide how a model is loaded and how processes work together."""

    model: ModelOptions
    text: TextOptions
    memory: MemoryOptions
    precision: PrecisionOptions
    distributed: DistributedOptions


class Processes:
    """Context of work that is split between processes. Inside it signals set a flag instead of killing."""

    def __init__(self, opts: Any, accelerator: Any = None) -> None:
        """Prepare; signals are caught from `with` on.

        Args:
            opts: `ProcessOptions`, or all options of a script, which have these groups too.
            accelerator: of accelerate; None: a plain one.
        """
        self.opts = opts
        self.accelerator = accelerator or make_accelerator(opts.distributed)
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.is_main: bool = self.accelerator.is_main_process
        self.local_rank: int = self.accelerator.local_process_index
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        self.ranks = Ranks.of_torch()
        self.stop = StopFlag(announce=self.is_main)
        self.mixed_dtype = _DTYPES[opts.precision.mixed_precision]
        self.autocast = Autocast(self.device, self.mixed_dtype)

    @property
    def is_local_main(self) -> bool:
        """Whether this is the first process of its node."""
        return self.local_rank == 0

    def weight_plan(self, trained: tuple[str, ...], *, unused: tuple[str, ...] = ()) -> WeightPlan:
        """Return where weights go and in which types, when the parts named `trained` train and `unused` never run."""
        return WeightPlan(
            self.device, trained, self.trained_dtype, self.frozen_dtype, self.vae_dtype, None, unused=unused
        )

    @property
    def trained_dtype(self) -> torch.dtype:
        """Type of the trained weights: float32 unless `--full_fp16` or `--full_bf16`."""
        if self.opts.precision.full_fp16:
            return torch.float16
        return torch.bfloat16 if self.opts.precision.full_bf16 else torch.float32

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Type of weights that do not train: the mixed precision type."""
        return self.mixed_dtype or torch.float32

    @property
    def vae_dtype(self) -> torch.dtype:
        """Type of the VAE: float32 with `--no_half_vae`, else that of frozen weights."""
        return torch.float32 if self.opts.model.no_half_vae else self.frozen_dtype

    def __enter__(self) -> Any:
        self.report_world_size()
        self.stop.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop.__exit__(kind, error, trace)
        if self.world_size > 1 and kind is None:
            self.accelerator.end_training()

    def report_world_size(self) -> None:
        """Log the number of processes, and warn when it is not what the launcher asked for."""
        requested = int(os.environ.get("WORLD_SIZE", "1"))
        plural = "" if self.world_size == 1 else "es"
        logger.info("running on %d process%s, %s", self.world_size, plural, _device_name(self.device))
        if requested != self.world_size:
            logger.warning("the launcher asked for %d processes, but %d run", requested, self.world_size)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.accelerator.wait_for_everyone()

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value` (any picklable object made by us) on every rank."""
        return self.ranks.broadcast(value)

    def from_node_leader(self, value: Any) -> Any:
        """Return the `value` of the first process of this node."""
        return self.ranks.gather(value)[self.rank - self.local_rank]


def _device_name(device: torch.device) -> str:
    """Say what computes: without this line a GPU that PyTorch does not see shows in the speed only."""
    if device.type == "cpu":
        return "without GPU"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def make_accelerator(distributed: DistributedOptions, *handlers: Any, plugin: Any = None, accumulation: int = 1) -> Any:
    """Start accelerate, which starts the communication between processes.

    Args:
        distributed: options.
        handlers: further `KwargsHandler` of accelerate.
        plugin: of DeepSpeed, or None.
        accumulation: micro-batches per update of its engine.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    minutes = distributed.ddp_timeout or SETUP_TIMEOUT_MINUTES
    group = InitProcessGroupKwargs(timeout=timedelta(minutes=minutes))
    if plugin is not None:
        from library.training.deepspeed_plugin import engine_backend

        group.backend = engine_backend()
    # Scripts that offer FSDP do it themselves, where the launcher asks for it too.
    asked = os.environ.pop(FSDP_VARIABLE, None)
    # torchrun and srun do not say so when there is no GPU, and accelerate would start each process on its own.
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        # The step enters autocast and the stepper scales losses; accelerate starts processes and places modules.
        return Accelerator(
            cpu=several and plugin is None and not torch.accelerator.is_available(),
            mixed_precision="no",
            gradient_accumulation_steps=accumulation,
            kwargs_handlers=[group, *handlers],
            deepspeed_plugin=plugin,
        )
    finally:
        if asked is not None:
            os.environ[FSDP_VARIABLE] = asked
