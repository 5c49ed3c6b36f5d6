"""Command lines of small Stable Cascade trainings, for tests that run the scripts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.support import run_tool


def train_stage_c(*argv: object) -> int:
    """Run stable_cascade_train_stage_c.py with a command line; returns the exit status."""
    import stable_cascade_train_stage_c as script

    return run_tool(script.main, *argv)


def train_stage_b(*argv: object) -> int:
    """Run stable_cascade_train_stage_b.py with a command line; returns the exit status."""
    import stable_cascade_train_stage_b as script

    return run_tool(script.main, *argv)


def words(values: dict[str, object], *more: object) -> list[str]:
    """Return options by name as words; None leaves one out."""
    return [f"--{name}={value}" for name, value in values.items() if value is not None] + [str(word) for word in more]


def command_maker(files, photos: Path) -> Callable[..., list[str]]:
    """Return what makes the command line of a small training: options by name, None leaves one out; then more words."""

    def command(out: Path, *more: object, stage: str = "c", **changes: object) -> list[str]:
        values: dict[str, object] = {
            f"stage_{stage}_checkpoint_path": files.stage_c if stage == "c" else files.stage_b,
            "stage_a_checkpoint_path": files.stage_a if stage == "b" else None,
            "effnet_checkpoint_path": files.effnet,
            "text_model_checkpoint_path": files.text,
            "train_data_dir": photos,
            "output_dir": out,
            "output_name": "duck",
            "resolution": 64,
            "learning_rate": 1e-3,
            "max_train_steps": 3,
            "max_data_loader_n_workers": 0,
            "seed": 7,
        }
        return words(values | changes, *more)

    return command
