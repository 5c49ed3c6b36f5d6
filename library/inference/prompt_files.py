"""Files of prompts: `.txt` with a prompt in each line, `.toml` and `.json` with lines or tables.

In a `.txt` file lines that start with `#` are comments. A `.toml` file has a `[prompt]` table with shared keys and a
`[[prompt.subset]]` table for each prompt; a `.json` file is a list of lines or of tables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config_file import parse_toml
from library.errors import Problem, UserError, raise_problems
from library.text_files import read_text

MAX_FILE_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class PromptEntry:
    """A prompt as it stands in its place: a line, or a table of keys; `where` names the place in messages."""

    where: str
    content: str | Mapping[str, Any]


def read_entries(path: Path, *, any_suffix: bool = False) -> Iterable[PromptEntry]:
    """Return the prompts of a file as they are written, without looking into them.

    Args:
        path: the file, UTF-8.
        any_suffix: take files that are neither `.toml` nor `.json` for lines, whatever they are called.

    Raises:
        UserError: the file cannot be read as a whole.
    """
    readers = {".txt": _text_entries, ".toml": _toml_entries, ".json": _json_entries}
    reader = readers.get(path.suffix.lower(), _text_entries if any_suffix else None)
    if reader is None:
        raise UserError("not a prompt file", "It must end in .txt, .toml or .json.", where=str(path))
    return reader(path, read_text(path, limit=MAX_FILE_BYTES))


def _text_entries(path: Path, text: str) -> Iterator[PromptEntry]:
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield PromptEntry(f"{path} line {number}", line.strip())


def _toml_entries(path: Path, text: str) -> list[PromptEntry]:
    document = parse_toml(text, path)
    table = document.pop("prompt", {})
    problems = [Problem(str(path), f"unknown key {shown(key)}", "Prompts stand under [prompt].") for key in document]
    shared = dict(table) if isinstance(table, dict) else {}
    subsets = shared.pop("subset", None)
    if not isinstance(subsets, list) or not subsets or not all(isinstance(subset, dict) for subset in subsets):
        problems.append(Problem(str(path), "no prompts", "Write one [[prompt.subset]] block for each prompt."))
    raise_problems(problems)
    found = [{**shared, **subset} for subset in subsets]
    return [PromptEntry(f"{path} subset {number}", content) for number, content in enumerate(found, start=1)]


def _json_entries(path: Path, text: str) -> list[PromptEntry]:
    try:
        document = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"not valid JSON: {error}", where=str(path)) from error
    if not isinstance(document, list):
        raise UserError("the top level is not a list", "Write a list of prompt lines or of tables.", where=str(path))
    wrong = [number for number, item in enumerate(document, start=1) if not isinstance(item, (str, dict))]
    raise_problems(Problem(f"{path} prompt {n}", "neither text nor a table", "Write a prompt line.") for n in wrong)
    return [PromptEntry(f"{path} prompt {number}", item) for number, item in enumerate(document, start=1)]


def shown(value: Any) -> str:
    """Return a value for a message, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
