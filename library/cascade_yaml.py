"""The YAML files of the original Stable Cascade trainer: every key of theirs, and the options that it stands for.

Light: yaml is imported where it is used. Nothing in a file is executed: filters and getters are handed on as text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import date
from fractions import Fraction
from pathlib import Path
from typing import Any

from library.errors import Problem, UserError, raise_problems
from library.option_values import BadValue, nearest
from library.text_files import read_text

MAX_BYTES = 1 << 20
SUFFIXES = (".yaml", ".yml", ".json")

IMPLIED: Mapping[str, Any] = {"caption_dropout_rate": 0.05, "resume": "auto", "mixed_precision": "bf16"}
"""What the original trainer does without a key for it."""

Options = dict[str, Any]
Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the files: the type of its value, and the options that it becomes.

    Attributes:
        convert: checks the value; raises `BadValue`.
        make: returns the options for a value and the whole file; they may depend on other keys.
        note: what the user should know about it.
    """

    convert: Callable[[Any], Any]
    make: Callable[[Any, Config], Options]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Converted:
    """Options by name, the key that each comes from, and remarks for the user."""

    options: Options
    sources: dict[str, str]
    notes: tuple[str, ...]


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML (or JSON) into plain values.

    Raises:
        UserError: it does not parse, holds a key twice, uses aliases, or asks for objects.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Neither aliases, with which a few lines stand for billions of values, nor double keys."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                mark = self.peek_event().start_mark
                raise yaml.composer.ComposerError(None, None, "aliases (*name) are not supported", mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    what = f"the key {key.value!r} occurs twice"
                    raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
                seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
            return super().construct_mapping(node, deep=deep)

    try:
        loader = Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())[:200]
        raise UserError(f"YAML error{place}: {reason}", where=where) from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"YAML error: {reason}", where=where) from error


def parse_json(text: str, where: str) -> Any:
    """Parse JSON into plain values.

    Raises:
        UserError: it does not parse, or holds a key twice.
    """

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=table)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"JSON error: {reason}", where=where) from error


def read_config(path: str | Path) -> dict[str, Any]:
    """Return the keys of a `.yaml`, `.yml` or `.json` file.

    Raises:
        UserError: it cannot be read or parsed, or is no list of `key: value`.
    """
    parse = parse_json if Path(path).suffix.lower() == ".json" else parse_yaml
    content = parse(read_text(path, limit=MAX_BYTES), str(path))
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError("is not a list of key: value", "See examples/stable_cascade.", where=str(path))
    return content


def to_options(config: Config, *, stage: str, own: Collection[str] = (), where: str = "--config_file") -> Converted:
    """Return the options that a file of the original trainer stands for.

    Args:
        config: its keys; None as value means that the key is absent.
        stage: "c" or "b": whose weights `generator_checkpoint_path` names.
        own: names of options that are accepted as keys, too, and handed on as they are.
        where: what messages start with.

    Raises:
        UserError: holds every unknown key, with the nearest known one, and every value of the wrong type.
    """
    options: Options = dict(IMPLIED)
    sources = dict.fromkeys(options, "")
    notes: list[str] = []
    problems: list[Problem] = []
    table = _keys(stage)
    for name, value in config.items():
        key = table.get(name)
        if key is None and name in own:
            options[name], sources[name] = value, name
            continue
        if key is None:
            near = nearest(name, [*table, *own], cutoff=0.6)
            problems.append(Problem(f"{where}: {name}", "unknown key", f"Did you mean {near}?" if near else ""))
            continue
        if value is None:
            continue
        try:
            made = key.make(key.convert(value), config)
        except BadValue as error:
            problems.append(Problem(f"{where}: {name}", str(error)))
            continue
        options.update(made)
        sources.update(dict.fromkeys(made, name))
        if key.note:
            notes.append(f"{where}: {name}: {key.note}")
    raise_problems(problems)
    return Converted(options, sources, tuple(notes))


def batch_per_process(global_batch: int, world_size: int, accumulation: int) -> int:
    """Return the size of a micro-batch, for `batch_size`, which counts the samples of a whole update.

    Raises:
        UserError: it cannot be divided evenly.
    """
    parts = world_size * accumulation
    if global_batch < parts or global_batch % parts:
        processes = f"{world_size} process{'' if world_size == 1 else 'es'}"
        what = f"{global_batch} samples cannot be shared evenly by {processes} x {accumulation} accumulated batches"
        lower = max(global_batch // parts, 1) * parts
        hint = f"Use {lower} or {lower + parts}." if global_batch > parts else f"Use {lower}."
        raise UserError(what, hint, where="batch_size")
    return global_batch // parts


def _text(value: Any) -> str:
    if not isinstance(value, str):
        hint = ": put it in quotes" if isinstance(value, (int, float, date)) and not isinstance(value, bool) else ""
        raise BadValue(f"expected a text, got {str(value)[:60]}{hint}")
    return value


def _number(value: Any) -> float:
    # YAML 1.1 takes 1e-4 for a text: its numbers need a point.
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)) or len(str(value)) > 100:
            raise ValueError("no number")
        return float(Fraction(value.replace(" ", "")) if isinstance(value, str) and "/" in value else value)
    except (ValueError, OverflowError, ZeroDivisionError):
        raise BadValue(f"expected a number, got {value!r}") from None


def _whole(value: Any) -> int:
    number = _number(value)
    if not number.is_integer():
        raise BadValue(f"expected a whole number, got {value!r}")
    return int(number)


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadValue(f"expected true or false, got {value!r}")
    return value


def _list(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise BadValue(f"expected a list, got {value!r}")
    return tuple(value)


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(_text(item) for item in (value if isinstance(value, list) else [value]))


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(_whole(item) for item in _list(value))


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadValue(f"expected keys and values, got {value!r}")
    return value


def _tokens(value: Any) -> tuple[tuple[str, str | None], ...]:
    pairs = [tuple(item) if isinstance(item, list) else () for item in _list(value)]
    if not all(
        len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], (str, type(None))) for pair in pairs
    ):
        raise BadValue("expected a list of [token, pattern or null]")
    return tuple((pair[0], pair[1]) for pair in pairs)


def _edm(value: Any) -> Any:
    raise BadValue(
        "no version of the original trainer knows this key: with it, its own script stops. What was meant "
        "(v-prediction) cannot be trained; remove the key"
    )


def _as(*names: str) -> Callable[[Any, Config], Options]:
    """Make the options `names` of the value as it is."""
    return lambda value, config: dict.fromkeys(names, value)


def _nothing(value: Any, config: Config) -> Options:
    return {}


def _output(value: Any, config: Config) -> Options:
    name = config.get("experiment_id")
    return {"output_dir": f"{value.rstrip('/')}/{name}" if isinstance(name, str) else value}


def _updates(option: str) -> Callable[[Any, Config], Options]:
    """Make the option `option` of a number of passes: the original counts micro-batches, we count updates."""

    def make(value: int, config: Config) -> Options:
        accumulation = _whole(config.get("grad_accum_steps") or 1)
        return {option: max(-(-value // max(accumulation, 1)), 0 if option == "ema_start_steps" else 1)}

    return make


def _aspects(value: Any, config: Config) -> Options:
    given = config.get("bucketeer_random_ratio")
    return {"multi_aspect_ratio": value} | ({"bucket_random_ratio": 0.05} if given is None else {})


def _dtype(value: str, config: Config) -> Options:
    if value == "bfloat16":
        return {"full_bf16": True, "mixed_precision": "bf16"}
    if value == "float32":
        return {"mixed_precision": "bf16"}
    raise BadValue(f"expected bfloat16 or float32, got {value!r}")


def _module_filters(value: tuple[str, ...], config: Config) -> Options:
    return {"network_args": (f"module_filters={','.join(value)}",)} if value else {}


def _filter_params(value: dict[str, Any], config: Config) -> Options:
    return {"controlnet_filter_params": tuple(f"{name}={json.dumps(item)}" for name, item in value.items())}


def _keys(stage: str) -> dict[str, Key]:
    """Return the keys known for a stage."""
    return {**_COMMON, "generator_checkpoint_path": Key(_text, _as(f"stage_{stage}_checkpoint_path"))}


_COMMON: dict[str, Key] = {
    "experiment_id": Key(_text, _as("output_name")),
    "checkpoint_path": Key(_text, _output),
    "output_path": Key(_text, _as("sample_dir")),
    "checkpoint_extension": Key(_text, _as("save_model_as")),
    "dist_file_subfolder": Key(_text, _nothing, "is not needed: processes find each other without a file"),
    "allow_tf32": Key(_switch, lambda value, config: {"no_tf32": not value}),
    "model_version": Key(_text, _as("model_version")),
    "dtype": Key(_text, _dtype),
    "wandb_project": Key(_text, lambda value, config: {"log_with": "wandb", "log_tracker_name": value}),
    "wandb_entity": Key(_text, _as("wandb_entity")),
    "lr": Key(_number, _as("learning_rate")),
    "batch_size": Key(_whole, _as("global_batch_size")),
    "grad_accum_steps": Key(_whole, _as("gradient_accumulation_steps")),
    "image_size": Key(_whole, _as("resolution")),
    "multi_aspect_ratio": Key(_list, _aspects),
    "bucketeer_random_ratio": Key(_number, _as("bucket_random_ratio")),
    "updates": Key(_whole, _as("max_train_steps")),
    "warmup_updates": Key(
        _whole, lambda value, config: {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": value}
    ),
    "save_every": Key(_whole, _as("save_every_n_steps", "sample_every_n_steps")),
    "backup_every": Key(_whole, _as("backup_every_n_steps")),
    "use_fsdp": Key(_switch, _as("fsdp")),
    "ema_start_iters": Key(_whole, _updates("ema_start_steps")),
    "ema_iters": Key(_whole, _updates("ema_every_n_steps")),
    "ema_beta": Key(_number, _as("ema_decay")),
    "adaptive_loss_weight": Key(_switch, _as("adaptive_loss_weight")),
    "edm_objective": Key(_edm, _nothing),
    "shift": Key(_number, _nothing, "is not used in training; the original trainer asks for it and does not use it"),
    "offset_noise": Key(_number, _as("noise_offset")),
    "captions_getter": Key(_list, _as("caption_field")),
    "dataset_filters": Key(_list, _as("dataset_filter")),
    "webdataset_path": Key(_texts, _as("webdataset_path")),
    "effnet_checkpoint_path": Key(_text, _as("effnet_checkpoint_path")),
    "previewer_checkpoint_path": Key(_text, _as("previewer_checkpoint_path")),
    "stage_a_checkpoint_path": Key(_text, _as("stage_a_checkpoint_path")),
    "clip_text_model_name": Key(_text, _as("text_model_checkpoint_path")),
    "clip_image_model_name": Key(_text, _as("image_model_checkpoint_path")),
    "module_filters": Key(_texts, _module_filters),
    "rank": Key(_whole, lambda value, config: {"network_dim": value, "network_alpha": 1.0}),
    "train_tokens": Key(_tokens, _as("train_tokens")),
    "lora_checkpoint_path": Key(_text, _as("network_weights")),
    "controlnet_blocks": Key(_numbers, _as("controlnet_blocks")),
    "controlnet_filter": Key(_text, _as("controlnet_filter")),
    "controlnet_filter_params": Key(_table, _filter_params),
    "controlnet_bottleneck_mode": Key(_text, _as("controlnet_bottleneck_mode")),
    "controlnet_checkpoint_path": Key(_text, _as("controlnet_checkpoint_path")),
}
