"""Tensors that are cut up between processes: this process's piece, and the whole. Other tensors are whole.

With FSDP (see `library.training.fsdp`) each process holds some rows of every tensor that trains.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, distributed


def is_cut(tensor: Tensor) -> bool:
    """Whether this process holds a piece only."""
    return hasattr(tensor, "device_mesh")


def own_piece(tensor: Tensor) -> Tensor:
    """Return what of `tensor` is here, sharing its memory; it may have no rows. The tensor itself, if it is not cut."""
    if not is_cut(tensor):
        return tensor
    cut: Any = tensor.detach()
    return cut.to_local()


def piece_of(whole: Tensor, like: Tensor) -> Tensor:
    """Return the rows of `whole` that this process holds of `like`; `whole` itself if `like` is not cut."""
    if not is_cut(like):
        return whole
    pieces = whole.chunk(distributed.get_world_size())
    rank = distributed.get_rank()
    # Where there are fewer rows than processes, the last ones have none.
    return pieces[rank] if rank < len(pieces) else whole[:0]


def put_together(piece: Tensor, like: Tensor) -> Tensor:
    """Return the whole of which every process has the `piece` that it has of `like`; a collective call if that is cut.

    Returns:
        The whole on the first process, in main memory; nothing ([0]) on the others. `piece`, if `like` is not cut.
    """
    if not is_cut(like):
        return piece
    from torch.distributed.tensor import DTensor

    cut: Any = like
    made = DTensor.from_local(
        piece.to(like.device), cut.device_mesh, cut.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    whole = made.full_tensor()
    return whole.cpu() if distributed.get_rank() == 0 else whole.new_empty(0)
