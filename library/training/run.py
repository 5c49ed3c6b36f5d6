"""A training run: what `Processes` are, and data, seed and output folder, from start to clean end."""

from __future__ import annotations

import logging
import os
import secrets
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.files import clean_litter
from library.lock_file import LockFile
from library.models.family import WeightPlan
from library.models.memory import allow_tf32
from library.training.beginning import find_beginning
from library.training.processes import Processes, make_accelerator
from library.training.stepper import Stepper

if TYPE_CHECKING:
    from types import TracebackType

    from library.contracts import ParamGroup
    from library.data.dataset import TrainingData
    from library.training.deepspeed import EngineStepper
    from library.training.fsdp import WeightShares
    from library.training.optimizers import BuiltOptimizer
    from library.training.options import DistributedOptions, PrecisionOptions, TrainingOptions

logger = logging.getLogger(__name__)


class Run(Processes):
    """Context of one run. Inside it the output folder is locked and signals set a flag instead of killing."""

    opts: TrainingOptions

    def __init__(self, opts: TrainingOptions, data: TrainingData) -> None:
        self.data = data
        self._ddp = _ddp_settings(opts.distributed)
        self._plugin = _plugin(opts, data)
        accumulation = 1 if self._plugin is None else opts.length.gradient_accumulation_steps
        super().__init__(
            opts, make_accelerator(opts.distributed, self._ddp, plugin=self._plugin, accumulation=accumulation)
        )
        self.output_dir = Path(opts.save.output_dir or ".")
        scaler = _make_scaler(self.device, opts.precision)
        self.scaler = scaler if self._plugin is None else None
        self.seed = opts.length.seed or 0
        self._shares: WeightShares | None = None
        self._cleanup = ExitStack()

    def weight_plan(self, trained: tuple[str, ...], *, unused: tuple[str, ...] = ()) -> WeightPlan:
        """Return where weights go and in which types, when the parts named `trained` train and `unused` never run."""
        plan = super().weight_plan(trained, unused=unused)
        waits = self.opts.shares_weights or (self._plugin is not None and self._plugin.zero3_init_flag)
        return replace(plan, trained_device=torch.device("cpu")) if waits else plan

    def __enter__(self) -> Run:
        self.report_world_size()
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
            allow_tf32(self.opts.precision.tf32 and not self.opts.length.deterministic)
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

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over all ranks, in place, and return it."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def share_weights(self, parts: Mapping[str, nn.Module]) -> None:
        """Cut up between the processes what trains, where the options ask for it; it then has other parameters."""
        if self.opts.shares_weights:
            from library.training.fsdp import WeightShares

            self._shares = WeightShares(parts, self.device, self.mixed_dtype)

    def own_groups(self, groups: list[ParamGroup]) -> list[ParamGroup]:
        """Return what of these groups this process steps: all, or its share."""
        return groups if self._shares is None else self._shares.own_groups(groups)

    def stepper(self, built: BuiltOptimizer) -> Stepper | EngineStepper:
        """Return what steps the optimizer and shares the work between processes."""
        optimizer, first_step = self.opts.optimizer, self.begin.position.step
        if self._plugin is not None:
            from library.training.deepspeed import EngineStepper

            return EngineStepper(self.accelerator, built, optimizer, self.opts.distributed, first_step=first_step)
        accumulation = self.begin.length.accumulation
        if self._shares is not None:
            from library.training.fsdp import ShardedStepper

            return ShardedStepper(built, optimizer, self._shares, accumulation=accumulation, first_step=first_step)
        return Stepper(
            built,
            optimizer,
            accumulation=accumulation,
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


def _make_scaler(device: torch.device, precision: PrecisionOptions) -> Any:
    """Return the loss scaler for float16, or None."""
    if precision.mixed_precision != "fp16":
        return None
    if device.type == "cpu":
        logger.warning("--mixed_precision fp16: no GPU is used, and processors are slow in float16")
    if precision.full_fp16:
        return _HalfGradientScaler(device.type)
    return torch.amp.GradScaler(device.type)


class _HalfGradientScaler(torch.amp.GradScaler):
    """A scaler that also unscales float16 gradients, which `--full_fp16` produces and torch refuses."""

    def _unscale_grads_(self, optimizer: Any, inv_scale: Any, found_inf: Any, allow_fp16: bool) -> Any:  # noqa: FBT001
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


def _set_determinism(deterministic: bool) -> None:
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
