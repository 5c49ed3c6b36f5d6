"""What every entry script does around its work: options, checks, logging, exit status, and the summary of the run."""

from __future__ import annotations

import errno
import logging
import os
import platform
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from library import log, option_parser
from library.errors import (
    EXIT_BUG,
    EXIT_CANNOT_SAVE,
    EXIT_DIVERGED,
    EXIT_USER,
    Problem,
    StopTraining,
    UserError,
    raise_problems,
)
from library.option_groups import OptionSet
from library.slurm import adopt_slurm

SetClass = TypeVar("SetClass", bound=OptionSet)

TRACEBACK_VARIABLE = "SD_TOOLKIT_TRACEBACK"
"""Set to 1, this environment variable shows where in the code an error of the user was found."""

SUMMARY_NAME = "run_summary.json"
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "bitsandbytes")
_MEMORY_HINT = "Try --gradient_checkpointing, a smaller --train_batch_size or --resolution, or --mixed_precision bf16."

logger = logging.getLogger(__name__)


def main(
    options_class: type[SetClass], train: Callable[[SetClass], object], argv: Sequence[str] | None = None
) -> NoReturn:
    """Run an entry script and end the process with its exit status; see `run_script`."""
    status = run_script(options_class, train, argv)
    sys.stdout.flush()
    sys.stderr.flush()
    if status != 0 and os.environ.get("WORLD_SIZE", "1") != "1":
        # Tearing a process group down waits for the other ranks, which may be waiting for this one.
        logging.shutdown()
        os._exit(status)
    sys.exit(status)


def run_script(
    options_class: type[SetClass], train: Callable[[SetClass], object], argv: Sequence[str] | None = None
) -> int:
    """Parse the options, check them, call `train` with them, and return the exit status.

    0 done; 1 a bug; 2 something the user can fix; 4 could not save; 5 diverged; 128 + n ended by signal n. The last
    line on standard error carries the whole message, because launchers replace the exit status by 1. When there is an
    output folder, `run_summary.json` in it repeats the outcome.

    Args:
        options_class: Composition of the script's option groups.
        train: The script's work.
        argv: Arguments without the script's name; default: those of the process.
    """
    log.make_streams_safe()
    log.summary.reset()
    adopt_slurm()
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        from library.option_help import help_text

        sys.stdout.write(help_text(options_class))
        return 0
    reading = option_parser.read(options_class, words)
    output_dir = reading.values.get("output_dir")
    try:
        options = option_parser.finish(options_class, reading)
        if reading.values.get("output_config"):
            _write_config(options, reading.values["config_file"])
            return 0
        _start(options)
    except UserError as error:
        # All ranks read the same options: one of them reports.
        status = _user_error(error, quiet=log.process_rank() > 0)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        status = _user_error(_too_long(error), quiet=log.process_rank() > 0)
    else:
        status = _guarded(lambda: train(options))
    _write_summary(output_dir)
    return status


def _write_config(options: OptionSet, name: str) -> None:
    from library.config_file import write_config

    if log.process_rank() == 0:
        path = write_config(options, name)
        sys.stderr.write(f"wrote {log.safe_text(path)}\n")


def _start(options: OptionSet) -> None:
    """Set up logging, repeat what the checks found suspicious, and check the folders that the run writes to."""
    values = options.values()
    log.set_up(
        values.get("console_log_level"), values.get("console_log_file"), simple=values.get("console_log_simple", False)
    )
    if log.process_rank() == 0:
        for warning in options.warnings:
            logger.warning("%s", warning, extra={"kind": str(warning)})
        for notice in options.notices:
            logger.info("%s", notice)
    raise_problems(options.check_folders())


def _guarded(work: Callable[[], object]) -> int:
    """Call `work`; turn whatever ends it into a message and an exit status."""
    try:
        work()
    except UserError as error:
        return _user_error(error)
    except StopTraining as stop:
        return _stopped(stop)
    except KeyboardInterrupt:
        return _finish("interrupted", 128 + signal.SIGINT, "error: interrupted")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else EXIT_BUG
        return _finish("done" if code == 0 else "failed", code, "" if code == 0 else f"error: {ended.code}")
    except Exception as error:  # noqa: BLE001 - the boundary: everything becomes a message and an exit status
        return _unexpected(error)
    log.summary.status, log.summary.exit_code = "done", 0
    _report_counts()
    return 0


def _user_error(error: UserError, *, quiet: bool = False) -> int:
    if os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0"):
        traceback.print_exception(error)
    lines = "\n".join(f"error: {_problem_text(problem)}" for problem in error.problems)
    return _finish("user error", EXIT_USER, lines, quiet=quiet)


def _problem_text(problem: Problem) -> str:
    """Return a problem as one line; a hint that begins with a line end is a table, whose makers escape its cells."""
    return log.safe_text(problem, keep_newlines=problem.hint.startswith("\n"))


def _stopped(stop: StopTraining) -> int:
    names = {
        0: "done",
        EXIT_CANNOT_SAVE: "could not save",
        EXIT_DIVERGED: "diverged",
        128 + signal.SIGINT: "interrupted",
        128 + signal.SIGTERM: "interrupted",
    }
    text = log.safe_text(stop.reason)
    prefix = "" if stop.exit_code == 0 else "error: "
    return _finish(names.get(stop.exit_code, "stopped"), stop.exit_code, f"{prefix}{text}")


def _unexpected(error: Exception) -> int:
    if type(error).__name__ == "OutOfMemoryError":
        first = str(error).partition("\n")[0]
        return _user_error(UserError(f"out of GPU memory: {first}", _MEMORY_HINT))
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return _user_error(_too_long(error))
    if isinstance(error, OSError) and _is_disk_full(error):
        hint = "Free some space and go on with --resume latest."
        where = str(error.filename or "")
        return _finish("could not save", EXIT_CANNOT_SAVE, f"error: {Problem(where, str(error.strerror), hint)}")
    prefix = _rank_prefix()
    text = "".join(traceback.format_exception(error))
    sys.stderr.write("".join(f"{prefix}{line}\n" for line in log.safe_text(text, keep_newlines=True).splitlines()))
    sys.stderr.write(f"{prefix}versions: {versions()}\n")
    what = log.safe_text(f"{type(error).__name__}: {error}")
    return _finish("bug", EXIT_BUG, f"error: this is a bug in the toolkit, please report the lines above: {what}")


def _too_long(error: OSError) -> UserError:
    """Return the error of the user behind a name that no file can have, which any look at the disk may come upon."""
    name = str(error.filename or "")
    return UserError(f"a name of {len(name)} characters is too long for a file", where=f"...{name[-60:]}")


def _is_disk_full(error: OSError) -> bool:
    from library.files import DISK_FULL

    return error.errno in DISK_FULL


def versions() -> str:
    """Return the versions of Python and of the libraries that matter, without importing them."""
    from importlib.metadata import PackageNotFoundError, version

    found = [f"python {platform.python_version()}", platform.platform()]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def _rank_prefix() -> str:
    rank = log.process_rank()
    return f"[rank {rank}] " if rank else ""


def _finish(status: str, code: int, message: str, *, quiet: bool = False) -> int:
    log.summary.status, log.summary.exit_code, log.summary.message = status, code, message
    _report_counts()
    if message and not quiet:
        prefix = _rank_prefix()
        sys.stderr.write("".join(f"{prefix}{line}\n" for line in message.splitlines()))
    return code


def _report_counts() -> None:
    """Log how often warnings were repeated and what was left out."""
    for text, count in log.summary.warnings.items():
        if count > log.MAX_REPEATS:
            logger.info("warned %d times: %s", count, text)
    for kind, count in log.summary.skipped.items():
        logger.info("left out or replaced: %d %s", count, kind)


def _write_summary(output_dir: str | None) -> None:
    if not output_dir or log.process_rank() > 0 or not Path(output_dir).is_dir():
        return
    from library.files import CannotSave, write_json

    try:
        write_json(Path(output_dir) / SUMMARY_NAME, log.summary.as_json())
    except (OSError, CannotSave, UserError) as error:
        logger.warning("cannot write %s: %s", SUMMARY_NAME, error)
