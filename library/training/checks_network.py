"""What can be refused or doubted about network training before any model is opened."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

from library.errors import Problem
from library.option_values import nearest
from library.training.checks_network_files import header_problems

if TYPE_CHECKING:
    from library.training.options_network import NetworkTrainingOptions

_MODULE = "--network_module"
UNET_ONLY_MODULES = ("networks.oft", "networks.hypernetwork")
"""Modules that leave the text encoder alone, whatever is asked for."""

_PACKAGES = {"lycoris": "lycoris_lora"}
"""Module -> the package on PyPI that brings it, where the names differ."""


def check_network(options: NetworkTrainingOptions) -> Iterator[Problem]:
    """Yield what stops the training of a network, judged by its options and the heads of the files they name."""
    if options.data.debug_dataset:
        return
    yield from _module(options.network.network_module)
    yield from header_problems(options)
    yield from _rates(options)
    yield from _start(options)
    if options.network.network_module in UNET_ONLY_MODULES and not options.network.trains_unet:
        what = f"{options.network.network_module} is for the U-Net alone, so nothing would be trained"
        yield Problem("--network_train_text_encoder_only", what, "Drop the option, or choose another module.")
    if options.cache.cache_text_encoder_outputs and _text_changes(options):
        what = "cannot be combined with a text encoder that is trained"
        yield Problem("--cache_text_encoder_outputs", what, "Add --network_train_unet_only.")


def _text_changes(options: NetworkTrainingOptions) -> bool:
    """Whether the network acts on the text encoder; one that begins at nothing and has no rate does not."""
    network = options.network
    covered = network.trains_text_encoder and network.network_module not in UNET_ONLY_MODULES
    rates = network.text_encoder_lr or (options.optimizer.learning_rate,)
    return covered and (any(rates) or network.network_weights is not None)


def warn_network(options: NetworkTrainingOptions) -> Iterator[Problem]:
    """Yield what is probably not meant."""
    network, start = options.network, options.start
    if "fused_backward_pass" in options.given:
        what = "has no effect: the gradients of a network take little memory, and are updated together"
        yield Problem("--fused_backward_pass", what)
    if network.fp8_base_unet and options.precision.fp8_base:
        yield Problem("--fp8_base_unet", "has no effect, since --fp8_base is given")
    if network.dim_from_weights and "network_alpha" in options.given:
        yield Problem("--network_alpha", "has no effect with --dim_from_weights: the file decides")
    if network.network_module in UNET_ONLY_MODULES and network.text_encoder_lr:
        yield Problem("--text_encoder_lr", f"has no effect: {network.network_module} is for the U-Net alone")
    if start.given and options.state.resume:
        name = "--initial_epoch" if start.initial_step is None else "--initial_step"
        yield Problem(name, "replaces the position that the state of --resume has recorded")


def _module(name: str | None) -> Iterator[Problem]:
    from library.models.network_module import MODULES, OFFERED

    listed = ", ".join(OFFERED)
    if name is None:
        yield Problem(_MODULE, "is required", f"Name one of {listed}, or a module of your own.")
        return
    package = name.partition(".")[0]
    ours = package == "networks"
    try:
        found = find_spec(name if ours else package) is not None
    except (ImportError, ValueError):
        found = False
    if found:
        return
    if not ours:
        hint = f"Run: pip install {_PACKAGES.get(package, package)}" if name in MODULES else f"There are {listed}."
        yield Problem(_MODULE, f"{name}: the module {package} is not installed", hint)
        return
    near = nearest(name, OFFERED, cutoff=0.6)
    yield Problem(_MODULE, f"there is no module {name}", f"Did you mean {near}?" if near else f"There are {listed}.")


def _rates(options: NetworkTrainingOptions) -> Iterator[Problem]:
    network, default = options.network, options.optimizer.learning_rate
    if len(network.text_encoder_lr) > options.text_encoders:
        what = f"{len(network.text_encoder_lr)} values, but the model has {_encoders(options.text_encoders)}"
        yield Problem("--text_encoder_lr", what, "Give one value for each.")
    rates = []
    if network.trains_unet:
        rates.append(default if network.unet_lr is None else network.unet_lr)
    if network.trains_text_encoder:
        rates += network.text_encoder_lr or [default]
    if rates and not any(rates):
        options_named = "--learning_rate, --unet_lr or --text_encoder_lr"
        yield Problem(
            "--learning_rate", "is 0 for all that the network covers, so nothing is trained", f"Raise {options_named}."
        )


def _encoders(count: int) -> str:
    return "one text encoder" if count == 1 else f"{count} text encoders"


def _start(options: NetworkTrainingOptions) -> Iterator[Problem]:
    """Refuse to begin after the end, where the length is known already; otherwise the data decide."""
    length, first = options.length, options.start.initial_step
    if first is not None and not length.max_train_epochs and first >= length.max_train_steps:
        what = f"{first} is not below --max_train_steps {length.max_train_steps}, the updates of the whole run"
        yield Problem("--initial_step", what, "Raise --max_train_steps.")
    epoch = options.start.initial_epoch
    if epoch is not None and first is None and length.max_train_epochs and epoch > length.max_train_epochs:
        what = f"{epoch} is above --max_train_epochs {length.max_train_epochs}, the epochs of the whole run"
        yield Problem("--initial_epoch", what, "Raise --max_train_epochs.")
