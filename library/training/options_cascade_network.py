"""Options of network training (LoRA and its relatives) for stage C of Stable Cascade, and of tokens trained along."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

from library.config_file import ConfigValue, ForeignConfig
from library.errors import Problem
from library.models.cascade.options import TrainedStageCModelOptions
from library.training.options_cascade import FROZEN_DROPOUT, StageCOptions
from library.training.options_network import FROZEN_FLOAT8, NetworkTrainingOptions
from library.training.options_tokens import TokenOptions


@dataclass(frozen=True, kw_only=True)
class StageCNetworkOptions(
    StageCOptions,
    NetworkTrainingOptions,
    changes={
        "save_model_as": {
            "default": "safetensors",
            "choices": ("ckpt", "pt", "safetensors"),
            "help": "Format of saved networks.",
        },
        "stage_c_dropout": FROZEN_DROPOUT,
        "fp8_base": FROZEN_FLOAT8,
    },
):
    """Everything that the script that trains networks on stage C accepts."""

    model: TrainedStageCModelOptions = field(default_factory=TrainedStageCModelOptions)
    tokens: TokenOptions = field(default_factory=TokenOptions)

    tracker_name: ClassVar[str] = "network_train"

    def __post_init__(self) -> None:
        StageCOptions.__post_init__(self)
        NetworkTrainingOptions.__post_init__(self)

    @classmethod
    def foreign_config(cls, name: str, typed: Collection[str]) -> ForeignConfig | None:
        """Read a YAML file of the original trainer, whose only network is LoRA, on stage C alone."""
        found = super().foreign_config(name, typed)
        if found is None:
            return None
        usual = {"network_module": ConfigValue("networks.lora", name)}
        if "network_train_text_encoder_only" not in typed:
            usual["network_train_unet_only"] = ConfigValue(True, name)
        return replace(found, values={**usual, **found.values})

    @property
    def family_name(self) -> str:
        """Name of the model family that networks of this run are for."""
        return "stable_cascade"

    @property
    def drops_out(self) -> bool:
        """Whether stage C's own dropout works while the network trains."""
        return bool(self.model.stage_c_dropout)

    def check_together(self) -> Iterator[Problem]:
        """Yield what is wrong between groups."""
        yield from super().check_together()
        if self.distributed.sharing:
            what = "shares a stage that trains as a whole, and each process needs the one that a network is attached to"
            yield Problem(self.distributed.sharing, what, "Leave it (use_fsdp) out.")
        if self.tokens.train_tokens and self.cache.cache_text_encoder_outputs:
            what = "cannot be combined with --train_tokens: the outputs change"
            yield Problem("--cache_text_encoder_outputs", what, "Drop one of them.")

    def warn_together(self) -> Iterator[Problem]:
        """Yield what is suspicious between groups."""
        yield from super().warn_together()
        if self.tokens.train_tokens and not self.network.network_train_unet_only:
            what = "trains the text encoder's layers beside single tokens"
            hint = "Add --network_train_unet_only to leave what it knows alone."
            yield Problem("--network_module", what, hint)
