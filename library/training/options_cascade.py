"""Options of training that only Stable Cascade has: its models, how losses are weighted, what trains."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from library import cascade_config
from library.cascade_yaml import batch_per_process
from library.data.spec_sizes import step_as_given
from library.errors import Problem
from library.inference.prompt_options import CASCADE_SAMPLES, STAGE_B_SAMPLES, Place
from library.models.cascade.options import (
    CascadeModelOptions,
    CascadeTextOptions,
    StageBModelOptions,
    StageCModelOptions,
)
from library.models.cascade.specs import STAGE_C
from library.option_groups import COMMAND_LINE, OptionGroup, opt
from library.training.fsdp_checks import fsdp_problems, fsdp_warnings
from library.training.options import TrainingOptions
from library.training.options_cascade_run import (
    CascadeDatasetOptions,
    CascadeDistributedOptions,
    CascadeLogOptions,
    CascadePrecisionOptions,
    CascadeSampleOptions,
    CascadeSaveOptions,
    CascadeScheduleOptions,
    StageCDatasetOptions,
)
from library.training.options_ema import EmaOptions
from library.training.options_full import FullTrainingOptions, FullTuneOptions

if TYPE_CHECKING:
    import torch

    from library.config_file import ForeignConfig
    from library.contracts import FamilySpec
    from library.models.family import ModelFamily
    from library.training.objective import Objective
    from library.training.sampling import Renderer

LOSS_WEIGHTINGS = (
    "p2",
    "adaptive",
    "constant",
    "snr",
    "snr+1",
    "min-snr",
    "min-snr+1",
    "truncated",
    "sech",
    "debiased",
    "sigmoid",
)


@dataclass(frozen=True, kw_only=True)
class CascadeLossOptions(OptionGroup, title="loss of Stable Cascade"):
    """How much the loss counts at different levels of noise."""

    adaptive_loss_weight: bool = opt(
        False,
        metadata_key="ss_adaptive_loss_weight",
        help="Weight the loss by what it was lately at the same level of noise, so that all levels count alike.",
    )
    loss_weighting: str | None = opt(
        None,
        choices=LOSS_WEIGHTINGS,
        metadata_key="ss_loss_weighting",
        help="Weight of the loss as a function of the level of noise. Default: p2.",
    )

    def check(self) -> Iterator[Problem]:
        """Refuse two weightings at once."""
        if self.adaptive_loss_weight and self.loss_weighting not in (None, "adaptive"):
            yield Problem("--adaptive_loss_weight", f"goes without --loss_weighting={self.loss_weighting}")


_OTHER_MODELS = (
    "pretrained_model_name_or_path",
    "v2",
    "v_parameterization",
    "no_token_padding",
    "diffusers_xformers",
)
"""Options about models of other families."""

FROZEN_DROPOUT = {
    "default": 0.0,
    "help": "Share of features and attention of stage C that training leaves out at random.",
}
"""What becomes of `--stage_c_dropout` where something beside a frozen stage C trains."""


@dataclass(frozen=True, kw_only=True)
class CascadeTrainingOptions(
    TrainingOptions,
    changes={
        "in_json": {"flag": "in_json"},
        "vae": {"help": "Has no effect: pictures are encoded by EfficientNet and by stage A."},
        "config_file": {"help": cascade_config.HELP},
        "no_half_vae": {"help": "Run the EfficientNet encoder in float32 whatever --mixed_precision says."},
        "save_model_as": {"choices": ("ckpt", "safetensors", "diffusers", "diffusers_safetensors")},
        "v_pred_like_loss": {"excludes": {}},
    },
    leave_out=_OTHER_MODELS,
):
    """What all training scripts of Stable Cascade share, whichever stage they train."""

    model: CascadeModelOptions = field(default_factory=CascadeModelOptions)
    text: CascadeTextOptions = field(default_factory=CascadeTextOptions)
    data: CascadeDatasetOptions = field(default_factory=CascadeDatasetOptions)
    precision: CascadePrecisionOptions = field(default_factory=CascadePrecisionOptions)
    schedule: CascadeScheduleOptions = field(default_factory=CascadeScheduleOptions)
    save: CascadeSaveOptions = field(default_factory=CascadeSaveOptions)
    sample: CascadeSampleOptions = field(default_factory=CascadeSampleOptions)
    log: CascadeLogOptions = field(default_factory=CascadeLogOptions)
    distributed: CascadeDistributedOptions = field(default_factory=CascadeDistributedOptions)
    cascade: CascadeLossOptions = field(default_factory=CascadeLossOptions)
    ema: EmaOptions = field(default_factory=EmaOptions)

    tracker_name: ClassVar[str] = "stable_cascade"
    sample_place: ClassVar[Place] = CASCADE_SAMPLES
    stage: ClassVar[str] = "c"
    """Whose weights `generator_checkpoint_path` of a YAML file names."""
    pyramid_noise: ClassVar[bool] = False
    """Whether noise of several resolutions is added up, as in the training of stage B."""

    def __post_init__(self) -> None:
        if self.data.global_batch_size is not None:
            processes = int(os.environ.get("WORLD_SIZE", "1"))
            size = batch_per_process(self.data.global_batch_size, processes, self.length.gradient_accumulation_steps)
            object.__setattr__(self, "data", replace(self.data, batch_size=size))

    @classmethod
    def spell_out(cls, words: Sequence[str]) -> list[str]:
        """Return the command line with `--config_file` before a YAML file that begins it."""
        return cascade_config.spell_out(list(words))

    @classmethod
    def meant_by(cls, name: str) -> str | None:
        """Return the option that a key of the original trainer's files stands for."""
        return cascade_config.option_of(name, cls.stage)

    @classmethod
    def foreign_config(cls, name: str, typed: Collection[str]) -> ForeignConfig | None:
        """Read a YAML file of the original trainer."""
        offered = {option.name for option in cls.options().values() if option.offered}
        return cascade_config.read(name, stage=cls.stage, offered=offered, typed=typed)

    def ema_options(self) -> EmaOptions:
        """Return the average of the weights that is kept."""
        return self.ema

    def objective(self, spec: FamilySpec, device: torch.device) -> Objective:
        """Return the objective of stages C and B, which differ in their noise."""
        from library.training.objective_cascade import GDFObjective

        return GDFObjective(self.noise, self.loss, self.cascade, device, pyramid=self.pyramid_noise)

    def check_together(self) -> Iterator[Problem]:
        """Yield what is wrong between groups."""
        yield from super().check_together()
        if self.ema.ema_decay is not None:
            yield from self._check_average()
        if self.given.get("train_batch_size") == self.given.get("global_batch_size") == COMMAND_LINE:
            yield Problem("--global_batch_size", "cannot be combined with --train_batch_size", "Drop one of them.")

    def _check_average(self) -> Iterator[Problem]:
        if self.distributed.deepspeed:
            yield Problem("--ema_decay", "cannot be combined with --deepspeed, whose processes each have a part")
        if "schedulefree" in self.optimizer.optimizer_type.lower():
            what = f"cannot be combined with {self.optimizer.optimizer_type}, which averages the weights itself"
            yield Problem("--ema_decay", what)


@dataclass(frozen=True, kw_only=True)
class StageCOptions(CascadeTrainingOptions):
    """What the scripts that train stage C, or something for it, share."""

    model: StageCModelOptions = field(default_factory=StageCModelOptions)
    data: StageCDatasetOptions = field(default_factory=StageCDatasetOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        step = step_as_given(STAGE_C.bucket_step_multiple, self.data.encoded_share)
        if "bucket_reso_steps" not in self.given and self.data.bucket_reso_steps % step:
            steps = -(-self.data.bucket_reso_steps // step) * step
            object.__setattr__(self, "data", replace(self.data, bucket_reso_steps=steps))

    def check_together(self) -> Iterator[Problem]:
        """Yield what is wrong between groups."""
        yield from super().check_together()
        if self.precision.full_fp16:
            yield Problem("--full_fp16", "the weights of stage C overflow in float16", "Use --full_bf16.")
        if self.sample.sample_prompts and not self.model.previewer_checkpoint_path:
            yield Problem("--sample_prompts", "needs --previewer_checkpoint_path, which makes pictures of latents")
        if self.model.clip_image_cond_rate and self.cache.cache_latents:
            what = "cannot be combined with --cache_latents: the image encoder looks at the pictures themselves"
            yield Problem("--clip_image_cond_rate", what, "Drop one of them.")

    def warn_together(self) -> Iterator[Problem]:
        """Yield what is suspicious between groups."""
        yield from super().warn_together()
        if self.precision.mixed_precision == "fp16":
            yield Problem("--mixed_precision", "fp16 makes stage C overflow", "Use bf16.")
        # The original trainer's files always name one.
        typed = self.given.get("previewer_checkpoint_path") == COMMAND_LINE
        if typed and not self.sample.sample_prompts:
            yield Problem("--previewer_checkpoint_path", "has no effect without --sample_prompts")

    def renderer(self, family: ModelFamily, autocast: Callable[[], AbstractContextManager[None]]) -> Renderer:
        """Return what draws sample pictures by stage C and the previewer."""
        from library.inference.cascade import CascadeRenderer
        from library.inference.cascade_decoders import PreviewDecoder

        return CascadeRenderer(family, PreviewDecoder(family.previewer), autocast=autocast)  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class CascadeTuneOptions(FullTuneOptions, title="tune"):
    """What is trained."""

    train_text_encoder: bool = opt(False, help="Train the text encoder too.")
    train_text_encoder_only: bool = opt(
        False, implies={"train_text_encoder": True}, help="Train the text encoder alone; the stage stays as it is."
    )
    learning_rate_te1: float | None = opt(
        None,
        more_than=0,
        matters_when={"train_text_encoder": (), "train_text_encoder_only": ()},
        help="Learning rate of the text encoder. Default: --learning_rate.",
    )

    @property
    def trains_text_encoder(self) -> bool:
        """Whether the text encoder is trained."""
        return self.train_text_encoder

    @property
    def text_encoder_rate(self) -> float | None:
        """Learning rate of the text encoder; None: that of everything."""
        return self.learning_rate_te1

    @property
    def trained_parts(self) -> tuple[str, ...]:
        """Names of the model's parts that train."""
        parts = ("text_encoder",) if self.train_text_encoder else ()
        return parts if self.train_text_encoder_only else ("unet", *parts)


@dataclass(frozen=True, kw_only=True)
class StageTuneOptions(CascadeTrainingOptions, FullTrainingOptions, leave_out=("learning_rate_te",)):
    """What the scripts that train a whole stage share."""

    tune: CascadeTuneOptions = field(default_factory=CascadeTuneOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        # Users of sd-scripts say so with a rate of zero.
        tune = self.tune
        if self.optimizer.learning_rate == 0 and tune.train_text_encoder and not tune.train_text_encoder_only:
            object.__setattr__(self, "tune", replace(tune, train_text_encoder_only=True))

    @property
    def shares_weights(self) -> bool:
        """Whether FSDP cuts up between the processes what trains."""
        return bool(self.distributed.sharing)

    def check_together(self) -> Iterator[Problem]:
        """Yield what is wrong between groups."""
        yield from super().check_together()
        if self.distributed.sharing:
            yield from fsdp_problems(self, self.distributed.sharing)
        tune = self.tune
        if self.cache.cache_text_encoder_outputs and tune.train_text_encoder:
            what = "cannot be combined with --train_text_encoder: its outputs change"
            yield Problem("--cache_text_encoder_outputs", what, "Drop one of them.")
        if self.optimizer.learning_rate == 0 and not (tune.train_text_encoder and tune.learning_rate_te1):
            hint = "To train the text encoder alone, give --train_text_encoder and --learning_rate_te1."
            yield Problem("--learning_rate", "0 trains nothing", hint)

    def warn_together(self) -> Iterator[Problem]:
        """Yield what is suspicious between groups."""
        yield from super().warn_together()
        if self.distributed.sharing:
            yield from fsdp_warnings(self, self.distributed.sharing)


@dataclass(frozen=True, kw_only=True)
class StageCTuneOptions(StageCOptions, StageTuneOptions):
    """Everything that the script that trains stage C accepts."""


@dataclass(frozen=True, kw_only=True)
class StageBTuneOptions(StageTuneOptions):
    """Everything that the script that trains stage B accepts."""

    model: StageBModelOptions = field(default_factory=StageBModelOptions)

    sample_place: ClassVar[Place] = STAGE_B_SAMPLES
    stage: ClassVar[str] = "b"
    pyramid_noise: ClassVar[bool] = True

    def renderer(self, family: ModelFamily, autocast: Callable[[], AbstractContextManager[None]]) -> Renderer:
        """Return what makes pictures that prompts name by `--cn` again."""
        from library.inference.cascade_reconstruction import ReconstructionRenderer

        return ReconstructionRenderer(family, autocast=autocast)  # type: ignore[arg-type]
