"""Saving everything that a run needs to go on exactly, and loading it again.

The layout is accelerate's, so `accelerator.load_state` reads our folders and we read the reference's; what is ours
comes in additional files, `resume.json` last. Nothing is registered for checkpointing, since accelerate unpickles such
objects without protection. Randomness is a function of counters (`library.randomness`); the stored generators serve
third-party code only.
"""

from __future__ import annotations

import io
import logging
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.pickles import load_pickle
from library.checkpoints.tensor_files import NonFiniteWeights, all_finite, write_safetensors
from library.errors import EXIT_CANNOT_SAVE, StopTraining, UserError
from library.files import CannotSave, atomic_folder, fault_point, write_bytes, write_json
from library.training.ranks import Ranks
from library.training.state_files import (
    EMA_NUMBERS,
    EMA_WEIGHTS,
    FORMAT_VERSION,
    MANIFEST,
    OBJECTIVE,
    OPTIMIZER,
    SCALER,
    SCHEDULER,
    TRAIN_STATE,
    FileTable,
    Identity,
    StateInfo,
    StoredState,
    find_state,
    model_names,
    next_sequence,
    verify_state,
    write_pickle,
)
from library.training.state_parts import Gathered, StateParts
from library.training.state_shards import load_shard, shard_files

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.training.resume_check import Changes

__all__ = [
    "Identity",
    "Ranks",
    "StateInfo",
    "StateParts",
    "StoredState",
    "find_state",
    "load_progress",
    "load_state",
    "load_weights",
    "save_state",
    "state_bytes",
    "verify_state",
]

_log = logging.getLogger(__name__)
_EARLIER = "Resume from an earlier state"


def state_bytes(modules: Mapping[str, nn.Module], per_parameter: float = 2.0) -> int:
    """Estimate the size of a state: the weights, and `per_parameter` float32 numbers of the optimizer for each."""
    from itertools import chain

    tensors = chain.from_iterable((*module.parameters(), *module.buffers()) for module in modules.values())
    # A tensor that is shared between processes has no values here, but says how many it has in all.
    sizes = ((getattr(tensor, "ds_numel", tensor.numel()), tensor.element_size()) for tensor in tensors)
    return sum(round(count * (size + 4 * per_parameter)) for count, size in sizes)


def save_state(folder: str | Path, parts: StateParts, info: StateInfo, ranks: Ranks | None = None) -> None:
    """Write a state folder; a collective call. The folder appears complete, or a previous one stays.

    Args:
        folder: where; its missing parents are made.
        parts: what to save, between two updates and with schedule-free optimizers in training mode.
        info: position, seed, identity...; `world` and `modules` are filled in here.
        ranks: the processes of the run; rank 0 writes.

    Raises:
        CannotSave: rank 0 could not write; raised on every rank.
        NonFiniteWeights: weights hold NaN or infinity.
    """
    ranks = ranks or Ranks()
    _require_training_mode(parts.optimizer)
    generators = ranks.gather(_generators(info.position.step))
    failure: tuple[str, int] | None = None
    error: StopTraining | None = None
    gathered = parts.gathered()
    with shard_files(Path(folder), parts.shards, ranks) as shards:
        if ranks.is_main:
            filled = replace(info, world=ranks.world, modules=tuple(parts.modules), sharded=bool(shards))
            try:
                _write_folder(Path(folder), parts, filled, generators, gathered, shards)
            except StopTraining as caught:
                error, failure = caught, (caught.reason, caught.exit_code)
        failure = ranks.broadcast(failure)
    if error is not None:
        raise error
    if failure is not None:
        reason, code = failure
        raise CannotSave(reason, folder) if code == EXIT_CANNOT_SAVE else StopTraining(reason, code)


def load_state(
    stored: StoredState, parts: StateParts, changes: Changes | None = None, ranks: Ranks | None = None
) -> StateInfo:
    """Bring `parts` to where the state was saved; every rank calls it.

    Args:
        stored: a state that `find_state` or `verify_state` found whole.
        parts: freshly built for this run's options.
        changes: what differs from the saved run and was allowed: rates, schedules and arguments that differ keep the
            values of this run.
        ranks: the processes of the run; each restores its own generators.

    Raises:
        UserError: the state does not fit the model or the optimizer, or its weights are not finite.
    """
    load_weights(stored, parts.modules)
    return load_progress(stored, parts, changes, ranks)


def load_weights(stored: StoredState, modules: Mapping[str, nn.Module]) -> None:
    """Do the first half of `load_state`: before modules are compiled, wrapped or shared between processes."""
    if len(stored.info.modules) not in (0, len(modules)):
        saved, now = len(stored.info.modules), len(modules)
        hint = "Train the same parts as before (is --stop_text_encoder_training the same?)"
        raise UserError(f"holds {saved} trained models, this run trains {now}", hint, where=str(stored.folder))
    content = stored.opened()
    for name, module in zip(model_names(len(modules)), modules.values(), strict=True):
        _load_module(stored.folder / name, content.tensors(name), module)


def load_progress(
    stored: StoredState, parts: StateParts, changes: Changes | None = None, ranks: Ranks | None = None
) -> StateInfo:
    """Do the second half of `load_state`: all but the weights."""
    ranks = ranks or Ranks()
    if parts.shards is not None:
        load_shard(stored, parts.shards, changes, ranks)
    _load_optimizer(stored, parts, changes)
    _load_rest(stored, parts)
    if stored.info.exact and ranks.rank < stored.info.world:
        _restore_generators(stored.folder / f"random_states_{ranks.rank}.pkl")
    return stored.info


def _write_folder(
    folder: Path,
    parts: StateParts,
    info: StateInfo,
    generators: list[bytes],
    gathered: Gathered,
    shards: Mapping[str, Path],
) -> None:
    tensors = {f"{part}.{name}": value for part, names in _weights(parts).items() for name, value in names.items()}
    if bad := all_finite(tensors):
        raise NonFiniteWeights(bad, folder)
    with atomic_folder(folder, size=state_bytes(parts.modules)) as temporary:
        table = FileTable()
        try:
            for path in _write_parts(temporary, parts, gathered, shards):
                table.add(path)
                fault_point("state.between_files")
            for rank, data in enumerate(generators):
                path = temporary / f"random_states_{rank}.pkl"
                write_bytes(path, data)
                table.add(path)
            write_json(temporary / TRAIN_STATE, _train_state(info))
            table.add(temporary / TRAIN_STATE)
        finally:
            files = table.close()
        sequence = next_sequence(folder, info.output_name)
        fault_point("state.before_manifest")
        manifest = {"format_version": FORMAT_VERSION, "sequence": sequence, "info": info.to_json(), "files": files}
        write_json(temporary / MANIFEST, manifest)


def _weights(parts: StateParts) -> dict[str, dict[str, Tensor]]:
    return {part: _own_tensors(module) for part, module in parts.modules.items()}


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers as they are, under the names of a plain `state_dict()`.

    Some modules (LyCORIS) hand out products of their parameters in `state_dict()`, from which those cannot be regained.
    """
    found = {}
    for path, child in module.named_modules(remove_duplicate=False):
        kept = {
            name: buffer for name, buffer in child._buffers.items() if name not in child._non_persistent_buffers_set
        }
        for name, tensor in (*child._parameters.items(), *kept.items()):
            if tensor is not None:
                found[f"{path}.{name}" if path else name] = tensor.detach()
    return found


def _write_parts(folder: Path, parts: StateParts, gathered: Gathered, shards: Mapping[str, Path]) -> Iterator[Path]:
    """Write the tensors, yielding each file when it is complete; the largest first, so that it is hashed early."""
    for name, path in shards.items():
        yield path.replace(folder / name)
    if gathered.optimizer is not None:
        yield write_pickle(folder / OPTIMIZER, gathered.optimizer)
    for name, weights in zip(model_names(len(parts.modules)), _weights(parts).values(), strict=True):
        write_safetensors(folder / name, weights, {"format": "pt"})
        yield folder / name
    yield write_pickle(folder / SCHEDULER, parts.lr_schedule.state_dict())
    if parts.scaler is not None:
        yield write_pickle(folder / SCALER, parts.scaler.state_dict())
    if parts.objective is not None and (state := parts.objective.state_dict()):
        yield write_pickle(folder / OBJECTIVE, state)
    if parts.ema is not None and gathered.averages is not None:
        write_safetensors(folder / EMA_WEIGHTS, gathered.averages, {"format": "pt"})
        yield folder / EMA_WEIGHTS
        write_json(folder / EMA_NUMBERS, dict(parts.ema.numbers()))
        yield folder / EMA_NUMBERS


def _train_state(info: StateInfo) -> dict[str, Any]:
    """The reference's file: the epoch of the last update (from 1) and the updates done; the rest is ours."""
    position = info.position
    epoch = position.epoch + 1 if position.update_in_epoch else max(1, position.epoch)
    ours = {"epochs_done": position.epoch, "update_in_epoch": position.update_in_epoch, "seed": info.seed}
    return {"current_epoch": epoch, "current_step": position.step, **ours}


def _require_training_mode(optimizer: torch.optim.Optimizer) -> None:
    if any(group.get("train_mode") is False for group in optimizer.param_groups):
        raise ValueError("a schedule-free optimizer must be in training mode while its state is saved")


def _load_module(path: Path, stored: dict[str, Tensor], module: nn.Module) -> None:
    """Copy the weights of a file into `module`: same names, same shapes, all finite."""
    wanted = _own_tensors(module)
    # A buffer that older transformers stored; it follows from the configuration.
    stored = {name: tensor for name, tensor in stored.items() if not name.endswith("position_ids") or name in wanted}
    missing, extra = sorted(set(wanted) - set(stored)), sorted(set(stored) - set(wanted))
    if missing or extra:
        what = f"is a state of another model: {len(missing)} tensors missing, {len(extra)} unknown"
        raise UserError(what, f"For example {(missing + extra)[0]}", where=str(path))
    for name, tensor in stored.items():
        if tensor.shape != wanted[name].shape:
            what = f"is a state of another model: {name} is {tuple(tensor.shape)}, not {tuple(wanted[name].shape)}"
            raise UserError(what, where=str(path))
    if bad := all_finite(stored):
        raise UserError(f"{len(bad)} tensors hold NaN or infinity, for example {bad[0]}", _EARLIER, where=str(path))
    # First as the module takes them, which may act on what it finds; then each as it is.
    module.load_state_dict(stored, strict=False)
    for name, tensor in stored.items():
        wanted[name].copy_(tensor)


def _load_optimizer(stored: StoredState, parts: StateParts, changes: Changes | None) -> None:
    from library.training.optimizer_state import load_optimizer_state, rewind_schedule, take_schedule

    optimizer = parts.optimizer
    rates = [{key: group[key] for key in ("lr", "initial_lr") if key in group} for group in optimizer.param_groups]
    kept = changes.optimizer_arguments if changes else ()
    content, where = stored.opened(), str(stored.folder / OPTIMIZER)
    if parts.shards is None:
        if stored.info.sharded:
            raise UserError("was saved with --deepspeed, which this run does not use", where=str(stored.folder))
        if content.optimizer not in ("", type(optimizer).__name__):
            what = f"is of {content.optimizer}, and this run trains with {type(optimizer).__name__}"
            raise UserError(what, f"Give --optimizer_type={content.optimizer}.", where=str(stored.folder))
        if content.has(OPTIMIZER):
            state, exact = content.pickle(OPTIMIZER), not content.optimizer
            load_optimizer_state(optimizer, state, where=where, keep=kept, layout=parts.layout, exact_types=exact)
    if (changes is not None and changes.new_schedule) or not content.has(SCHEDULER):
        rewind_schedule(parts.lr_schedule, optimizer, rates, stored.info.position.step)
    else:
        take_schedule(parts.lr_schedule, content.pickle(SCHEDULER), stored.info)


def _load_rest(stored: StoredState, parts: StateParts) -> None:
    folder, content = stored.folder, stored.opened()
    for name, part in ((SCALER, parts.scaler), (OBJECTIVE, parts.objective)):
        if part is not None and content.has(name):
            part.load_state_dict(content.pickle(name))
    if parts.scaler is not None and stored.info.exact and not content.has(SCALER):
        raise UserError("holds no loss scaler", "It was not saved with --mixed_precision fp16", where=str(folder))
    if parts.ema is not None:
        if content.has(EMA_WEIGHTS):
            parts.ema.restore(content.tensors(EMA_WEIGHTS), content.json(EMA_NUMBERS))
        else:
            _log.warning("%s holds no averaged weights (EMA): the average begins with the weights", folder)


def _generators(step: int) -> bytes:
    """Return this process's global random generators as accelerate stores them."""
    import numpy as np
    import torch

    algorithm, keys, *rest = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "step": step,
        "random_state": random.getstate(),
        # A list serves numpy as well as an array, and needs nothing special when it is read back.
        "numpy_random_seed": (algorithm, np.asarray(keys).tolist(), *rest),
        "torch_manual_seed": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["torch_cuda_manual_seed"] = torch.cuda.get_rng_state_all()
    buffer = io.BytesIO()
    torch.save(states, buffer)
    return buffer.getvalue()


def _restore_generators(path: Path) -> None:
    import numpy as np
    import torch

    states = load_pickle(path, mmap=False)
    try:
        random.setstate(states["random_state"])
        np.random.set_state(states["numpy_random_seed"])
        torch.set_rng_state(states["torch_manual_seed"])
        cuda = states.get("torch_cuda_manual_seed", [])
        if torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(cuda)
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UserError(f"holds no random generators ({error})", _EARLIER, where=str(path)) from error
