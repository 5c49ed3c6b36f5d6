"""Options of the tools that fill caches for the training of stage C."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from library.errors import Problem
from library.models.cascade.options import StageCModelOptions
from library.training.options_cache import CachingOptions
from library.training.options_cascade import StageCTuneOptions


@dataclass(frozen=True, kw_only=True)
class LatentModelOptions(StageCModelOptions, title="model"):
    """Which files encode pictures."""

    def missing(self) -> Iterator[Problem]:
        """Yield what pictures cannot be encoded without."""
        if not self.effnet_checkpoint_path:
            yield Problem("--effnet_checkpoint_path", "is required", "Give effnet_encoder.safetensors.")


@dataclass(frozen=True, kw_only=True)
class TextModelOptions(StageCModelOptions, title="model"):
    """Which files encode captions."""

    def missing(self) -> Iterator[Problem]:
        """Yield nothing: the text encoder can be downloaded."""
        return iter(())


@dataclass(frozen=True, kw_only=True)
class CascadeCachingOptions(StageCTuneOptions, CachingOptions, leave_out=("sdxl", "flux")):
    """What both tools share. Command lines of training are understood; what does nothing here is named."""

    def check_together(self) -> Iterator[Problem]:
        """Yield what keeps the tool from opening model and data."""
        return CachingOptions.check_together(self)

    def warn_together(self) -> Iterator[Problem]:
        """Name, all together, the options that do nothing here."""
        return CachingOptions.warn_together(self)


@dataclass(frozen=True, kw_only=True)
class LatentCachingOptions(CascadeCachingOptions):
    """What the tool for latents accepts."""

    model: LatentModelOptions = field(default_factory=LatentModelOptions)


@dataclass(frozen=True, kw_only=True)
class TextCachingOptions(CascadeCachingOptions):
    """What the tool for text encoder outputs accepts."""

    model: TextModelOptions = field(default_factory=TextModelOptions)
