"""The parts of a state that every process writes and reads itself: an optimizer that is shared between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.pickles import load_pickle
from library.errors import StopTraining, UserError
from library.files import CannotSave, temporary_beside
from library.training.state_files import shard_name, write_pickle

if TYPE_CHECKING:
    from library.training.ranks import Ranks
    from library.training.resume_check import Changes
    from library.training.state_files import StoredState
    from library.training.state_parts import Shards


@contextmanager
def shard_files(folder: Path, shards: Shards | None, ranks: Ranks) -> Iterator[dict[str, Path]]:
    """Write every rank's part beside the state folder; yield name in the state -> where it is now.

    Rank 0 moves the files into the state; what is left of them afterwards is removed. A collective call.

    Raises:
        CannotSave: a rank could not write its part; raised on all.
    """
    if shards is None:
        yield {}
        return
    mine = temporary_beside(folder.parent / shard_name(ranks.rank))
    try:
        failure = _write(mine, shards.state_dict())
        written: list[tuple[str, str | None]] = ranks.gather((str(mine), failure))
        for _, reason in written:
            if reason is not None:
                raise CannotSave(reason, folder)
        yield {shard_name(rank): Path(path) for rank, (path, _) in enumerate(written)}
    finally:
        with suppress(OSError):
            mine.unlink(missing_ok=True)


def _write(path: Path, state: dict[str, Any]) -> str | None:
    """Write one part; return why that failed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_pickle(path, state)
    except StopTraining as error:
        return error.reason
    except OSError as error:
        return f"cannot save: {error}"
    return None


def load_shard(stored: StoredState, shards: Shards, changes: Changes | None, ranks: Ranks) -> None:
    """Continue from this rank's part.

    Raises:
        UserError: the state has none, or was saved by another number of processes.
    """
    where, info = str(stored.folder), stored.info
    if not info.sharded:
        raise UserError("was saved without --deepspeed, so it cannot be shared out", where=where)
    if info.world != ranks.world:
        what = f"holds an optimizer shared by {info.world} processes, and {ranks.world} run"
        raise UserError(what, f"Start {info.world} processes.", where=where)
    kept = changes.optimizer_arguments if changes else ()
    shards.load_state_dict(load_pickle(stored.folder / shard_name(ranks.rank)), keep=kept)
