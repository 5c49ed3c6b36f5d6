"""Start-up: --help, an option error, and the way to the first step, against bare imports in a fresh process."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report import child_cpu_seconds, report  # noqa: E402

IMPORTS = (
    "import torch; from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel; "
    "from transformers import CLIPTextModel"
)


def best(command: list[str], rounds: int) -> float:
    return min(child_cpu_seconds(command, OMP_NUM_THREADS="1") for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output")
    args = parser.parse_args()
    from library.models.random_models import make_random_sd

    with tempfile.TemporaryDirectory() as folder:
        model = make_random_sd(Path(folder) / "tiny.safetensors", family="sd1")
        dataset = Path(folder) / "data.toml"
        dataset.write_text(
            f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{ROOT / 'examples/photos/duck'}'\n"
        )
        script = [sys.executable, str(ROOT / "train_db.py")]
        train = [
            *script,
            f"--pretrained_model_name_or_path={model}",
            f"--dataset_config={dataset}",
            f"--output_dir={folder}/out",
            "--max_train_steps=1",
            "--max_data_loader_n_workers=0",
            "--save_precision=fp16",
            "--overwrite",
        ]
        bare = best([sys.executable, "-c", IMPORTS], args.rounds)
        rows = [
            {"what": "train_db.py --help", "cpu_s": best([*script, "--help"], args.rounds), "limit_s": 0.3},
            {"what": "option error", "cpu_s": best([*script, "--resolutoin=1"], args.rounds), "limit_s": 0.3},
            {"what": "bare imports", "cpu_s": bare, "limit_s": ""},
            {"what": "one step, start to end", "cpu_s": best(train, args.rounds), "limit_s": round(1.3 * bare, 2)},
        ]
    for row in rows:
        row["ratio_to_imports"] = row["cpu_s"] / bare
    report("startup", rows, args.output)


if __name__ == "__main__":
    main()
