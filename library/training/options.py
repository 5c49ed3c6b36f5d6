"""Options of training itself: length, precision, optimizer, noise and loss; and what all training scripts share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from library.data.options import CacheOptions, DatasetOptions, LoaderOptions, SubsetOptions
from library.errors import Problem
from library.inference.prompt_options import TRAINING_SAMPLES, Place
from library.models.options import MemoryOptions, ModelOptions, TextOptions
from library.option_groups import OptionGroup, OptionSet, opt
from library.option_parser import ConfigOptions
from library.training.fsdp_checks import launcher_problems
from library.training.options_ema import EmaOptions
from library.training.options_objective import LossOptions, NoiseOptions
from library.training.options_output import (
    HubOptions,
    LogOptions,
    ModelMetadataOptions,
    SampleOptions,
    SaveOptions,
    StateOptions,
)
from library.training.options_progress import StartOptions, ValidationOptions

if TYPE_CHECKING:
    import torch

    from library.contracts import FamilySpec
    from library.models.family import ModelFamily
    from library.training.objective import Objective
    from library.training.sampling import Renderer

__all__ = [
    "CacheOptions",
    "ConfigOptions",
    "DatasetOptions",
    "DistributedOptions",
    "EmaOptions",
    "HubOptions",
    "LengthOptions",
    "LoaderOptions",
    "LogOptions",
    "LossOptions",
    "MemoryOptions",
    "ModelMetadataOptions",
    "ModelOptions",
    "NoiseOptions",
    "OptimizerOptions",
    "PrecisionOptions",
    "SampleOptions",
    "SaveOptions",
    "ScheduleOptions",
    "StartOptions",
    "StateOptions",
    "SubsetOptions",
    "TextOptions",
    "TrainingOptions",
    "ValidationOptions",
]


@dataclass(frozen=True, kw_only=True)
class LengthOptions(OptionGroup, title="length"):
    """How long the run is, and what its randomness starts from."""

    max_train_steps: int = opt(
        1600, at_least=1, metadata_key="ss_max_train_steps", help="Optimizer updates of the whole run."
    )
    max_train_epochs: int | None = opt(
        None, zero_is_off="quiet", help="Passes over the data; replaces --max_train_steps."
    )
    gradient_accumulation_steps: int = opt(
        1,
        at_least=1,
        metadata_key="ss_gradient_accumulation_steps",
        help="Batches per optimizer update and process: a larger batch for the memory of a small one.",
    )
    seed: int | None = opt(
        None,
        at_least=0,
        metadata_key="ss_seed",
        help="Start of all randomness. Default: a fresh one, shown in the log.",
    )
    deterministic: bool = opt(
        False, help="Use only deterministic algorithms on the GPU: the same bits each time, somewhat slower."
    )


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions(OptionGroup, title="precision"):
    """Number formats of weights and arithmetic."""

    mixed_precision: str = opt(
        "no",
        choices=("no", "fp16", "bf16"),
        metadata_key="ss_mixed_precision",
        help="Format of arithmetic and of frozen weights; trained weights stay in float32.",
    )
    full_fp16: bool = opt(
        False,
        needs={"mixed_precision": ("fp16",)},
        excludes={"full_bf16": "trained weights have one format"},
        metadata_key="ss_full_fp16",
        help="Train in float16 altogether: half the memory, less exact.",
    )
    full_bf16: bool = opt(
        False, needs={"mixed_precision": ("bf16",)}, help="Train in bfloat16 altogether: half the memory, less exact."
    )
    fp8_base: bool = opt(False, metadata_key="ss_fp8_base", help="Keep frozen weights in 8 bits.")

    @property
    def tf32(self) -> bool:
        """Whether products in float32 may be rounded to TensorFloat-32."""
        return True


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(OptionGroup, title="optimizer"):
    """Which optimizer trains, and how gradients are treated."""

    optimizer_type: str = opt(
        "",
        help="Name of the optimizer, such as AdamW, AdamW8bit, Lion, Adafactor, Prodigy, DAdaptAdam, "
        "AdamWScheduleFree, any class of torch.optim, or package.module.Class. Default: AdamW.",
    )
    use_8bit_adam: bool = opt(
        False,
        resume="free",
        means={"optimizer_type": "AdamW8bit"},
        help="Older spelling of --optimizer_type AdamW8bit.",
    )
    use_lion_optimizer: bool = opt(
        False, resume="free", means={"optimizer_type": "Lion"}, help="Older spelling of --optimizer_type Lion."
    )
    learning_rate: float = opt(
        2e-6, at_least=0, metadata_key="ss_learning_rate", help="Learning rate of everything without one of its own."
    )
    optimizer_args: tuple[str, ...] = opt(
        (), help="Further arguments of the optimizer, such as weight_decay=0.01 betas=0.9,0.999."
    )
    max_grad_norm: float = opt(
        1.0,
        at_least=0,
        metadata_key="ss_max_grad_norm",
        help="Scale gradients down to this norm if it is larger. 0: never.",
    )
    fused_backward_pass: bool = opt(
        False,
        excludes={"deepspeed": "its engine owns the optimizer"},
        help="Update each weight as soon as its gradient is known, so that gradients need no memory.",
    )
    max_nan_steps: int = opt(
        10,
        at_least=0,
        resume="free",
        help="Stop after this many updates in a row without finite gradients. 0: at the first one.",
    )


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions(OptionGroup, title="schedule"):
    """How the learning rate changes during the run."""

    lr_scheduler: str = opt(
        "constant",
        metadata_key="ss_lr_scheduler",
        help="constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial, inverse_sqrt, "
        "cosine_with_min_lr, warmup_stable_decay, piecewise_constant or adafactor.",
    )
    lr_scheduler_type: str = opt(
        "", help="Class of torch.optim.lr_scheduler or package.module.Class; replaces --lr_scheduler."
    )
    lr_scheduler_args: tuple[str, ...] = opt((), help="Further arguments of the schedule, such as T_max=100.")
    lr_warmup_steps: int | float = opt(
        0,
        at_least=0,
        metadata_key="ss_lr_warmup_steps",
        help="Updates over which the learning rate rises; below 1 or in percent: a share of the run.",
    )
    lr_decay_steps: int | float = opt(
        0,
        at_least=0,
        matters_when={"lr_scheduler": ("warmup_stable_decay",)},
        help="Updates over which the learning rate falls at the end; below 1 or in percent: a share of the run.",
    )
    lr_scheduler_num_cycles: int = opt(
        1,
        at_least=1,
        matters_when={"lr_scheduler": ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay")},
        help="Number of cycles of a cosine schedule.",
    )
    lr_scheduler_power: float = opt(
        1, matters_when={"lr_scheduler": ("polynomial",)}, help="Power of the polynomial schedule."
    )
    lr_scheduler_timescale: int | None = opt(
        None,
        at_least=1,
        matters_when={"lr_scheduler": ("inverse_sqrt",)},
        help="Time scale of the inverse_sqrt schedule. Default: the warm-up.",
    )
    lr_scheduler_min_lr_ratio: float | None = opt(
        None,
        at_least=0,
        at_most=1,
        matters_when={"lr_scheduler": ("cosine_with_min_lr", "warmup_stable_decay")},
        help="Lowest learning rate as a share of the highest.",
    )

    @property
    def warmup_begins_at(self) -> int:
        """Where in the warm-up the first update stands: at 0 it changes nothing, as in diffusers; at 1 it counts."""
        return 0


@dataclass(frozen=True, kw_only=True)
class DistributedOptions(OptionGroup, title="distributed", resume="free"):
    """Several processes, and DeepSpeed."""

    ddp_timeout: int | None = opt(
        None, zero_is_off="quiet", help="Minutes that processes wait for each other. Default: 120."
    )
    ddp_gradient_as_bucket_view: bool = opt(False, help="Let gradients be views of the communication buffers.")
    ddp_static_graph: bool = opt(False, help="Tell PyTorch that the same parameters are used in every step.")
    deepspeed: bool = opt(False, resume="exact", help="Share optimizer states and weights between GPUs by DeepSpeed.")
    zero_stage: int = opt(
        2,
        choices=(0, 1, 2, 3),
        resume="exact",
        matters_when={"deepspeed": ()},
        help="What DeepSpeed shares: 1 optimizer states, 2 gradients too, 3 weights too.",
    )
    offload_optimizer_device: str | None = opt(
        None, choices=("cpu", "nvme"), matters_when={"deepspeed": ()}, help="Where optimizer states are kept."
    )
    offload_optimizer_nvme_path: str | None = opt(
        None,
        path=True,
        matters_when={"offload_optimizer_device": ("nvme",)},
        help="Folder on an NVMe disk for optimizer states.",
    )
    offload_param_device: str | None = opt(
        None, choices=("cpu", "nvme"), matters_when={"deepspeed": ()}, help="Where weights are kept (ZeRO stage 3)."
    )
    offload_param_nvme_path: str | None = opt(
        None, path=True, matters_when={"offload_param_device": ("nvme",)}, help="Folder on an NVMe disk for weights."
    )
    zero3_init_flag: bool = opt(
        False, matters_when={"deepspeed": ()}, help="Build the model in shared pieces (ZeRO stage 3)."
    )
    zero3_save_16bit_model: bool = opt(
        False, matters_when={"deepspeed": ()}, help="Gather weights in 16 bits when saving (ZeRO stage 3)."
    )
    fp16_master_weights_and_gradients: bool = opt(
        False,
        resume="exact",
        needs={"deepspeed": ()},
        help="Keep master weights and gradients in float16 (ZeRO stage 2 with the optimizer on the CPU).",
    )

    offers_fsdp: ClassVar[bool] = False
    """Whether FSDP can be asked for."""

    def check(self) -> Iterator[Problem]:
        """Refuse DeepSpeed without its package, and settings that contradict each other."""
        yield from launcher_problems(self)
        if not self.deepspeed:
            return
        from importlib.util import find_spec

        if find_spec("deepspeed") is None:
            yield Problem("--deepspeed", "the package deepspeed is not installed", "Run: pip install deepspeed")
        for device, folder in (
            ("offload_optimizer_device", "offload_optimizer_nvme_path"),
            ("offload_param_device", "offload_param_nvme_path"),
        ):
            if getattr(self, device) == "nvme" and not getattr(self, folder):
                yield Problem(f"--{device}", f"nvme needs --{folder}")
        on_cpu = self.offload_optimizer_device == "cpu" and self.zero_stage == 2
        if self.fp16_master_weights_and_gradients and not on_cpu:
            yield Problem(
                "--fp16_master_weights_and_gradients", "needs --zero_stage 2 and --offload_optimizer_device cpu"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(OptionSet):
    """The groups that all training scripts share; a script adds those of its method."""

    model: ModelOptions = field(default_factory=ModelOptions)
    text: TextOptions = field(default_factory=TextOptions)
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    data: DatasetOptions = field(default_factory=DatasetOptions)
    subset: SubsetOptions = field(default_factory=SubsetOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    loader: LoaderOptions = field(default_factory=LoaderOptions)
    length: LengthOptions = field(default_factory=LengthOptions)
    precision: PrecisionOptions = field(default_factory=PrecisionOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    noise: NoiseOptions = field(default_factory=NoiseOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    save: SaveOptions = field(default_factory=SaveOptions)
    state: StateOptions = field(default_factory=StateOptions)
    sample: SampleOptions = field(default_factory=SampleOptions)
    log: LogOptions = field(default_factory=LogOptions)
    metadata: ModelMetadataOptions = field(default_factory=ModelMetadataOptions)
    hub: HubOptions = field(default_factory=HubOptions)
    distributed: DistributedOptions = field(default_factory=DistributedOptions)
    config: ConfigOptions = field(default_factory=ConfigOptions)

    tracker_name: ClassVar[str] = "dreambooth"
    """Name of the curves without `--log_tracker_name`."""
    sample_place: ClassVar[Place] = TRAINING_SAMPLES
    """The options that prompts of sample pictures may have."""

    def validation_options(self) -> ValidationOptions:
        """Return when the validation loss is measured: after every epoch, in scripts without options for it."""
        return ValidationOptions()

    def start_options(self) -> StartOptions:
        """Return where the user wants the run to begin: nowhere special, in scripts without options for it."""
        return StartOptions()

    def ema_options(self) -> EmaOptions:
        """Return the average of the weights that is kept: none, in scripts without options for it."""
        return EmaOptions()

    @property
    def shares_weights(self) -> bool:
        """Whether FSDP cuts up between the processes what trains."""
        return False

    def objective(self, spec: FamilySpec, device: torch.device) -> Objective:
        """Return what is added to latents and what is to be predicted."""
        from library.training.objective import DDPMObjective

        return DDPMObjective(spec.prediction_type, self.noise, self.loss, device)

    def renderer(self, family: ModelFamily, autocast: Callable[[], AbstractContextManager[None]]) -> Renderer:
        """Return what draws sample pictures with the model while it trains."""
        from library.inference.render import DiffusionRenderer, RenderSettings

        settings = RenderSettings(zero_terminal_snr=self.noise.zero_terminal_snr)
        return DiffusionRenderer(family, settings, autocast=autocast)

    def base_files(self) -> dict[str, str]:
        """Return the files (folders, ids) that frozen weights come from, by name; the model itself is called ""."""
        return self.model.base_files()

    def check_together(self) -> Iterator[Problem]:
        """Yield what is wrong between groups."""
        from library.training.checks import check_training

        return check_training(self, world_size=int(os.environ.get("WORLD_SIZE", "1")))

    def warn_together(self) -> Iterator[Problem]:
        """Yield what is suspicious between groups."""
        from library.training.checks import warn_training

        return warn_training(self)

    def check_folders(self) -> Iterator[Problem]:
        """Yield which folders cannot be written to, after making them."""
        from library.training.checks import check_output

        return check_output(self)
