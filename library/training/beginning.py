"""Where a run begins and how long it is: known, and compared with the state to resume, before a model is loaded."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.checkpoints.hashes import legacy_hash
from library.contracts import Position, RunLength
from library.data.loader import worker_count
from library.data.stream_data import StreamedData
from library.errors import UserError
from library.option_groups import resume_fingerprint
from library.training.ranks import Ranks
from library.training.resume_check import Changes, compare, start_position
from library.training.run_length import length_report, resolve_length
from library.training.state import Identity, StoredState, find_state, verify_state

if TYPE_CHECKING:
    from library.data.dataset import TrainingData
    from library.training.options import StartOptions, TrainingOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Beginning:
    """Length and start of a run, and the state it goes on from, if any."""

    length: RunLength
    identity: Identity
    position: Position = Position()
    stored: StoredState | None = None
    changes: Changes = Changes()

    @property
    def finished(self) -> bool:
        """Whether the state that is resumed is that of a finished run."""
        return self.stored is not None and self.stored.finished(self.length.total_steps)


def find_beginning(opts: TrainingOptions, data: TrainingData, device: torch.device, ranks: Ranks) -> Beginning:
    """Decide where the run begins. A collective call.

    Raises:
        UserError: there is nothing to train on, the state is damaged, or it belongs to another run.
    """
    length = resolve_length(opts.length, batches_per_epoch=data.batch_count(), world_size=ranks.world)
    if ranks.is_main:
        for line in length_report(length, samples_per_epoch=data.num_train_images + data.num_reg_images):
            logger.info("%s", line)
    training = f"{opts.tracker_name} ({data.family.name})"
    environment = {**_environment(device), **_streaming(opts, data, ranks)}
    identity = Identity(resume_fingerprint(opts), data.fingerprint(), _base_model(opts), environment, training)
    stored = _stored(opts, ranks)
    named = named_position(opts.start_options(), length)
    if stored is None:
        if named is not None:
            logger.info("counting goes on after update %d of %d", named.step, length.total_steps)
        return Beginning(length, identity, named or Position())
    changes = compare(stored.info, identity, length, opts.state.allows, seed=opts.length.seed)
    changes.raise_refused("--resume")
    for note in (*stored.notes, *changes.notes):
        logger.warning("%s", note)
    position = named or start_position(stored.info, length, changes)
    if named is not None:
        stored = replace(stored, info=replace(stored.info, position=named))
        changes = replace(changes, moved=True)
    logger.info("going on from %s: %d of %d updates are done", stored.folder, position.step, length.total_steps)
    return Beginning(length, identity, position, stored, changes)


def named_position(start: StartOptions, length: RunLength) -> Position | None:
    """Return where `--initial_step` or `--initial_epoch` (1 is the first) say that the run begins; None: nowhere.

    Everything that goes by the number of updates goes on from there: the learning rate, names of files, the end of the
    run. With `--skip_until_initial_step` so do the data, as if the updates before had been done; otherwise the epoch
    that the position lies in begins with its first batch.

    Raises:
        UserError: the run ends before.
    """
    if not start.given:
        return None
    step = start.initial_step
    if step is None:
        step = ((start.initial_epoch or 1) - 1) * length.updates_per_epoch
    if step >= length.total_steps:
        name = "--initial_epoch" if start.initial_step is None else "--initial_step"
        what = f"begins after {step} updates, but the whole run has {length.total_steps}"
        raise UserError(what, "Raise --max_train_steps (or --max_train_epochs).", where=name)
    epoch, inside = divmod(step, length.updates_per_epoch)
    return Position(step, epoch, inside if start.skip_until_initial_step else 0)


def _stored(opts: TrainingOptions, ranks: Ranks) -> StoredState | None:
    state, save = opts.state, opts.save
    if not state.resume:
        return None
    folder = None
    if ranks.is_main:
        resume = _downloaded(opts) if state.resume_from_huggingface else state.resume
        found = find_state(resume, save.output_dir, save.output_name, fast=state.fast_resume)
        folder = None if found is None else str(found.folder)
    folder = ranks.broadcast(folder)
    return None if folder is None else verify_state(folder, fast=True)


def _downloaded(opts: TrainingOptions) -> str:
    from library.training.hub_state import download_state

    return str(download_state(opts.state.resume or "", opts.hub))


def _base_model(opts: TrainingOptions) -> dict[str, Any]:
    """Return what weights come from that no state holds: those of frozen parts, another VAE, merged networks."""
    return {
        f"{what} {key}".lstrip(): value
        for what, name in opts.base_files().items()
        for key, value in _name_and_hash(name).items()
    }


def _name_and_hash(name: str) -> dict[str, Any]:
    path = Path(name)
    # What is no path is the id of a repository, which keeps its owner's name; where there is nothing there is no name.
    if not name or not path.exists():
        return {"name": name, "hash": ""}
    return {"name": path.name, "hash": legacy_hash(path) if path.is_file() else _folder_mark(path)}


def _folder_mark(folder: Path) -> str:
    """Return a short digest of the weight files of a model folder: names, sizes, and the short hash of each."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".bin") and path.is_file():
            digest.update(f"{path.relative_to(folder).as_posix()}:{path.stat().st_size}:{legacy_hash(path)};".encode())
    return digest.hexdigest()[:8]


def _streaming(opts: TrainingOptions, data: TrainingData, ranks: Ranks) -> dict[str, Any]:
    """Return what else decides which batches come next where tar files are streamed."""
    if not isinstance(data, StreamedData):
        return {}
    return {"loader processes": data.lanes(worker_count(opts.loader, cached=False), ranks.world)}


def _environment(device: torch.device) -> dict[str, Any]:
    """Return what changes bits without being an option; differences are reported."""
    from diffusers import __version__ as diffusers_version
    from transformers import __version__ as transformers_version

    return {
        "torch": torch.__version__,
        "diffusers": diffusers_version,
        "transformers": transformers_version,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else os.environ.get("OMP_NUM_THREADS", ""),
    }
