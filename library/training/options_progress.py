"""Options of when a run is judged, and of where its counts begin: for scripts that offer them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.errors import Problem
from library.option_groups import OptionGroup, opt

SPLIT = {"validation_split": (), "dataset_config": ()}
"""What keeps images apart for validation."""

_START = {"initial_epoch": (), "initial_step": (), "resume": ()}


@dataclass(frozen=True, kw_only=True)
class ValidationOptions(OptionGroup, title="validation", resume="free"):
    """When the loss on images kept apart (--validation_split) is measured."""

    validate_every_n_steps: int | None = opt(
        None,
        zero_is_off="quiet",
        matters_when=SPLIT,
        metadata_key="ss_validate_every_n_steps",
        help="Measure the validation loss after every n-th update.",
    )
    validate_every_n_epochs: int | None = opt(
        None,
        zero_is_off="quiet",
        matters_when=SPLIT,
        metadata_key="ss_validate_every_n_epochs",
        help="Measure the validation loss after every n-th epoch. Default: after each.",
    )
    max_validation_steps: int | None = opt(
        None,
        zero_is_off="quiet",
        matters_when=SPLIT,
        metadata_key="ss_max_validation_steps",
        help="Use at most this many validation batches each time. Default: all.",
    )


@dataclass(frozen=True, kw_only=True)
class StartOptions(OptionGroup, title="start", resume="free"):
    """Where the count of epochs and updates begins, other than where a state says."""

    initial_epoch: int | None = opt(
        None, at_least=1, help="Count epochs from this one on (1 is the first), as if those before it were done."
    )
    initial_step: int | None = opt(None, at_least=0, help="Count updates from this one on; replaces --initial_epoch.")
    skip_until_initial_step: bool = opt(
        False, matters_when=_START, help="Leave out the data of the updates before the beginning, too."
    )

    @property
    def given(self) -> bool:
        """Whether the user says where to begin."""
        return self.initial_epoch is not None or self.initial_step is not None

    def warn(self) -> Iterator[Problem]:
        """Point out that updates win over epochs."""
        if self.initial_epoch is not None and self.initial_step is not None:
            yield Problem("--initial_epoch", "has no effect, since --initial_step is given")
