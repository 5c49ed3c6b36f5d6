"""Options of a run that only the Stable Cascade scripts have, most of them known from the original trainer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from library.data.options import DatasetOptions
from library.errors import Problem
from library.option_groups import opt
from library.training.options import DistributedOptions, PrecisionOptions
from library.training.options_output import LogOptions, SampleOptions, SaveOptions


@dataclass(frozen=True, kw_only=True)
class CascadeDatasetOptions(DatasetOptions, title="data"):
    """Where images come from and how they are put into batches."""

    global_batch_size: int | None = opt(
        None,
        at_least=1,
        help="Samples of one update, over all processes and accumulated batches; replaces --train_batch_size.",
    )


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


@dataclass(frozen=True, kw_only=True)
class CascadeDistributedOptions(DistributedOptions, title="distributed", resume="free"):
    """Several processes, and how they share a model."""

    fsdp: bool = opt(
        False, help="Share weights between GPUs. Means nothing in one process; in several, --deepspeed does it."
    )

    def check(self) -> Iterator[Problem]:
        """Refuse what several processes cannot do."""
        yield from super().check()
        if self.fsdp and int(os.environ.get("WORLD_SIZE", "1")) > 1 and not self.deepspeed:
            what = "weights are shared between processes by DeepSpeed here"
            yield Problem("--fsdp", what, "Give --deepspeed --zero_stage=3, or leave --fsdp (use_fsdp) out.")

    def warn(self) -> Iterator[Problem]:
        """Say that one process has nobody to share with."""
        yield from super().warn()
        if self.fsdp and int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield Problem("--fsdp", "has no effect in one process")
