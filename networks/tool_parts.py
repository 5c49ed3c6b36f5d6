"""What the LoRA tools share: checks of their options, types and devices by name, and the metadata they write. Light."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.metadata import modelspec_metadata
from library.errors import Problem, UserError

if TYPE_CHECKING:
    import torch

    from library.contracts import FamilySpec

PRECISIONS = ("float", "fp16", "bf16")
"""Names of number formats on the command line."""


class _NoDescription:
    """Stands for the options that describe a model (`metadata_*`), none of which was given."""

    def __init__(self, merged_from: str | None) -> None:
        self.metadata_merged_from = merged_from

    def __getattr__(self, name: str) -> None:
        return None


def missing_options(**values: str | None) -> Iterator[Problem]:
    """Yield a problem for every option (by name) that has no value and needs one."""
    return (Problem(f"--{name}", "is required", "See --help.") for name, value in values.items() if not value)


def check_target(path: str | None, sources: Iterable[str | None] = ()) -> Iterator[Problem]:
    """Yield what is wrong with `--save_to`: a folder, another suffix, or one of the files that are read."""
    if not path:
        return
    target = Path(path)
    if target.is_dir():
        yield Problem(f"--save_to {path}", "is a folder", "Give the name of a file.")
    elif target.suffix not in (".safetensors", ".ckpt", ".pt"):
        yield Problem(f"--save_to {path}", "has no suffix of a LoRA file", "End it with .safetensors (or .ckpt, .pt).")
    yield from check_output("--save_to", path, sources)


def check_output(option: str, path: str | None, sources: Iterable[str | None]) -> Iterator[Problem]:
    """Yield a problem when what `option` names cannot be written, or is one of the files or folders that are read."""
    if not path:
        return
    real = os.path.realpath(path)
    if any(source and os.path.realpath(source) == real for source in sources):
        yield Problem(f"{option} {path}", "is the file that is read", "Choose another name.")
    # Missing folders are made when the result is there.
    folder = next(parent for parent in Path(real).parents if parent.exists())
    if not folder.is_dir():
        yield Problem(f"{option} {path}", f"{folder} is a file, not a folder", "Choose another name.")
    elif not os.access(folder, os.W_OK | os.X_OK):
        yield Problem(f"{option} {path}", f"cannot write into {folder}", "Check its permissions or choose another.")


def dtype_of(precision: str | None) -> torch.dtype | None:
    """Return the torch type that a name of `PRECISIONS` stands for, None for None."""
    import torch

    table = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return table[precision] if precision else None


def device_of(name: str | None) -> torch.device:
    """Return the device that `--device` names, the CPU for None.

    Raises:
        UserError: there is no such device here.
    """
    import torch

    try:
        device = torch.device(name or "cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"cannot be used ({reason})", "Give cpu, cuda or cuda:1.", where=f"--device {name}") from error
    return device


def show(lines: Iterable[str]) -> None:
    """Write lines to standard output; when its reader (`head`, `less`) has gone, the rest is made but not written."""
    for line in lines:
        try:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
        except BrokenPipeError:
            # As Python's documentation advises, so that flushing at exit does not fail once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def lora_modelspec(
    spec: FamilySpec, save_to: str, *, kind: str = "lora", merged_from: str | None = None
) -> dict[str, str]:
    """Return the `modelspec.*` entries of a file that a tool makes; its title is the name of the file.

    Args:
        spec: of the model.
        save_to: name of the file.
        kind: ``lora``, or empty for a checkpoint.
        merged_from: names of the files that went into it.
    """
    return modelspec_metadata(spec, _NoDescription(merged_from), output_name=Path(save_to).stem, kind=kind)
