"""Cut a DyLoRA into LoRA files of smaller ranks: a DyLoRA is trained so that its first ranks work by themselves.

For rank 16 and unit 4 it writes NAME-0004, NAME-0008 and NAME-0012; the whole file is the LoRA of rank 16.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli  # noqa: E402
from library.errors import Problem, UserError  # noqa: E402
from library.option_groups import OptionGroup, OptionSet, opt  # noqa: E402
from networks.tool_parts import check_target, missing_options  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

    from library.checkpoints.lora_file import AdapterWeights, LoraFile

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DyLoraOptions(OptionGroup, title="DyLoRA"):
    """One DyLoRA file in, several LoRA files out."""

    model: str | None = opt(None, path=True, help="DyLoRA file to cut: .safetensors, .ckpt or .pt.")
    save_to: str | None = opt(
        None, path=True, help="Name of the new files, such as out.safetensors for out-0004.safetensors and so on."
    )
    unit: int | None = opt(
        None, at_least=1, help="Distance of the ranks, as the DyLoRA was trained. Default: what its metadata say."
    )

    def check(self) -> Iterator[Problem]:
        """Names are needed."""
        yield from missing_options(model=self.model, save_to=self.save_to)
        yield from check_target(self.save_to)


@dataclass(frozen=True, kw_only=True)
class Options(OptionSet):
    """Everything that extract_lora_from_dylora.py accepts."""

    dylora: DyLoraOptions


def first_ranks(weights: AdapterWeights, rank: int) -> AdapterWeights:
    """Return a module with its first ranks alone, and the alpha it had; other kinds and smaller modules stay."""
    if weights.kind != "lora" or weights.rank <= rank:
        return weights
    cut: dict[str, Tensor] = dict(weights.tensors)
    cut["lora_down.weight"] = cut["lora_down.weight"][:rank].contiguous()
    cut["lora_up.weight"] = cut["lora_up.weight"][:, :rank].contiguous()
    return replace(weights, tensors=cut)


def split(options: DyLoraOptions) -> list[Path]:
    """Write one LoRA per rank and return their paths.

    Raises:
        UserError: the file is damaged or no LoRA, or there is nothing to cut.
    """
    from tqdm import tqdm

    from library.checkpoints.lora_file import read_lora, write_lora

    file = read_lora(str(options.model))
    unit = options.unit or _unit_of(file.metadata, str(file.path))
    most = max(weights.rank for weights in file.modules.values())
    if any("lora_mid.weight" in weights.tensors for weights in file.modules.values()):
        raise UserError("is a LoRA in CP form (lora_mid), which is no DyLoRA", where=str(file.path))
    ranks = range(unit, most, unit)
    if not ranks:
        what = f"has rank {most}, so there is nothing to cut with --unit {unit}"
        raise UserError(what, "Give the unit that it was trained with", where=str(file.path))
    if file.unknown:
        _log.warning("left out, since nobody understands them: %s", ", ".join(file.unknown))
    target = Path(str(options.save_to))
    written = []
    for rank in tqdm(ranks, desc="cutting", leave=False):
        path = target.with_name(f"{target.stem}-{rank:04d}{target.suffix}")
        written.append(write_lora(path, _tensors(file, rank), _metadata(file.metadata, most, rank)))
    _log.info("wrote %s", ", ".join(path.name for path in written))
    return written


def _tensors(file: LoraFile, rank: int) -> dict[str, Tensor]:
    modules = {name: first_ranks(weights, rank) for name, weights in file.modules.items()}
    return {**replace(file, modules=modules).tensors(), **file.bundled}


def _unit_of(metadata: Mapping[str, str], where: str) -> int:
    try:
        return max(1, int(json.loads(metadata["ss_network_args"])["unit"]))
    except (KeyError, TypeError, ValueError):
        raise UserError("does not say what unit it was trained with", "Give --unit", where=where) from None


def _metadata(metadata: Mapping[str, str], most: int, rank: int) -> dict[str, str]:
    before = metadata.get("ss_training_comment", "None")
    note = f"split from DyLoRA, rank {most} to {rank}"
    comment = note if before in ("", "None") else f"{note}; {before}"
    return {**metadata, "ss_network_dim": str(rank), "ss_training_comment": comment}


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, lambda opts: split(opts.dylora), argv=argv)


if __name__ == "__main__":
    main()
