"""Extract a LoRA from a fine-tuned model: the best approximation of what training changed in every layer.

Both models may be single files (.safetensors, .ckpt), Diffusers folders or hub ids. They are mapped from their files
and compared layer by layer, so that little memory is needed.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli  # noqa: E402
from library.errors import Problem, UserError  # noqa: E402
from library.option_groups import OptionGroup, OptionSet, opt  # noqa: E402
from library.randomness import derive  # noqa: E402
from networks.tool_parts import (  # noqa: E402
    PRECISIONS,
    check_target,
    device_of,
    dtype_of,
    lora_modelspec,
    missing_options,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.checkpoints.parts import LoadedParts
    from library.contracts import FamilySpec

_log = logging.getLogger(__name__)

_UNET_LINEAR = re.compile(r"\.attentions\.\d+\.")
_UNET_CONV = re.compile(r"\.(resnets|downsamplers|upsamplers)\.\d+\.")
_TEXT = re.compile(r"\.(self_attn|mlp)\.")


@dataclass(frozen=True, kw_only=True)
class ExtractOptions(OptionGroup, title="extraction"):
    """Two models in, a LoRA out that turns the first into the second."""

    model_org: str | None = opt(None, path=True, help="Original model: a file, a Diffusers folder or a hub id.")
    model_tuned: str | None = opt(None, path=True, help="Fine-tuned model: a file, a Diffusers folder or a hub id.")
    save_to: str | None = opt(None, path=True, help="LoRA file to write.")
    dim: int = opt(4, at_least=1, help="Rank of linear layers and 1x1 convolutions.")
    conv_dim: int | None = opt(
        None, at_least=1, help="Rank of 3x3 convolutions; switches the layers of the resnets on. Default: without them."
    )
    v2: bool = opt(False, help="The models are Stable Diffusion 2.x models.")
    v_parameterization: bool = opt(
        False, help="Write down that the models predict velocity. Default: what the tuned model says, else as --v2."
    )
    sdxl: bool = opt(False, help="The models are SDXL models; these cannot be read here.")
    device: str | None = opt(None, help="Where to compute, such as cuda. Default: cpu.")
    load_precision: str | None = opt(
        None, choices=PRECISIONS, help="Round the models to this format first. Default: as they are in their files."
    )
    save_precision: str | None = opt(
        None, choices=PRECISIONS, help="Format of the numbers in the new file. Default: float."
    )
    clamp_quantile: float = opt(
        1.0,
        more_than=0,
        at_most=1,
        help="Clamp the factors at this quantile. Other tools use 0.99, which damages results; 1 does not clamp.",
    )
    min_diff: float = opt(
        0.01,
        at_least=0,
        help="The text encoder is left out unless one of its weights differs by more than this.",
    )
    no_metadata: bool = opt(False, help="Leave the description of the model (modelspec) out of the file.")
    load_original_model_to: str | None = opt(
        None, help="Without effect: models are mapped from their files and only layers are loaded."
    )
    load_tuned_model_to: str | None = opt(None, help="Without effect, like --load_original_model_to.")

    def check(self) -> Iterator[Problem]:
        """Names are needed, and SDXL cannot be read."""
        yield from missing_options(model_org=self.model_org, model_tuned=self.model_tuned, save_to=self.save_to)
        yield from check_target(self.save_to, (self.model_org, self.model_tuned))
        if self.sdxl:
            yield Problem("--sdxl", "SDXL models cannot be read here", "Give Stable Diffusion 1.x or 2.x models.")

    def warn(self) -> Iterator[Problem]:
        """Options that nothing here needs."""
        for name in ("load_original_model_to", "load_tuned_model_to"):
            if getattr(self, name) is not None:
                yield Problem(f"--{name}", "has no effect: models are mapped, layers computed on --device")


@dataclass(frozen=True, kw_only=True)
class Options(OptionSet):
    """Everything that extract_lora_from_models.py accepts."""

    extract: ExtractOptions


@dataclass(frozen=True)
class Pair:
    """A layer in both models.

    Attributes:
        name: in LoRA files.
        rank: wanted.
        original, tuned: weights [out,in] or [out,in,k,k], mapped from the files.
    """

    name: str
    rank: int
    original: Tensor
    tuned: Tensor


def lora_layers(weights: Mapping[str, Tensor], part: str, *, conv: bool) -> dict[str, str]:
    """Return the layers that a LoRA of `networks.lora` has: name in LoRA files -> name of the weight in `weights`.

    Args:
        weights: a part of a model by memory names.
        part: ``unet`` or ``text_encoder``.
        conv: with the layers of resnets and samplers, as `conv_dim` adds them.
    """
    from library.checkpoints.lora_names import module_names

    patterns = [_TEXT] if part == "text_encoder" else [_UNET_LINEAR, _UNET_CONV] if conv else [_UNET_LINEAR]
    paths = [
        name.removesuffix(".weight")
        for name, weight in weights.items()
        if name.endswith(".weight") and weight.dim() >= 2 and any(pattern.search(name) for pattern in patterns)
    ]
    return {name: f"{path}.weight" for name, path in module_names(paths, part).items()}


def extract(options: ExtractOptions) -> Path:
    """Compare the models, write the LoRA and return its path.

    Raises:
        UserError: a model cannot be read or is of another family, or both are the same.
    """
    import torch

    from library.checkpoints.load import load_parts
    from library.checkpoints.lora_file import write_lora

    device = device_of(options.device)
    family = "sd2" if options.v2 else "sd1"
    original, tuned = (load_parts(str(name), family) for name in (options.model_org, options.model_tuned))
    spec = _spec(options, tuned)
    pairs = list(_pairs(original, tuned, "unet", options))
    with torch.inference_mode():
        text = list(_pairs(original, tuned, "text_encoder", options))
        largest = _largest_difference(text, options, device)
        if largest > options.min_diff:
            pairs = text + pairs
        else:
            _log_left_out(largest, options.min_diff)
        tensors = _extract_all(pairs, options, device)
    return write_lora(
        str(options.save_to), tensors, _metadata(options, spec), precision=dtype_of(options.save_precision)
    )


def _spec(options: ExtractOptions, tuned: LoadedParts) -> FamilySpec:
    from library.models.specs import V_PREDICTION, check_prediction, stable_diffusion_family

    said = tuned.source.prediction_type
    velocity = options.v_parameterization or (options.v2 if said is None else said == V_PREDICTION)
    spec = stable_diffusion_family("sd2" if options.v2 else "sd1", v_prediction=velocity)
    check_prediction(spec, said, str(tuned.source.path))
    return spec


def _pairs(original: LoadedParts, tuned: LoadedParts, part: str, options: ExtractOptions) -> Iterator[Pair]:
    before, after = (parts.unet if part == "unet" else parts.text for parts in (original, tuned))
    for name, key in lora_layers(before, part, conv=options.conv_dim is not None).items():
        old, new = before[key], after.get(key)
        if new is None or new.shape[0] != old.shape[0] or new.numel() != old.numel():
            found = "lacks it" if new is None else f"has {list(new.shape)}"
            what = f"the models differ in structure: {key} is {list(old.shape)}, {tuned.source.path} {found}"
            raise UserError(what, "Give the model that the other one was trained from", where=str(original.source.path))
        kernel = old.shape[2:].numel() > 1
        wanted = options.conv_dim if kernel and options.conv_dim is not None else options.dim
        yield Pair(name, min(wanted, old.shape[0], old[0].numel()), old, new.reshape(old.shape))


def _difference(pair: Pair, options: ExtractOptions, device: torch.device) -> Tensor:
    """Return what training changed in a layer, in float32.

    Raises:
        UserError: a model holds NaN or infinity there.
    """
    dtype = dtype_of(options.load_precision)
    old, new = (weight.to(dtype=dtype).to(device).float() for weight in (pair.original, pair.tuned))
    delta = new - old
    if not delta.sum().isfinite() and not delta.isfinite().all():
        broken = options.model_tuned if old.isfinite().all() else options.model_org
        raise UserError(f"holds NaN or infinity (layer {pair.name})", "The model is damaged", where=str(broken))
    return delta


def _largest_difference(pairs: list[Pair], options: ExtractOptions, device: torch.device) -> float:
    return max((float(_difference(pair, options, device).abs().max()) for pair in pairs), default=0.0)


def _log_left_out(largest: float, min_diff: float) -> None:
    if largest == 0:
        _log.info("the text encoders are the same: the LoRA is for the U-Net alone")
    else:
        text = "the text encoder is left out: its weights differ by %.3g at most, --min_diff is %g"
        _log.warning(f"{text}; a smaller one includes it", largest, min_diff)


def _extract_all(pairs: list[Pair], options: ExtractOptions, device: torch.device) -> dict[str, Tensor]:
    from tqdm import tqdm

    tensors: dict[str, Tensor] = {}
    total = kept = 0.0
    for pair in tqdm(pairs, desc="extracting", leave=False):
        delta = _difference(pair, options, device)
        found, captured = _module(delta, pair, options.clamp_quantile)
        total += float(delta.square().sum())
        kept += captured
        tensors.update(found)
    if total == 0:
        raise UserError("is the same as the original model in every layer of a LoRA", where=str(options.model_tuned))
    _log.info("%d modules; %.2f %% of the difference's norm is in the LoRA", len(pairs), 100 * (kept / total) ** 0.5)
    return tensors


def _module(delta: Tensor, pair: Pair, quantile: float) -> tuple[dict[str, Tensor], float]:
    """Return the tensors of a module by their names in the file, and the squared norm that they keep of `delta`."""
    import torch

    from library.checkpoints.lora_combine import clamp_factors
    from library.checkpoints.low_rank import svd_of_matrix, truncate

    generator = torch.Generator().manual_seed(derive(0, "extract lora", pair.name) >> 1)
    parts = svd_of_matrix(delta.flatten(1), pair.rank, generator)
    # Clamping depends on how the factors share the singular values: other tools leave them to `up`.
    up, down = truncate(parts, pair.rank) if quantile == 1 else (parts.u * parts.s, parts.vh)
    tensors = {
        f"{pair.name}.lora_down.weight": down.reshape(pair.rank, *delta.shape[1:]).contiguous().cpu(),
        f"{pair.name}.lora_up.weight": up.reshape(*up.shape, *[1] * (delta.dim() - 2)).contiguous().cpu(),
        f"{pair.name}.alpha": torch.tensor(float(pair.rank)),
    }
    captured = float(parts.s.square().sum())
    return (tensors if quantile == 1 else clamp_factors(tensors, quantile)), captured


def _metadata(options: ExtractOptions, spec: FamilySpec) -> dict[str, str]:
    metadata = {
        "ss_v2": str(options.v2),
        "ss_base_model_version": str(spec.base_model_version),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(options.dim),
        "ss_network_alpha": str(float(options.dim)),
    }
    if options.conv_dim is not None:
        arguments = {"conv_dim": str(options.conv_dim), "conv_alpha": str(float(options.conv_dim))}
        metadata["ss_network_args"] = json.dumps(arguments)
    return metadata if options.no_metadata else {**metadata, **lora_modelspec(spec, str(options.save_to))}


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, lambda opts: extract(opts.extract), argv=argv)


if __name__ == "__main__":
    main()
