"""Where the prompts of gen_img.py come from: a list or a file, a Python file of the user's own, or somebody who types.

A source gives the prompts of a round as they are written, one `PromptEntry` after the other; `prompt_run` makes
requests of them.
"""

from __future__ import annotations

import importlib.util
import logging
import random
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from library.errors import UserError
from library.inference.prompt_files import PromptEntry, read_entries, shown

logger = logging.getLogger(__name__)

_MODULE_OPTION = "--from_module"
_MODULE_NAME = "prompter_module"


@dataclass(slots=True)
class Round:
    """One pass over all prompts.

    Attributes:
        number: from 0.
        chance: draws the seeds of pictures; a module may draw from it too.
        seed: the one of all pictures of this round, with `--iter_same_seed`.
        shuffler: set if the prompts are wanted in another order; decides it.
        pictures: how many pictures all rounds have planned so far.
    """

    number: int
    chance: random.Random
    seed: int | None = None
    shuffler: random.Random | None = None
    pictures: int = 0


class PromptSource(Protocol):
    """Gives prompts.

    Attributes:
        dynamic: whether braces in the prompts mean variants.
        count: how many prompts a round has; None where that shows only at its end.
    """

    dynamic: bool
    count: int | None

    def entries(self, now: Round) -> Iterator[PromptEntry]:
        """Yield the prompts of a round, each when it is needed."""


class ListSource:
    """Prompts that are all known before the first is drawn."""

    def __init__(self, entries: Iterable[PromptEntry], *, dynamic: bool = True) -> None:
        """Take the prompts; not `dynamic` are those that were drawn once already, such as a picture's own."""
        self._entries = list(entries)
        self.dynamic = dynamic
        self.count: int | None = len(self._entries)

    def entries(self, now: Round) -> Iterator[PromptEntry]:
        """Yield the prompts in their order, or shuffled."""
        order = list(self._entries)
        if now.shuffler is not None:
            now.shuffler.shuffle(order)
        yield from order


def line_source(line: str, where: str = "--prompt") -> ListSource:
    """Return the source of a single prompt line."""
    return ListSource([PromptEntry(where, line.strip())])


def file_source(path: str | Path) -> ListSource:
    """Return the prompts of a file: `.toml`, `.json`, or (any other suffix) one a line.

    Raises:
        UserError: the file cannot be read as a whole, or holds no prompt.
    """
    source = ListSource(read_entries(Path(path), any_suffix=True))
    if not source.count:
        raise UserError("holds no prompt", "Write one prompt per line.", where=str(path))
    return source


class InteractiveSource:
    """Prompts that are typed, one a line, until the input ends. Empty lines and those that begin with # are nothing."""

    def __init__(self, ask: Callable[[], str]) -> None:
        """Take the function that returns the next line and raises `EOFError` at the end of the input."""
        self._ask = ask
        self._typed = 0
        self.dynamic = True
        self.count: int | None = None

    def entries(self, now: Round) -> Iterator[PromptEntry]:
        """Yield lines as they are typed."""
        while True:
            try:
                line = self._ask().strip()
            except EOFError:
                return
            self._typed += 1
            if line and not line.startswith("#"):
                yield PromptEntry(f"line {self._typed}", line)


class ModuleSource:
    """Prompts that a Python file of the user's own makes.

    Its `get_prompter(args, pipe, networks)` returns what gives the prompts: a function (or an object with `__call__`),
    which is called with (args, pipe, generator of seeds, seed of the round or None, number of the prompt in its round,
    number of pictures so far) and returns the next prompt, None at the end of the round; or a list, or another thing to
    loop over. A prompt is a line with options, or a dictionary with the keys of prompt files. With `--shuffle_prompts`
    its method `shuffle` is called before each round.
    """

    def __init__(self, path: str | Path, args: object, pipe: object, networks: Sequence[object]) -> None:
        """Run the file and ask it for the prompter.

        Args:
            path: the file.
            args: options of the run by name, as attributes.
            pipe: what draws.
            networks: those that are applied to the model.

        Raises:
            UserError: the file fails, or has no `get_prompter`.
        """
        self._path = Path(path)
        self._args = args
        self._pipe = pipe
        self.dynamic = True
        self.count: int | None = None
        module = _import_file(self._path)
        make = getattr(module, "get_prompter", None)
        if not callable(make):
            raise UserError("has no function get_prompter(args, pipe, networks)", where=self._where)
        self._prompter: Any = self._guarded("get_prompter", make, args, pipe, networks)
        if not callable(self._prompter) and not isinstance(self._prompter, Iterable):
            what = f"get_prompter returned {shown(self._prompter)}, which gives no prompts"
            raise UserError(what, "Return a function that returns the next prompt, or None.", where=self._where)

    @property
    def _where(self) -> str:
        return f"{_MODULE_OPTION} {self._path}"

    def entries(self, now: Round) -> Iterator[PromptEntry]:
        """Yield what the prompter gives until it gives None.

        Raises:
            UserError: it fails, or gives something that is no prompt.
        """
        if now.shuffler is not None:
            self._shuffle()
        following = self._following(now)
        index = 0
        while (prompt := self._guarded("prompter", following, index)) is not None:
            if not isinstance(prompt, (str, Mapping)):
                what = f"the prompter gave {shown(prompt)}, which is neither text nor a dictionary"
                raise UserError(what, where=self._where)
            index += 1
            yield PromptEntry(f"{self._path} prompt {index}", prompt)

    def _following(self, now: Round) -> Callable[[int], Any]:
        if callable(self._prompter):
            return lambda index: self._prompter(self._args, self._pipe, now.chance, now.seed, index, now.pictures)
        items = self._guarded("prompter", iter, self._prompter)
        return lambda index: next(items, None)

    def _shuffle(self) -> None:
        shuffle = getattr(self._prompter, "shuffle", None)
        if shuffle is None:
            logger.warning("--shuffle_prompts has no effect: the prompter of %s has no method shuffle", self._path)
        else:
            self._guarded("shuffle", shuffle)

    def _guarded(self, name: str, function: Callable[..., Any], *arguments: object) -> Any:
        try:
            return function(*arguments)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - a file of the user's own may fail in any way
            raise _failed(self._path, name, error) from error


def _import_file(path: Path) -> ModuleType:
    where = f"{_MODULE_OPTION} {path}"
    if not path.is_file():
        raise UserError("no such file", f"Looked for {path.absolute()}.", where=where)
    spec = importlib.util.spec_from_file_location(_MODULE_NAME, path.absolute())
    if spec is None or spec.loader is None:
        raise UserError("is no Python file", "Its name must end in .py.", where=where)
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE_NAME] = module  # dataclasses and pickles of the file look for it there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a file of the user's own may fail in any way
        raise _failed(path, "import", error) from error
    return module


def _failed(path: Path, name: str, error: BaseException) -> UserError:
    """Name the last line of the user's file that was running."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path.absolute())
    ]
    line = f" line {lines[-1]}" if lines else ""
    what = f"{name} failed: {type(error).__name__}: {error}"
    return UserError(what, where=f"{_MODULE_OPTION} {path}{line}")
