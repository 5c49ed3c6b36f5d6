"""Resizing a rank-128 LoRA of full-size Stable Diffusion 1.5 (264 modules) to rank 32.

- command: the program from its start to the file under its final name, imports included.
- work: the same without the start of Python and the imports.
- one module: decomposing one product of the factors by the core of the factors, against a full decomposition of the
  product, which is what the same result costs without that.

Each measurement has a process of its own, and one thread of torch unless `--threads` says otherwise.

    python benchmarks/lora_resizing.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report import child_cpu_seconds, cpu_seconds, report  # noqa: E402

NAMES = ROOT / "tests" / "golden" / "lora_keys_sd15.json"
OLD, NEW = 128, 32
LIMIT_S = 5.0
METHODS = {"fixed": [], "sv_fro 0.9": ["--dynamic_method", "sv_fro", "--dynamic_param", "0.9"]}


def make_file(path: Path, dtype: str) -> None:
    """Write a LoRA of rank 128 with the names and shapes of the real one and singular values that fall off."""
    import torch

    from library.checkpoints.lora_file import write_lora

    generator = torch.Generator().manual_seed(0)
    falling = torch.arange(1, OLD + 1).float().rsqrt()
    tensors = {}
    for name, shape in json.loads(NAMES.read_text()).items():
        if name.endswith(".alpha"):
            tensors[name] = torch.tensor(OLD / 2)
            continue
        is_up = name.endswith("lora_up.weight")
        wide = [shape[0], OLD, *shape[2:]] if is_up else [OLD, *shape[1:]]
        tensors[name] = torch.randn(wide, generator=generator) * 0.02
        if is_up:
            tensors[name] *= falling.reshape(OLD, *[1] * (len(wide) - 2))
    write_lora(path, tensors, {"ss_network_dim": str(OLD)}, precision=getattr(torch, dtype))


def run(source: Path, target: Path, extra: list[str], threads: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Return the best (CPU seconds, wall seconds) of the whole command and of the work inside."""
    options = ["--model", str(source), "--save_to", str(target), "--new_rank", str(NEW), *extra]
    environment: dict = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    whole, inner = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        cpu = child_cpu_seconds([sys.executable, str(ROOT / "networks" / "resize_lora.py"), *options], **environment)
        whole.append((cpu, time.perf_counter() - start))
        command = [sys.executable, __file__, "--inside", json.dumps(options)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **environment})
        inner.append(tuple(json.loads(done.stdout.splitlines()[-1])))
    return {"command": min(whole), "work": min(inner)}


def inside(options: list[str]) -> None:
    """Measure the work without imports, in a process of its own."""
    import torch
    import tqdm  # noqa: F401 - imported before the clock starts

    from library.checkpoints import lora_file, lora_math, low_rank  # noqa: F401
    from library.option_parser import finish, read
    from networks.resize_lora import Options, resize

    torch.linalg.svd(torch.ones(4, 4))
    opts = finish(Options, read(Options, options))
    print(json.dumps(cpu_seconds(lambda: resize(opts.resize))))


def one_module(shape: tuple[int, int]) -> dict:
    """Compare both ways of decomposing one product, with one thread."""
    import torch

    from library.checkpoints.low_rank import svd_of_product

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    up, down = (torch.randn(size, generator=generator) for size in ((shape[0], NEW), (NEW, shape[1])))
    svd_of_product(up, down)
    found: dict = {}
    took = cpu_seconds(lambda: found.update(ours=svd_of_product(up, down)))
    reference = cpu_seconds(lambda: found.update(full=torch.linalg.svd(up @ down, full_matrices=False)))
    error = float((found["ours"].s - found["full"].S[:NEW]).abs().max() / found["full"].S[0])
    return {
        "what": f"one module {shape[0]}x{shape[1]}, rank {NEW}",
        "cpu_s": took[0],
        "wall_s": took[1],
        "reference_cpu_s": reference[0],
        "ratio": took[0] / reference[0],
        "note": f"singular values differ by {error:.1e} of the largest",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        inside(json.loads(args.inside))
        return
    rows: list = []
    with tempfile.TemporaryDirectory() as name:
        for dtype in ("float16", "float32"):
            source = Path(name) / f"{dtype}.safetensors"
            make_file(source, dtype)
            for method, extra in METHODS.items():
                found = run(source, Path(name) / "out.safetensors", extra, args.threads, args.repeats)
                for what, (cpu, wall) in found.items():
                    label = f"{what}: rank {OLD} to {NEW}, {method}, {dtype}"
                    note = f"limit {LIMIT_S:g} s: {'met' if cpu <= LIMIT_S else 'missed'}"
                    row = {
                        "what": label,
                        "cpu_s": cpu,
                        "wall_s": wall,
                        "reference_cpu_s": "",
                        "ratio": "",
                        "note": note,
                    }
                    rows.append(row)
    rows += [one_module(shape) for shape in ((640, 2880), (1280, 1280))]
    report("lora_resizing", rows, args.output)


if __name__ == "__main__":
    main()
