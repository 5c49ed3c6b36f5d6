"""What the children of `test_atomic_saves.py` run: writers of one file or folder, and a small saver."""

import itertools
import os
import resource
import sys

from library import files
from library.files import CannotSave


def _tensors(version):
    import torch

    return {f"t{number}": torch.full((64, 65), float(version) + number) for number in range(8)}


def write_text(path, version):
    files.write_text(path, "".join(f"{version} {number}\n" for number in range(30000)))


def write_json(path, version):
    files.write_json(path, [[version, number] for number in range(9000)])


def write_safetensors(path, version):
    from library.checkpoints.tensor_files import write_safetensors

    write_safetensors(path, _tensors(version))


def foreign_safetensors(path, version):
    """The safetensors library's own writer inside `atomic_file`, as third-party code would be called."""
    from safetensors.torch import save_file

    with files.atomic_file(path) as temporary:
        save_file(_tensors(version), temporary)


def torch_save(path, version):
    import torch

    with files.atomic_file(path) as temporary, files.NewFile(temporary) as file:
        torch.save(_tensors(version), file)


def numpy_savez(path, version):
    import numpy as np

    with files.atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **{name: tensor.numpy() for name, tensor in _tensors(version).items()})


def pickled_checkpoint(path, version):
    from library.checkpoints.ckpt_writer import write_ckpt

    write_ckpt(path, _tensors(version), {"epoch": 1, "global_step": version})


def write_folder(path, version):
    with files.atomic_folder(path) as temporary:
        write_text(temporary / "a.txt", version)
        write_json(temporary / "b" / "c.json", version)


def parts(version):
    """Model, optimizer and schedule of a tiny run after `version` updates."""
    import torch

    from library.training.state import StateParts

    torch.manual_seed(0)
    module = torch.nn.Linear(60, 60)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for _ in range(int(version)):
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        schedule.step()
    return StateParts({"unet": module}, optimizer, schedule)


def write_state(path, version):
    from library.contracts import Position, RunLength
    from library.training.state import StateInfo, save_state

    position = Position(int(version), 0, int(version))
    save_state(path, parts(version), StateInfo(position, seed=1, length=RunLength(9, 1, 9, 1, 1, 1), output_name="n"))


WRITERS = {
    function.__name__: function
    for function in (
        write_text, write_json, write_safetensors, foreign_safetensors, torch_save, numpy_savez, pickled_checkpoint,
        write_folder, write_state,
    )
}  # fmt: skip


def save(writer, path, version, limit="0"):
    """Write once, with `limit` bytes as the largest file that the system allows (0: no limit)."""
    allowed = int(limit) or resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, resource.RLIM_INFINITY))
    try:
        WRITERS[writer](path, int(version))
    except CannotSave as error:
        # The output is a file too.
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


def save_for_ever(writer, path):
    """Write versions 1, 2, 1, 2, ... until killed."""
    print("started", flush=True)
    for version in itertools.cycle((1, 2)):
        WRITERS[writer](path, version)


def save_as_rank(path, rank, store):
    """Save a state as one of two processes of a run; rank 0 meets a full disk when `SD_FAULT` says so."""
    from datetime import timedelta

    from torch import distributed

    from library.contracts import Position
    from library.training.state import Ranks, StateInfo, save_state

    timeout = timedelta(seconds=60)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2, timeout=timeout)
    try:
        save_state(path, parts(2), StateInfo(Position(2, 0, 2), output_name="n"), Ranks.of_torch())
    except CannotSave as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
    finally:
        distributed.destroy_process_group()


def keep_the_last(folder):
    """A run of nine updates that saves a model and a state after each and keeps the last two."""
    from pathlib import Path

    from library.contracts import Position, RunLength
    from library.training.options import SaveOptions, StateOptions
    from library.training.saving import SaveActions, Saver

    files.clean_litter(folder, min_age=0)

    def model(target, *, epoch, step):
        write_safetensors(target.with_suffix(".safetensors"), step)
        return target.with_suffix(".safetensors")

    def state(path):
        step = path.name.removeprefix("n-step").removesuffix("-state")
        write_state(path, 9 if step == "n" else int(step))

    save = SaveOptions(output_dir=folder, output_name="n", save_every_n_steps=1, save_last_n_steps=1)
    saver = Saver(save, StateOptions(save_state=True), RunLength(9, 1, 9, 1, 1, 1), SaveActions(model, state))
    start = sum(1 for _ in Path(folder).glob("n-step*-state")) and max(
        int(path.name[6:14]) for path in Path(folder).glob("n-step*-state")
    )
    for step in range(start, 9):
        saver.after_update(Position(step + 1, 0, step + 1), epoch_ended=False)
    saver.finish(Position(9, 1, 0))
    print("done", os.getpid())
