"""Small trainings of ControlNets for stage C, which several test packages run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from library.models.random_cascade import TINY_C, CascadeFiles
from tests.support import run_tool

FINAL = "net.safetensors"
STAGE = replace(TINY_C, blocks_down=(1, 2), blocks_up=(2, 1))
"""Six residual blocks."""


def control_words(files: CascadeFiles, photos: Path, out: Path, *more: object) -> list[str]:
    """Return the command line of a small run on a tree of photographs, or a folder of tar files."""
    return [
        f"--stage_c_checkpoint_path={files.stage_c}",
        f"--effnet_checkpoint_path={files.effnet}",
        f"--text_model_checkpoint_path={files.text}",
        f"--{'webdataset_path' if any(photos.glob('*.tar')) else 'train_data_dir'}={photos}",
        f"--output_dir={out}",
        "--output_name=net",
        "--controlnet_filter=canny",
        "--resolution=64",
        "--train_batch_size=2",
        "--learning_rate=1e-2",
        "--max_train_steps=4",
        "--max_data_loader_n_workers=0",
        "--seed=7",
        *map(str, more),
    ]


def train_control_net(*argv: object) -> int:
    """Run stable_cascade_train_c_control_net.py with a command line; returns the exit status."""
    import stable_cascade_train_c_control_net as script

    return run_tool(script.main, *argv)
