"""The options of a prompt, one row each: how they are written, what they take, and which field of a request they set.

There are two places for prompts: sample pictures of a training run, and gen_img.py, which knows more options. A `Place`
is the table of one of them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from library.file_names import bad_file_name
from library.inference.cascade_samplers import SAMPLERS
from library.inference.samplers import SAMPLER_NAMES

MAX_SIDE = 8192
MAX_NUMBER = 1e6
_LONGEST_NUMBER = 60
"""Characters; patterns that look for numbers take long over long rows of digits."""
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_MAX_SEED = 2**64 - 1
_MAX_SEEDS = 100_000
_SIDE_STEP, MIN_SIDE = 8, 64
_MOST_KERNEL = 99


class UnusableValue(Exception):
    """A value is not what its option takes; the text says what it takes."""


class Written(str):
    """A value from a prompt line, where numbers are written as text; in a table a number must be a number."""


@dataclass(frozen=True, slots=True)
class PromptOption:
    """An option of a prompt.

    Attributes:
        flag: `--flag` in a line.
        key: name in a table.
        read: makes the value, or raises `UnusableValue`.
        field: of `PromptRequest`; `name.key` for a key of a mapping; None: the option has no effect.
        sdxl: only SDXL models can do something with it.
    """

    flag: str
    key: str
    read: Callable[[Any], Any]
    field: str | None
    sdxl: bool = False


@dataclass(frozen=True)
class Place:
    """Where prompts stand, and the options that they may have there.

    Attributes:
        options: all options.
        elsewhere: options that only the other place knows.
        elsewhere_name: what the other place is called in messages.
        sdxl: the model is an SDXL model.
        needs_picture: nothing is drawn without the picture that `--cn` names.
    """

    options: tuple[PromptOption, ...]
    elsewhere: tuple[PromptOption, ...] = ()
    elsewhere_name: str = ""
    sdxl: bool = False
    needs_picture: bool = False

    @cached_property
    def by_flag(self) -> Mapping[str, PromptOption]:
        """The options by flag, in lower case."""
        return {option.flag: option for option in self.options}

    @cached_property
    def by_key(self) -> Mapping[str, PromptOption]:
        """The options by their names in tables, `prompt` included."""
        return {option.key: option for option in (PROMPT_TEXT, *self.options)}

    def flag_hint(self, flag: str) -> str:
        """Return what to do about the unknown `--flag`."""
        glued = re.fullmatch(r"([A-Za-z]+)[=:]?([0-9.+-].*)", flag)
        if glued and glued[1].lower() in self.by_flag:
            return f"Write --{glued[1]} {glued[2]}."
        known = f"Known: {' '.join('--' + name for name in self.by_flag)}."
        if flag.lower() in (option.flag for option in self.elsewhere):
            return f"It is for {self.elsewhere_name}. {known}"
        return known

    def key_hint(self, key: str) -> str:
        """Return what to do about the unknown `key` of a table."""
        if key in (option.key for option in self.elsewhere):
            return f"It is for {self.elsewhere_name}."
        near = difflib.get_close_matches(key, self.by_key, 1)
        return f"Did you mean {near[0]}?" if near else f"Known: {', '.join(self.by_key)}."


def whole(low: int, high: int) -> Callable[[Any], int]:
    """Return a reader of whole numbers from `low` to `high`."""

    def read(value: Any) -> int:
        if isinstance(value, Written) and re.fullmatch(r"[+-]?[0-9]{1,20}", value):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise UnusableValue(f"a whole number from {low} to {high}")
        return value

    return read


def _side(low: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        pixels = whole(low, MAX_SIDE)(value)
        return max(MIN_SIDE, pixels - pixels % _SIDE_STEP)

    return read


def _number(value: Any) -> float:
    if isinstance(value, Written) and len(value) <= _LONGEST_NUMBER and _NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MAX_NUMBER:
        raise UnusableValue("a number")
    return float(value)


def _from_to(low: float, high: float) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        try:
            number = _number(value)
        except UnusableValue:
            number = high + 1
        if not low <= number <= high:
            raise UnusableValue(f"a number from {low:g} to {high:g}")
        return number

    return read


def _number_or_none(value: Any) -> float | None:
    if isinstance(value, str) and value.lower() == "none":
        return None
    try:
        return _number(value)
    except UnusableValue:
        raise UnusableValue("a number, or none") from None


def _list_of(read: Callable[[Any], Any], takes: str) -> Callable[[Any], tuple[Any, ...]]:
    """Return a reader of lists: `1,2,3` in a line, a list or a single value in a table."""

    def read_list(value: Any) -> tuple[Any, ...]:
        if isinstance(value, Written):
            items: list[Any] = [Written(item.strip()) for item in value.split(",", _MAX_SEEDS)]
        else:
            items = value if isinstance(value, list) else [value]
        try:
            found = tuple(read(item) for item in items)
        except UnusableValue:
            found = ()
        if not 0 < len(found) <= _MAX_SEEDS:
            raise UnusableValue(takes)
        return found

    return read_list


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise UnusableValue("text")
    return re.sub(r"[\x00-\x1f\x7f]+", " ", value).strip()


def _file_name(value: Any) -> str:
    name = _text(value)
    reason = bad_file_name(name) if name else "is empty"
    if reason is not None:
        raise UnusableValue(f"a file name without folders; this one {reason}")
    return name


def unsharp_numbers(value: Any) -> tuple[int, float, float, bool] | None:
    """Read kernel size, sigma, strength and, if wanted, whether the target is sharpened; None: nothing is.

    Raises:
        UnusableValue: it is something else, or a kernel without middle.
    """
    text = _unspaced(value)
    if text == "none":
        return None
    number = r"([0-9]*\.?[0-9]+)"
    found = re.fullmatch(rf"([0-9]+),{number},(-?){number}(?:,([01]))?", text) if len(text) <= _LONGEST_NUMBER else None
    if found is not None:
        kernel, sigma = int(found[1]), float(found[2])
        if kernel % 2 and 3 <= kernel <= _MOST_KERNEL and sigma > 0:
            return kernel, sigma, float(found[3] + found[4]), found[5] != "0"
    raise UnusableValue("an odd kernel size, sigma, strength and 1 or 0, such as 3,0.5,0.5,1")


def _unspaced(value: Any) -> str:
    return "".join(_text(value).split()).lower()


def _unsharp(value: Any) -> str:
    unsharp_numbers(value)
    return _unspaced(value)


def _one_of(names: Sequence[str]) -> Callable[[Any], str]:
    """Return a reader of one of these names, in any case."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or value.lower() not in names:
            raise UnusableValue(f"one of {', '.join(names)}")
        return value.lower()

    return read


PROMPT_TEXT = PromptOption("", "prompt", _text, "prompt")
"""The text of the prompt itself, which has no flag."""

_seed = whole(0, _MAX_SEED)
_timestep = whole(0, 1000)
_pixels = whole(1, 1 << 16)


def _shared(smallest_side: int) -> tuple[PromptOption, ...]:
    return (
        PromptOption("n", "negative_prompt", _text, "negative_prompt"),
        PromptOption("w", "width", _side(smallest_side), "width"),
        PromptOption("h", "height", _side(smallest_side), "height"),
        PromptOption("s", "sample_steps", whole(1, 1000), "steps"),
    )


# Samples of old prompt files come out larger rather than not at all; gen_img.py refuses what --W and --H refuse.
_SHARED, _SHARED_STRICT = _shared(1), _shared(MIN_SIDE)

_SHARED_REST: tuple[PromptOption, ...] = (
    PromptOption("l", "scale", _number, "scale"),
    PromptOption("ss", "sample_sampler", _one_of(SAMPLER_NAMES), "sampler"),
    PromptOption("cn", "controlnet_image", _text, "controlnet_image"),
    # For other kinds of models; accepted so that one prompt file serves several trainers.
    PromptOption("g", "guidance_scale", _number, None),
    PromptOption("ctr", "cfg_trunc_ratio", _number, None),
    PromptOption("rcfg", "renorm_cfg", _number, None),
    PromptOption("fs", "flow_shift", _number, None),
)

_GENERATION_ONLY: tuple[PromptOption, ...] = (
    PromptOption("nl", "negative_scale", _number_or_none, "negative_scale"),
    PromptOption("t", "strength", _from_to(0, 1), "strength"),
    PromptOption("c", "clip_prompt", _text, "clip_prompt"),
    PromptOption("am", "network_mul", _list_of(_number, "numbers separated by commas"), "multipliers"),
    PromptOption("f", "file_name", _file_name, "file_name"),
    PromptOption("ow", "original_width", _pixels, "original_width", sdxl=True),
    PromptOption("oh", "original_height", _pixels, "original_height", sdxl=True),
    PromptOption("nw", "original_width_negative", _pixels, "original_width_negative", sdxl=True),
    PromptOption("nh", "original_height_negative", _pixels, "original_height_negative", sdxl=True),
    PromptOption("ct", "crop_top", whole(-(1 << 16), 1 << 16), "crop_top", sdxl=True),
    PromptOption("cl", "crop_left", whole(-(1 << 16), 1 << 16), "crop_left", sdxl=True),
    PromptOption("dsd1", "ds_depth_1", whole(0, 100), "deep_shrink.depth_1"),
    PromptOption("dst1", "ds_timesteps_1", _timestep, "deep_shrink.timesteps_1"),
    PromptOption("dsd2", "ds_depth_2", whole(0, 100), "deep_shrink.depth_2"),
    PromptOption("dst2", "ds_timesteps_2", _timestep, "deep_shrink.timesteps_2"),
    PromptOption("dsr", "ds_ratio", _from_to(0.01, 1), "deep_shrink.ratio"),
    PromptOption("glt", "gradual_latent_timesteps", _timestep, "gradual_latent.timesteps"),
    PromptOption("glr", "gradual_latent_ratio", _from_to(0.01, 1), "gradual_latent.ratio"),
    PromptOption("gle", "gradual_latent_every_n_steps", whole(1, 1000), "gradual_latent.every_n_steps"),
    PromptOption("gls", "gradual_latent_ratio_step", _from_to(0.001, 1), "gradual_latent.ratio_step"),
    PromptOption("glsn", "gradual_latent_s_noise", _from_to(0, 100), "gradual_latent.s_noise"),
    PromptOption("glus", "gradual_latent_unsharp_params", _unsharp, "gradual_latent.unsharp_params"),
)

PROMPT_OPTIONS: tuple[PromptOption, ...] = (*_SHARED, PromptOption("d", "seed", _seed, "seed"), *_SHARED_REST)
"""What the prompts of sample pictures may have."""

_SEEDS = PromptOption("d", "seed", _list_of(_seed, f"seeds from 0 to {_MAX_SEED}, separated by commas"), "seeds")

TRAINING_SAMPLES = Place(PROMPT_OPTIONS, _GENERATION_ONLY, "prompts of gen_img.py")
"""Prompts of the sample pictures of a training run."""

GENERATION = Place((*_SHARED_STRICT, _SEEDS, *_SHARED_REST, *_GENERATION_ONLY))
"""Prompts of gen_img.py."""

_STAGE_B: tuple[PromptOption, ...] = (
    PromptOption("l", "scale", _number, "scale"),
    PromptOption("ss", "sample_sampler", _one_of(SAMPLERS), "sampler"),
    PromptOption("f", "shift", _from_to(0.01, 100), "shift"),
    PromptOption("cn", "controlnet_image", _text, "controlnet_image"),
)
_STAGE_C_ONLY: tuple[PromptOption, ...] = (
    PromptOption("le", "scale_end", _number_or_none, "scale_end"),
    PromptOption("t", "t_start", _from_to(0.001, 1), "strength"),
)
_CASCADE: tuple[PromptOption, ...] = (*_STAGE_B, *_STAGE_C_ONLY)

CASCADE_SAMPLES = Place(
    (*_SHARED, *_CASCADE, PromptOption("d", "seed", _seed, "seed")), _GENERATION_ONLY, "prompts of gen_img.py"
)
"""Prompts of the sample pictures of a run that trains stage C of Stable Cascade, or something for it."""

STAGE_B_SAMPLES = Place(
    (
        *_SHARED,
        *_STAGE_B,
        PromptOption("d", "seed", _seed, "seed"),
        # Accepted, so that one prompt file serves both stages.
        *(replace(option, field=None) for option in _STAGE_C_ONLY),
    ),
    _GENERATION_ONLY,
    "prompts of gen_img.py",
    needs_picture=True,
)
"""Prompts of the sample pictures of a run that trains stage B."""

CASCADE_GENERATION = Place(
    (
        *_SHARED_STRICT,
        *_CASCADE,
        _SEEDS,
        PromptOption("am", "network_mul", _list_of(_number, "numbers separated by commas"), "multipliers"),
        PromptOption("fn", "file_name", _file_name, "file_name"),
    ),
    _GENERATION_ONLY,
    "prompts of gen_img.py",
)
"""Prompts of stable_cascade_gen_img.py, where `--f` is the shift."""
