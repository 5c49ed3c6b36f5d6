"""Prompt files and the grammar of a prompt line: `a photo of a dog --n blurry --w 512 --h 768 --d 42`.

Text before the first ` --option` is the prompt and is never searched for options. Files are `.txt` (one prompt per
line, lines starting with `#` are comments), `.toml` (`[prompt]` with shared keys and `[[prompt.subset]]` entries) or
`.json` (a list of lines or of tables).
"""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config_file import parse_toml
from library.errors import Problem, UserError, raise_problems
from library.inference.samplers import SAMPLER_NAMES
from library.text_files import read_text

logger = logging.getLogger(__name__)

MAX_SIDE = 8192
MAX_NUMBER = 1e6
MAX_FILE_BYTES = 16 * 2**20
_MAX_SEED = 2**64 - 1
_SIDE_STEP, _MIN_SIDE = 8, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRequest:
    """One picture to make.

    `index` is the prompt's place in its file (bad ones counted), `where` names it in messages. `seed` is None where
    the prompt gives none; whoever renders chooses it then. Sides are multiples of 8.
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
    negative_scale: float | None = None
    strength: float | None = None
    index: int = 0
    where: str = ""


class _Unusable(Exception):
    """A value is not what its option takes; the text says what it takes."""


class _Written(str):
    """A value from a prompt line, where numbers are written as text; in a table a number must be a number."""


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, _Written) and re.fullmatch(r"[+-]?[0-9]{1,20}", value):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _Unusable(f"a whole number from {low} to {high}")
        return value

    return read


def _side(value: Any) -> int:
    pixels = _whole(1, MAX_SIDE)(value)
    return max(_MIN_SIDE, pixels - pixels % _SIDE_STEP)


def _number(value: Any) -> float:
    if isinstance(value, _Written) and re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MAX_NUMBER:
        raise _Unusable("a number")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Unusable("text")
    return re.sub(r"[\x00-\x1f\x7f]+", " ", value).strip()


def _sampler(value: Any) -> str:
    if not isinstance(value, str) or value.lower() not in SAMPLER_NAMES:
        raise _Unusable(f"one of {', '.join(SAMPLER_NAMES)}")
    return value.lower()


@dataclass(frozen=True, slots=True)
class PromptOption:
    """An option of a prompt: `--flag` in a line, `key` in a table, `field` of `PromptRequest` (None: no effect)."""

    flag: str
    key: str
    read: Callable[[Any], Any]
    field: str | None


PROMPT_OPTIONS: tuple[PromptOption, ...] = (
    PromptOption("n", "negative_prompt", _text, "negative_prompt"),
    PromptOption("w", "width", _side, "width"),
    PromptOption("h", "height", _side, "height"),
    PromptOption("s", "sample_steps", _whole(1, 1000), "steps"),
    PromptOption("d", "seed", _whole(0, _MAX_SEED), "seed"),
    PromptOption("l", "scale", _number, "scale"),
    PromptOption("ss", "sample_sampler", _sampler, "sampler"),
    PromptOption("cn", "controlnet_image", _text, "controlnet_image"),
    # For other kinds of models; accepted so that one prompt file serves several trainers.
    PromptOption("g", "guidance_scale", _number, None),
    PromptOption("ctr", "cfg_trunc_ratio", _number, None),
    PromptOption("rcfg", "renorm_cfg", _number, None),
    PromptOption("fs", "flow_shift", _number, None),
)

_BY_FLAG = {option.flag: option for option in PROMPT_OPTIONS}
_PROMPT = PromptOption("", "prompt", _text, "prompt")
_BY_KEY = {option.key: option for option in (_PROMPT, *PROMPT_OPTIONS)}
_OPTION_START = re.compile(r"\s--(?=[A-Za-z])")


@dataclass(frozen=True, slots=True)
class _Entry:
    """A prompt as it stands in its file: a line, or a table of keys."""

    where: str
    content: str | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PromptFile:
    """What stands in a prompt file: usable prompts, what is wrong with the others, and what has no effect."""

    requests: tuple[PromptRequest, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


def read_prompts(path: str | Path, *, default_sampler: str = "ddim") -> PromptFile:
    """Read a prompt file: `.txt`, `.toml` or `.json`, UTF-8.

    Args:
        path: the file.
        default_sampler: sampler of prompts that name none.

    Raises:
        UserError: the file cannot be read as a whole, or holds no usable prompt.
    """
    requests: list[PromptRequest] = []
    problems: list[Problem] = []
    notes: list[str] = []
    for index, entry in enumerate(_entries(Path(path))):
        request, found = _request(entry, index, default_sampler, notes)
        problems.extend(found)
        if not found:
            requests.append(request)
    if not requests:
        problems.append(Problem(str(path), "holds no usable prompt", "Write one prompt per line."))
        raise_problems(problems)
    return PromptFile(tuple(requests), tuple(problems), tuple(notes))


def load_prompts(path: str | Path, *, default_sampler: str = "ddim", strict: bool = True) -> list[PromptRequest]:
    """Return all prompts of a file, as `read_prompts` reads them.

    Args:
        path: the file.
        default_sampler: sampler of prompts that name none.
        strict: refuse the file if any prompt is bad; otherwise bad prompts are left out with a warning each.

    Raises:
        UserError: as `read_prompts`, and (strict) when any prompt is bad; every problem is listed with its place.
    """
    file = read_prompts(path, default_sampler=default_sampler)
    if strict:
        raise_problems(file.problems)
    for note in file.notes:
        logger.warning("%s", note)
    for problem in file.problems:
        logger.warning("prompt skipped: %s", problem)
    return list(file.requests)


def parse_prompt_line(line: str, *, where: str, index: int = 0, default_sampler: str = "ddim") -> PromptRequest:
    """Read one line of the grammar.

    Raises:
        UserError: everything that is wrong with the line.
    """
    request, problems = _request(_Entry(where, line), index, default_sampler, [])
    raise_problems(problems)
    return request


def _request(entry: _Entry, index: int, default_sampler: str, notes: list[str]) -> tuple[PromptRequest, list[Problem]]:
    values: dict[str, Any] = {"sampler": default_sampler}
    problems: list[Problem] = []
    settings = _line_settings(entry.content) if isinstance(entry.content, str) else _table_settings(entry.content)
    for name, option, value in settings:
        if isinstance(option, str):
            problems.append(Problem(entry.where, f"unknown {_shown(name)}", option))
            continue
        try:
            read = option.read(value)
        except _Unusable as takes:
            problems.append(Problem(entry.where, f"{name} is {_shown(value)}, but takes {takes}"))
            continue
        if option.field is None:
            notes.append(f"{entry.where}: {name} has no effect on this kind of model")
        else:
            values[option.field] = read
    return PromptRequest(**{"prompt": "", **values}, index=index, where=entry.where), problems


_Setting = tuple[str, "PromptOption | str", Any]
"""Name as written, its option (or the hint for an unknown name), raw value."""


def _line_settings(line: str) -> Iterator[_Setting]:
    text, *parts = _OPTION_START.split(" " + line)
    yield "prompt", _PROMPT, text
    for part in parts:
        flag, *value = part.split(None, 1)
        yield f"--{flag}", _BY_FLAG.get(flag.lower(), _flag_hint(flag)), _Written(value[0].strip() if value else "")


def _table_settings(table: Mapping[str, Any]) -> Iterator[_Setting]:
    for key, value in table.items():
        yield key, _BY_KEY.get(key, _key_hint(key)), value


def _flag_hint(flag: str) -> str:
    glued = re.fullmatch(r"([A-Za-z]+)[=:]?([0-9.+-].*)", flag)
    if glued and glued[1].lower() in _BY_FLAG:
        return f"Write --{glued[1]} {glued[2]}."
    return f"Known: {' '.join('--' + name for name in _BY_FLAG)}."


def _key_hint(key: str) -> str:
    near = difflib.get_close_matches(key, _BY_KEY, 1)
    return f"Did you mean {near[0]}?" if near else f"Known: {', '.join(_BY_KEY)}."


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _entries(path: Path) -> Iterable[_Entry]:
    readers = {".txt": _text_entries, ".toml": _toml_entries, ".json": _json_entries}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError("not a prompt file", "It must end in .txt, .toml or .json.", where=str(path))
    return reader(path, read_text(path, limit=MAX_FILE_BYTES))


def _text_entries(path: Path, text: str) -> Iterator[_Entry]:
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield _Entry(f"{path} line {number}", line.strip())


def _toml_entries(path: Path, text: str) -> list[_Entry]:
    document = parse_toml(text, path)
    table = document.pop("prompt", {})
    problems = [Problem(str(path), f"unknown key {_shown(key)}", "Prompts stand under [prompt].") for key in document]
    shared = dict(table) if isinstance(table, dict) else {}
    subsets = shared.pop("subset", None)
    if not isinstance(subsets, list) or not subsets or not all(isinstance(subset, dict) for subset in subsets):
        problems.append(Problem(str(path), "no prompts", "Write one [[prompt.subset]] block for each prompt."))
    raise_problems(problems)
    return [_Entry(f"{path} subset {number}", {**shared, **subset}) for number, subset in enumerate(subsets, start=1)]


def _json_entries(path: Path, text: str) -> list[_Entry]:
    try:
        document = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"not valid JSON: {error}", where=str(path)) from error
    if not isinstance(document, list):
        raise UserError("the top level is not a list", "Write a list of prompt lines or of tables.", where=str(path))
    wrong = [number for number, item in enumerate(document, start=1) if not isinstance(item, (str, dict))]
    raise_problems(Problem(f"{path} prompt {n}", "neither text nor a table", "Write a prompt line.") for n in wrong)
    return [_Entry(f"{path} prompt {number}", item) for number, item in enumerate(document, start=1)]
