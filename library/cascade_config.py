"""YAML files of the original Stable Cascade trainer as `--config_file` of our scripts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from library import cascade_yaml
from library.checkpoints.cascade_configs import CONFIGS
from library.config_file import ConfigValue, ForeignConfig
from library.errors import Problem, UserError, raise_problems

_IMAGE_SHARE = 0.1
"""Of the pictures that the original trainer shows stage C an embedding of."""


_LISTED = ("network_weights", "controlnet_checkpoint_path", "controlnet_filter")
"""Options of which pictures may have several, and trainings one."""


_REPLACED: Mapping[str, set[str]] = {
    "global_batch_size": {"train_batch_size"},
    "webdataset_path": {"train_data_dir", "in_json", "dataset_config", "dataset_class"},
}
"""Options of a file that others on the command line take the place of."""


HELP = (
    "TOML or YAML file with options; the command line wins. `.toml` is added when there is no ending. A YAML file, in "
    "the original trainer's form, may also stand first, without the name of the option."
)
"""About `--config_file`."""

_NAMES: Mapping[str, str] = {
    "experiment_id": "output_name",
    "checkpoint_path": "output_dir",
    "output_path": "sample_dir",
    "lr": "learning_rate",
    "batch_size": "global_batch_size",
    "grad_accum_steps": "gradient_accumulation_steps",
    "image_size": "resolution",
    "bucketeer_random_ratio": "bucket_random_ratio",
    "updates": "max_train_steps",
    "warmup_updates": "lr_warmup_steps",
    "save_every": "save_every_n_steps",
    "backup_every": "backup_every_n_steps",
    "use_fsdp": "fsdp",
    "ema_start_iters": "ema_start_steps",
    "ema_iters": "ema_every_n_steps",
    "ema_beta": "ema_decay",
    "offset_noise": "noise_offset",
    "captions_getter": "caption_field",
    "dataset_filters": "dataset_filter",
    "clip_text_model_name": "text_model_checkpoint_path",
    "clip_image_model_name": "image_model_checkpoint_path",
    "rank": "network_dim",
    "lora_checkpoint_path": "network_weights",
}
"""Keys of the original trainer that people type as options -> our options."""


def option_of(key: str, stage: str) -> str | None:
    """Return the option that a key stands for, where there is one of another name."""
    return f"stage_{stage}_checkpoint_path" if key == "generator_checkpoint_path" else _NAMES.get(key)


def is_yaml(name: str) -> bool:
    """Whether a name is that of a file of the original trainer."""
    return Path(name).suffix.lower() in cascade_yaml.SUFFIXES


def spell_out(words: list[str]) -> list[str]:
    """Return a command line with `--config_file` before a YAML file that begins it."""
    if words and not words[0].startswith("-") and is_yaml(words[0]):
        return ["--config_file", *words]
    return words


def spell_out_two(words: list[str]) -> list[str]:
    """Return a command line with the names of options before one or two YAML files that begin it."""
    found = spell_out(words)
    if found != words and len(words) > 1 and spell_out(words[1:]) != words[1:]:
        return [*found[:2], "--config_file_b", *words[1:]]
    return found


def read(name: str, *, stage: str, offered: Collection[str], typed: Collection[str]) -> ForeignConfig | None:
    """Return the options that a YAML file stands for; None when `name` is none.

    Args:
        name: of the file.
        stage: `c` or `b`.
        offered: names of the script's options, which may be keys as well.
        typed: options on the command line.

    Raises:
        UserError: the file is wrong, or asks for what the script does not do.
    """
    if not is_yaml(name):
        return None
    config = cascade_yaml.read_config(name)
    converted = cascade_yaml.to_options(config, stage=stage, own=offered, where=name)
    options = _completed(converted.options, typed)
    raise_problems(_lacking(converted, typed, name))
    notes = [*converted.notes, *_counted(converted, name), *_replaced(converted, typed, name)]
    _refuse_others(options, converted.sources, offered, name)
    values = {
        option: ConfigValue(value, f"{name}: {converted.sources.get(option) or option}")
        for option, value in options.items()
        if option in offered
    }
    return ForeignConfig(values, tuple(notes))


def read_for_pictures(name: str, *, second: str | None, offered: Collection[str]) -> ForeignConfig | None:
    """Return the options for making pictures that YAML files stand for; None when `name` is none.

    The original program has one file for stage C and another for stage B. What only a training needs is passed over.

    Args:
        name: of the first file.
        second: of a second one, whose keys win.
        offered: names of the script's options, which may be keys as well.

    Raises:
        UserError: a file is wrong, or both are for the same stage.
    """
    if not is_yaml(name):
        if second:
            what = "goes with a YAML file as --config_file"
            raise UserError(what, "Give the files of stages C and B.", where=f"--config_file_b {second}")
        return None
    values: dict[str, ConfigValue] = {}
    notes: list[str] = []
    stages: dict[str, str] = {}
    for path in filter(None, (name, second)):
        config = cascade_yaml.read_config(path)
        stage = _stage_of(config)
        if stage in stages:
            what = f"is for stage {stage.upper()}, as {stages[stage]} is"
            raise UserError(what, "Give one file for each stage.", where=path)
        stages[stage] = path
        converted = cascade_yaml.to_options(config, stage=stage, own=offered, where=path)
        made = _for_pictures(converted.options, stage, offered)
        keys = {option: key for option, key in converted.sources.items() if key}
        values |= {option: ConfigValue(value, f"{path}: {keys.get(option, option)}") for option, value in made.items()}
        if config.get("dtype") == "bfloat16":
            values["bf16"] = ConfigValue(True, f"{path}: dtype")
        used = {*made, "full_bf16", "mixed_precision", "model_version"}
        left = dict.fromkeys(key for option, key in keys.items() if option not in used)
        if left:
            notes.append(f"{path}: keys that only trainings need are passed over: {', '.join(left)}")
    return ForeignConfig(values, tuple(notes))


def _stage_of(config: Mapping[str, Any]) -> str:
    """Return the stage that a file is for: by its structure, else by the file that only stage B needs."""
    for stage, version in CONFIGS:
        if config.get("model_version") == version:
            return stage
    return "b" if config.get("stage_a_checkpoint_path") and not config.get("previewer_checkpoint_path") else "c"


def _for_pictures(options: Mapping[str, Any], stage: str, offered: Collection[str]) -> dict[str, Any]:
    """Return what has a meaning for pictures, as the options of stable_cascade_gen_img.py take it."""
    found = dict(options)
    for name in _LISTED:
        if isinstance(found.get(name), str):
            found[name] = (found[name],)
    if params := found.get("controlnet_filter_params"):
        found["controlnet_filter_params"] = (";".join(params),)
    if "model_version" in found and stage == "b":
        found["model_version_b"] = found.pop("model_version")
    if not found.get("network_weights"):
        found.pop("train_tokens", None)
    if not found.get("controlnet_checkpoint_path"):
        found = {name: value for name, value in found.items() if not name.startswith("controlnet_")}
    return {name: value for name, value in found.items() if name in offered}


def _completed(options: Mapping[str, Any], typed: Collection[str]) -> dict[str, Any]:
    """Return options with what the original trainer does besides, and without what has no ground here."""
    gone = {option for option, others in _REPLACED.items() if others & set(typed)}
    found = {option: value for option, value in options.items() if option not in gone}
    if not found.get("sample_prompts") and "sample_prompts" not in typed:
        # It draws captions of its data; here there is nothing to draw without prompts.
        found.pop("sample_every_n_steps", None)
    if every := found.get("save_every_n_steps"):
        # It writes over its one model and its one state at every save.
        found = {"save_state": True, "save_last_n_steps": every, **found}
    if found.get("image_model_checkpoint_path"):
        found = {"clip_image_cond_rate": _IMAGE_SHARE, **found}
    return found


def _lacking(converted: cascade_yaml.Converted, typed: Collection[str], name: str) -> Iterator[Problem]:
    """Yield that an average of the weights is asked for without its most important number."""
    keys = [converted.sources.get(option) for option in ("ema_start_steps", "ema_every_n_steps")]
    if any(keys) and "ema_decay" not in {*converted.options, *typed}:
        yield Problem(f"{name}: {next(filter(None, keys))}", "needs ema_beta", "Give ema_beta: 0.9, for example.")


def _counted(converted: cascade_yaml.Converted, name: str) -> Iterator[str]:
    """Yield what becomes of numbers that the original trainer counts in accumulated batches."""
    options, accumulation = converted.options, converted.options.get("gradient_accumulation_steps", 1)
    made = [option for option in ("ema_start_steps", "ema_every_n_steps") if converted.sources.get(option)]
    keys = [converted.sources[option] for option in made]
    if accumulation > 1 and any(key.endswith("iters") for key in keys):
        shown = " ".join(f"--{option}={options[option]}" for option in made)
        yield f"{name}: {' and '.join(keys)}: updates are counted here, {accumulation} batches each: {shown}"


def _replaced(converted: cascade_yaml.Converted, typed: Collection[str], name: str) -> Iterator[str]:
    """Yield which keys have no effect because of what stands on the command line, where that is not plain to see."""
    for option, others in _REPLACED.items():
        key = converted.sources.get(option)
        if key and others & set(typed):
            yield f"{name}: {key}: has no effect, since --{min(others & set(typed))} is given"
    key = converted.sources.get("network_args")
    if key == "module_filters" and "network_args" in typed:
        yield f"{name}: {key}: has no effect, since --network_args is given; add module_filters=... to it"
    if converted.options.get("sample_every_n_steps") and "sample_prompts" not in {*typed, *converted.options}:
        yield f"{name}: no sample pictures are drawn without --sample_prompts"


def _refuse_others(options: Mapping[str, Any], sources: Mapping[str, str], offered: Collection[str], name: str) -> None:
    """Refuse keys of other scripts; those that switch something off may stand anywhere."""
    wrong = [
        option
        for option, value in options.items()
        if option not in offered and sources.get(option) and value not in (None, False, (), {}, [])
    ]
    keys = dict.fromkeys(sources[option] for option in wrong)
    raise_problems(
        Problem(f"{name}: {key}", "has no effect in this script", "Remove it, or use the script that it is for.")
        for key in keys
    )
