"""Show the weights of a LoRA file: every tensor with the mean, the smallest and the largest of its absolute values.

Exit status 2 if there is NaN or infinity in it, or if it is no LoRA.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli  # noqa: E402
from library.errors import UserError  # noqa: E402
from library.log import safe_text  # noqa: E402
from library.option_groups import OptionGroup, OptionSet, opt  # noqa: E402
from networks.tool_parts import show  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

    from library.checkpoints.lora_file import LoraInfo

_NOT_SHOWN = ("alpha", "dora_scale")


@dataclass(frozen=True, kw_only=True)
class CheckOptions(OptionGroup, title="checking"):
    """What to look at."""

    file: str = opt("", positional=True, path=True, help="LoRA file: .safetensors, .ckpt or .pt, of any layout.")
    show_all_keys: bool = opt(False, help="Show alphas and everything else too. -s does the same.")


@dataclass(frozen=True, kw_only=True)
class Options(OptionSet):
    """Everything that check_lora_weights.py accepts."""

    check: CheckOptions


class Statistics(NamedTuple):
    """Of the absolute values of a tensor that are numbers; `broken` counts those that are not (NaN, infinity)."""

    mean: float
    least: float
    most: float
    broken: int


def statistics_of(tensor: Tensor) -> Statistics:
    """Return the statistics of a tensor of any type; zeros for one without elements."""
    values = tensor.detach().float().abs()
    finite = values[values.isfinite()]
    broken = values.numel() - finite.numel()
    if not finite.numel():
        return Statistics(0.0, 0.0, 0.0, broken)
    return Statistics(float(finite.double().mean()), float(finite.min()), float(finite.max()), broken)


def check(options: CheckOptions) -> None:
    """Write the listing to standard output.

    Raises:
        UserError: the file is damaged or no LoRA, or holds NaN or infinity; the listing is complete then too.
    """
    from library.checkpoints.lora_file import inspect_lora
    from library.checkpoints.tensor_files import open_tensors

    info = inspect_lora(options.file)
    tensors = open_tensors(info.path)
    show(_heading(info))
    broken: list[str] = []
    show(_lines(tensors, broken, show_all=options.show_all_keys))
    if broken:
        shown = ", ".join(broken[:5]) + (", ..." if len(broken) > 5 else "")
        raise UserError(f"{len(broken)} tensors hold NaN or infinity ({shown})", where=str(info.path))


def _heading(info: LoraInfo) -> Iterator[str]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(info.kinds.items()))
    yield f"number of LoRA modules: {info.modules} ({kinds})"
    ranks = ", ".join(map(str, sorted(info.ranks)))
    yield f"layout: {info.layout}; base model: {info.base or 'not known'}; ranks: {ranks}"
    if info.unknown:
        yield f"keys that nobody understands: {', '.join(info.unknown)}"
    yield "key, shape, mean abs, min abs, max abs"


def _lines(tensors: Mapping[str, Tensor], broken: list[str], *, show_all: bool) -> Iterator[str]:
    """Yield a line per tensor; keys of those with values that are not numbers, always shown, are added to `broken`."""
    for key in tensors:
        found = statistics_of(tensors[key])
        if found.broken:
            broken.append(key)
        elif not show_all and key.endswith(_NOT_SHOWN):
            continue
        shape = "-".join(map(str, tensors[key].shape))
        mark = f"  <- {found.broken} values are NaN or infinity" if found.broken else ""
        yield f"{safe_text(key)}, {shape}, {found.mean:.6g}, {found.least:.6g}, {found.most:.6g}{mark}"


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    words = sys.argv[1:] if argv is None else argv
    cli.main(
        Options,
        lambda opts: check(opts.check),
        argv=["--show_all_keys" if word == "-s" else word for word in words],
    )


if __name__ == "__main__":
    main()
