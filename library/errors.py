"""The two exceptions that end a run on purpose, and the record they carry. No third-party import."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

EXIT_BUG = 1
EXIT_USER = 2
EXIT_FOUND = 3
"""A check did its work and found something to complain about."""
EXIT_CANNOT_SAVE = 4
EXIT_DIVERGED = 5


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that the user can fix: where it is, what is wrong, and how to mend it."""

    where: str
    what: str
    hint: str = ""

    def __str__(self) -> str:
        """Return ``where: what. hint`` as shown to the user."""
        text = f"{self.where}: {self.what}" if self.where else self.what
        text = text.rstrip(".") + "."
        return f"{text} {self.hint}".rstrip()


class UserError(Exception):
    """Something that the user can fix; shown as one line per problem, without a traceback, exit status 2."""

    def __init__(self, what: str, hint: str = "", *, where: str = "") -> None:
        self.problems: tuple[Problem, ...] = (Problem(where, what, hint),)
        super().__init__(str(self.problems[0]))

    @classmethod
    def of(cls, problems: Iterable[Problem]) -> UserError:
        """Build one error from all problems of a stage, so that the user sees them together."""
        found = tuple(problems)
        if not found:
            raise ValueError("UserError.of needs at least one problem")
        error = cls(found[0].what, found[0].hint, where=found[0].where)
        error.problems = found
        error.args = ("\n".join(str(problem) for problem in found),)
        return error


class StopTraining(Exception):
    """Ends a run with a message and an exit status of its own (4 could not save, 5 diverged, 130/143 signals)."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.exit_code = exit_code


@contextmanager
def named_by(option: str) -> Iterator[None]:
    """Put the option that named a file before what is wrong with it, where the message does not name it itself."""
    try:
        yield
    except UserError as error:
        raise UserError.of(
            found if found.where.startswith(option) else replace(found, where=f"{option} {found.where}".rstrip())
            for found in error.problems
        ) from error


def raise_problems(problems: Iterable[Problem]) -> None:
    """Raise one `UserError` holding all `problems`; return when there is none."""
    found = tuple(problems)
    if found:
        raise UserError.of(found)
