"""What the files of a state hold, whoever wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from library.checkpoints.pickles import load_pickle
from library.checkpoints.tensor_files import open_tensors
from library.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_MAX_JSON_BYTES = 256 * 1024**2
ANOTHER = "The state is damaged: resume from another one (--resume latest finds the newest whole one)"
"""What to do about a damaged state."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: missing, too large, or not a JSON object.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise UserError("is too large for what it should be", where=str(path))
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise UserError("is not valid JSON", ANOTHER, where=str(path)) from error
    if not isinstance(value, dict):
        raise UserError("is not a JSON object", ANOTHER, where=str(path))
    return value


class StateContent(Protocol):
    """What the files of a state hold, by the names of accelerate's layout and ours."""

    optimizer: str
    """Class of the optimizer, whose values have the types of their parameters; empty: only the state knows."""

    def has(self, name: str) -> bool:
        """Whether the state has this file."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a file."""

    def json(self, name: str) -> dict[str, Any]:
        """Return what a JSON file says."""

    def pickle(self, name: str) -> Any:
        """Return what a pickle holds."""


class FolderContent:
    """The files of a state folder as they are."""

    optimizer = ""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, name: str) -> bool:
        """Whether the file is there."""
        return (self._folder / name).exists()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a file."""
        return dict(open_tensors(self._folder / name))

    def json(self, name: str) -> dict[str, Any]:
        """Return what a JSON file says."""
        return read_json(self._folder / name)

    def pickle(self, name: str) -> Any:
        """Return what a pickle holds."""
        return load_pickle(self._folder / name)
