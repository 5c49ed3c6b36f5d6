"""YAML files of the original Stable Cascade trainer as `--config_file` of our scripts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from library import cascade_yaml
from library.config_file import ConfigValue, ForeignConfig
from library.errors import Problem, raise_problems

_IMAGE_SHARE = 0.1
"""Of the pictures that the original trainer shows stage C an embedding of."""


def is_yaml(name: str) -> bool:
    """Whether a name is that of a file of the original trainer."""
    return Path(name).suffix.lower() in cascade_yaml.SUFFIXES


def spell_out(words: list[str]) -> list[str]:
    """Return a command line with `--config_file` before a YAML file that begins it."""
    if words and not words[0].startswith("-") and is_yaml(words[0]):
        return ["--config_file", *words]
    return words


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
    _refuse_others(options, converted.sources, offered, name)
    values = {
        option: ConfigValue(value, f"{name}: {converted.sources.get(option) or option}")
        for option, value in options.items()
        if option in offered
    }
    return ForeignConfig(values, converted.notes)


def _completed(options: Mapping[str, Any], typed: Collection[str]) -> dict[str, Any]:
    """Return options with what the original trainer does besides, and without what has no ground here."""
    found = dict(options)
    if not found.get("sample_prompts") and "sample_prompts" not in typed:
        # It draws captions of its data; here there is nothing to draw without prompts.
        found.pop("sample_every_n_steps", None)
    if every := found.get("save_every_n_steps"):
        # It writes over its one model and its one state at every save.
        found = {"save_state": True, "save_last_n_steps": every, **found}
    if found.get("image_model_checkpoint_path"):
        found = {"clip_image_cond_rate": _IMAGE_SHARE, **found}
    return found


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
