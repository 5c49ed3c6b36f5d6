"""Merge LoRA files of any ranks into one of a chosen rank: the best approximation of their sum.

The sum is exact before it is cut to its largest singular values, and of LoRA files these come from the factors, not
from full matrices. Files of LyCORIS that stand alone (LoHa, LoKr, full) are accepted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli  # noqa: E402
from library.errors import Problem  # noqa: E402
from library.option_groups import OptionGroup, OptionSet, opt  # noqa: E402
from networks.merge_parts import IngredientOptions, combined_metadata, read_ingredients  # noqa: E402
from networks.tool_parts import check_target, device_of, dtype_of  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class RankOptions(OptionGroup, title="rank of the result"):
    """How much of the sum is kept."""

    new_rank: int = opt(4, at_least=1, help="Rank of linear layers and 1x1 convolutions.")
    new_conv_rank: int | None = opt(None, at_least=1, help="Rank of larger convolutions. Default: --new_rank.")
    device: str | None = opt(None, help="Where to compute, such as cuda. Default: cpu.")
    clamp_quantile: float = opt(
        1.0,
        more_than=0,
        at_most=1,
        help="Clamp the factors at this quantile. sd-scripts clamps at 0.99, which changes results; 1 does not clamp.",
    )


@dataclass(frozen=True, kw_only=True)
class Options(OptionSet):
    """Everything that svd_merge_lora.py accepts."""

    ingredients: IngredientOptions
    ranks: RankOptions

    def check_together(self) -> Iterator[Problem]:
        """The result is a LoRA file."""
        yield from check_target(self.ingredients.save_to, self.ingredients.models)


def merge(options: Options) -> Path:
    """Merge and write; return the path of the result.

    Raises:
        UserError: a file is damaged or made for another model, or holds adapters that a sum cannot have.
    """
    import torch
    from tqdm import tqdm

    from library.checkpoints.lora_combine import Ranks, clamp_factors, combine
    from library.checkpoints.lora_file import write_lora

    chosen, wanted = options.ingredients, options.ranks
    device = device_of(wanted.device)
    with torch.inference_mode():
        ingredients = read_ingredients(chosen, None)
        tensors = combine(
            ingredients,
            ranks=Ranks(wanted.new_rank, wanted.new_conv_rank or wanted.new_rank),
            device=device,
            progress=lambda names: tqdm(names, desc="merging", leave=False),
        )
        if wanted.clamp_quantile < 1:
            tensors = clamp_factors(tensors, wanted.clamp_quantile)
        metadata = combined_metadata(chosen, ingredients, tensors)
        precision = dtype_of(chosen.save_precision or chosen.precision) or torch.float32
        return write_lora(str(chosen.save_to), tensors, metadata, precision=precision)


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, merge, argv=argv)


if __name__ == "__main__":
    main()
