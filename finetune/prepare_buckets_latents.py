"""Choose the bucket of every picture, write it into the metadata, and keep the latents beside the pictures.

    python finetune/prepare_buckets_latents.py photos photos/meta_clean.json photos/meta_lat.json model.safetensors \
        --batch_size=4 --max_resolution=512,512 --mixed_precision=bf16
    python finetune/prepare_buckets_latents.py photos photos/meta_clean.json photos/meta_lat.json \
        effnet_encoder.safetensors --stable_cascade --max_resolution=768,768 --max_bucket_reso=1536

Training then takes the new metadata file as --in_json. The pictures themselves are no longer needed. See
docs/data_tools.md for how this differs from tools/cache_latents.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.metadata_parts import check_metadata_output  # noqa: E402
from library import cli  # noqa: E402
from library.errors import Problem, UserError  # noqa: E402
from library.option_groups import OptionGroup, OptionSet, opt  # noqa: E402
from library.option_values import resolution_text  # noqa: E402

if TYPE_CHECKING:
    from library.contracts import FamilySpec
    from library.data.dataset import TrainingData
    from library.data.jobs import JobReport
    from library.models.options import ModelOptions, TextOptions
    from library.training.cache_tools import LoadedFamily


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(OptionGroup, title="preparation"):
    """Pictures and metadata in, latents and metadata with buckets out."""

    train_data_dir: str = opt("", positional=True, path=True, help="Folder with the pictures.")
    in_json: str = opt("", positional=True, path=True, help="Metadata file to read (.json or .jsonl).")
    out_json: str = opt("", positional=True, path=True, help="Metadata file to write; may be the one that is read.")
    model_name_or_path: str = opt(
        "",
        positional=True,
        path=True,
        help="Model whose VAE is used: a file, a Diffusers folder or a Hugging Face id. With --stable_cascade: the "
        "EfficientNet encoder.",
    )
    vae: str | None = opt(None, path=True, help="VAE to use in place of the model's own.")
    batch_size: int = opt(1, at_least=1, help="Pictures that the VAE encodes at once.")
    max_data_loader_n_workers: int | None = opt(
        None, at_least=0, help="Has no effect: threads prepare the next pictures while the VAE works."
    )
    max_resolution: str = opt(
        "512,512", convert=resolution_text, help="Training resolution: width,height or one number; its area counts."
    )
    min_bucket_reso: int = opt(256, at_least=1, help="Shortest side of a bucket.")
    max_bucket_reso: int = opt(1024, at_least=1, help="Longest side of a bucket.")
    bucket_reso_steps: int = opt(
        64, at_least=8, help="Sides of buckets are multiples of this; training needs a multiple of 64."
    )
    bucket_no_upscale: bool = opt(False, help="Make buckets from the pictures' own sizes; never enlarge a picture.")
    mixed_precision: str = opt("no", choices=("no", "fp16", "bf16"), help="Number format that the VAE works in.")
    no_half_vae: bool = opt(False, help="Run the VAE in float32 whatever --mixed_precision says.")
    full_path: bool = opt(False, help="Keys of new entries are paths and not the names of the pictures alone.")
    flip_aug: bool = opt(False, help="Encode mirror images too, for training with --flip_aug.")
    alpha_mask: bool = opt(False, help="Keep the alpha channel too, for training with --alpha_mask.")
    skip_existing: bool = opt(
        False, help="Use latents that are there already. This is always done where they fit the picture and its bucket."
    )
    recursive: bool = opt(False, help="Look into sub-folders, too.")
    v2: bool = opt(False, help="The model is a Stable Diffusion 2.x model; found out from files and folders.")
    stable_cascade: bool = opt(False, help="Encode for stage C of Stable Cascade, by its EfficientNet encoder.")
    no_exif_transpose: bool = opt(False, help="Ignore the orientation that cameras write into photographs.")
    max_image_pixels: int = opt(179_000_000, at_least=1, help="Refuse pictures with more pixels than this.")

    def check(self) -> Iterator[Problem]:
        """Refuse what cannot be read, and an output that is no metadata file."""
        if self.bucket_reso_steps % 8:
            yield Problem("--bucket_reso_steps", f"{self.bucket_reso_steps} is not a multiple of 8", "Use 64.")
        yield from check_metadata_output("out_json", self.out_json)
        for name in ("v2", "vae") if self.stable_cascade else ():
            if getattr(self, name):
                yield Problem(f"--{name}", "belongs to Stable Diffusion, not to --stable_cascade", "Drop one of them.")
        if self.in_json and not Path(self.in_json).is_file():
            yield Problem(self.in_json, "no such metadata file", "merge_captions_to_metadata.py makes one.")

    def warn(self) -> Iterator[Problem]:
        """Say what is ignored, and that other steps do not suit the model."""
        if self.max_data_loader_n_workers is not None:
            yield Problem("--max_data_loader_n_workers", "has no effect: threads prepare the next pictures")
        multiple = 32 if self.stable_cascade else 64
        if self.bucket_reso_steps % multiple:
            what = f"training needs a multiple of {multiple}, not {self.bucket_reso_steps}"
            hint = "Use 64." if self.stable_cascade else "SDXL models, which come later, need a multiple of 32."
            yield Problem("--bucket_reso_steps", what, hint)


@dataclass(frozen=True, kw_only=True)
class Options(OptionSet):
    """Everything that prepare_buckets_latents.py accepts."""

    prepare: PrepareOptions = field(default_factory=PrepareOptions)


def prepare(options: PrepareOptions) -> None:
    """Encode what has no latents yet, then write the metadata.

    Raises:
        UserError: the metadata, the folder or the model cannot be used, or no picture can.
    """
    from library.data.jobs import find_pictures
    from library.data.metadata_files import read_table
    from library.models.options import MemoryOptions
    from library.training.cache_tools import cache_latent_files, fill
    from library.training.options import DistributedOptions, PrecisionOptions
    from library.training.processes import ProcessOptions

    table = read_table(options.in_json)
    folders = sorted({path.parent for path in find_pictures(Path(options.train_data_dir), recursive=options.recursive)})
    chosen = _cascade(options) if options.stable_cascade else _stable_diffusion(options)
    data = _open(options, folders, chosen.spec)

    def write(report: JobReport) -> None:
        _write_metadata(options, table, data, {bad.path for bad in report.failed})

    precision = PrecisionOptions(mixed_precision=options.mixed_precision)
    groups = ProcessOptions(chosen.model, chosen.text, MemoryOptions(), precision, DistributedOptions())
    unused = ("unet", "text_encoder")
    fill(groups, chosen.spec, data, cache_latent_files, unused=unused, family_class=chosen.family_class, then=write)


@dataclass(frozen=True)
class _Chosen:
    """What encodes the pictures, as options of a training would name it."""

    model: ModelOptions
    text: TextOptions
    spec: FamilySpec
    family_class: type[LoadedFamily]


def _cascade(options: PrepareOptions) -> _Chosen:
    """Return stage C of Stable Cascade, of which only the EfficientNet encoder is needed."""
    from library.models.cascade.options import CascadeTextOptions, StageCModelOptions
    from library.models.cascade.specs import STAGE_C
    from library.models.cascade.stage_c import StageC

    model = StageCModelOptions(effnet_checkpoint_path=options.model_name_or_path, no_half_vae=options.no_half_vae)
    return _Chosen(model, CascadeTextOptions(), STAGE_C, StageC)


def _stable_diffusion(options: PrepareOptions) -> _Chosen:
    """Return the model that is named; its family is that of the file, where there is one."""
    from library.checkpoints.detect import inspect
    from library.models.options import ModelOptions, TextOptions
    from library.models.sd import StableDiffusion
    from library.models.specs import V_PREDICTION, stable_diffusion_spec

    v2, velocity = options.v2, False
    path = Path(options.model_name_or_path).expanduser()
    if path.exists():
        info = inspect(path)
        v2 = info.family == "sd2"
        velocity = V_PREDICTION in (info.prediction_type, info.prediction_hint)
    model = ModelOptions(
        pretrained_model_name_or_path=options.model_name_or_path,
        v2=v2,
        v_parameterization=velocity,
        vae=options.vae,
        no_half_vae=options.no_half_vae,
    )
    return _Chosen(model, TextOptions(), stable_diffusion_spec(model), StableDiffusion)


def _open(options: PrepareOptions, folders: list[Path], spec: FamilySpec) -> TrainingData:
    """Find the pictures of all folders, and the bucket of each."""
    from dataclasses import replace

    from library.data.buckets import bucket_problems
    from library.data.dataset_spec import DatasetSpec, SubsetSpec
    from library.data.opening import open_specs
    from library.data.options import CacheOptions, DatasetOptions
    from library.data.scan import ScanContext
    from library.errors import raise_problems
    from library.option_values import resolution_wh

    subsets = [
        SubsetSpec(
            index=index,
            image_dir=str(folder),
            caption_extension=None,
            flip_aug=options.flip_aug,
            alpha_mask=options.alpha_mask,
        )
        for index, folder in enumerate(folders)
    ]
    data_set = DatasetSpec(
        resolution_wh=resolution_wh(options.max_resolution),
        batch_size=options.batch_size,
        enable_bucket=True,
        min_bucket_reso=options.min_bucket_reso,
        max_bucket_reso=options.max_bucket_reso,
        bucket_reso_steps=options.bucket_reso_steps,
        bucket_no_upscale=options.bucket_no_upscale,
        subsets=tuple(subsets),
    )
    raise_problems(bucket_problems(data_set, "--max_resolution", spec.latent_downscale))
    return open_specs(
        (data_set,),
        DatasetOptions(
            skip_bad_files=True,
            check_images="none",
            no_exif_transpose=options.no_exif_transpose,
            max_image_pixels=options.max_image_pixels,
        ),
        CacheOptions(cache_latents_to_disk=True, vae_batch_size=options.batch_size),
        spec=replace(spec, bucket_step_multiple=spec.latent_downscale),
        tokenizers=(),
        context=ScanContext(tolerated_share=1.0),
    )


def _write_metadata(
    options: PrepareOptions, table: dict[str, dict[str, object]], data: TrainingData, failed: set[str]
) -> None:
    """Write the metadata with the bucket of every picture that has latents."""
    import logging

    from library.data.metadata_files import write_table

    log = logging.getLogger(__name__)
    folder, entries = Path(options.train_data_dir), dict(table)
    used, added = set(), 0
    for row, (width, height) in enumerate(data.placements.bucket_wh.tolist()):
        path = Path(data.table.path(row))
        known = [key for key in keys_of(path, folder) if key in entries]
        key = known[0] if known else new_key(path, folder, full_path=options.full_path)
        added += not known
        used.add(key)
        entry = {name: value for name, value in entries.get(key, {}).items() if name != "train_resolution"}
        if str(path) not in failed:
            entry["train_resolution"] = [width - width % 8, height - height % 8]
        entries[key] = entry
    left = len(entries) - len(used)
    if added:
        log.warning("%d pictures have no entry in %s: new ones are made, without captions", added, options.in_json)
    if left:
        log.warning("%d entries have no picture in %s: they stay as they are", left, options.train_data_dir)
    if not entries:
        raise UserError("no picture is left to write about", where=options.train_data_dir)
    write_table(options.out_json, entries)
    log.info("wrote %s: %d entries, %d with a bucket", options.out_json, len(entries), len(used) - len(failed & used))


def keys_of(path: Path, folder: Path) -> Iterator[str]:
    """Yield the keys that a picture in `folder` may have in metadata, the most exact ones first."""
    inside = path.relative_to(folder)
    yield str(path)
    yield str(path.absolute())
    yield path.absolute().as_posix()
    yield inside.as_posix()
    yield inside.with_suffix("").as_posix()
    # Without folders names need not be unique, but tools that know no folders write them so.
    yield path.stem


def new_key(path: Path, folder: Path, *, full_path: bool) -> str:
    """Return the key of a new entry."""
    return str(path) if full_path else path.relative_to(folder).with_suffix("").as_posix()


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, lambda opts: prepare(opts.prepare), argv=argv)


if __name__ == "__main__":
    main()
