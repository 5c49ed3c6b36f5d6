"""Network files that a run starts from: what their headers say against it, and then their values. No model is needed.

Latents and captions are cached between loading the model and attaching the network, which can take hours: what does
not fit must be known before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import Problem, UserError
from library.training.checks import must_exist

if TYPE_CHECKING:
    from library.checkpoints.lora_file import LoraInfo
    from library.training.options_network import NetworkOptions, NetworkTrainingOptions

_KINDS = {
    "networks.lora": "lora",
    "networks.lora_fa": "lora",
    "networks.dylora": "lora",
    "networks.oft": "oft",
    "networks.loha": "loha",
    "networks.lokr": "lokr",
}
"""Network module -> the kind of its modules in files; LyCORIS has many."""

_DEFAULT_RANK = 4
_RANKS = ("conv_dim", "block_dims", "conv_block_dims")
"""Arguments that give ranks other than `--network_dim`."""


def named_files(network: NetworkOptions) -> list[tuple[str, str]]:
    """Return (option, file) of all network files whose layout is known here: a foreign module may have its own."""
    files = [("--base_weights", name) for name in network.base_weights]
    if network.network_weights and network.is_known_module:
        files.insert(0, ("--network_weights", network.network_weights))
    return files


def header_problems(options: NetworkTrainingOptions) -> Iterator[Problem]:
    """Yield which files are missing, are no networks, or are for another model or another network than the run's."""
    network = options.network
    if network.network_weights and not network.is_known_module:
        yield from must_exist("--network_weights", network.network_weights)
    for option, name in named_files(network):
        missing = list(must_exist(option, name, folder=Path(name).is_dir()))
        yield from missing or _unfit(options, option, name)


def value_problems(options: NetworkTrainingOptions) -> Iterator[Problem]:
    """Yield which files hold values that nothing can be begun with: NaN, or an alpha of 0."""
    from library.checkpoints.lora_file import read_lora

    for option, name in named_files(options.network):
        try:
            read_lora(name, base=options.family_name)
        except UserError as error:
            yield from _named(option, error)


def _unfit(options: NetworkTrainingOptions, option: str, name: str) -> Iterator[Problem]:
    from library.checkpoints.lora_file import inspect_lora, require_base, require_layers

    try:
        info = inspect_lora(name)
        require_base(info, options.family_name, option)
        require_layers(info, option)
    except UserError as error:
        yield from _named(option, error)
        return
    if option == "--network_weights":
        yield from _of_another_network(options.network, info)


def _named(option: str, error: UserError) -> Iterator[Problem]:
    for found in error.problems:
        where = found.where if found.where.startswith(option) else f"{option} {found.where}".strip()
        yield replace(found, where=where)


def _of_another_network(network: NetworkOptions, info: LoraInfo) -> Iterator[Problem]:
    """Yield why no module of the file can be continued with this network."""
    where = f"--network_weights {info.path}"
    kind = _KINDS.get(network.network_module or "")
    if kind is None:
        return
    if kind not in info.kinds:
        what = f"holds {', '.join(info.kinds)} modules, but {network.network_module} makes {kind} modules"
        yield Problem(where, what, "Choose the --network_module that made the file.")
        return
    ranks, given = info.ranks - {0}, _ranks(network)
    if kind in ("lora", "loha") and given and ranks and not ranks & given:
        has, gets = (_listed(found) for found in (ranks, given))
        hint = f"Give --network_dim={max(ranks)}, or --dim_from_weights."
        yield Problem(where, f"has modules of rank {has}, but the network gets rank {gets}", hint)


def _ranks(network: NetworkOptions) -> set[int]:
    """Return all ranks that modules of the network may get; nothing when that is not easily told."""
    arguments = network.arguments
    if network.dim_from_weights or "network_reg_dims" in arguments:
        return set()
    found = {network.network_dim or _DEFAULT_RANK}
    for name in _RANKS:
        found |= {int(word) for word in arguments.get(name, "").split(",") if word.strip().isdecimal()}
    return found


def _listed(ranks: set[int] | frozenset[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))
