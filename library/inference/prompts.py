"""Requests for pictures, and the prompts that they are read from: `a photo of a dog --n blurry --w 512 --h 768 --d 42`.

Text before the first ` --option` is the prompt and is never searched for options; names of options ignore case. Which
options there are depends on the place (`prompt_options`); files are read by `prompt_files`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from library.errors import Problem, raise_problems
from library.inference.prompt_files import PromptEntry, read_entries, shown
from library.inference.prompt_options import (
    PROMPT_OPTIONS,
    PROMPT_TEXT,
    TRAINING_SAMPLES,
    Place,
    PromptOption,
    UnusableValue,
    Written,
)

__all__ = [
    "PROMPT_OPTIONS",
    "PromptFile",
    "PromptRequest",
    "load_prompts",
    "parse_entry",
    "parse_prompt_line",
    "read_prompts",
]

logger = logging.getLogger(__name__)

_OPTION_START = re.compile(r"\s--(?=[A-Za-z])")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRequest:
    """One picture to make. Sides are multiples of 8.

    Attributes:
        prompt: what to draw.
        negative_prompt: what not to draw.
        width: in pixels.
        height: in pixels.
        steps: denoising steps.
        seed: of all noise; None where the prompt gives none: whoever renders chooses it then.
        scale: of guidance.
        sampler: one of `SAMPLER_NAMES`.
        controlnet_image: the picture that guides this one.
        index: the prompt's place in its file, bad ones counted.
        where: names that place in messages.
        negative_scale: scale of the negative prompt on its own; None: there is one scale.
        strength: how much of the picture to start from is painted anew, 0 to 1; None: the default.
        shift: of the noise schedule, for models that have one; None: the default.
        scale_end: what the scale of guidance becomes towards the end, for models that can change it; None: it stays.
        clip_prompt: another prompt for CLIP.
        multipliers: strengths of the networks, the last one for all that follow; None: those of the command line.
        file_name: of the picture, without folder.
        seeds: for the pictures of this prompt, one after the other; empty where none are given, else `seed` is the
            first.
        raw_prompt: the prompt as it was written, with its options, before anything was expanded.
        deep_shrink: what the prompt itself says of `depth_1`, `timesteps_1`, `depth_2`, `timesteps_2`, `ratio`.
        gradual_latent: what it says of `timesteps`, `ratio`, `ratio_step`, `every_n_steps`, `s_noise`,
            `unsharp_params` (text such as `3,0.5,0.5,1`, or `none`).
        original_width: of the size that SDXL is told; None: the picture's own, so also below.
        original_height: see `original_width`.
        original_width_negative: what SDXL is told with the negative prompt.
        original_height_negative: see `original_width_negative`.
        crop_top: pixels that SDXL is told were cut off; None: 0.
        crop_left: see `crop_top`.
    """

    prompt: str
    negative_prompt: str = ""
    width: int = 512
    height: int = 512
    steps: int = 30
    seed: int | None = None
    scale: float = 7.5
    sampler: str = "ddim"
    controlnet_image: str | None = None
    index: int = 0
    where: str = ""
    negative_scale: float | None = None
    strength: float | None = None
    shift: float | None = None
    scale_end: float | None = None
    clip_prompt: str | None = None
    multipliers: tuple[float, ...] | None = None
    file_name: str | None = None
    seeds: tuple[int, ...] = ()
    raw_prompt: str = ""
    deep_shrink: Mapping[str, float | str] = field(default_factory=dict, hash=False)
    gradual_latent: Mapping[str, float | str] = field(default_factory=dict, hash=False)
    original_width: int | None = None
    original_height: int | None = None
    original_width_negative: int | None = None
    original_height_negative: int | None = None
    crop_top: int | None = None
    crop_left: int | None = None


@dataclass(frozen=True, slots=True)
class PromptFile:
    """What stands in a prompt file: usable prompts, what is wrong with the others, and what has no effect."""

    requests: tuple[PromptRequest, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


def read_prompts(
    path: str | Path,
    *,
    default_sampler: str = "ddim",
    defaults: PromptRequest | None = None,
    place: Place = TRAINING_SAMPLES,
) -> PromptFile:
    """Read the prompts of sample pictures from a file: `.txt`, `.toml` or `.json`, UTF-8.

    Args:
        path: the file.
        default_sampler: sampler of prompts that name none, unless there are `defaults`.
        defaults: what prompts leave open.
        place: decides which options there are.

    Raises:
        UserError: the file cannot be read as a whole, or holds no usable prompt.
    """
    requests: list[PromptRequest] = []
    problems: list[Problem] = []
    notes: list[str] = []
    template = defaults if defaults is not None else PromptRequest(prompt="", sampler=default_sampler)
    for index, entry in enumerate(read_entries(Path(path))):
        request, found = parse_entry(entry, replace(template, index=index), place, notes)
        problems.extend(found)
        if not found:
            requests.append(request)
    if not requests:
        problems.append(Problem(str(path), "holds no usable prompt", "Write one prompt per line."))
        raise_problems(problems)
    return PromptFile(tuple(requests), tuple(problems), tuple(notes))


def load_prompts(
    path: str | Path,
    *,
    default_sampler: str = "ddim",
    defaults: PromptRequest | None = None,
    place: Place = TRAINING_SAMPLES,
    strict: bool = True,
) -> list[PromptRequest]:
    """Return all prompts of a file, as `read_prompts` reads them.

    Args:
        path: the file.
        default_sampler: sampler of prompts that name none, unless there are `defaults`.
        defaults: what prompts leave open.
        place: decides which options there are.
        strict: refuse the file if any prompt is bad; otherwise bad prompts are left out with a warning each.

    Raises:
        UserError: as `read_prompts`, and (strict) when any prompt is bad; every problem is listed with its place.
    """
    file = read_prompts(path, default_sampler=default_sampler, defaults=defaults, place=place)
    if strict:
        raise_problems(file.problems)
    for note in file.notes:
        logger.warning("%s", note)
    for problem in file.problems:
        logger.warning("prompt skipped: %s", problem)
    return list(file.requests)


def parse_prompt_line(
    line: str,
    *,
    where: str,
    index: int = 0,
    default_sampler: str = "ddim",
    defaults: PromptRequest | None = None,
    place: Place = TRAINING_SAMPLES,
) -> PromptRequest:
    """Read one line of the grammar.

    Args:
        line: the prompt with its options.
        where: names the line in messages.
        index: place of the line among all.
        default_sampler: sampler of prompts that name none, unless there are `defaults`.
        defaults: what the line leaves open.
        place: decides which options there are.

    Raises:
        UserError: everything that is wrong with the line.
    """
    template = defaults if defaults is not None else PromptRequest(prompt="", sampler=default_sampler)
    request, problems = parse_entry(PromptEntry(where, line), replace(template, index=index), place, [])
    raise_problems(problems)
    return request


def parse_entry(
    entry: PromptEntry, defaults: PromptRequest, place: Place, notes: list[str]
) -> tuple[PromptRequest, list[Problem]]:
    """Read a line or a table.

    Args:
        entry: the prompt as written.
        defaults: the request whose fields the prompt replaces.
        place: decides which options there are.
        notes: what has no effect is appended here.

    Returns:
        The request, and everything that is wrong with the prompt; with problems the request is of no use.
    """
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    content = entry.content
    settings = _line_settings(content, place) if isinstance(content, str) else _table_settings(content, place)
    for name, option, value in settings:
        if isinstance(option, str):
            problems.append(Problem(entry.where, f"unknown {shown(name)}", option))
            continue
        try:
            read = option.read(value)
        except UnusableValue as takes:
            problems.append(Problem(entry.where, f"{name} is {shown(value)}, but takes {takes}"))
            continue
        if option.field is None or (option.sdxl and not place.sdxl):
            notes.append(f"{entry.where}: {name} has no effect on this kind of model")
        else:
            _store(values, option.field, read, defaults)
    if values.get("seeds"):
        values["seed"] = values["seeds"][0]
    request = replace(defaults, **values, where=entry.where)
    if place.needs_picture and not request.controlnet_image:
        problems.append(Problem(entry.where, "names no picture to make again", "Add one: --cn photo.jpg."))
    return request, problems


def _store(values: dict[str, Any], name: str, value: Any, defaults: PromptRequest) -> None:
    """Put the value of an option among the fields of a request; `field.key` adds a key to a mapping."""
    field_name, dot, key = name.partition(".")
    if not dot:
        values[name] = value
        return
    before = values.get(field_name, getattr(defaults, field_name))
    values[field_name] = {**before, key: value}


_Setting = tuple[str, "PromptOption | str", Any]
"""Name as written, its option (or the hint for an unknown name), raw value."""


def _line_settings(line: str, place: Place) -> Iterator[_Setting]:
    text, *parts = _OPTION_START.split(" " + line)
    yield "prompt", PROMPT_TEXT, text
    for part in parts:
        flag, *value = part.split(None, 1)
        option = place.by_flag.get(flag.lower()) or place.flag_hint(flag)
        yield f"--{flag}", option, Written(value[0].strip() if value else "")


def _table_settings(table: Mapping[str, Any], place: Place) -> Iterator[_Setting]:
    for key, value in table.items():
        yield key, place.by_key.get(key) or place.key_hint(key), value
