"""Merging one LoRA into a full-size Stable Diffusion 1.5 checkpoint, against copying the file.

- copy: the file read and written in blocks and synchronized with the disk, as our writing is.
- merge: networks/merge_lora.py with a LoRA of rank 32 for all layers that LoRAs usually have, from the command line's
  options to the finished file; after its imports.

Every measurement runs in a process of its own with one thread of torch. Memory is private memory (not the file's pages)
over what the process had after its imports.

    python benchmarks/lora_merging.py                    # 2.1 GB in float16, 4.3 GB in float32
    python benchmarks/lora_merging.py --precision fp16   # one of them
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.checkpoint_io import NAMES, Peak  # noqa: E402
from benchmarks.report import report  # noqa: E402

LAYERS = ROOT / "tests" / "golden" / "lora_keys_sd15.json"
TIME_LIMIT, MEMORY_LIMIT_GB = 2.0, 1.0
BLOCK = 16 * 1024**2


def make_checkpoint(path: Path, precision: str) -> None:
    """Write random numbers under the names and in the shapes of Stable Diffusion 1.5, tensor by tensor."""
    import torch

    from library.checkpoints.tensor_files import LazyTensor, write_safetensors

    dtype = {"fp16": torch.float16, "float": torch.float32}[precision]

    def tensor(shape: tuple) -> LazyTensor:
        return LazyTensor(shape, dtype, lambda: torch.randn(shape) * 0.02)

    rows = json.loads(NAMES.read_text())
    write_safetensors(
        path, {name: tensor(tuple(row["shape"])) for name, row in rows.items() if not row.get("optional")}
    )


def make_lora(path: Path, rank: int) -> None:
    """Write a random LoRA for every layer of the text encoder and of the U-Net's transformers."""
    import torch

    from library.checkpoints.lora_file import write_lora

    tensors = {}
    for name, shape in json.loads(LAYERS.read_text()).items():
        if name.endswith("alpha"):
            tensors[name] = torch.tensor(rank / 2)
        elif name.endswith("lora_down.weight"):
            tensors[name] = torch.randn(rank, *shape[1:]) * 0.02
        else:
            tensors[name] = torch.randn(shape[0], rank, *shape[2:]) * 0.02
    write_lora(path, tensors, None, precision=torch.float16)


def copy(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("wb") as written:
        while block := read.read(BLOCK):
            written.write(block)
        written.flush()
        os.fsync(written.fileno())


def prepare(task: str, folder: Path):
    """Import what a measurement needs; return what is measured."""
    source, target = folder / "model.safetensors", folder / "out.safetensors"
    if task == "copy":
        return lambda: copy(source, target)
    import torch
    import tqdm  # noqa: F401

    import library.checkpoints.lora_combine
    import library.checkpoints.lora_file
    import library.checkpoints.lora_merge  # noqa: F401
    import library.models.specs  # noqa: F401
    from library.option_parser import parse
    from networks import merge_lora

    torch.set_num_threads(1)
    argv = ["--sd_model", source, "--models", folder / "lora.safetensors", "--ratios", "0.8", "--save_to", target]
    options = parse(merge_lora.Options, [str(item) for item in argv])
    return lambda: merge_lora.merge(options)


def measure(task: str, folder: Path) -> None:
    action = prepare(task, folder)
    with Peak() as peak:
        action()
    print(json.dumps({"wall_s": peak.wall, "cpu_s": peak.cpu, "private_mb": (peak.top - peak.start) / 1e6}))


def run(task: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--task", task, "--folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    (folder / "out.safetensors").unlink()
    return json.loads(done.stdout.splitlines()[-1])


def compare(folder: Path, precision: str, rank: int, repeats: int) -> list[dict]:
    """Measure both tasks alternately, so that a disk that slows down slows both down; return the best of each."""
    make_checkpoint(folder / "model.safetensors", precision)
    make_lora(folder / "lora.safetensors", rank)
    results: dict[str, list[dict[str, float]]] = {"copy": [], "merge": []}
    for _ in range(repeats):
        for task, found in results.items():
            found.append(run(task, folder))
    choice = {"wall_s": min, "cpu_s": min, "private_mb": max}
    best = {task: {key: choice[key](row[key] for row in rows) for key in choice} for task, rows in results.items()}
    size = (folder / "model.safetensors").stat().st_size / 1e9
    limits = {"copy": "", "merge": f"{TIME_LIMIT:g} x, {MEMORY_LIMIT_GB:g} GB"}
    rows = []
    for task, found in best.items():
        ratio = found["wall_s"] / best["copy"]["wall_s"]
        rows.append(
            {"task": f"{task} {precision}", **found, "wall_ratio": ratio, "limit": limits[task], "file_gb": size}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp16", "float"), help="default: both")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    parser.add_argument("--output")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        measure(args.task, args.folder)
        return
    rows = []
    for precision in (args.precision,) if args.precision else ("fp16", "float"):
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            rows += compare(Path(name), precision, args.rank, args.repeats)
    report("lora_merging", rows, args.output)


if __name__ == "__main__":
    main()
