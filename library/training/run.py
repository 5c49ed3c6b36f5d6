"""A training run: processes, device, precision, seed, output folder and signals, from start to clean end."""

from __future__ import annotations

import logging
import os
import secrets
import warnings
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.errors import UserError
from library.files import clean_litter
from library.lock_file import LockFile
from library.models.family import WeightPlan
from library.models.memory import allow_tf32
from library.signals import StopFlag
from library.training.beginning import find_beginning
from library.training.ranks import Ranks
from library.training.step import Autocast
from library.training.stepper import Stepper

if TYPE_CHECKING:
    from types import TracebackType

    from library.data.dataset import TrainingData
    from library.training.deepspeed import EngineStepper
    from library.training.optimizers import BuiltOptimizer
    from library.training.options import DistributedOptions, PrecisionOptions, TrainingOptions

logger = logging.getLogger(__name__)

SETUP_TIMEOUT_MINUTES = 120
"""How long ranks wait for each other by default: one of them may be caching or saving for that long."""

_DTYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class Run:
    """Context of one run. Inside it the output folder is locked and signals set a flag instead of killing."""

    def __init__(self, opts: TrainingOptions, data: TrainingData) -> None:
        self.opts = opts
        self.data = data
        self._ddp = _ddp_settings(opts.distributed)
        self._plugin = _plugin(opts, data)
        self.accelerator = _make_accelerator(opts, self._ddp, self._plugin)
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.is_main: bool = self.accelerator.is_main_process
        self.local_rank: int = self.accelerator.local_process_index
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        self.ranks = Ranks.of_torch()
        self.output_dir = Path(opts.save.output_dir or ".")
        self.stop = StopFlag(announce=self.is_main)
        self.mixed_dtype = _DTYPES[opts.precision.mixed_precision]
        self.autocast = Autocast(self.device, self.mixed_dtype)
        scaler = _make_scaler(self.device, opts.precision)
        self.scaler = scaler if self._plugin is None else None
        self.seed = opts.length.seed or 0
        self._cleanup = ExitStack()

    @property
    def is_local_main(self) -> bool:
        """Whether this is the first process of its node."""
        return self.local_rank == 0

    def weight_plan(self, trained: tuple[str, ...]) -> WeightPlan:
        """Return where weights go and in which types, when the parts named `trained` train."""
        waits = self._plugin is not None and self._plugin.zero3_init_flag
        trained_device = torch.device("cpu") if waits else None
        return WeightPlan(self.device, trained, self.trained_dtype, self.frozen_dtype, self.vae_dtype, trained_device)

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

    def __enter__(self) -> Run:
        _report_world_size(self.world_size)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            if self.is_main:
                clean_litter(self.output_dir)
                name = self.opts.save.output_name or "last"
                opened.enter_context(LockFile(self.output_dir / f".{name}.lock"))
            opened.enter_context(self.stop)
            self._begin()
            self._cleanup = opened.pop_all()
        return self

    def _begin(self) -> None:
        _set_determinism(self.opts.length.deterministic)
        if self.device.type == "cuda":
            allow_tf32(not self.opts.length.deterministic)
        self.begin = find_beginning(self.opts, self.data, self.device, self.ranks)
        self.seed = self._resolve_seed()
        # Nothing of ours draws from the global generator; third-party code may.
        torch.manual_seed(self.seed)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()
        if self.world_size > 1 and kind is None:
            self.accelerator.end_training()

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.accelerator.wait_for_everyone()

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value` (any picklable object made by us) on every rank."""
        return self.ranks.broadcast(value)

    def from_node_leader(self, value: Any) -> Any:
        """Return the `value` of the first process of this node."""
        return self.ranks.gather(value)[self.rank - self.local_rank]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over all ranks, in place, and return it."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def stepper(self, built: BuiltOptimizer) -> Stepper | EngineStepper:
        """Return what steps the optimizer and shares the work between processes."""
        optimizer, first_step = self.opts.optimizer, self.begin.position.step
        if self._plugin is not None:
            from library.training.deepspeed import EngineStepper

            return EngineStepper(self.accelerator, built, optimizer, self.opts.distributed, first_step=first_step)
        return Stepper(
            built,
            optimizer,
            accumulation=self.begin.length.accumulation,
            scaler=self.scaler,
            first_step=first_step,
            seed=self.seed,
            share=None if self.world_size == 1 else self._share,
        )

    def _share(self, step: nn.Module, may_skip_parameters: bool) -> nn.Module:  # noqa: FBT001
        self._ddp.find_unused_parameters = may_skip_parameters
        with warnings.catch_warnings():
            # New versions of torch give an argument of accelerate's another name.
            warnings.simplefilter("ignore", FutureWarning)
            # Everything is in its place. To accelerate the processor is "cpu:0", so moving would copy the parameters,
            # and rows of them (`FlatParameters`) would be left behind.
            return self.accelerator.prepare_model(step, device_placement=False)

    def _resolve_seed(self) -> int:
        """Return `--seed`, else that of the state that is resumed, else a fresh one, which is told."""
        given, stored = self.opts.length.seed, self.begin.stored
        if given is not None:
            return given
        if stored is not None and stored.info.seed is not None:
            return stored.info.seed
        seed = int(self.broadcast(secrets.randbits(32)))
        logger.info("no --seed given: this run uses %d", seed)
        return seed


def _ddp_settings(distributed: DistributedOptions) -> Any:
    from accelerate.utils import DistributedDataParallelKwargs

    return DistributedDataParallelKwargs(
        broadcast_buffers=False,
        gradient_as_bucket_view=distributed.ddp_gradient_as_bucket_view,
        static_graph=distributed.ddp_static_graph,
    )


def _plugin(opts: TrainingOptions, data: TrainingData) -> Any:
    """Return accelerate's plugin for DeepSpeed, or None when its engine is not used."""
    from library.training.deepspeed_plugin import make_plugin, prepare_environment, uses_engine

    if not uses_engine(opts.distributed):
        return None
    prepare_environment(opts.distributed)
    batch = max(spec.batch_size for spec in data.specs)
    return make_plugin(opts, micro_batch=batch, world_size=int(os.environ.get("WORLD_SIZE", "1")))


def _make_accelerator(opts: TrainingOptions, ddp: Any, plugin: Any) -> Any:
    from accelerate import Accelerator, InitProcessGroupKwargs

    minutes = opts.distributed.ddp_timeout or SETUP_TIMEOUT_MINUTES
    group = InitProcessGroupKwargs(timeout=timedelta(minutes=minutes))
    if plugin is not None:
        from library.training.deepspeed_plugin import engine_backend

        group.backend = engine_backend()
    # The step enters autocast and the stepper scales losses; accelerate starts processes and places modules.
    return Accelerator(
        mixed_precision="no",
        gradient_accumulation_steps=1 if plugin is None else opts.length.gradient_accumulation_steps,
        kwargs_handlers=[group, ddp],
        deepspeed_plugin=plugin,
    )


def _make_scaler(device: torch.device, precision: PrecisionOptions) -> Any:
    """Return the loss scaler for float16, or None."""
    if precision.mixed_precision != "fp16":
        return None
    if device.type == "cpu":
        raise UserError(
            "float16 training needs a GPU, and none is used here",
            "Use --mixed_precision bf16 or no.",
            where="--mixed_precision fp16",
        )
    if precision.full_fp16:
        return _HalfGradientScaler(device.type)
    return torch.amp.GradScaler(device.type)


class _HalfGradientScaler(torch.amp.GradScaler):
    """A scaler that also unscales float16 gradients, which `--full_fp16` produces and torch refuses."""

    def _unscale_grads_(self, optimizer: Any, inv_scale: Any, found_inf: Any, allow_fp16: bool) -> Any:  # noqa: FBT001
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


def _report_world_size(world_size: int) -> None:
    requested = int(os.environ.get("WORLD_SIZE", "1"))
    logger.info("running on %d process%s", world_size, "" if world_size == 1 else "es")
    if requested != world_size:
        logger.warning("the launcher asked for %d processes, but %d run", requested, world_size)


def _set_determinism(deterministic: bool) -> None:
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
