"""LoRAs and other networks in generation: merged into the model, or attached to it with a strength for each picture."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.headers import read_header
from library.checkpoints.hypernetwork_file import read_hypernetwork
from library.errors import Problem, UserError, raise_problems
from library.inference.generation_words import NetworkWords, TokenChanges, Vocabulary, network_words, read_words
from library.models.network_files import KohyaFile, load_readable, merge_networks
from library.models.network_module import HYPERNETWORK, MODULES, argument_problems, calling, import_network_module

if TYPE_CHECKING:
    import torch
    from torch import nn

    from library.contracts import FamilySpec
    from library.inference.options import NetworkUseOptions
    from library.inference.prompts import PromptRequest
    from library.models.family import ModelFamily

logger = logging.getLogger(__name__)

_OPTION = "--network_weights"
_DEFAULT_MODULE = "networks.lora"
_METHODS = ("apply_to", "load_weights")


@dataclass(frozen=True, slots=True)
class NetworkSource:
    """One network of the command line.

    Attributes:
        module: name of its Python module.
        path: of its file.
        strength: without `--am`.
        arguments: of the module.
        merged: whether it becomes part of the model's weights.
    """

    module: str
    path: str
    strength: float
    arguments: dict[str, str]
    merged: bool

    @property
    def foreign(self) -> bool:
        """Whether the module's files may be of a layout that is not known here."""
        return self.module not in MODULES


def network_sources(options: NetworkUseOptions) -> list[NetworkSource]:
    """Return the networks that the options name, each with what belongs to it."""
    modules = options.network_module or (_DEFAULT_MODULE,)
    sources = []
    for index, path in enumerate(options.network_weights):
        written = options.network_args[index] if index < len(options.network_args) else ""
        pairs = (item.partition("=") for item in written.split(";") if item.strip())
        sources.append(
            NetworkSource(
                module=modules[min(index, len(modules) - 1)],
                path=path,
                strength=options.network_mul[index] if index < len(options.network_mul) else 1.0,
                arguments={name.strip(): value.strip() for name, _, value in pairs},
                merged=index < options.merged_count,
            )
        )
    return sources


def check_networks(sources: Sequence[NetworkSource], spec: FamilySpec, *, show_metadata: bool = False) -> None:
    """Look at modules, their arguments and headers of files before the model is loaded.

    Args:
        sources: the networks.
        spec: of the model that they shall change.
        show_metadata: write what the files say about themselves to the log.

    Raises:
        UserError: a module cannot be imported or refuses an argument, or a file is damaged or for another model.
    """
    problems: list[Problem] = []
    for source in sources:
        module = import_network_module(source.module)
        problems += argument_problems(source.module, module, (None, None), source.arguments, spec.name)
        metadata = _check_file(source, spec)
        if show_metadata:
            text = json.dumps(dict(metadata), indent=2, ensure_ascii=False, sort_keys=True)
            logger.info("metadata of %s: %s", source.path, text)
    raise_problems(problems)


def _check_file(source: NetworkSource, spec: FamilySpec) -> Mapping[str, str]:
    """Return what the file says about itself, if it is one for this module and model."""
    from library.checkpoints.lora_file import inspect_lora, require_base, require_layers

    if source.module == HYPERNETWORK:
        return read_hypernetwork(source.path).metadata
    if source.foreign:
        return read_header(source.path).metadata if source.path.lower().endswith(".safetensors") else {}
    try:
        info = inspect_lora(source.path)
    except UserError as error:
        if _is_hypernetwork(source.path):
            hint = f"Give --network_module {HYPERNETWORK}."
            raise UserError("is a hypernetwork", hint, where=f"{_OPTION} {source.path}") from error
        raise
    require_base(info, spec.name, _OPTION)
    require_layers(info, _OPTION)
    return info.metadata


def _is_hypernetwork(path: str) -> bool:
    try:
        read_hypernetwork(path)
    except UserError:
        return False
    return True


@dataclass(slots=True)
class _Attached:
    """A network on its layers, and the strength that it has now (None: not set yet)."""

    source: NetworkSource
    network: Any
    calculated: bool
    words: TokenChanges | None = None
    strength: float | None = None

    def set_strength(self, strength: float) -> None:
        """Change the strength; at 0 the network leaves its layers, where it can, so that nothing of it is left."""
        network = self.network
        if self.words is not None:
            self.words.strength = strength
        if self.calculated:
            network.set_multiplier(strength)
            network.set_enabled(False)
        elif strength != self.strength:
            if hasattr(network, "set_multiplier"):
                network.set_multiplier(strength)
            elif strength != 1:
                what = f"its network has no set_multiplier, so its strength is 1 and not {strength:g}"
                raise UserError(what, where=f"--network_module {self.source.module}")
            if hasattr(network, "set_enabled"):
                # A network of another kind that was attached to the same layers later keeps this one in its place.
                with suppress(RuntimeError):
                    network.set_enabled(strength != 0)
        self.strength = strength


class NetworkBank:
    """The attached networks of a model; pictures that want other strengths (`--am`) are made in other batches."""

    def __init__(self, attached: Sequence[_Attached]) -> None:
        self._attached = list(attached)
        self._current: tuple[float, ...] | None = None
        self._warned = False

    def __len__(self) -> int:
        return len(self._attached)

    @property
    def networks(self) -> list[Any]:
        """The network objects, in the order of the options."""
        return [item.network for item in self._attached]

    def strengths(self, request: PromptRequest) -> tuple[float, ...]:
        """Return the strength of each network for a picture; the last one of `--am` stands for those that follow."""
        wanted = request.multipliers
        if not wanted:
            return tuple(item.source.strength for item in self._attached)
        if len(wanted) > len(self._attached) and not self._warned:
            self._warned = True
            logger.warning(
                "%s: --am gives %d strengths for %d attached networks", request.where, len(wanted), len(self._attached)
            )
        return tuple(wanted[min(index, len(wanted) - 1)] for index in range(len(self._attached)))

    def set_strengths(self, wanted: tuple[float, ...]) -> None:
        """Give every network its strength, which it keeps until it is given another."""
        if wanted == self._current:
            return
        self._current = None  # should one of them refuse, the others have changed all the same
        calculated = [item for item in self._attached if item.calculated]
        for item in calculated:
            item.network.restore_weights()
        for item, strength in zip(self._attached, wanted, strict=True):
            item.set_strength(strength)
        for item in calculated:
            if item.strength:
                item.network.pre_calculation()
        self._current = wanted


@dataclass(frozen=True, slots=True)
class Additions:
    """What the options add to a model: networks, and words.

    Attributes:
        sources: the networks, in order.
        words: what the model is taught.
    """

    sources: tuple[NetworkSource, ...]
    words: Vocabulary

    def join(
        self, family: ModelFamily, dtype: torch.dtype, *, pre_calculate: bool = False
    ) -> tuple[NetworkBank, list[nn.Module]]:
        """Teach a model the words, merge what is to be merged and attach the rest.

        Args:
            family: it learns words; its weights change, or get networks attached.
            dtype: number format of attached networks.
            pre_calculate: add attached networks to the weights before each batch, where they can.

        Returns:
            The attached networks, and the modules that hold vectors of words.

        Raises:
            UserError: a file or module cannot be used with this model, or a word is known already.
        """
        rows, changes = self.words.teach(family)
        attached = []
        for source, changed in zip(self.sources, changes, strict=True):
            if source.merged:
                _merge(family, source)
                if changed is not None:
                    changed.strength = source.strength
            else:
                attached.append(_attach(family, source, dtype, pre_calculate=pre_calculate))
                attached[-1].words = changed
        return NetworkBank(attached), [*rows, *(changed for changed in changes if changed is not None)]


def read_additions(options: NetworkUseOptions, spec: FamilySpec, began: Sequence[str] = ()) -> Additions:
    """Look at networks and embeddings before the model is loaded.

    Args:
        options: which ones.
        spec: of the model that they shall change.
        began: what new words of the original trainer of Stable Cascade began with.

    Raises:
        UserError: a file is damaged or for another model, or a module cannot be used.
    """
    sources = network_sources(options)
    check_networks(sources, spec, show_metadata=options.network_show_meta)
    held = [_words_of(source) for source in sources]
    return Additions(tuple(sources), Vocabulary(read_words(options.textual_inversion_embeddings), held, began))


def _words_of(source: NetworkSource) -> NetworkWords:
    where = f"{_OPTION} {source.path}"
    return NetworkWords(where) if source.foreign or source.module == HYPERNETWORK else network_words(source.path, where)


def _merge(family: ModelFamily, source: NetworkSource) -> None:
    if not source.foreign:
        # Files of known layouts are added by the rules of their kinds: no network object is needed.
        merge_networks(family, [(source.path, source.strength)], _OPTION)
        return
    where = f"--network_module {source.module}"
    with _readable(family, source) as readable, calling(source.module, "merge_to"):
        network, weights = _create(family, source, readable)
        if not hasattr(network, "merge_to") or not getattr(network, "is_mergeable", lambda: True)():
            raise UserError("its network cannot be merged", "Leave out --network_merge.", where=where)
        network.merge_to(_text_encoder(family), family.denoiser, weights, None, None)


def _attach(family: ModelFamily, source: NetworkSource, dtype: torch.dtype, *, pre_calculate: bool) -> _Attached:
    where = f"--network_module {source.module}"
    with _readable(family, source) as readable:
        network, _ = _create(family, source, readable)
        missing = [method for method in _METHODS if not callable(getattr(network, method, None))]
        if missing:
            raise UserError(f"its network has no method {missing[0]}", where=where)
        with calling(source.module, "apply_to"):
            network.apply_to(_text_encoder(family), family.denoiser, True, True)  # noqa: FBT003 - the protocol
        with calling(source.module, "load_weights"):
            load_readable(network, readable, source.path)
    network.to(device=next(family.denoiser.parameters()).device, dtype=dtype)
    network.requires_grad_(False).eval()
    needed = ("backup_weights", "restore_weights", "pre_calculation", "set_enabled")
    calculated = pre_calculate and all(hasattr(network, name) for name in needed)
    if calculated:
        network.backup_weights()
        # Later it could not leave layers that a network of another kind was attached to after it.
        network.set_enabled(False)
    elif pre_calculate:
        logger.warning("--network_pre_calc has no effect on %s: %s cannot do that", source.path, source.module)
    return _Attached(source, network, calculated)


def _readable(family: ModelFamily, source: NetworkSource) -> KohyaFile:
    return KohyaFile(source.path, family.spec.name, _OPTION, foreign=source.foreign)


def _create(family: ModelFamily, source: NetworkSource, readable: Path) -> tuple[Any, Any]:
    module = importlib.import_module(source.module)  # which has been looked at before
    with calling(source.module, "create_network_from_weights"):
        network, weights = module.create_network_from_weights(
            source.strength,
            str(readable),
            getattr(family, "vae", None),
            _text_encoder(family),
            family.denoiser,
            for_inference=True,
            **source.arguments,
        )
    if network is None:
        raise UserError("created no network", "Its messages above may say why.", where=f"{_OPTION} {source.path}")
    return network, weights


def _text_encoder(family: ModelFamily) -> Any:
    """One text encoder as it is, several as a list: modules choose their names by that."""
    encoders = family.text_encoders
    return encoders[0] if len(encoders) == 1 else list(encoders)
