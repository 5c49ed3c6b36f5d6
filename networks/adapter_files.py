"""Values of a network file on their way into adapters: what fits, what is left over, and whose alpha counts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import Problem, UserError, raise_problems

if TYPE_CHECKING:
    from torch import Tensor

    from networks.adapter_base import Adapter

logger = logging.getLogger(__name__)

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class NetworkWeights:
    """A network file by modules: name -> suffix -> tensor.

    Attributes:
        where: the file, for messages.
        modules: by name in files (`lora_unet_...`, `oft_unet_...`).
        base: model family that it is for, or None.
    """

    where: str
    modules: Mapping[str, Mapping[str, Tensor]]
    base: str | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors under their full names."""
        return {
            f"{name}.{suffix}": tensor for name, tensors in self.modules.items() for suffix, tensor in tensors.items()
        }


def read_weights(
    file: str | Path | None, tensors: Mapping[str, Tensor] | None, base: str | None, *, option: str = ""
) -> NetworkWeights:
    """Return the modules of a file, or of tensors that were read before.

    Args:
        file: of any layout; with `tensors` only its name matters.
        tensors: by their names in kohya files; None: read the file.
        base: family of the model; a file for another one is refused. None: not known.
        option: that named the file, for messages.

    Raises:
        UserError: the file is damaged, no network file, or for another base model.
    """
    family = None
    if tensors is None:
        from library.checkpoints.lora_file import read_lora, require_base

        if file is None:
            raise ValueError("a file or its tensors are needed")
        read = read_lora(file, base=base) if base == "sdxl" else read_lora(file)
        if base is not None:
            require_base(read, base, option)
        if read.unknown:
            logger.warning("%s: %d tensors are not understood: %s", file, len(read.unknown), shorten(read.unknown))
        tensors, family = read.tensors(), read.base
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, suffix = key.partition(".")
        modules.setdefault(name, {})[suffix] = tensor
    return NetworkWeights(str(file or "the network"), modules, family)


def load_into(adapters: Mapping[str, Adapter], weights: NetworkWeights) -> str:
    """Give adapters their values; return a sentence about how many there were.

    The alpha of the file counts, with a warning where the adapter was created with another one.

    Raises:
        UserError: no module of the file belongs to an adapter, or a module does not fit its adapter.
    """
    matched = match_modules(weights, adapters, "this network")
    problems = []
    for name, tensors in matched.items():
        what = shape_problem(adapters[name].file_tensors(), tensors)
        if what:
            problems.append(
                Problem(weights.where, f"{name}: {what}", "Give the --network_dim of the file, or --dim_from_weights.")
            )
    if len(problems) > 1:
        first = problems[0]
        problems = [Problem(first.where, f"{first.what} (and {len(problems) - 1} more that do not fit)", first.hint)]
    raise_problems(problems)
    changed = []
    for name, tensors in matched.items():
        before = adapters[name].scale
        adapters[name].load_file_tensors(tensors)
        if adapters[name].scale != before:
            changed.append((before, adapters[name].scale))
    if changed:
        before, now = changed[0]
        logger.warning(
            "%s: its alpha is not the one given; %d layers go on with the file's (alpha / rank is %g, not %g)",
            weights.where,
            len(changed),
            now,
            before,
        )
    missing = len(adapters) - len(matched)
    return f"weights for {len(matched)} of {len(adapters)} layers" + (
        f"; {missing} keep their initial values" if missing else ""
    )


def match_modules(weights: NetworkWeights, names: Mapping[str, object], what: str) -> dict[str, Mapping[str, Tensor]]:
    """Return the modules of a file that are among `names`; log the others.

    Raises:
        UserError: there is none.
    """
    matched = {name: tensors for name, tensors in weights.modules.items() if name in names}
    left = [name for name in weights.modules if name not in names]
    if not matched:
        raise UserError(
            f"none of its {len(left)} modules is a layer of {what} (the first is {left[0] if left else 'missing'})",
            "It was made for another model or another kind of network.",
            where=weights.where,
        )
    if left:
        logger.warning("%s: %d modules have no layer in %s: %s", weights.where, len(left), what, shorten(left))
    return matched


def shape_problem(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str | None:
    """Return why tensors of a file do not fit those of an adapter, or None."""
    for suffix, tensor in given.items():
        if suffix not in own:
            return f"{suffix} belongs to another kind of network (here: {', '.join(own)})"
        if tuple(own[suffix].shape) != tuple(tensor.shape):
            return f"{suffix} is {list(tensor.shape)} in the file, but {list(own[suffix].shape)} here"
    missing = [suffix for suffix in own if suffix not in given and suffix != "alpha"]
    return f"{missing[0]} is missing" if missing else None


def shorten(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
