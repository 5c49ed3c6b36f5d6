"""Messages: set-up of logging, text that is safe on any console, repeated warnings, and the summary of a run."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from library.errors import UserError

MAX_REPEATS = 5
"""A kind of warning is shown this often; after that it is only counted."""

_HANDLER = "sd-finetune-toolkit"
OUR_LOGGERS = ("library", "networks", "finetune", "tools", "__main__")


@dataclass
class RunSummary:
    """How the run went; `library.cli` writes it to `run_summary.json`, other modules fill it in."""

    status: str = "running"
    exit_code: int | None = None
    step: int = 0
    last_state: str | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    warnings: dict[str, int] = field(default_factory=dict)
    message: str = ""

    def skip(self, kind: str, count: int = 1) -> None:
        """Count things that were left out or replaced, such as "broken images"."""
        self.skipped[kind] = self.skipped.get(kind, 0) + count

    def reset(self) -> None:
        """Start afresh, for several runs in one process."""
        self.__init__()  # type: ignore[misc]

    def as_json(self) -> dict[str, Any]:
        """Return what `run_summary.json` holds."""
        return {
            "status": self.status,
            "exit_code": self.exit_code,
            "step": self.step,
            "last_state": self.last_state,
            "skipped": dict(self.skipped),
            "warnings": [{"message": message, "count": count} for message, count in self.warnings.items()],
            "message": self.message,
        }


summary = RunSummary()
"""The summary of this process."""


def process_rank() -> int:
    """Return the number of this process among those of the run, from the launcher's environment."""
    for name in ("RANK", "LOCAL_RANK"):
        value = os.environ.get(name, "")
        if value.isdigit():
            return int(value)
    return 0


def safe_text(text: Any, *, keep_newlines: bool = False) -> str:
    """Return `text` with control characters and undecodable bytes written as escapes, harmless on a console."""
    return "".join(
        character
        if character.isprintable() or (keep_newlines and character in "\n\t")
        else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in str(text)
    )


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 batch`, `2,000 batches`."""
    plural = "" if number == 1 else "es" if noun.endswith(("s", "ch")) and noun != "epoch" else "s"
    return f"{number:,} {noun}{plural}"


def make_streams_safe() -> None:
    """Let stdout and stderr replace what the console's encoding cannot show."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


class RepeatFilter(logging.Filter):
    """Counts warnings by kind (the unformatted message, or `extra={"kind": ...}`) and lets the first few through."""

    def __init__(self, counts: dict[str, int]) -> None:
        super().__init__()
        self.counts = counts
        self._names: dict[str, str] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether the record is to be shown."""
        if record.levelno != logging.WARNING:
            return True
        text = safe_text(record.getMessage())
        kind = str(getattr(record, "kind", text if record.name == "py.warnings" else record.msg))
        # The first message of a kind stands for all of them in the summary.
        name = self._names.setdefault(kind, text)
        self.counts[name] = self.counts.get(name, 0) + 1
        if self.counts[name] == MAX_REPEATS:
            record.msg = f"{record.getMessage()} (said {MAX_REPEATS} times; further ones are only counted)"
            record.args = None
        return self.counts[name] <= MAX_REPEATS


class SafeFormatter(logging.Formatter):
    """Escapes control characters other than line ends and tabs."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        return safe_text(super().format(record), keep_newlines=True)


class ConsoleHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to stderr, above a progress bar if one is shown."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        self.stream: TextIO = sys.stderr
        tqdm = sys.modules.get("tqdm")
        if tqdm is None or not getattr(tqdm.tqdm, "_instances", None):
            super().emit(record)
            return
        try:
            tqdm.tqdm.write(self.format(record), file=self.stream)
        except (OSError, ValueError):
            self.handleError(record)


def set_up(level: str | None = None, file: str | None = None, *, simple: bool = False) -> None:
    """Send messages to the console, or to `file`; other ranks than 0 show warnings only, with their number in front.

    Args:
        level: Name of the lowest level of our own messages; None means INFO. Other libraries are heard from WARNING.
        file: Written anew, in place of the console; by rank 0 only.
        simple: Leave out time and level.

    Raises:
        UserError: If `file` cannot be written.
    """
    rank = process_rank()
    ours = logging.getLevelName(level or "INFO")
    if rank > 0:
        ours = max(ours, logging.WARNING)
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if handler.name == _HANDLER]:
        root.removeHandler(handler)
        handler.close()
    root.addHandler(_make_handler(file if rank == 0 else None, rank=rank, simple=simple))
    root.setLevel(max(ours, logging.WARNING))
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(ours)
    # It warns at every import that 4-bit products on the CPU, which nothing here uses, lack an optional package.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.captureWarnings(capture=True)


def _make_handler(file: str | None, *, rank: int, simple: bool) -> logging.Handler:
    handler: logging.Handler
    if file is None:
        handler = ConsoleHandler()
    else:
        try:
            Path(file).absolute().parent.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(file, mode="w", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UserError(f"cannot be written ({error})", where=f"--console_log_file {file}") from None
    prefix = f"[rank {rank}] " if rank else ""
    style = f"{prefix}%(message)s" if simple else f"{prefix}%(asctime)s %(levelname)-7s %(message)s"
    handler.setFormatter(SafeFormatter(style, datefmt="%Y-%m-%d %H:%M:%S"))
    handler.addFilter(RepeatFilter(summary.warnings))
    handler.set_name(_HANDLER)
    return handler
