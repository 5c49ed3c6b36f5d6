"""Start-up: --help, an option error, and the way to the first step, against bare imports in a fresh process.

CPU seconds of whole processes, the best of several that take turns. The tiny model and its pictures are there before.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report import child_cpu_seconds, report  # noqa: E402

IMPORTS = (
    "import torch; from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel; "
    "from transformers import CLIPTextModel"
)
FIRST_STEP = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train_db
from library.training.loop import Loop
Loop._between_updates = lambda self: os._exit(0)
train_db.main(sys.argv[1:])
"""
"""Ends the process when the first update is done."""


def commands(folder: Path) -> dict[str, tuple[list[str], int]]:
    """Return commands and exit statuses of what is measured."""
    from library.models.random_models import make_random_sd

    model = make_random_sd(folder / "tiny.safetensors", family="sd1")
    dataset = folder / "data.toml"
    dataset.write_text(
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{ROOT / 'examples/photos/duck'}'\n"
    )
    script = [sys.executable, str(ROOT / "train_db.py")]
    options = [
        f"--pretrained_model_name_or_path={model}",
        f"--dataset_config={dataset}",
        f"--output_dir={folder}/out",
        "--max_train_steps=1",
        "--max_data_loader_n_workers=0",
        "--overwrite",
        "--seed=1",
    ]
    return {
        "bare imports": ([sys.executable, "-c", IMPORTS], 0),
        "train_db.py --help": ([*script, "--help"], 0),
        "option error": ([*script, "--resolutoin=1"], 2),
        "start to end of first step": ([sys.executable, "-c", FIRST_STEP, *options], 0),
        "run of one step, with its save": ([*script, *options], 0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cases = commands(Path(folder))
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(args.rounds):
            for name, (command, status) in cases.items():
                times[name].append(child_cpu_seconds(command, status=status, OMP_NUM_THREADS="1"))
    best = {name: min(found) for name, found in times.items()}
    limits: dict[str, Any] = {"train_db.py --help": "0.3 s", "option error": "0.3 s"}
    limits["start to end of first step"] = "1.3 times the imports"
    rows = [
        {
            "what": name,
            "cpu_s": seconds,
            "ratio_to_imports": seconds / best["bare imports"],
            "limit": limits.get(name, ""),
        }
        for name, seconds in best.items()
    ]
    report("startup", rows, args.output)


if __name__ == "__main__":
    main()
