"""What is written when a model is saved during training: the weights for use, and how they came about."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.checkpoints.metadata import modelspec_metadata
from library.checkpoints.save import is_folder_kind, save_kind
from library.option_groups import metadata_values

if TYPE_CHECKING:
    from library.models.family import ModelFamily
    from library.training.options import TrainingOptions

_PRECISIONS = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class ModelWriter:
    """Writes full checkpoints of a family.

    Attributes:
        family: the model.
        opts: format, precision and description.
        facts: what is known of data, optimizer and run, as metadata strings.
        resolution_wh: largest training resolution.
        observing: context in which the weights are those to be used.
        is_main: whether this process writes.
    """

    family: ModelFamily
    opts: TrainingOptions
    facts: dict[str, str]
    resolution_wh: tuple[int, int]
    observing: Callable[[], AbstractContextManager[None]]
    is_main: bool

    @property
    def kind(self) -> str:
        """Format of the saved models."""
        save = self.opts.save
        return save_kind(save.save_model_as, save.use_safetensors, self.family.source_kind)

    @property
    def suffix(self) -> str:
        """Suffix of the saved files; empty for folders."""
        return "" if is_folder_kind(self.kind) else f".{self.kind}"

    def __call__(self, target: Path, *, epoch: int, step: int) -> Path | None:
        """Write the model to `target` plus suffix; only the main process does."""
        if not self.is_main:
            return None
        save = self.opts.save
        precision = _PRECISIONS[save.save_precision] if save.save_precision else None
        with self.observing():
            return self.family.save(
                target,
                self.kind,
                precision,
                self._metadata(epoch, step),
                epoch=epoch,
                step=step,
                zero_terminal_snr=self.opts.noise.zero_terminal_snr,
            )

    def estimated_bytes(self) -> int:
        """Return about how large a saved model is."""
        size = {"fp16": 2, "bf16": 2}.get(self.opts.save.save_precision or "float", 4)
        return size * self.family.parameter_count()

    def _metadata(self, epoch: int, step: int) -> dict[str, str]:
        opts = self.opts
        described = modelspec_metadata(
            self.family.spec,
            opts.metadata,
            output_name=opts.save.output_name,
            resolution_wh=self.resolution_wh,
            clip_skip=opts.text.clip_skip,
            timesteps=(opts.noise.min_timestep, opts.noise.max_timestep),
        )
        progress = {"ss_epoch": str(epoch), "ss_steps": str(step)}
        return {**metadata_values(opts), **self.facts, **progress, **described}
