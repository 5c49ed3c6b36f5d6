"""Merge Stable Diffusion checkpoints of one family into one: the weighted sum of their weights.

python tools/merge_models.py --models a.safetensors b.safetensors --ratios 0.7 0.3 --output merged.safetensors

Weights are read, added and written one tensor at a time, so that little memory is needed.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli  # noqa: E402
from library.errors import Problem, UserError, raise_problems  # noqa: E402
from library.option_groups import OptionGroup, OptionSet, opt  # noqa: E402
from networks.tool_parts import PRECISIONS, check_output, device_of, dtype_of, missing_options  # noqa: E402

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.checkpoints.detect import CheckpointInfo
    from library.checkpoints.tensor_files import LazyTensor
    from library.contracts import FamilySpec

_log = logging.getLogger(__name__)

UNET = "model.diffusion_model."
_FAMILIES = ("sd1", "sd2", "sdxl", "sdxl-refiner")
_SUFFIXES = (".safetensors", ".ckpt")
_SHOWN = 5
_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class MergeOptions(OptionGroup, title="merging"):
    """Several checkpoint files in, one out."""

    models: tuple[str, ...] = opt(
        (), path=True, help="Checkpoint files to merge, two or more; the first decides which tensors the result has."
    )
    output: str | None = opt(None, path=True, help="File to write: .safetensors or .ckpt.")
    ratios: tuple[float, ...] = opt((), help="Weight of each model. Default: all the same, adding up to 1.")
    unet_only: bool = opt(False, help="Merge U-Nets only; text encoder and VAE are those of the first model.")
    device: str | None = opt(None, help="Where to compute, such as cuda. Default: cpu.")
    precision: str = opt("float", choices=PRECISIONS, help="Format that sums are computed in.")
    saving_precision: str = opt("float", choices=PRECISIONS, help="Format of the weights in the result.")
    show_skipped: bool = opt(False, help="List all tensors that the first model lacks, which are left out.")

    @property
    def weights(self) -> tuple[float, ...]:
        """The ratio of every model."""
        return self.ratios or (1 / len(self.models),) * len(self.models)

    def check(self) -> Iterator[Problem]:
        """Two models or more, a ratio for each or for none, and a file to write."""
        yield from missing_options(models=" ".join(self.models), output=self.output)
        if len(self.models) == 1:
            yield Problem("--models", "one model is nothing to merge", "Name two or more.")
        if self.ratios and self.models and len(self.ratios) != len(self.models):
            what = f"{len(self.ratios)} ratios for {len(self.models)} models"
            yield Problem("--ratios", what, "Give one for each model, or none for equal shares.")
        if self.output and (Path(self.output).suffix.lower() not in _SUFFIXES or Path(self.output).is_dir()):
            yield Problem(f"--output {self.output}", "is no name of a checkpoint file", "End it with .safetensors.")
        # It may replace one of the models: the result appears when it is complete.
        yield from check_output("--output", self.output, ())

    def warn(self) -> Iterator[Problem]:
        """Ratios usually add up to one."""
        if self.ratios and not math.isclose(sum(self.ratios), 1, abs_tol=_TOLERANCE):
            yield Problem("--ratios", f"they add up to {sum(self.ratios):g}, not 1: the result is scaled by that")


@dataclass(frozen=True, kw_only=True)
class Options(OptionSet):
    """Everything that merge_models.py accepts."""

    merging: MergeOptions


def merge(options: MergeOptions) -> Path:
    """Merge models and return the file written; it appears complete or not at all.

    Raises:
        UserError: a model cannot be read, they are of different families or sizes, or the result is not finite.
    """
    import torch

    from library.checkpoints.tensor_files import NonFiniteWeights, open_tensors

    device = device_of(options.device)
    infos = _inspect_all(options.models)
    models = [open_tensors(path) for path in options.models]
    names = _names(options, models)
    _check_shapes(options, models, names)
    merged = partial(
        weighted_sum,
        models=models,
        ratios=options.weights,
        device=device,
        dtype=dtype_of(options.precision) or torch.float32,
    )
    saved = dtype_of(options.saving_precision) or torch.float32
    makers = {name: merged if _is_merged(options, name) else models[0].__getitem__ for name in names}
    tensors = {name: _when_written(models[0][name], partial(make, name), saved) for name, make in makers.items()}
    target = Path(str(options.output))
    try:
        _write(target, tensors, _metadata(options, _spec(infos)))
    except NonFiniteWeights as error:
        what = f"not merged: {error.cause} ({', '.join(error.names[:_SHOWN])})"
        broken = _broken_model(options, models, error.names[0])
        hint = "The model is damaged." if broken else "Try --saving_precision float."
        raise UserError(what, hint, where=f"--models {broken}" if broken else "--saving_precision") from error
    _log.info("saved %s: %d tensors", target, len(tensors))
    return target


def weighted_sum(
    name: str, models: Sequence[Mapping[str, Tensor]], ratios: Sequence[float], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return the weighted sum of one tensor, in `dtype` on `device`.

    Where a model lacks the tensor, the first one's takes its share. Whole numbers and markers without content are the
    first model's.
    """
    first = models[0][name]
    if not first.is_floating_point() or not first.numel():
        return first
    having = [(model, ratio) for model, ratio in zip(models[1:], ratios[1:], strict=True) if name in model]
    lacking = sum(ratio for model, ratio in zip(models[1:], ratios[1:], strict=True) if name not in model)
    total = first.to(device, dtype) * (ratios[0] + lacking)
    for model, ratio in having:
        total.add_(model[name].to(device, dtype), alpha=ratio)
    return total


def _broken_model(options: MergeOptions, models: Sequence[Mapping[str, Tensor]], name: str) -> str | None:
    """Return the first model whose tensor of that name is not finite; None when the sum alone is not."""
    pairs = zip(options.models, models, strict=True)
    return next((path for path, model in pairs if name in model and not model[name].isfinite().all()), None)


def _is_merged(options: MergeOptions, name: str) -> bool:
    return not options.unet_only or name.startswith(UNET)


def _when_written(like: Tensor, make: Callable[[], Tensor], saved: torch.dtype) -> LazyTensor:
    from library.checkpoints.tensor_files import LazyTensor

    return LazyTensor(tuple(like.shape), saved if like.is_floating_point() else like.dtype, make)


def _inspect_all(paths: Sequence[str]) -> list[CheckpointInfo]:
    """Find out what all models are, from their headers where they have any.

    Raises:
        UserError: with everything that is wrong with them.
    """
    from library.checkpoints.detect import inspect

    infos: list[CheckpointInfo] = []
    problems: list[Problem] = []
    for path in paths:
        where = f"--models {path}"
        if Path(path).is_dir():
            hint = "Make a file of it with tools/convert_diffusers20_original_sd.py first."
            problems.append(Problem(where, "is a folder", hint))
            continue
        try:
            info = inspect(path)
        except UserError as error:
            problems.extend(error.problems)
            continue
        infos.append(info)
        if info.family not in _FAMILIES:
            hint = "This tool merges whole checkpoints; for LoRA files see networks/merge_lora.py."
            problems.append(Problem(where, f"looks like {info.label}", hint))
        elif info.family != infos[0].family and infos[0].family in _FAMILIES:
            what = f"is {info.label}, but {infos[0].path.name} is {infos[0].label}"
            problems.append(Problem(where, what, "Merge models of one family."))
    raise_problems(problems)
    stated = {info.prediction_type or info.prediction_hint for info in infos} - {None}
    if len(stated) > 1:
        _log.warning("some of the models predict noise and others velocity: the result may be of no use")
    return infos


def _names(options: MergeOptions, models: Sequence[Mapping[str, Tensor]]) -> list[str]:
    """Return the tensors of the result: the first model's without averaged weights; log how the models differ."""
    from library.checkpoints.key_maps import is_average

    names = [name for name in models[0] if not is_average(name)]
    if len(names) < len(models[0]):
        _log.info("%d EMA tensors of the first model are left out", len(models[0]) - len(names))
    present = set(models[0])
    for path, model in zip(options.models[1:], models[1:], strict=True):
        extra = [name for name in model if name not in present and _is_merged(options, name) and not is_average(name)]
        lacking = [name for name in names if name not in model and _is_merged(options, name)]
        _report(options, f"{path}: %d tensors are not in the first model and are left out", extra)
        _report(options, f"{path}: lacks %d tensors; the first model's take its share", lacking)
    return names


def _report(options: MergeOptions, text: str, names: Sequence[str]) -> None:
    if not names:
        return
    shown = names if options.show_skipped else names[:_SHOWN]
    hint = "" if len(shown) == len(names) else ", ... (--show_skipped lists all)"
    _log.warning("%s: %s%s", text.replace("%d", str(len(names)), 1), ", ".join(shown), hint)


def _check_shapes(options: MergeOptions, models: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> None:
    """Refuse models whose tensors have other shapes, such as one for inpainting among plain ones."""
    problems = []
    compared = {name: models[0][name].shape for name in names if _is_merged(options, name)}
    for path, model in zip(options.models[1:], models[1:], strict=True):
        other = [name for name, shape in compared.items() if name in model and model[name].shape != shape]
        if other:
            example = f"{other[0]} {tuple(model[other[0]].shape)} instead of {tuple(compared[other[0]])}"
            what = f"{len(other)} tensors have other shapes than in the first model, such as {example}"
            problems.append(Problem(f"--models {path}", what, "Models of different structure cannot be merged."))
    raise_problems(problems)


def _spec(infos: Sequence[CheckpointInfo]) -> FamilySpec:
    from library.contracts import FamilySpec
    from library.models.specs import EPSILON, V_PREDICTION, stable_diffusion_family

    first = infos[0]
    prediction = first.prediction_type or first.prediction_hint or EPSILON
    if first.family in ("sd1", "sd2"):
        return stable_diffusion_family(first.family, v_prediction=prediction == V_PREDICTION)
    architecture = {"sdxl": "stable-diffusion-xl-v1-base", "sdxl-refiner": "stable-diffusion-xl-v1-refiner"}
    return FamilySpec(
        name=first.family,
        prediction_type=prediction,
        tokenizers=(),
        architecture=architecture[first.family],
        default_resolution_wh=(1024, 1024),
    )


def _metadata(options: MergeOptions, spec: FamilySpec) -> dict[str, str]:
    from library.checkpoints.metadata import modelspec_metadata
    from library.training.options_output import ModelMetadataOptions

    titles = [Path(path).stem for path in options.models]
    terms = [f"{ratio:.6g} * {title}" for ratio, title in zip(options.weights, titles, strict=True)]
    part = " of the U-Nets" if options.unet_only else ""
    described = ModelMetadataOptions(
        metadata_merged_from=", ".join(titles), metadata_description=f"Weighted sum{part}: {' + '.join(terms)}"
    )
    return modelspec_metadata(spec, described, output_name=Path(str(options.output)).stem)


def _write(target: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> None:
    from tqdm import tqdm

    from library.checkpoints.ckpt_writer import write_ckpt
    from library.checkpoints.tensor_files import stored_size, write_safetensors

    total = sum(stored_size(tensor, None) for tensor in tensors.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="merging", leave=False) as bar:
        if target.suffix.lower() == ".ckpt":
            write_ckpt(target, tensors, {"epoch": 0, "global_step": 0}, require_finite=True, progress=bar.update)
        else:
            write_safetensors(target, tensors, metadata, require_finite=True, progress=bar.update)


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, lambda opts: merge(opts.merging), argv=argv)


if __name__ == "__main__":
    main()
