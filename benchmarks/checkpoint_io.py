"""Loading and saving a full-size Stable Diffusion 1.5 checkpoint, against the least that the work can cost.

- load: from the path to named parts of the model, and one access to every page, against safetensors mapping the file
  and doing the same.
- ready: the same and modules built around the weights, every number checked for NaN, against safetensors and one sum
  over every tensor.
- save: against a plain streaming write of the same bytes, synchronized with the disk, as ours is.

Every measurement runs in a process of its own, with one thread of torch; memory is private memory (not the file's
pages) over what the process had after its imports.

    python benchmarks/checkpoint_io.py                  # 4.3 GB
    python benchmarks/checkpoint_io.py --scale 0.5      # widths halved: 1.1 GB
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report import report  # noqa: E402

NAMES = ROOT / "tests" / "golden" / "ckpt_keys_sd15.json"
FIXED = (49408, 77, 1000)
KINDS = ("safetensors", "ckpt")
TASKS = {"load": (*KINDS,), "ready": (*KINDS,), "save": (*KINDS, "safetensors fp16")}
LIMITS = {"load": 2.0, "ready": 2.0, "save": 1.5}


def make_file(path: Path, scale: float) -> None:
    """Write a random checkpoint tensor by tensor; its names and shapes are those of the real one."""
    import torch

    from library.checkpoints.tensor_files import LazyTensor, write_safetensors

    def tensor(row: dict) -> LazyTensor:
        shape = tuple(d if d < 64 or d in FIXED else int(d * scale) for d in row["shape"])
        return LazyTensor(shape, torch.float32, lambda: torch.randn(shape) * 0.02)

    rows = json.loads(NAMES.read_text())
    write_safetensors(path, {name: tensor(row) for name, row in rows.items() if not row.get("optional")})


def private_bytes() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024


class Peak:
    """Highest private memory while the block runs, over what it was at the start."""

    def __enter__(self) -> Peak:
        self.start = self.top = private_bytes()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.005):
            self.top = max(self.top, private_bytes())

    def __exit__(self, *_: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        self.top = max(self.top, private_bytes())
        self.done.set()
        self.thread.join()


def touch(tensor) -> int:
    import torch

    return int(tensor.reshape(-1).view(torch.uint8)[::4096].sum())


def reference_load(path: Path, access) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            access(file.get_tensor(name))


def our_load(path: Path):
    from library.checkpoints.load import load_parts

    parts = load_parts(str(path), "sd1")
    for tensors in (parts.unet, parts.text, parts.vae):
        for tensor in tensors.values():
            touch(tensor)
    return parts


def our_ready(path: Path):
    """Everything between a path and models ready to run: reading, renaming, checks, modules around the weights."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from library.checkpoints.load import load_parts
    from library.models.assemble import build_module, check_weights, from_config
    from library.models.clip_text import build_text_encoder
    from library.models.specs import stable_diffusion_family

    cpu, dtype = torch.device("cpu"), torch.float32
    spec = stable_diffusion_family("sd1")
    parts = load_parts(str(path), spec.name)
    unet = build_module(
        lambda: from_config(UNet2DConditionModel, parts.unet_config), parts.unet, what="U-Net", device=cpu, dtype=dtype
    )
    text = build_text_encoder(parts.text_config, parts.text, device=cpu, dtype=dtype)
    vae = build_module(
        lambda: from_config(AutoencoderKL, parts.vae_config), parts.vae, what="VAE", device=cpu, dtype=dtype
    )
    for name, module in (("unet", unet), ("text", text), ("vae", vae)):
        check_weights(module.state_dict(), name, allow_nan=False)
    return parts, (unet, text, vae)


def reference_write(target: Path, tensors: dict) -> None:
    import torch

    with target.open("wb") as file:
        for tensor in tensors.values():
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def prepare(task: str, path: Path, folder: Path):
    """Import and load what a measurement needs; return what is measured."""
    import torch

    torch.set_num_threads(1)
    verb, kind = task.split()[:2]
    if verb != "save":
        access = touch if verb == "load" else torch.sum
        action = {"load": our_load, "ready": our_ready}[verb]
        action = (lambda file: reference_load(file, access)) if kind == "reference" else action
        action(tiny_file(folder))
        return lambda: action(path)
    from library.checkpoints.load import load_parts
    from library.checkpoints.parts import SaveSettings
    from library.checkpoints.save import save_checkpoint
    from library.models.specs import stable_diffusion_family

    parts = load_parts(str(path), "sd1")
    tensors = {
        **parts.unet,
        **{f"t.{k}": v for k, v in parts.text.items()},
        **{f"v.{k}": v for k, v in parts.vae.items()},
    }
    for tensor in tensors.values():
        touch(tensor)
    if kind == "reference":
        return lambda: reference_write(folder / "out.bin", tensors)
    settings = SaveSettings(precision=torch.float16 if task.endswith("fp16") else None)
    spec = stable_diffusion_family("sd1")
    target = folder / f"out.{kind}"
    return lambda: save_checkpoint(target, kind, parts, spec=spec, source=parts.source, settings=settings)


def tiny_file(folder: Path) -> Path:
    """A tiny model: loading it once takes the imports out of the measurement."""
    from library.models.random_models import make_random_sd

    return make_random_sd(folder / f"tiny-{os.getpid()}.safetensors")


def measure(task: str, path: Path, folder: Path) -> None:
    action = prepare(task, path, folder)
    with Peak() as peak:
        kept = action()
    del kept
    print(json.dumps({"wall_s": peak.wall, "cpu_s": peak.cpu, "private_mb": (peak.top - peak.start) / 1e6}))


def run(task: str, path: Path, folder: Path, repeats: int) -> dict[str, float]:
    """Return the best times of several processes that do one task, and the most memory."""
    command = [sys.executable, __file__, "--task", task, "--file", str(path), "--folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    results = []
    for _ in range(repeats):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            sys.exit(done.stderr)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        for left in folder.glob("out.*"):
            left.unlink()
    choice = {"wall_s": min, "cpu_s": min, "private_mb": max}
    return {key: choose(result[key] for result in results) for key, choose in choice.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, choices=(0.5, 1.0), help="factor of all widths")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    parser.add_argument("--output")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        measure(args.task, args.file, args.folder)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        rows = compare(Path(name), args.scale, args.repeats)
    report("checkpoint_io", rows, args.output)


def compare(folder: Path, scale: float, repeats: int) -> list[dict]:
    from library.checkpoints.load import load_parts
    from library.checkpoints.save import save_checkpoint
    from library.models.specs import stable_diffusion_family

    files = {"safetensors": folder / "model.safetensors", "ckpt": folder / "model.ckpt"}
    make_file(files["safetensors"], scale)
    parts = load_parts(str(files["safetensors"]), "sd1")
    save_checkpoint(files["ckpt"], "ckpt", parts, spec=stable_diffusion_family("sd1"))
    rows = []
    for verb, tasks in TASKS.items():
        base = run(f"{verb} reference", files["safetensors"], folder, repeats)
        for task in ("reference", *tasks):
            source = files["safetensors"] if verb == "save" else files.get(task, files["safetensors"])
            found = base if task == "reference" else run(f"{verb} {task}", source, folder, repeats)
            ratios = {f"{kind}_ratio": found[f"{kind}_s"] / base[f"{kind}_s"] for kind in ("cpu", "wall")}
            limit = "" if task == "reference" else LIMITS[verb]
            rows.append({"task": f"{verb} {task}", **found, **ratios, "limit": limit})
            rows[-1]["file_gb"] = files["safetensors"].stat().st_size / 1e9
    return rows


if __name__ == "__main__":
    main()
