"""Convert a Stable Diffusion 1.x or 2.x model between a single checkpoint file and a Diffusers folder.

python tools/convert_diffusers20_original_sd.py model.safetensors model_folder
python tools/convert_diffusers20_original_sd.py model_folder model.safetensors --fp16

A destination with a suffix is a file, one without is a folder. Tensors are read and written one at a time.
"""

from __future__ import annotations

import ast
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli  # noqa: E402
from library.errors import Problem, UserError  # noqa: E402
from library.option_groups import OptionGroup, OptionSet, opt  # noqa: E402
from library.option_values import BadValue  # noqa: E402
from networks.tool_parts import PRECISIONS, check_output, dtype_of  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

    from library.checkpoints.detect import CheckpointInfo
    from library.checkpoints.parts import LoadedParts, SaveSettings, SourceInfo
    from library.contracts import FamilySpec

_log = logging.getLogger(__name__)

FOLDER = "diffusers_safetensors"
FILE_KINDS = {".safetensors": "safetensors", ".ckpt": "ckpt", ".pt": "ckpt", ".pth": "ckpt"}
_FROM_REFERENCE = ("model_index.json", "scheduler/", "tokenizer/")
_STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
_FAMILY_FLAGS = {"sd1": "--v1", "sd2": "--v2"}
_MAX_METADATA = 16 * 1024**2


def metadata_table(value: Any) -> dict[str, str] | None:
    """Read `--metadata`: a table written as JSON or as Python does, which is parsed and never executed."""
    text = str(value)
    if not text.strip():
        return None
    if len(text) > _MAX_METADATA:
        raise BadValue(f"is longer than {_MAX_METADATA} characters")
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        try:
            table = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise BadValue(f'expected a table such as {{"name": "value"}}, got {text[:60]!r}') from None
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table):
        raise BadValue(f'expected a table such as {{"name": "value"}}, got {text[:60]!r}')
    return {name: item if isinstance(item, str) else _as_text(item) for name, item in table.items()}


def _as_text(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(value)


def kind_of_target(name: str) -> str | None:
    """Return the kind of model that a destination asks for, None for an unknown suffix.

    A folder that exists, or a name that ends with a slash, is a folder whatever its suffix.
    """
    if name.endswith(("/", "\\")) or Path(name).is_dir() or not Path(name).suffix:
        return FOLDER
    return FILE_KINDS.get(Path(name).suffix.lower())


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(OptionGroup, title="conversion"):
    """What to read and what to write; the kind of the model is found out from the model itself."""

    model_to_load: str = opt(
        "", positional=True, path=True, help="Model to read: a file, a Diffusers folder or a hub id."
    )
    model_to_save: str = opt(
        "", positional=True, path=True, help="Model to write: a .safetensors or .ckpt file, or a folder (no suffix)."
    )
    v1: bool = opt(
        False, excludes={"v2": "a model is one or the other"}, help="Expect Stable Diffusion 1.x, refuse others."
    )
    v2: bool = opt(False, help="Expect Stable Diffusion 2.x, refuse others.")
    unet_use_linear_projection: bool = opt(
        False,
        help="Write SD2's U-Net with linear projections, as Stability AI's folders are. "
        "Default: as the source holds them, which is the same for single files.",
    )
    fp16: bool = opt(False, help="Write all weights as float16.")
    bf16: bool = opt(False, help="Write all weights as bfloat16.")
    float: bool = opt(False, help="Write all weights as float32. Default: as the source holds them.")
    save_precision_as: str | None = opt(None, choices=PRECISIONS, help="The same by name.")
    epoch: int = opt(0, at_least=0, help="Epochs to add to those stored in a .ckpt file.")
    global_step: int = opt(0, at_least=0, help="Steps to add to those stored in a .ckpt file.")
    metadata: Mapping[str, str] | None = opt(
        None, convert=metadata_table, help='Entries for the header of a .safetensors file, as {"name": "value"}.'
    )
    variant: str | None = opt(None, help="Which weights of a Diffusers folder to read, such as fp16.")
    reference_model: str | None = opt(
        None,
        path=True,
        help="Where to take from what the model itself lacks: scheduler and tokenizer from a Diffusers folder (when a "
        "folder is written); schedule buffers and the unused last layer of SD2 from a checkpoint file (for a file).",
    )
    use_safetensors: bool = opt(False, help="Write safetensors into folders; this is always done.")

    @property
    def precision(self) -> str | None:
        """The one precision that was asked for, None for the source's own."""
        return next(iter(self._precisions()), None)

    def _precisions(self) -> list[str]:
        flags = [name for name in PRECISIONS if getattr(self, name)]
        return list(dict.fromkeys([*flags, *([self.save_precision_as] if self.save_precision_as else [])]))

    def check(self) -> Iterator[Problem]:
        """One precision, a destination that can be written, and metadata only where it can be kept."""
        if len(self._precisions()) > 1:
            yield Problem("", f"{' and '.join(self._precisions())} are both asked for", "Give one precision.")
        kind, target = kind_of_target(self.model_to_save), Path(self.model_to_save)
        if kind is None:
            hint = "End a file with .safetensors or .ckpt, and the name of a folder with /."
            yield Problem(f"model_to_save {target}", f"{target.suffix!r} is no suffix of a model file", hint)
        if kind == FOLDER and target.is_dir() and any(target.iterdir()) and not (target / "model_index.json").is_file():
            hint = "Writing there would replace everything in it: name a new folder inside it."
            yield Problem(f"model_to_save {target}", "is a folder that holds something else than a model", hint)
        yield from check_output("model_to_save", self.model_to_save, (self.model_to_load, self.reference_model))
        if self.metadata and kind in (FOLDER, "ckpt"):
            yield Problem(
                "--metadata", "only .safetensors files hold metadata", "Save as .safetensors or leave it out."
            )

    def warn(self) -> Iterator[Problem]:
        """Say what has no effect for this destination."""
        kind = kind_of_target(self.model_to_save)
        if kind not in (None, "ckpt") and (self.epoch or self.global_step):
            yield Problem("--epoch, --global_step", "have no effect: only .ckpt files store them")
        if kind != FOLDER and self.unet_use_linear_projection:
            yield Problem("--unet_use_linear_projection", "has no effect on files, which always hold them so")
        if kind == "ckpt" and self.use_safetensors:
            yield Problem("--use_safetensors", "has no effect: the suffix of a file decides its kind")
        if self.variant and Path(self.model_to_load).is_file():
            yield Problem("--variant", "has no effect on files")


@dataclass(frozen=True, kw_only=True)
class Options(OptionSet):
    """Everything that convert_diffusers20_original_sd.py accepts."""

    conversion: ConvertOptions


def convert(options: ConvertOptions) -> Path:
    """Convert a model and return what was written; it appears under its name complete or not at all.

    Raises:
        UserError: the model cannot be read, is of another family than the flags say, or holds NaN.
    """
    from tqdm import tqdm

    from library.checkpoints.load import load_parts
    from library.checkpoints.save import save_checkpoint
    from library.checkpoints.tensor_files import NonFiniteWeights

    kind = kind_of_target(options.model_to_save) or FOLDER
    info = _inspect(options.model_to_load, "model_to_load")
    _check_flags(options, info)
    reference = _inspect_reference(options, info, kind)
    spec = _spec(info, reference)
    _log.info("%s: %s, predicting %s", info.path.name, info.label, spec.prediction_type)
    parts = load_parts(str(info.path), info.family, variant=options.variant if info.layout == "diffusers" else None)
    if kind == FOLDER and info.family == "sd2" and options.unet_use_linear_projection:
        parts = replace(parts, unet_config={**parts.unet_config, "use_linear_projection": True})
    source = _source(parts, reference)
    target = Path(options.model_to_save)
    settings = _settings(options, parts, spec)
    total = _total_bytes(parts, settings)
    try:
        with tqdm(total=total, unit="B", unit_scale=True, desc="writing", leave=False) as bar:
            written = replace(settings, progress=bar.update)
            save_checkpoint(target, kind, parts, spec=spec, source=source, settings=written)
    except NonFiniteWeights as error:
        what = f"not converted: {error.cause} ({', '.join(error.names[:5])})"
        raise UserError(what, "Another precision may do, or the model is damaged.", where=str(info.path)) from error
    _log.info("saved %s", target)
    return target


def _inspect(name: str, option: str) -> CheckpointInfo:
    """Find out what a model is, before anything large is read.

    Raises:
        UserError: it is missing, damaged, or no Stable Diffusion 1.x or 2.x model.
    """
    from library.checkpoints.detect import inspect
    from library.checkpoints.hub import near_names, resolve_model

    path, where = Path(name).expanduser(), f"{option} {name}"
    if not path.exists() and path.suffix.lower() in FILE_KINDS:
        raise UserError("no such file", near_names(path), where=where)
    info = inspect(resolve_model(name, option))
    if info.family not in _FAMILY_FLAGS:
        hint = "This tool converts Stable Diffusion 1.x and 2.x models."
        raise UserError(f"looks like {info.label}", hint, where=where)
    if info.missing:
        raise UserError(f"has no {' and no '.join(info.missing)}", "Give a complete model.", where=where)
    if info.in_channels not in (None, 4):
        what = f"its U-Net takes {info.in_channels} channels ({info.label}), not 4"
        raise UserError(what, "Such models cannot be converted here.", where=where)
    return info


def _check_flags(options: ConvertOptions, info: CheckpointInfo) -> None:
    given = "sd1" if options.v1 else "sd2" if options.v2 else info.family
    where = f"model_to_load {options.model_to_load}"
    if given != info.family:
        hint = f"Write {_FAMILY_FLAGS[info.family]} or neither: the model tells by itself."
        raise UserError(f"looks like {info.label}, but {_FAMILY_FLAGS[given]} was given", hint, where=where)
    if options.unet_use_linear_projection and info.family == "sd1":
        _log.warning("--unet_use_linear_projection has no effect on %s, whose projections are convolutions", info.label)


def _inspect_reference(options: ConvertOptions, info: CheckpointInfo, kind: str) -> CheckpointInfo | None:
    """Return what the reference model is; None when there is none, or it has nothing to give to this destination."""
    if options.reference_model is None:
        return None
    reference = _inspect(options.reference_model, "--reference_model")
    where = f"--reference_model {options.reference_model}"
    if reference.family != info.family:
        hint = f"Give a model of the same family as {info.path.name}."
        raise UserError(f"is {reference.label}, and the model is {info.label}", hint, where=where)
    if (reference.layout == "diffusers") != (kind == FOLDER):
        _log.warning("%s has no effect: files take from files, and folders from folders", where)
        return None
    stated = {info.prediction_type, reference.prediction_type} - {None}
    if kind == FOLDER and len(stated) > 1:
        what = f"its scheduler is for {reference.prediction_type}, and the model predicts {info.prediction_type}"
        raise UserError(what, "Give a reference of the same kind.", where=where)
    return reference


def _spec(info: CheckpointInfo, reference: CheckpointInfo | None) -> FamilySpec:
    """Return the family with the prediction that the model or its reference states, or else the weights hint at."""
    from library.models.specs import EPSILON, V_PREDICTION, stable_diffusion_family

    stated = info.prediction_type or (reference.prediction_type if reference is not None else None)
    if stated is None and info.prediction_hint is not None:
        _log.warning(
            "%s does not state its prediction type; judging by its weights it is %s",
            info.path.name,
            info.prediction_hint,
        )
    prediction = stated or info.prediction_hint or EPSILON
    return stable_diffusion_family(info.family, v_prediction=prediction == V_PREDICTION)


def _source(parts: LoadedParts, reference: CheckpointInfo | None) -> SourceInfo:
    """Return what is carried over to the new model: what the source holds beside its parts, and the reference's."""
    from library.checkpoints.folders import SMALL_FILES, read_small_files
    from library.checkpoints.load import load_parts

    if reference is None:
        return parts.source
    if reference.layout == "diffusers":
        names = [name for name in SMALL_FILES if name.startswith(_FROM_REFERENCE)]
        return replace(parts.source, files={**parts.source.files, **read_small_files(reference.path, names)})
    own: Mapping[str, Tensor] = parts.source.carried if parts.source.kind != "diffusers" else {}
    carried = load_parts(str(reference.path), reference.family).source.carried
    # Whatever the reference holds takes the type of the model, so that the file has one precision.
    dtype = next(iter(parts.unet.values())).dtype
    carried = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in carried.items()}
    return replace(parts.source, kind=reference.kind, carried={**own, **carried})


def _metadata(options: ConvertOptions, parts: LoadedParts, spec: FamilySpec) -> dict[str, str]:
    """Return what a .safetensors file says about itself: the source's entries, ours where it lacks them, the user's."""
    from library.checkpoints.metadata import modelspec_metadata
    from library.training.options_output import ModelMetadataOptions

    ours = modelspec_metadata(spec, ModelMetadataOptions(), output_name=Path(options.model_to_save).stem)
    kept = {name: value for name, value in parts.source.metadata.items() if name not in _STALE}
    return {**ours, **kept, **(options.metadata or {})}


def _settings(options: ConvertOptions, parts: LoadedParts, spec: FamilySpec) -> SaveSettings:
    from library.checkpoints.parts import SaveSettings

    return SaveSettings(
        precision=dtype_of(options.precision),
        metadata=_metadata(options, parts, spec),
        epoch=options.epoch,
        step=options.global_step,
    )


def _total_bytes(parts: LoadedParts, settings: SaveSettings) -> int:
    from library.checkpoints.tensor_files import stored_size

    tensors = (tensor for part in (parts.unet, parts.text, parts.vae) for tensor in part.values())
    return sum(stored_size(tensor, settings.precision) for tensor in tensors)


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, lambda opts: convert(opts.conversion), argv=argv)


if __name__ == "__main__":
    main()
