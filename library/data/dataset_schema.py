"""Which keys a dataset configuration may hold, at which level, for which kind of data set, and what their values are.

The keys are the fields of `DatasetOptions` and `SubsetOptions`; here they are checked as strictly as files deserve,
where nothing is typed by hand on a command line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from library.data.dataset_spec import CONTROLNET, DREAMBOOTH, FINETUNING
from library.data.options import CacheOptions, DatasetOptions, LoaderOptions, SubsetOptions
from library.errors import Problem
from library.option_groups import Option, options_of
from library.option_values import BadValue, check_choice, nearest, number_pair, resolution_text

LEVEL_NAMES = {"general": "[general]", "dataset": "[[datasets]]", "subset": "[[datasets.subsets]]"}
KIND_NAMES = {
    DREAMBOOTH: "DreamBooth",
    FINETUNING: "metadata (fine-tuning)",
    CONTROLNET: "conditioning_data_dir",
}
PATH_KEYS = ("image_dir", "metadata_file", "conditioning_data_dir")
REQUIRED = {
    DREAMBOOTH: ("image_dir",),
    FINETUNING: ("metadata_file",),
    CONTROLNET: ("image_dir", "conditioning_data_dir"),
}
DROPOUT_KEYS = ("caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate")
_CONVERTED = ("multi_aspect_ratio", "dataset_filter", "caption_field")
_ELSEWHERE_ON_COMMAND_LINE = ("max_token_length", "in_json", "seed")
_TYPE_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text in quotes"}


@dataclass(frozen=True)
class Key:
    """One key: levels and kinds that may hold it, and how its value is checked."""

    name: str
    levels: tuple[str, ...]
    kinds: tuple[str, ...]
    option: Option | None = None

    def legal_levels(self) -> str:
        """Return where the key belongs, as written in a file."""
        return " or ".join(LEVEL_NAMES[level] for level in self.levels)

    def read(self, value: Any) -> Any:
        """Return the value as the specs hold it.

        Raises:
            BadValue: It is of another type, or outside its range.
        """
        if self.name == "resolution":
            return _resolution(value)
        if self.name == "face_crop_aug_range":
            return _pair(value, self.option)
        if self.name == "webdataset_path":
            return _paths(value)
        if self.name in _CONVERTED and self.option is not None:
            return self.option.notes["convert"](value)
        if self.name == "custom_attributes":
            return _table(value)
        annotation = self.option.annotation if self.option else str
        value = _typed(value, annotation)
        if self.name in PATH_KEYS:
            return _path(value)
        if self.option is not None:
            _check_range(value, self.option, self.name)
        return value


@cache
def known_keys() -> Mapping[str, Key]:
    """Return every key of dataset configurations by name."""
    keys = {
        "conditioning_data_dir": Key("conditioning_data_dir", ("subset",), (CONTROLNET,)),
        "webdataset_path": Key("webdataset_path", ("subset",), (DREAMBOOTH, FINETUNING)),
    }
    for group in (DatasetOptions, SubsetOptions):
        for option in options_of(group):
            levels = option.notes.get("scope", ())
            if levels:
                name = option.notes.get("toml", option.field_name)
                keys[name] = Key(name, levels, option.notes.get("kinds", ()), option)
    return keys


@cache
def command_line_names() -> frozenset[str]:
    """Return names that the command line knows but no dataset configuration may hold."""
    names = set(_ELSEWHERE_ON_COMMAND_LINE)
    for group in (DatasetOptions, SubsetOptions, CacheOptions, LoaderOptions):
        names.update(option.name for option in options_of(group) if option.offered)
    return frozenset(names - set(known_keys()))


def _typed(value: Any, annotation: Any) -> Any:
    """Check the exact type: files say what they mean, so `"1"` is no number and `true` no 1."""
    if annotation is bool and isinstance(value, bool):
        return value
    if annotation is str and isinstance(value, str):
        return value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int and is_number and isinstance(value, int):
        return value
    if annotation is float and is_number:
        if not math.isfinite(value):
            raise BadValue(f"must be a finite number, not {value!r}")
        return value
    raise BadValue(f"must be {_TYPE_WORDS.get(annotation, 'a value')}, not {value!r}")


def _check_range(value: Any, option: Option, name: str) -> None:
    notes = option.notes
    if name == "resize_interpolation":
        check_choice(value, (*(option.choices or ()), "box", "lanczos4"))
    else:
        check_choice(value, option.choices)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or name == "num_repeats":
        return  # Subsets with fewer repeats than 1 are left out with a warning, as users know it.
    if "at_least" in notes and value < notes["at_least"]:
        raise BadValue(f"must be at least {notes['at_least']}, not {value!r}")
    if "at_most" in notes and value > notes["at_most"]:
        raise BadValue(f"must be at most {notes['at_most']}, not {value!r}")


def _resolution(value: Any) -> str:
    shape = "must be a size such as 512, or [width, height]"
    if isinstance(value, str):
        return resolution_text(value)
    parts: Sequence[Any] = value if isinstance(value, list) else [value]
    whole = all(isinstance(part, int) and not isinstance(part, bool) for part in parts)
    if not whole or (isinstance(value, list) and len(value) != 2):
        raise BadValue(f"{shape}, not {value!r}")
    try:
        return resolution_text(list(parts))
    except BadValue:
        raise BadValue(f"{shape}, not {value!r}") from None


def _pair(value: Any, option: Option | None) -> tuple[float, float]:
    if not isinstance(value, list):
        raise BadValue(f"must be a list of two numbers such as [2.0, 4.0], not {value!r}")
    pair = number_pair([_typed(part, float) for part in value])
    more_than = option.notes.get("more_than", -math.inf) if option else -math.inf
    if pair[0] <= more_than:
        raise BadValue(f"must hold numbers above {more_than}, not {value!r}")
    return pair


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadValue(f"must be a table such as {{ key = 1 }}, not {value!r}")
    return value


def _paths(value: Any) -> tuple[str, ...]:
    parts = value if isinstance(value, list) else [value]
    if not parts or not all(isinstance(part, str) for part in parts):
        raise BadValue(f"must be a path or a list of paths of tar files, not {value!r}")
    return tuple(_path(part) for part in parts)


def _path(value: str) -> str:
    if any(ord(character) < 32 for character in value):
        raise BadValue(
            f"{value!r} holds a control character; backslashes have a meaning inside double quotes: "
            "use single quotes or forward slashes"
        )
    if not value:
        raise BadValue("must not be empty")
    return value


@dataclass(frozen=True)
class Level:
    """One table of a configuration: where it is, its level, and the kinds of data set it may speak about."""

    where: str
    level: str
    kinds: tuple[str, ...]
    caption_dropout: bool = True
    structure: tuple[str, ...] = ()


def check_table(table: Mapping[str, Any], place: Level, values: dict[str, Any]) -> Iterator[Problem]:
    """Check one table; values that are good are put into `values`, everything else is yielded as a problem."""
    for name, value in table.items():
        if name in place.structure:
            continue
        where = f"{place.where}{name}"
        refusal = _refusal(name, place)
        if refusal is not None:
            yield Problem(where, f"{refusal[0]} (value {_short(value)})", refusal[1])
            continue
        try:
            values[name] = known_keys()[name].read(value)
        except BadValue as error:
            yield Problem(where, str(error))


def _refusal(name: str, place: Level) -> tuple[str, str] | None:
    """Return (what, hint) when the key may not stand here."""
    key = known_keys().get(name)
    here = LEVEL_NAMES[place.level]
    if key is None:
        return _unknown(name, place)
    if name in DROPOUT_KEYS and not place.caption_dropout:
        return f"this script has no caption dropout, so {name!r} has no place here", "Remove it."
    if place.level not in key.levels:
        return f"{name!r} is not allowed in {here}", f"Move it to {key.legal_levels()}."
    if not set(key.kinds) & set(place.kinds):
        allowed = " and ".join(KIND_NAMES[kind] for kind in key.kinds)
        hint = f"It is a key of {allowed} data sets, in {key.legal_levels()}."
        if name == "conditioning_data_dir":
            hint += " With --masked_loss it names the folder of masks."
        return f"{name!r} is not allowed in {here} of this data set", hint
    return None


def _unknown(name: str, place: Level) -> tuple[str, str]:
    if name in command_line_names():
        return f"{name!r} is not a key of dataset configurations", f"Give --{name} on the command line."
    legal = [
        key.name for key in known_keys().values() if place.level in key.levels and set(key.kinds) & set(place.kinds)
    ]
    near = nearest(name, legal, cutoff=0.6) or nearest(name, list(known_keys()), cutoff=0.6)
    if near is None:
        return f"unknown key {name!r}", f"Known in {LEVEL_NAMES[place.level]}: {', '.join(sorted(legal))}."
    return f"unknown key {name!r}", f"Did you mean {near!r} ({known_keys()[near].legal_levels()})?"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
