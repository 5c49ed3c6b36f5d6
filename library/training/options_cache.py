"""Options of the tools that fill caches before training: all that training scripts have, so their command lines fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from library.errors import Problem
from library.option_groups import COMMAND_LINE, OptionGroup, opt
from library.training.options import TrainingOptions
from library.training.options_full import DreamBoothOptions
from library.training.options_network import NetworkOptions
from library.training.options_progress import StartOptions, ValidationOptions

_SHOWN = 12
_LATER = "models are not supported yet"


@dataclass(frozen=True, kw_only=True)
class CacheToolOptions(OptionGroup, title="tool"):
    """What only the tools that fill caches have."""

    sdxl: bool = opt(False, help="The model is an SDXL model. Refused: such models are not supported yet.")
    flux: bool = opt(False, help="The model is a FLUX model. Refused: such models are not supported yet.")
    skip_existing: bool = opt(
        False, help="Use files that are there already. This is always done where they fit; old command lines have it."
    )

    def check(self) -> Iterator[Problem]:
        """Refuse models that no script here can load."""
        for name, family in (("sdxl", "SDXL"), ("flux", "FLUX")):
            if getattr(self, name):
                yield Problem(f"--{name}", f"{family} {_LATER}", "Give a Stable Diffusion 1.x or 2.x model.")


CHANGES: dict[str, dict[str, Any]] = {
    # Keys of data set files everywhere; here, as in the scripts that train networks, the command line has them too.
    **{name: {"flag": name} for name in ("in_json", "validation_split", "validation_seed")},
    "save_model_as": {"choices": ("ckpt", "pt", "safetensors", "diffusers", "diffusers_safetensors")},
    # Pictures that must be encoded are decoded anyway, and one that cannot be is left out.
    "check_images": {"default": "none"},
    "skip_bad_files": {"help": "Leave out files that cannot be used, and list them. Always done here, for any number."},
}


@dataclass(frozen=True, kw_only=True)
class CachingOptions(TrainingOptions, changes=CHANGES):
    """What the tools share. Command lines of the training scripts are understood; what does nothing here is named."""

    tool: CacheToolOptions = field(default_factory=CacheToolOptions)
    tune: DreamBoothOptions = field(default_factory=DreamBoothOptions)
    network: NetworkOptions = field(default_factory=NetworkOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    start: StartOptions = field(default_factory=StartOptions)

    used_groups: ClassVar[frozenset[str]] = frozenset({"model", "data", "subset", "cache", "config", "tool"})
    """Groups whose options count."""
    used: ClassVar[frozenset[str]] = frozenset(
        ("mixed_precision", "seed", "ddp_timeout", "output_dir", "highvram")
        + ("console_log_level", "console_log_file", "console_log_simple")
    )
    """Single options that count besides."""
    ignored: ClassVar[frozenset[str]] = frozenset()
    """Options of those groups that do not count."""

    def check_together(self) -> Iterator[Problem]:
        """Yield what keeps the tool from opening model and data."""
        from library.training.checks import check_sources

        yield from check_sources(self)
        if self.data.dataset_class:
            yield Problem("--dataset_class", "pictures of your own class are never cached", "Drop it.")

    def warn_together(self) -> Iterator[Problem]:
        """Name, all together, the options that do nothing here."""
        # A file may be shared with the training.
        unused = [f"--{name}" for name in self.without_effect() if self.given[name] == COMMAND_LINE]
        if unused:
            more = f" and {len(unused) - _SHOWN} more" if len(unused) > _SHOWN else ""
            yield Problem("", f"nothing is trained here, so these have no effect: {', '.join(unused[:_SHOWN])}{more}")

    def without_effect(self) -> list[str]:
        """Return the names of options that were given and do nothing here."""
        titles = {option.name: option.title for option in type(self).options().values()}
        groups, used, ignored = type(self).used_groups, type(self).used, type(self).ignored
        return [name for name in self.given if name in ignored or (titles[name] not in groups and name not in used)]

    def check_folders(self) -> Iterator[Problem]:
        """Yield why the report of the data cannot be written; nothing else goes into a folder of outputs."""
        return super().check_folders() if self.data.debug_dataset else iter(())
