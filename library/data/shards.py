"""Which tar files the entries of `--webdataset_path` stand for: files, patterns, ranges, folders, addresses, lists."""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Iterator, Sequence
from itertools import chain, product
from pathlib import Path

from library.data.storage import MARK, is_remote
from library.errors import Problem, UserError, raise_problems
from library.text_files import read_text

MAX_SHARDS = 1_000_000
_LISTS = (".yml", ".yaml", ".txt")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_COPIED = re.compile(r"pipe:aws s3 cp (s3://\S+) -")
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*):")


def expand_shards(entries: str | Sequence[str], *, where: str = "--webdataset_path", pipes: bool = False) -> list[str]:
    """Return the tar files that `entries` stand for, each once, in order.

    An entry is a path, `file:path`, a glob pattern, a pattern with ranges (`data-{0000..0009}.tar`, `{cat,dog}.tar`), a
    folder, `s3://bucket/key.tar`, `s3://bucket/folder/`, `https://host/data.tar`, or a `.yml` or `.txt` file that lists
    such entries. Addresses are neither opened here, except folders on S3, nor given to any shell.

    Args:
        entries: as the user wrote them.
        where: what messages start with.
        pipes: accept `pipe:command` too. Such entries come back as they are, ranges expanded.

    Raises:
        UserError: holds every entry that cannot be used.
    """
    found: dict[str, None] = {}
    problems: list[Problem] = []
    for entry in [entries] if isinstance(entries, str) else entries:
        try:
            found.update(dict.fromkeys(_expanded(entry, where, pipes=pipes)))
            if len(found) > MAX_SHARDS:
                raise UserError(f"more than {MAX_SHARDS} shards", where=where)
        except UserError as error:
            problems.extend(error.problems)
    raise_problems(problems)
    if not found:
        raise UserError("names no tar file", where=where)
    return list(found)


def _expanded(entry: str, where: str, *, pipes: bool, lists: bool = True) -> list[str]:
    if not isinstance(entry, str) or not entry.strip():
        raise UserError(f"expected the path of a tar file, got {entry!r}", where=where)
    entry = entry.strip().removeprefix("file://").removeprefix("file:")
    place = f"{where} {entry}"
    if pipes and is_pipe(entry):
        return list(expand_braces(entry, place))
    _check_scheme(entry, place)
    if MARK in entry:
        raise UserError(f"holds {MARK!r}, which paths of tar files must not", "Rename it.", where=place)
    if lists and entry.lower().endswith(_LISTS):
        return list(chain.from_iterable(_expanded(item, entry, pipes=pipes, lists=False) for item in _list_of(entry)))
    if not is_remote(entry) and Path(entry).exists():
        return _in_folder(entry, place) if Path(entry).is_dir() else [entry]
    paths = list(expand_braces(entry, place))
    if is_remote(entry):
        return list(chain.from_iterable(_remote(path) for path in paths))
    return list(chain.from_iterable(_local(path, place) for path in paths))


def is_pipe(entry: str) -> bool:
    """Tell whether an entry is a command whose output is a tar file."""
    return entry.lower().startswith("pipe:")


def _check_scheme(entry: str, place: str) -> None:
    match = _SCHEME.match(entry)
    # One letter is a drive of Windows.
    if match is None or is_remote(entry) or len(match[1]) == 1:
        return
    if is_pipe(entry):
        copied = _COPIED.fullmatch(entry)
        better = f"the address itself: {copied[1]}" if copied else "a path or an address (s3://bucket/data.tar)"
        hint = f"Give {better}. To have commands run all the same, add --allow_pipe_urls."
        raise UserError("pipe: would run a command", hint, where=place)
    raise UserError(f"{match[1]}: is not supported", "Use a path, s3://, http:// or https://.", where=place)


def _list_of(path: str) -> list[str]:
    text = read_text(path)
    if path.lower().endswith(".txt"):
        return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    from library.cascade_yaml import parse_yaml

    content = parse_yaml(text, path)
    if not isinstance(content, list) or not all(isinstance(item, str) for item in content):
        raise UserError("is not a list of tar files", where=path)
    return content


def _in_folder(folder: str, place: str) -> list[str]:
    with os.scandir(folder) as entries:
        names = sorted(item.name for item in entries if item.name.endswith(".tar") and item.is_file())
    names = [name for name in names if not name.startswith(".")]
    if not names:
        raise UserError("the folder holds no .tar file", where=place)
    return [os.path.join(folder, name) for name in names]  # noqa: PTH118 - spelled as the user spelled the folder


def _remote(path: str) -> list[str]:
    if path.partition("?")[0].endswith(".tar") or not path.startswith("s3://"):
        return [path]
    from library.data.remote_files import list_remote

    found = list_remote(path)
    if not found:
        raise UserError("holds no .tar file", where=path)
    return found


def _local(path: str, place: str) -> list[str]:
    if Path(path).is_file():
        return [path]
    if Path(path).is_dir():
        return _in_folder(path, place)
    matches = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []  # noqa: PTH207 - spelling is kept
    if not matches:
        raise UserError("no such file" if path in place else f"no such file: {path}", where=place)
    return matches


def expand_braces(pattern: str, where: str = "") -> Iterator[str]:
    """Yield what a pattern with `{0000..0009}` and `{a,b}` stands for, as a shell would; ranges keep their zeros.

    Raises:
        UserError: there would be more than a million.
    """
    pieces = _BRACES.split(pattern)
    alternatives = [_alternatives(text, where) for text in pieces[1::2]]
    if math.prod(map(len, alternatives)) > MAX_SHARDS:
        raise UserError(f"stands for more than {MAX_SHARDS} files", where=where)
    for chosen in product(*alternatives):
        yield "".join(chain.from_iterable(zip(pieces[::2], (*chosen, ""), strict=True)))


def _alternatives(text: str, where: str) -> list[str]:
    match = _RANGE.fullmatch(text)
    if match is None:
        return text.split(",") if "," in text else [f"{{{text}}}"]
    first, last = int(match[1]), int(match[2])
    if abs(last - first) >= MAX_SHARDS:
        raise UserError(f"stands for more than {MAX_SHARDS} files", where=where)
    padded = match[1].startswith("0") or match[2].startswith("0")
    width = max(len(match[1]), len(match[2])) if padded else 0
    step = 1 if last >= first else -1
    return [str(number).zfill(width) for number in range(first, last + step, step)]
