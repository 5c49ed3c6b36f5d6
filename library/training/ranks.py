"""What saving needs of the other processes of a run: their small objects, and the outcome of rank 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


def _alone(value: Any) -> list[Any]:
    return [value]


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of the run. The defaults are a run of one process.

    `gather` returns every rank's object, in order, on all ranks; `broadcast` returns rank 0's.
    """

    rank: int = 0
    world: int = 1
    gather: Callable[[Any], list[Any]] = _alone
    broadcast: Callable[[Any], Any] = _same

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    @classmethod
    def of_torch(cls) -> Ranks:
        """Return the ranks of `torch.distributed`, or a single one when it is not in use."""
        from torch import distributed

        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        world = distributed.get_world_size()

        def gather(value: Any) -> list[Any]:
            found: list[Any] = [None] * world
            distributed.all_gather_object(found, value)
            return found

        def broadcast(value: Any) -> Any:
            box = [value]
            distributed.broadcast_object_list(box, src=0)
            return box[0]

        return cls(distributed.get_rank(), world, gather, broadcast)
