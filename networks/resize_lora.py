"""Resize a LoRA file to fewer (or more) ranks, all alike or each module as its singular values ask for.

Every module is replaced by its best approximation of the new rank. Modules of other kinds (LoHa, LoKr, OFT...), DoRA
magnitudes and everything else in the file stay as they are.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli  # noqa: E402
from library.errors import Problem, UserError  # noqa: E402
from library.option_groups import OptionGroup, OptionSet, opt  # noqa: E402
from networks.tool_parts import PRECISIONS, check_target, device_of, dtype_of, missing_options, show  # noqa: E402

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.checkpoints.lora_file import AdapterWeights, LoraFile

_log = logging.getLogger(__name__)

_METHODS = ("sv_ratio", "sv_fro", "sv_cumulative")
_DYNAMIC = "Dynamic"


@dataclass(frozen=True, kw_only=True)
class ResizeOptions(OptionGroup, title="resizing"):
    """One LoRA file in, a smaller one out."""

    model: str | None = opt(None, path=True, help="LoRA file to resize: .safetensors, .ckpt or .pt, of any layout.")
    save_to: str | None = opt(None, path=True, help="File to write, in the layout of kohya's scripts.")
    new_rank: int = opt(4, at_least=1, help="Rank of linear layers; with --dynamic_method the most they get.")
    new_conv_rank: int | None = opt(
        None, at_least=1, help="Rank of convolutions, those of 1x1 (proj_in, proj_out) too. Default: --new_rank."
    )
    dynamic_method: str | None = opt(
        None,
        choices=_METHODS,
        help="Choose each module's rank: sv_ratio keeps singular values above the largest / param, sv_fro the share "
        "param of the Frobenius norm, sv_cumulative the share param of the sum; and one more than needed.",
    )
    dynamic_param: float | None = opt(
        None,
        needs={"dynamic_method": _METHODS},
        help="Parameter of --dynamic_method: at least 1 for sv_ratio (2 halves), above 0 and at most 1 for the others.",
    )
    device: str | None = opt(None, help="Where to compute, such as cuda. Default: cpu.")
    save_precision: str | None = opt(
        None, choices=PRECISIONS, help="Format of the numbers in the new file. Default: that of the old one."
    )
    verbose: bool = opt(False, help="Show rank and what is kept for every module.")

    def check(self) -> Iterator[Problem]:
        """Names are needed, and a method needs a parameter in its range."""
        yield from missing_options(model=self.model, save_to=self.save_to)
        yield from check_target(self.save_to, (self.model,))
        if self.dynamic_method is None:
            return
        param = self.dynamic_param
        if param is None:
            yield Problem("--dynamic_param", f"is required with --dynamic_method {self.dynamic_method}")
        elif self.dynamic_method == "sv_ratio" and not param >= 1:
            yield Problem("--dynamic_param", f"{param} is below 1, the smallest ratio of singular values")
        elif self.dynamic_method != "sv_ratio" and not 0 < param <= 1:
            yield Problem("--dynamic_param", f"{param} is no share", "Give more than 0 and at most 1.")


@dataclass(frozen=True, kw_only=True)
class Options(OptionSet):
    """Everything that resize_lora.py accepts."""

    resize: ResizeOptions


class Resized(NamedTuple):
    """One module after resizing.

    Attributes:
        tensors: by suffix, on the CPU.
        old_rank, new_rank: before and after.
        alpha: the new one.
        sum_kept, norm_kept: share of the sum of singular values, and of the Frobenius norm, that is left.
        ratio: largest singular value divided by the smallest that is left.
    """

    tensors: dict[str, Tensor]
    old_rank: int
    new_rank: int
    alpha: float
    sum_kept: float
    norm_kept: float
    ratio: float


def resize_module(weights: AdapterWeights, options: ResizeOptions, device: torch.device) -> Resized:
    """Return a LoRA module (`lora_down`, `lora_up`, maybe `lora_mid`) with its new rank; the strength stays the same.

    The core of a module in CP form (`lora_mid`) joins `lora_down`, so the result is an ordinary LoRA.
    """
    from library.checkpoints.lora_math import plain_factors
    from library.checkpoints.low_rank import chosen_rank, svd_of_product, truncate

    moved = {name: tensor.to(device) for name, tensor in weights.tensors.items() if name.startswith("lora_")}
    factors = plain_factors(replace(weights, tensors=moved))
    if factors is None:
        raise ValueError(f"{weights.name} is no LoRA module")
    parts = svd_of_product(*factors)
    down = moved["lora_down.weight"]
    kernel = moved.get("lora_mid.weight", down).shape[2:]
    is_conv = len(kernel) > 0
    cap = options.new_conv_rank or options.new_rank if is_conv else options.new_rank
    rank = chosen_rank(parts.s, options.dynamic_method, options.dynamic_param, cap)
    new_up, new_down = truncate(parts, rank)
    alpha = weights.scale * rank
    kept = parts.s[:rank]
    squares = float(parts.s.square().sum())
    tensors = {
        "lora_down.weight": new_down.reshape(rank, down.shape[1], *kernel),
        "lora_up.weight": new_up.reshape(-1, rank, *[1] * len(kernel)),
    }
    return Resized(
        tensors={name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
        old_rank=weights.rank,
        new_rank=rank,
        alpha=alpha,
        sum_kept=float(kept.sum() / parts.s.sum()) if squares else 1.0,
        norm_kept=(float(kept.square().sum()) / squares) ** 0.5 if squares else 1.0,
        ratio=float(parts.s[0] / kept[-1]) if squares and kept[-1] > 0 else float("inf"),
    )


def resized_metadata(
    metadata: Mapping[str, str], options: ResizeOptions, done: Mapping[str, Resized]
) -> dict[str, str]:
    """Return the metadata of the new file: what the old one says, with the new dimensions and a comment."""
    found = dict(metadata)
    old = _span(sorted({one.old_rank for one in done.values()}))
    if options.dynamic_method is not None:
        found["ss_network_dim"] = found["ss_network_alpha"] = _DYNAMIC
        note = f"Dynamic resize with {options.dynamic_method}: {options.dynamic_param} from {old}"
    else:
        linear = [one for one in done.values() if one.tensors["lora_down.weight"].dim() == 2] or list(done.values())
        alphas = {one.alpha for one in linear}
        found["ss_network_dim"] = str(linear[0].new_rank)
        found["ss_network_alpha"] = str(alphas.pop()) if len(alphas) == 1 else _DYNAMIC
        note = f"dimension is resized from {old} to {options.new_rank}"
    before = found.get("ss_training_comment", "None")
    found["ss_training_comment"] = note if before in ("", "None") else f"{note}; {before}"
    _update_arguments(found, options, done)
    return found


def _update_arguments(metadata: dict[str, str], options: ResizeOptions, done: Mapping[str, Resized]) -> None:
    """Set the dimensions of convolutions in `ss_network_args`, where the file states them."""
    try:
        arguments = json.loads(metadata.get("ss_network_args", ""))
    except ValueError:
        return
    kernels = [one for one in done.values() if one.tensors["lora_down.weight"].shape[2:] > (1, 1)]
    if not isinstance(arguments, dict) or "conv_dim" not in arguments or not kernels:
        return
    if options.dynamic_method is not None:
        arguments.update(conv_dim=_DYNAMIC, conv_alpha=_DYNAMIC)
    else:
        arguments.update(conv_dim=str(kernels[0].new_rank), conv_alpha=str(kernels[0].alpha))
    metadata["ss_network_args"] = json.dumps(arguments)


def _span(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def resize(options: ResizeOptions) -> Path:
    """Read, resize and write; return the path of the new file.

    Raises:
        UserError: the file is damaged, or holds no LoRA module.
    """
    import torch
    from tqdm import tqdm

    from library.checkpoints.lora_file import read_lora, write_lora

    device = device_of(options.device)
    file = read_lora(str(options.model))
    chosen = {name: weights for name, weights in file.modules.items() if _can_resize(weights)}
    if not chosen:
        kinds = ", ".join(sorted({weights.kind for weights in file.modules.values()}))
        raise UserError(f"holds no LoRA module to resize ({kinds})", where=str(file.path))
    done: dict[str, Resized] = {}
    with torch.inference_mode(), tqdm(total=len(chosen), desc="resizing", leave=False) as bar:
        for name, weights in chosen.items():
            done[name] = resize_module(weights, options, device)
            bar.update()
    _report(file, done, options.verbose)
    metadata = resized_metadata(file.metadata, options, done)
    tensors = _all_tensors(file, done)
    return write_lora(str(options.save_to), tensors, metadata, precision=dtype_of(options.save_precision))


def _can_resize(weights: AdapterWeights) -> bool:
    return weights.kind == "lora"


def _all_tensors(file: LoraFile, done: Mapping[str, Resized]) -> dict[str, Tensor]:
    """Return all tensors of the new file, in the number format of the old one."""
    import torch

    tensors: dict[str, Tensor] = {}
    for name, weights in file.modules.items():
        rest = dict(weights.tensors)
        if name in done:
            dtype = rest["lora_down.weight"].dtype
            rest = {suffix: tensor for suffix, tensor in rest.items() if not suffix.startswith("lora_")}
            rest |= {suffix: tensor.to(dtype) for suffix, tensor in done[name].tensors.items()}
            rest["alpha"] = torch.tensor(done[name].alpha)
        tensors.update(replace(weights, tensors=rest).file_tensors())
    return {**tensors, **file.bundled, **_unknown_tensors(file)}


def _unknown_tensors(file: LoraFile) -> dict[str, Tensor]:
    if not file.unknown:
        return {}
    from library.checkpoints.tensor_files import open_tensors

    opened = open_tensors(file.path)
    return {name: opened[name] for name in file.unknown if name in opened}


def _report(file: LoraFile, done: Mapping[str, Resized], verbose: bool) -> None:
    if verbose:
        show(_table(done))
    kept = [one.norm_kept for one in done.values()]
    average = sum(kept) / len(kept)
    spread = (sum((share - average) ** 2 for share in kept) / len(kept)) ** 0.5
    old, new = ({getattr(one, field) for one in done.values()} for field in ("old_rank", "new_rank"))
    text = "resized %d modules from rank %s to %s; of their norm %.2f %% is left (spread %.2f, least %.2f)"
    _log.info(text, len(done), _span(sorted(old)), _span(sorted(new)), average * 100, spread * 100, min(kept) * 100)
    others = [name for name in file.modules if name not in done]
    if others:
        kinds = ", ".join(sorted({file.modules[name].kind for name in others}))
        _log.warning("%d modules of other kinds (%s) stay as they are, such as %s", len(others), kinds, others[0])
    dora = [name for name in done if "dora_scale" in file.modules[name].tensors]
    if dora:
        _log.warning("the DoRA magnitudes (dora_scale) of %d modules stay as they are", len(dora))
    passed = [*file.unknown, *file.bundled]
    if passed:
        _log.warning("%d tensors that belong to no module stay as they are: %s", len(passed), ", ".join(passed))


def _table(done: Mapping[str, Resized]) -> Iterator[str]:
    width = max(map(len, done))
    yield f"{'module':{width}}  rank  new rank   alpha  sum kept  norm kept  largest / smallest"
    for name, one in done.items():
        yield (
            f"{name:{width}}  {one.old_rank:4d}  {one.new_rank:8d}  {one.alpha:6.4g}  {one.sum_kept:7.2%}"
            f"   {one.norm_kept:7.2%}  {one.ratio:18.4g}"
        )


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, lambda opts: resize(opts.resize), argv=argv)


if __name__ == "__main__":
    main()
