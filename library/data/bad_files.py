"""Files that cannot be used: collected, listed together, and either the end of the start or left out and counted."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from library import files
from library.errors import Problem, UserError

_log = logging.getLogger(__name__)

SHOWN = 20
TOLERATED_SHARE = 0.01
REPORT_NAME = "bad_files.txt"


@dataclass(frozen=True, slots=True)
class BadFile:
    """One file that cannot be used, and why."""

    path: str
    reason: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{printable(self.path)}: {self.reason}"
        return f"{text}. {self.hint}" if self.hint else text


def printable(text: str) -> str:
    """Return text for messages: control characters and undecodable bytes are shown escaped."""
    if text.isprintable():
        return text
    return "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":  # an undecodable byte of a file name
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def apply_policy(
    bad: Sequence[BadFile],
    total: int,
    skip: bool,
    report_dir: str | None = None,
    tolerated_share: float = TOLERATED_SHARE,
) -> None:
    """Stop because of bad files, or log them when they may be skipped.

    Args:
        bad: What was found.
        total: Number of images looked at, the bad ones included.
        skip: `--skip_bad_files`.
        report_dir: Folder that the complete list is written into when it is longer than what is shown.
        tolerated_share: Of files that may be bad.

    Raises:
        UserError: There are bad files and `skip` is off, or too many of all files are bad.
    """
    if not bad:
        return
    too_many = len(bad) > total * tolerated_share
    report = _write_report(bad, report_dir) if report_dir is not None and len(bad) > SHOWN else ""
    if skip and not too_many:
        _log.warning("%d of %d files skipped%s", len(bad), total, report)
        for one in bad[:SHOWN]:
            _log.warning("skipped: %s", one)
        return
    problems = [Problem(printable(one.path), one.reason, one.hint) for one in bad[:SHOWN]]
    if skip:
        what = f"{len(bad)} of {total} files are bad, more than 1 %: --skip_bad_files does not apply{report}"
        hint = "Mend or remove them."
    else:
        what = f"{len(bad)} of {total} files cannot be used{report}"
        hint = "Mend or remove them, or give --skip_bad_files to go on without them (up to 1 %)."
    problems.append(Problem("", what, hint))
    raise UserError.of(problems)


def _write_report(bad: Sequence[BadFile], folder: str) -> str:
    path = Path(folder) / REPORT_NAME
    try:
        files.write_text(path, "".join(f"{one}\n" for one in bad))
    except files.CannotSave as error:
        _log.warning("%s", error)
        return ""
    return f"; all are listed in {path}"
