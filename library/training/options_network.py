"""Options of network training (LoRA and its relatives): the network, its warm start, validation, and where to begin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from library.errors import Problem
from library.models.network_module import MODULES, OFFERED
from library.option_groups import OptionGroup, opt
from library.option_values import BadValue
from library.training.options import OptimizerOptions, TrainingOptions
from library.training.options_progress import SPLIT, StartOptions, ValidationOptions

_HALF = {"mixed_precision": ("fp16", "bf16")}
_ENGINE = {"deepspeed": "its engine cannot hold weights of 8 bits"}


def module_name(value: Any) -> str:
    """Read `--network_module`: a dotted name, as in an import statement.

    Raises:
        BadValue: If it is something else, such as a path.
    """
    name = str(value)
    if all(part.isidentifier() for part in name.split(".")):
        return name
    dotted = name.removesuffix(".py").replace("\\", "/").strip("./").replace("/", ".")
    hint = f" (did you mean {dotted}?)" if all(part.isidentifier() for part in dotted.split(".")) else ""
    raise BadValue(f"{name!r} is not a dotted name such as networks.lora{hint}")


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(OptionGroup, title="network"):
    """The network that is trained, and what it starts from."""

    network_module: str | None = opt(
        None,
        convert=module_name,
        metadata_key="ss_network_module",
        help=f"Python module that makes the network: {', '.join(OFFERED)}, or one of your own.",
    )
    network_dim: int | None = opt(
        None,
        at_least=1,
        metadata_key="ss_network_dim",
        help="Rank (size) of the network. Default: the module's own, 4 for networks.lora.",
    )
    network_alpha: float = opt(
        1,
        at_least=0,
        metadata_key="ss_network_alpha",
        help="The network acts with strength alpha divided by rank; 0 stands for the rank.",
    )
    network_dropout: float | None = opt(
        None,
        at_least=0,
        at_most=1,
        metadata_key="ss_network_dropout",
        help="Probability that a value inside the network is left out while training.",
    )
    network_args: tuple[str, ...] = opt(
        (), help="Further arguments of the module, such as conv_dim=4 conv_alpha=1 loraplus_lr_ratio=16."
    )
    network_weights: str | None = opt(
        None, path=True, resume="free", help="Network file whose weights training starts from."
    )
    dim_from_weights: bool = opt(
        False, needs={"network_weights": ()}, help="Take rank and alpha of every layer from --network_weights."
    )
    network_train_unet_only: bool = opt(
        False,
        excludes={"network_train_text_encoder_only": "nothing would be trained"},
        help="Train the network on the U-Net only.",
    )
    network_train_text_encoder_only: bool = opt(False, help="Train the network on the text encoder only.")
    unet_lr: float | None = opt(
        None,
        at_least=0,
        metadata_key="ss_unet_lr",
        help="Learning rate of the network on the U-Net. Default: --learning_rate.",
    )
    text_encoder_lr: tuple[float, ...] = opt(
        (), at_least=0, help="Learning rate of the network on the text encoder. Default: --learning_rate."
    )
    scale_weight_norms: float | None = opt(
        None,
        at_least=0,
        metadata_key="ss_scale_weight_norms",
        help="Shrink a layer's weights after an update when their norm exceeds this (1 is usual). 0: never.",
    )
    base_weights: tuple[str, ...] = opt(
        (), path=True, resume="free", help="Network files that are merged into the model before training."
    )
    base_weights_multiplier: tuple[float, ...] = opt(
        (), matters_when={"base_weights": ()}, help="Strength of each of --base_weights. Default: 1."
    )
    no_metadata: bool = opt(
        False, resume="free", help="Write no more about the training into saved networks than loading them needs."
    )
    training_comment: str | None = opt(
        None, resume="free", metadata_key="ss_training_comment", help="Comment stored in saved networks."
    )
    fp8_base_unet: bool = opt(
        False,
        needs=_HALF,
        excludes=_ENGINE,
        metadata_key="ss_fp8_base_unet",
        help="Keep the frozen weights of the U-Net alone in 8 bits.",
    )
    cpu_offload_checkpointing: bool = opt(
        False,
        resume="free",
        needs={"gradient_checkpointing": ()},
        help="Keep what --gradient_checkpointing stores in main memory: less GPU memory, slower.",
    )

    @property
    def is_known_module(self) -> bool:
        """Whether the files of the network module are of a layout that is known here."""
        return self.network_module in MODULES

    @property
    def trains_unet(self) -> bool:
        """Whether the network covers the U-Net."""
        return not self.network_train_text_encoder_only

    @property
    def trains_text_encoder(self) -> bool:
        """Whether the network covers the text encoder."""
        return not self.network_train_unet_only

    @property
    def text_rate(self) -> float | None:
        """`--text_encoder_lr` for a model with one text encoder, or None for `--learning_rate`."""
        return self.text_encoder_lr[0] if self.text_encoder_lr else None

    @property
    def arguments(self) -> dict[str, str]:
        """What `--network_args` hands to the module: text by name, split at the first `=`.

        `dropout` is `--network_dropout` unless given: modules differ in which of the two they read.
        """
        found = {name: value for name, _, value in (item.partition("=") for item in self.network_args)}
        if self.network_dropout is not None:
            found.setdefault("dropout", str(self.network_dropout))
        return found

    @property
    def base_networks(self) -> tuple[tuple[str, float], ...]:
        """`--base_weights` with the strength of each."""
        strengths = (*self.base_weights_multiplier, *[1.0] * len(self.base_weights))
        return tuple(zip(self.base_weights, strengths, strict=False))

    def check(self) -> Iterator[Problem]:
        """Refuse arguments that no module could read."""
        seen: set[str] = set()
        for item in self.network_args:
            name, separator, _ = item.partition("=")
            if not separator or not name:
                hint = "Write name=value without spaces, such as conv_dim=4."
                yield Problem("--network_args", f"{item!r} has no {'=' if not separator else 'name'}", hint)
            elif name in seen:
                yield Problem("--network_args", f"{name!r} is given twice", "Keep one of them.")
            seen.add(name)
        extra = len(self.base_weights_multiplier) - len(self.base_weights)
        if self.base_weights and extra > 0:
            what = f"{len(self.base_weights_multiplier)} values for {len(self.base_weights)} of --base_weights"
            yield Problem("--base_weights_multiplier", what, "Give at most one for each file.")

    def warn(self) -> Iterator[Problem]:
        """Point out what another option makes useless."""
        if self.network_train_unet_only and self.text_encoder_lr:
            yield Problem("--text_encoder_lr", "has no effect with --network_train_unet_only")
        if self.network_train_text_encoder_only and self.unet_lr is not None:
            yield Problem("--unet_lr", "has no effect with --network_train_text_encoder_only")
        if self.dim_from_weights and self.network_dim is not None:
            yield Problem("--network_dim", "has no effect with --dim_from_weights: the file decides")


FROZEN_FLOAT8: dict[str, Any] = {
    "needs": _HALF,
    "excludes": _ENGINE,
    "help": "Keep the frozen weights of U-Net and text encoder in 8 bits.",
}
"""What `--fp8_base` is in scripts that leave the model as it is."""

_CHANGES: dict[str, dict[str, Any]] = {
    # Keys of data set files everywhere; here the command line has them too.
    "in_json": {"flag": "in_json"},
    "validation_split": {"flag": "validation_split"},
    "validation_seed": {"flag": "validation_seed", "matters_when": SPLIT},
    "save_model_as": {
        "default": "safetensors",
        "choices": ("ckpt", "pt", "safetensors"),
        "help": "Format of saved networks.",
    },
    "fp8_base": FROZEN_FLOAT8,
}


@dataclass(frozen=True, kw_only=True)
class NetworkTrainingOptions(TrainingOptions, changes=_CHANGES, leave_out=("no_token_padding",)):
    """What scripts that train networks share."""

    network: NetworkOptions = field(default_factory=NetworkOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    start: StartOptions = field(default_factory=StartOptions)

    tracker_name: ClassVar[str] = "network_train"
    text_encoders: ClassVar[int] = 1
    """Text encoders of the models that the script trains."""

    def __post_init__(self) -> None:
        if self.optimizer.fused_backward_pass:
            object.__setattr__(self, "optimizer", unfused(self.optimizer))

    @property
    def family_name(self) -> str:
        """Name of the model family that networks of this run are for."""
        return "sd2" if self.model.v2 else "sd1"

    @property
    def drops_out(self) -> bool:
        """Whether the model's own dropout works while the network trains."""
        return False

    def validation_options(self) -> ValidationOptions:
        """Return when the validation loss is measured."""
        return self.validation

    def start_options(self) -> StartOptions:
        """Return where the user wants the run to begin."""
        return self.start

    def base_files(self) -> dict[str, str]:
        """Return the files that the frozen weights come from, by name."""
        merged = {f"base weights {number}": name for number, name in enumerate(self.network.base_weights, start=1)}
        return super().base_files() | merged

    def check_together(self) -> Iterator[Problem]:
        """Yield what is wrong between groups."""
        from library.training.checks_network import check_network

        yield from super().check_together()
        yield from check_network(self)

    def warn_together(self) -> Iterator[Problem]:
        """Yield what is suspicious between groups."""
        from library.training.checks_network import warn_network

        yield from super().warn_together()
        yield from warn_network(self)


def unfused(optimizer: OptimizerOptions) -> OptimizerOptions:
    """Return the options without `--fused_backward_pass`, for methods whose gradients take next to no memory."""
    return replace(optimizer, fused_backward_pass=False)
