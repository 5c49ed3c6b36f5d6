"""Merge LoRA files into a checkpoint (with --sd_model), or into one LoRA file (without).

A ratio is a strength: 1 changes the model as the LoRA alone would. Several files add up exactly. Files of LyCORIS
(LoHa, LoKr, OFT, GLoRA, DoRA...) can be merged into checkpoints, too.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli  # noqa: E402
from library.errors import Problem, UserError  # noqa: E402
from library.option_groups import OptionGroup, OptionSet, opt  # noqa: E402
from networks.merge_parts import (  # noqa: E402
    IngredientOptions,
    combined_metadata,
    merged_from,
    read_ingredients,
    spec_of,
)
from networks.tool_parts import check_output, check_target, dtype_of, lora_modelspec  # noqa: E402

if TYPE_CHECKING:
    from library.checkpoints.detect import CheckpointInfo
    from library.checkpoints.lora_merge import MergePlan, OpenBase

_log = logging.getLogger(__name__)

_FAMILIES = ("sd1", "sd2", "sdxl")
_SHOWN = 5
_INHERITED = ("author", "license", "usage_hint", "resolution", "encoder_layer", "prediction_type", "architecture")


@dataclass(frozen=True, kw_only=True)
class MergeOptions(OptionGroup, title="merging"):
    """What the files are merged into, and how."""

    sd_model: str | None = opt(
        None,
        path=True,
        help="Checkpoint to merge into: a file, a Diffusers folder or a hub id; the result has the same layout. "
        "Without it the result is a LoRA file.",
    )
    v2: bool = opt(False, help="The model is a Stable Diffusion 2.x model; the wrong kind is refused.")
    concat: bool = opt(
        False,
        help="LoRA files: keep all ranks, so that the result is exact. Without it they are cut to those of the first.",
    )
    shuffle: bool = opt(False, help="LoRA files: put the ranks of each module in another order (the same every time).")
    legacy_ratio: bool = opt(
        False, help="LoRA files: sum up and down factors apart, as sd-scripts does, which squares every ratio."
    )

    def warn(self) -> Iterator[Problem]:
        """Options that matter for LoRA files alone."""
        for name in ("concat", "shuffle", "legacy_ratio"):
            if self.sd_model and getattr(self, name):
                yield Problem(f"--{name}", "has no effect with --sd_model, where ratios are exact anyway")


@dataclass(frozen=True, kw_only=True)
class Options(OptionSet):
    """Everything that merge_lora.py accepts."""

    ingredients: IngredientOptions
    merging: MergeOptions

    def check_together(self) -> Iterator[Problem]:
        """A LoRA file needs a suffix of one; a checkpoint is checked when the model has been looked at."""
        chosen, model = self.ingredients, self.merging.sd_model
        if model:
            yield from check_output("--save_to", chosen.save_to, (model, *chosen.models))
        else:
            yield from check_target(chosen.save_to, chosen.models)


def merge(options: Options, *, family: str | None = None) -> Path:
    """Merge and write; return the path of the result.

    Args:
        options: of the script.
        family: ``sdxl`` where nothing else is accepted.

    Raises:
        UserError: a file is damaged or made for another model, or nothing in it fits.
    """
    import torch

    with torch.inference_mode():
        return _into_checkpoint(options, family) if options.merging.sd_model else _into_lora(options, family)


# LoRA files into a checkpoint ----------------------------------------------------------------------------------------


def _into_checkpoint(options: Options, family: str | None) -> Path:
    from tqdm import tqdm

    from library.checkpoints.detect import inspect
    from library.checkpoints.hub import resolve_model
    from library.checkpoints.lora_merge import MergeSettings, open_base, plan_merge, write_merged
    from library.checkpoints.tensor_files import NonFiniteWeights

    chosen = options.ingredients
    info = inspect(resolve_model(str(options.merging.sd_model), option="--sd_model"))
    _check_family(info, "sd2" if options.merging.v2 else family)
    target = Path(str(chosen.save_to))
    _check_kind(info, target)
    ingredients = read_ingredients(chosen, info.family)
    base = open_base(info)
    plan = plan_merge(base, ingredients)
    _report(plan)
    with tqdm(total=len(plan.edits), desc="merging", leave=False) as bar:
        settings = MergeSettings(
            precision=dtype_of(chosen.save_precision or chosen.precision),
            metadata=_checkpoint_metadata(options, base),
            on_change=bar.update,
        )
        try:
            write_merged(base, plan, target, settings)
        except NonFiniteWeights as error:
            what = f"not merged: {error.cause} ({', '.join(error.names[:_SHOWN])})"
            hint = "It is damaged, a ratio is too large, or --save_precision bf16 is needed"
            raise UserError(what, hint, where=f"--sd_model {info.path}") from error
    _log.info("merged into %d tensors: %s", len(plan.edits), target)
    return target


def _check_family(info: CheckpointInfo, wanted: str | None) -> None:
    from library.checkpoints.detect import family_label

    where = f"--sd_model {info.path}"
    if info.family not in _FAMILIES:
        raise UserError(f"looks like {info.label}", "Give a Stable Diffusion 1.x, 2.x or SDXL checkpoint", where=where)
    if wanted is not None and info.family != wanted:
        hint = "Remove --v2" if wanted == "sd2" else "Use merge_lora.py"
        raise UserError(f"looks like {info.label}, not like {family_label(wanted)}", hint, where=where)


def _check_kind(info: CheckpointInfo, target: Path) -> None:
    where = f"--save_to {target}"
    if info.layout == "diffusers":
        if target.suffix in (".safetensors", ".ckpt") or target.is_file():
            hint = "Give the name of a folder; tools/convert_diffusers20_original_sd.py makes a file of it"
            raise UserError("--sd_model is a Diffusers folder, so the result is one", hint, where=where)
    elif target.is_dir():
        raise UserError("is a folder, but --sd_model is a file", "Give the name of a file", where=where)
    elif target.suffix not in (".safetensors", ".ckpt"):
        raise UserError("has no suffix of a checkpoint", "End it with .safetensors or .ckpt", where=where)


def _report(plan: MergePlan) -> None:
    for path, names in plan.unmatched.items():
        if names:
            text = "%s: %d modules have no counterpart in the model and are left out: %s"
            _log.warning(text, Path(path).name, len(names), ", ".join(names))


def _checkpoint_metadata(options: Options, base: OpenBase) -> dict[str, str] | None:
    chosen = options.ingredients
    if chosen.no_metadata:
        return None
    info, before = base.info, base.metadata
    names = merged_from([str(options.merging.sd_model), *chosen.models])
    prediction = info.prediction_type or info.prediction_hint
    fresh = lora_modelspec(spec_of(info.family, prediction), str(chosen.save_to), kind="", merged_from=names)
    others = {key: value for key, value in before.items() if not key.startswith(("modelspec.", "sshs_"))}
    inherited = {key: value for name in _INHERITED if (value := before.get(key := f"modelspec.{name}"))}
    return {**others, **fresh, **inherited}


# LoRA files into one -------------------------------------------------------------------------------------------------


def _into_lora(options: Options, family: str | None) -> Path:
    import torch
    from tqdm import tqdm

    from library.checkpoints.lora_combine import combine, combine_legacy, shuffle_ranks
    from library.checkpoints.lora_file import write_lora

    chosen, merging = options.ingredients, options.merging
    ingredients = read_ingredients(chosen, "sd2" if merging.v2 else family)
    if merging.legacy_ratio:
        tensors = combine_legacy(ingredients, concat=merging.concat)
    else:
        tensors = combine(
            ingredients, concat=merging.concat, progress=lambda names: tqdm(names, desc="merging", leave=False)
        )
    if merging.shuffle:
        tensors = shuffle_ranks(tensors)
    precision = dtype_of(chosen.save_precision or chosen.precision) or torch.float32
    metadata = combined_metadata(chosen, ingredients, tensors)
    return write_lora(str(chosen.save_to), tensors, metadata, precision=precision)


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, merge, argv=argv)


if __name__ == "__main__":
    main()
