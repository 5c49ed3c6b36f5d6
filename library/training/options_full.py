"""Options of full fine-tuning: what of the text encoder is trained, and at which rate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

from library.errors import Problem
from library.option_groups import OptionGroup, opt
from library.training.options import TrainingOptions


@dataclass(frozen=True, kw_only=True)
class FullTuneOptions(OptionGroup, title="tune"):
    """What of the text encoder is trained."""

    learning_rate_te: float | None = opt(
        None, at_least=0, help="Learning rate of the text encoder. Default: --learning_rate."
    )

    @property
    def trains_text_encoder(self) -> bool:
        """Whether the text encoder is trained at any time of the run."""
        return False

    @property
    def text_encoder_stop(self) -> int | None:
        """Update after which a trained text encoder is trained no more; None: never."""
        return None

    @property
    def text_encoder_rate(self) -> float | None:
        """Learning rate of the text encoder; None: that of everything."""
        return self.learning_rate_te

    @property
    def trained_parts(self) -> tuple[str, ...]:
        """Names of the model's parts that train at any time of the run."""
        return ("unet", "text_encoder") if self.trains_text_encoder else ("unet",)


@dataclass(frozen=True, kw_only=True)
class DreamBoothOptions(FullTuneOptions, title="tune"):
    """What of the text encoder is trained: all of it, until it is stopped."""

    stop_text_encoder_training: int | None = opt(
        None, help="Updates after which the text encoder is trained no more; negative: it is not trained at all."
    )

    @property
    def trains_text_encoder(self) -> bool:
        """Whether the text encoder is trained at any time of the run."""
        stop = self.stop_text_encoder_training
        return stop is None or stop >= 0

    @property
    def text_encoder_stop(self) -> int | None:
        """Update after which a trained text encoder is trained no more; None: never."""
        return self.stop_text_encoder_training

    def warn(self) -> Iterator[Problem]:
        """Point out a learning rate for a text encoder that is not trained."""
        if not self.trains_text_encoder and self.learning_rate_te is not None:
            yield Problem(
                "--learning_rate_te", "has no effect: a negative --stop_text_encoder_training freezes the text encoder"
            )


@dataclass(frozen=True, kw_only=True)
class FineTuneOptions(FullTuneOptions, title="tune"):
    """What is trained besides the U-Net."""

    train_text_encoder: bool = opt(False, help="Train the text encoder too, not the U-Net alone.")
    diffusers_xformers: bool = opt(
        False, resume="free", means={"xformers": True}, help="Older spelling of --xformers for diffusers' models."
    )

    @property
    def trains_text_encoder(self) -> bool:
        """Whether the text encoder is trained."""
        return self.train_text_encoder

    def warn(self) -> Iterator[Problem]:
        """Point out a learning rate for a text encoder that is not trained."""
        if self.learning_rate_te is not None and not self.train_text_encoder:
            yield Problem("--learning_rate_te", "has no effect without --train_text_encoder")


@dataclass(frozen=True, kw_only=True)
class FullTrainingOptions(TrainingOptions):
    """What scripts that train whole models share."""

    tune: FullTuneOptions = field(default_factory=FullTuneOptions)


@dataclass(frozen=True, kw_only=True)
class FineTuningOptions(
    FullTrainingOptions,
    # A key of data set files everywhere; here the command line has it too.
    changes={"in_json": {"flag": "in_json"}},
    leave_out=(
        "reg_data_dir",
        "prior_loss_weight",
        "masked_loss",
        "conditioning_data_dir",
        "no_token_padding",
    ),
):
    """What scripts that fine-tune whole models on metadata share."""

    tune: FineTuneOptions = field(default_factory=FineTuneOptions)

    tracker_name: ClassVar[str] = "finetuning"

    def __post_init__(self) -> None:
        if self.tune.diffusers_xformers:
            object.__setattr__(self, "memory", replace(self.memory, xformers=True))

    def check_together(self) -> Iterator[Problem]:
        """Yield what is wrong between groups."""
        yield from super().check_together()
        if self.cache.cache_text_encoder_outputs and self.tune.train_text_encoder:
            yield Problem(
                "--cache_text_encoder_outputs",
                "cannot be combined with --train_text_encoder: its outputs change",
                "Drop one of them.",
            )
