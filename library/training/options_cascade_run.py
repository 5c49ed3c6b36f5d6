"""Options of a run that only the Stable Cascade scripts have, most of them known from the original trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from library.data.options import DatasetOptions
from library.errors import Problem
from library.option_groups import opt
from library.training.fsdp_checks import asked_by, processes
from library.training.options import DistributedOptions, PrecisionOptions, ScheduleOptions
from library.training.options_output import LogOptions, SampleOptions, SaveOptions

_FINEST = 64
"""Largest denominator of the fraction that `--effnet_scale` stands for."""


@dataclass(frozen=True, kw_only=True)
class CascadeDatasetOptions(DatasetOptions, title="data"):
    """Where images come from and how they are put into batches."""

    global_batch_size: int | None = opt(
        None,
        at_least=1,
        help="Samples of one update, over all processes and accumulated batches; replaces --train_batch_size.",
    )


@dataclass(frozen=True, kw_only=True)
class StageCDatasetOptions(CascadeDatasetOptions, title="data"):
    """Where images of stage C come from, and how they are put into batches."""

    effnet_scale: float = opt(
        1.0,
        at_least=0.25,
        at_most=1,
        metadata_key="ss_effnet_scale",
        help="Sides of pictures as the EfficientNet encoder sees them, over the sizes in options and data set files. "
        "0.75: these are sizes to draw at, such as --resolution=1024, and sides of buckets are multiples of 128.",
    )

    @property
    def encoded_share(self) -> Fraction:
        """Sides of pictures as they are trained, over sides as options and data set files give them."""
        return Fraction(self.effnet_scale).limit_denominator(_FINEST)

    def check(self) -> Iterator[Problem]:
        """Refuse to scale what was not given."""
        yield from super().check()
        if self.effnet_scale != 1:
            if self.dataset_class is not None:
                yield Problem("--effnet_scale", "cannot be combined with --dataset_class, which chooses the sizes")
            elif not (self.resolution or self.dataset_config):
                yield Problem("--effnet_scale", "needs --resolution, which it scales", "Give the size to draw at.")


@dataclass(frozen=True, kw_only=True)
class CascadePrecisionOptions(PrecisionOptions, title="precision"):
    """Number formats of weights and arithmetic."""

    no_tf32: bool = opt(
        False, help="Do not let GPUs round float32 to TensorFloat-32 in products, which is faster and less exact."
    )

    @property
    def tf32(self) -> bool:
        """Whether products in float32 may be rounded to TensorFloat-32."""
        return not self.no_tf32


@dataclass(frozen=True, kw_only=True)
class CascadeScheduleOptions(ScheduleOptions, title="schedule"):
    """How the learning rate changes during the run."""

    @property
    def warmup_begins_at(self) -> int:
        """The first update has a rate above 0, and the last one of the warm-up the whole rate."""
        return 1


@dataclass(frozen=True, kw_only=True)
class CascadeSaveOptions(SaveOptions, title="save", resume="free"):
    """Where, when and how models are saved."""

    backup_every_n_steps: int | None = opt(
        None,
        zero_is_off="quiet",
        help="Save a model and a state after every n-th update that are never removed, whatever else is saved.",
    )

    @property
    def backup_every(self) -> int | None:
        """Updates between two models and states that stay."""
        return self.backup_every_n_steps


@dataclass(frozen=True, kw_only=True)
class CascadeSampleOptions(SampleOptions, title="sample", resume="free"):
    """Sample images that are drawn during training."""

    sample_dir: str | None = opt(
        None, path=True, help="Folder for sample images. Default: `sample` in --output_dir.", resume="free"
    )

    @property
    def folder(self) -> str | None:
        """Folder for sample images; None: inside that of the models."""
        return self.sample_dir


@dataclass(frozen=True, kw_only=True)
class CascadeLogOptions(LogOptions, title="log", resume="free"):
    """What is logged, and where."""

    wandb_entity: str | None = opt(
        None, matters_when={"log_with": ("wandb", "all")}, help="Team or user that the wandb project belongs to."
    )

    @property
    def entity(self) -> str | None:
        """Owner of the project in wandb; None: the user."""
        return self.wandb_entity

    def further_names(self, scalars: Mapping[str, float], step: int) -> Mapping[str, float]:
        """Return what the original trainer calls `lr` (of the stage, or of what trains in its place), and the step."""
        rates = [value for name, value in scalars.items() if name.startswith("lr/")]
        return {"total_steps": step, **({"lr": rates[0]} if rates else {})}


@dataclass(frozen=True, kw_only=True)
class CascadeDistributedOptions(DistributedOptions, title="distributed", resume="free"):
    """Several processes, and how they share a model."""

    fsdp: bool = opt(
        False,
        help="Share weights, gradients and optimizer states between GPUs by PyTorch's FSDP2. In one process there is "
        "nobody to share with.",
    )

    offers_fsdp: ClassVar[bool] = True

    @property
    def sharing(self) -> str:
        """Who asks for shared weights, the option or accelerate's launcher; empty: nobody, or there is one process."""
        return asked_by(self.fsdp) if processes() > 1 else ""

    def warn(self) -> Iterator[Problem]:
        """Say that one process has nobody to share with."""
        yield from super().warn()
        if asked_by(self.fsdp) and processes() == 1:
            yield Problem(asked_by(self.fsdp), "has no effect in one process")
