"""What several test packages share: running the training scripts in this process, and hashing what came out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path


def train_db(*argv: object) -> int:
    """Run train_db.py with a command line; returns the exit status."""
    import train_db as script

    return _status(script.main, argv)


def fine_tune(*argv: object) -> int:
    """Run fine_tune.py with a command line; returns the exit status."""
    import fine_tune as script

    return _status(script.main, argv)


def train_network(*argv: object) -> int:
    """Run train_network.py with a command line; returns the exit status."""
    import train_network as script

    return _status(script.main, argv)


def train_textual_inversion(*argv: object) -> int:
    """Run train_textual_inversion.py with a command line; returns the exit status."""
    import train_textual_inversion as script

    return _status(script.main, argv)


def run_tool(main: Callable[[list[str]], None], *argv: object) -> int:
    """Run the main function of a tool with a command line; returns the exit status."""
    return _status(main, argv)


def _status(main: Callable[[list[str]], None], argv: tuple[object, ...]) -> int:
    try:
        main([str(item) for item in argv])
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def tensor_digest(path: Path) -> str:
    """Hash of all tensors of a safetensors file, names and bytes, without the metadata."""
    import torch
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name).contiguous()
            digest.update(f"{name}:{tensor.dtype}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
