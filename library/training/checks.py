"""Rules between groups of options: what can be refused or doubted before any file or model is opened."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import Problem
from library.option_groups import COMMAND_LINE
from library.option_values import nearest
from library.training.deepspeed_checks import deepspeed_problems, deepspeed_warnings
from library.training.options_output import NEWEST, OVERRIDES
from library.training.sampling import sampling_problems

if TYPE_CHECKING:
    from library.training.options import TrainingOptions

logger = logging.getLogger(__name__)

_MODEL_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def check_training(options: TrainingOptions, *, world_size: int) -> Iterator[Problem]:
    """Yield what stops a training script, judged by its options and the paths in them.

    Args:
        options: All options.
        world_size: Number of processes.
    """
    yield from _missing(options)
    yield from _paths(options)
    yield from _output_folder(options.save.output_dir)
    yield from _optimizer(options)
    if options.optimizer.fused_backward_pass:
        yield from _fused_backward(options, world_size)
    yield from deepspeed_problems(options)
    yield from _augmentation(options)
    yield from _override_names(options)


def check_sources(options: TrainingOptions) -> Iterator[Problem]:
    """Yield what keeps a tool that trains nothing from opening the model and the data that options name."""
    yield from (problem for problem in _missing(options) if problem.where != "--output_dir")
    yield from _data_paths(options)
    if not options.data.debug_dataset:
        yield from _model_paths(options)
    yield from _augmentation(options)


def warn_training(options: TrainingOptions) -> Iterator[Problem]:
    """Yield what is probably not meant."""
    model, text, length, save = options.model, options.text, options.length, options.save
    velocity = options.options().get("v_parameterization")
    if options.noise.zero_terminal_snr and not model.v_parameterization and velocity and velocity.offered:
        yield Problem("--zero_terminal_snr", "is meant for models trained with --v_parameterization")
    if model.v2 and text.clip_skip is not None:
        yield Problem("--clip_skip", "is unusual with --v2, whose text encoder ends one layer early already")
    if length.max_train_epochs and "max_train_steps" in options.given:
        yield Problem("--max_train_steps", "has no effect, since --max_train_epochs is given")
    if save.save_n_epoch_ratio and save.save_every_n_epochs:
        yield Problem("--save_every_n_epochs", "has no effect, since --save_n_epoch_ratio is given")
    if options.loader.persistent_data_loader_workers and options.loader.max_data_loader_n_workers == 0:
        yield Problem("--persistent_data_loader_workers", "has no effect with --max_data_loader_n_workers 0")
    if options.subset.face_crop_aug_range and (options.data.enable_bucket or options.cache.cache_latents):
        yield Problem("--face_crop_aug_range", "has no effect with --enable_bucket or --cache_latents")
    yield from deepspeed_warnings(options)
    yield from _warn_warmup(options)
    yield from _warn_output_folder(options)


def check_output(options: TrainingOptions) -> Iterator[Problem]:
    """Yield why the output folder cannot be written to; it is made when it is missing."""
    folder = options.save.output_dir
    if folder is None:
        if options.data.debug_dataset:
            yield from _writable(str(Path.cwd()), "the working folder, where the report goes")
        return
    problems = list(_writable(folder, "--output_dir"))
    yield from problems
    if not problems and not options.data.debug_dataset:
        _warn_of_little_space(options)
    if options.log.logging_dir and not options.data.debug_dataset:
        yield from _writable(options.log.logging_dir, "--logging_dir")


def _writable(folder: str, where: str) -> Iterator[Problem]:
    from library.files import check_writable_folder

    yield from check_writable_folder(folder, where)


def _warn_of_little_space(options: TrainingOptions) -> None:
    """A saved model is about as large as the file that it came from; a state about four times (weights, moments)."""
    from library.files import format_bytes, free_bytes

    source = Path(options.model.main_path or "")
    if not source.is_file() or not options.save.output_dir:
        return
    size = source.stat().st_size
    states = options.state.save_state or options.state.save_state_on_train_end
    needed, free = size * 5 if states else size, free_bytes(options.save.output_dir)
    if free < needed:
        what = "a model and a state need" if states else "a model needs"
        logger.warning("--output_dir: %s free, but %s about %s", format_bytes(free), what, format_bytes(needed))


def _missing(options: TrainingOptions) -> Iterator[Problem]:
    """Yield one problem for each option that a run cannot do without; a data set report needs only the data."""
    data = options.data
    if not data.debug_dataset:
        yield from options.model.missing()
        if not options.save.output_dir:
            yield Problem("--output_dir", "is required", "Give the folder for models and sample images.")
    if not (data.dataset_config or data.train_data_dir or data.in_json or data.webdataset_path or data.dataset_class):
        yield Problem("--train_data_dir", "no training data named", "Give --train_data_dir or --dataset_config.")
    if data.allow_pipe_urls and options.given.get("allow_pipe_urls") != COMMAND_LINE:
        what = "would run commands, which no file may ask for"
        yield Problem("--allow_pipe_urls", what, "Type it on the command line, if you trust the data's configuration.")
    # Metadata that were prepared name their buckets, which shows when they are read.
    if not (data.dataset_config or data.in_json or data.resolution):
        yield Problem("--resolution", "is required", "Give a size, such as --resolution 512.")


def _paths(options: TrainingOptions) -> Iterator[Problem]:
    """Yield every path that must exist and does not."""
    state = options.state
    yield from _data_paths(options)
    if options.data.debug_dataset:
        return
    yield from must_exist("--log_tracker_config", options.log.log_tracker_config)
    missing = list(must_exist("--sample_prompts", options.sample.sample_prompts))
    yield from missing or sampling_problems(options.sample, options.sample_place)
    thumbnail = options.metadata.metadata_thumbnail
    if thumbnail and not thumbnail.startswith("data:"):
        yield from must_exist("--metadata_thumbnail", thumbnail)
    if state.resume and state.resume not in NEWEST and not state.resume_from_huggingface:
        yield from must_exist("--resume", state.resume, folder=True)
    yield from _model_paths(options)


def _data_paths(options: TrainingOptions) -> Iterator[Problem]:
    data = options.data
    if not data.dataset_config:
        for entry in data.webdataset_path:
            if entry.endswith(".tar") and not re.search(r"^\w+:|[*?{\[]", entry):  # neither address nor pattern
                yield from must_exist("--webdataset_path", entry)
        yield from must_exist("--train_data_dir", data.train_data_dir, folder=True)
        yield from must_exist("--reg_data_dir", data.reg_data_dir, folder=True)
        yield from must_exist("--in_json", data.in_json)
    yield from must_exist("--dataset_config", data.dataset_config)


def _model_paths(options: TrainingOptions) -> Iterator[Problem]:
    for option, name in options.model.files().items():
        yield from _model_file(option, name)


def must_exist(option: str, name: str | None, *, folder: bool = False) -> Iterator[Problem]:
    """Yield a problem when the file (or folder) `name` that `option` names is not there."""
    if not name:
        return
    path, kind = Path(name), "folder" if folder else "file"
    try:
        if folder and path.is_dir() or not folder and path.is_file():
            return
        what = f"{name!r} is not a {kind}" if path.exists() else f"{kind} {name!r} not found"
    except (OSError, ValueError) as error:
        yield Problem(option, f"{name!r} cannot be looked at ({error})")
        return
    yield Problem(option, what, f"Give a {kind}." if path.exists() else _near_names(path))


def _near_names(path: Path) -> str:
    """Return a hint: a name like it in the same folder, or where it was looked for."""
    near = None
    try:
        if path.absolute().parent.is_dir():
            near = nearest(path.name, [entry.name for entry in path.absolute().parent.iterdir()], cutoff=0.6)
    except OSError:
        near = None
    return f"There is {str(path.with_name(near))!r}." if near else f"Looked for {path.absolute()}"


def _model_file(option: str, name: str | None) -> Iterator[Problem]:
    """Refuse a name that can only be a path when nothing is there; `user/name` may be an id on Hugging Face."""
    if not name:
        return
    path = Path(name).expanduser() if name.startswith("~") else Path(name)
    looks_like_path = path.is_absolute() or name.startswith((".", "~")) or name.endswith(_MODEL_SUFFIXES)
    if looks_like_path or len(path.parts) > 2 or "\\" in name:
        try:
            found = path.exists()
        except (OSError, ValueError):
            found = False
        if not found:
            yield Problem(option, f"{name!r} not found", _near_names(path))


def _output_folder(name: str | None) -> Iterator[Problem]:
    """Check without making it that the output folder can be made; `check_output` then does so."""
    if not name:
        return
    path = Path(name).absolute()
    for place in (path, *path.parents):
        try:
            exists = place.exists()
        except (OSError, ValueError) as error:
            yield Problem("--output_dir", f"{name!r} cannot be looked at ({error})")
            return
        if not exists:
            continue
        if not place.is_dir():
            yield Problem("--output_dir", f"{str(place)!r} is a file, not a folder", "Choose another folder.")
        elif not os.access(place, os.W_OK | os.X_OK):
            yield Problem("--output_dir", f"{str(place)!r} cannot be written to", "Choose another folder.")
        return


def _optimizer(options: TrainingOptions) -> Iterator[Problem]:
    from library.training.lr_schedules import check_lr_schedule
    from library.training.optimizers import check_optimizer

    yield from check_optimizer(options.optimizer, options.schedule)
    yield from check_lr_schedule(options.schedule, options.optimizer)


def _fused_backward(options: TrainingOptions, world_size: int) -> Iterator[Problem]:
    from library.training.deepspeed_plugin import uses_engine
    from library.training.fused_checks import check_fused_backward

    yield from check_fused_backward(
        options.optimizer,
        options.length,
        options.precision,
        world_size=world_size,
        sharded=uses_engine(options.distributed),
    )


def _augmentation(options: TrainingOptions) -> Iterator[Problem]:
    """Subsets of a dataset configuration may switch these off; then the data sets are checked instead."""
    if not options.cache.cache_latents or options.data.dataset_config:
        return
    for name in ("color_aug", "random_crop"):
        if getattr(options.subset, name):
            hint = "Drop one of them."
            yield Problem(f"--{name}", "cannot be combined with --cache_latents: images are encoded only once", hint)


def _override_names(options: TrainingOptions) -> Iterator[Problem]:
    declared = type(options).options()
    known = {*OVERRIDES, *declared, *(option.title for option in declared.values())}
    for name in options.state.resume_override:
        if name not in known:
            near = nearest(name, known, cutoff=0.6)
            hint = f"Did you mean {near}?" if near else f"Known are {', '.join(OVERRIDES)} and names of options."
            yield Problem("--resume_override", f"unknown name {name!r}", hint)


def _warn_warmup(options: TrainingOptions) -> Iterator[Problem]:
    warmup, length = options.schedule.lr_warmup_steps, options.length
    if isinstance(warmup, int) and not length.max_train_epochs and warmup > length.max_train_steps:
        what = f"{warmup} is longer than the run (--max_train_steps {length.max_train_steps})"
        yield Problem("--lr_warmup_steps", what, "The full learning rate is never reached.")
    if isinstance(warmup, float) and warmup >= 1:
        yield Problem("--lr_warmup_steps", "the whole run is warm-up")


def _warn_output_folder(options: TrainingOptions) -> Iterator[Problem]:
    output = options.save.output_dir
    for option, name in (
        ("--train_data_dir", options.data.train_data_dir),
        ("--reg_data_dir", options.data.reg_data_dir),
    ):
        if not output or not name:
            continue
        images = Path(name).absolute()
        if images in (Path(output).absolute(), *Path(output).absolute().parents):
            yield Problem("--output_dir", f"lies inside {option}", "Keep what is written apart from the images.")
