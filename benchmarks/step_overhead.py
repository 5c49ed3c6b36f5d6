"""What a training step costs beyond its arithmetic.

Compares the toolkit's whole update (loader, noise, loss, clipping, optimizer, bookkeeping) with forward and backward of
U-Net and text encoder and fused AdamW on tensors that are in memory already, and shows where the rest goes. `--size
full` is SD 1.5 in float32 with 256x256 pictures (it needs 18 GB of memory); `--size tiny` keeps all layers, with few
channels, at 64 pixels: the time that one CPU thread needs to issue a step.

CPU seconds of whole processes with one thread of torch, those of the loader's thread included. Every measurement runs
in a process of its own; of several the median of the best one counts.

    python benchmarks/step_overhead.py
    python benchmarks/step_overhead.py --size full
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report import report  # noqa: E402

WARM_UP = 2
LEARNING_RATE = 1e-6
SIZES = {"tiny": (64, 60, 3, 1.15), "full": (256, 6, 1, 1.03)}
"""By size: pixels, updates, processes of each kind, limit of the ratio."""
FORWARD, BACKWARD, STEP = "text encoder and U-Net", "backward", "optimizer"
PARTS = (FORWARD, BACKWARD, STEP, "norm of the gradients", "noise and timestep", "loss", "curves", "between updates")

Times = dict[str, list[float]]


@contextlib.contextmanager
def clocked(times: Times, part: str) -> Iterator[None]:
    begin = time.process_time()
    try:
        yield
    finally:
        times[part][-1] += time.process_time() - begin


def new_update(times: Times) -> None:
    for part in (*PARTS, "all"):
        times[part].append(0.0)


def bare_loop(model: Path, pixels: int, updates: int) -> Times:
    """The arithmetic alone."""
    import torch

    from library.models.family import WeightPlan
    from library.models.options import MemoryOptions, ModelOptions, TextOptions
    from library.models.sd import StableDiffusion
    from library.models.specs import stable_diffusion_spec

    options = ModelOptions(pretrained_model_name_or_path=str(model))
    spec = stable_diffusion_spec(options)
    family = StableDiffusion.load(options, TextOptions(), MemoryOptions(), spec=spec, weights=WeightPlan())
    modules = torch.nn.ModuleList([family.unet, family.text_encoder]).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=LEARNING_RATE, fused=True)
    latents, noise = torch.randn(2, 1, 4, pixels // 8, pixels // 8)
    ids, timestep = torch.from_numpy(family.tokenizers[0].encode("a photo of sks duck")[0])[None], torch.tensor([500])
    times: Times = defaultdict(list)
    for _ in range(updates):
        new_update(times)
        with clocked(times, "all"):
            with clocked(times, FORWARD):
                hidden = family.encode_text((ids,)).hidden
                prediction = family.unet(latents, timestep, encoder_hidden_states=hidden, return_dict=False)[0]
            loss = torch.nn.functional.mse_loss(prediction, noise)
            with clocked(times, BACKWARD):
                loss.backward()
            with clocked(times, STEP):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return times


def watch(owner: Any, name: str, times: Times, part: str, *, less: tuple[str, ...] = ()) -> None:
    """Let every call of `owner.name` add its time, without that of the parts `less` inside it, to `part`."""
    inner: Callable[..., Any] = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        if not times["all"]:  # not in the loop yet
            return inner(*args, **kwargs)
        before = sum(times[other][-1] for other in less)
        with clocked(times, part):
            result = inner(*args, **kwargs)
        times[part][-1] -= sum(times[other][-1] for other in less) - before
        return result

    setattr(owner, name, watched)


def watch_training(times: Times) -> None:
    """Measure the parts of the toolkit's updates, and leave out its last save."""
    from library.models.sd import StableDiffusion
    from library.training import stepping
    from library.training.loop import Loop
    from library.training.objective import DDPMObjective
    from library.training.saving import Saver
    from library.training.step import TrainStep
    from library.training.stepper import Stepper

    watch(StableDiffusion, "condition", times, FORWARD)
    watch(StableDiffusion, "denoise", times, FORWARD)
    watch(DDPMObjective, "noise", times, "noise and timestep")
    watch(TrainStep, "forward", times, "loss", less=(FORWARD, "noise and timestep"))
    watch(Stepper, "backward", times, BACKWARD)
    watch(stepping, "gradient_norm", times, "norm of the gradients")
    watch(Stepper, "step", times, STEP, less=("norm of the gradients",))
    watch(Loop, "_track", times, "curves")
    watch(Loop, "_between_updates", times, "between updates")
    watch(Loop, "_between_updates", times, "all")
    update = Loop._update

    def whole(self: Loop, batches: Any) -> None:
        new_update(times)
        with clocked(times, "all"):
            update(self, batches)

    Loop._update = whole  # type: ignore[method-assign]
    Saver.finish = lambda self, position: None  # type: ignore[method-assign]


def toolkit_loop(model: Path, pixels: int, updates: int) -> Times:
    """What train_db.py does, on latents cached in memory."""
    import train_db

    times: Times = defaultdict(list)
    watch_training(times)
    folder = Path(tempfile.mkdtemp(dir=model.parent))
    dataset = folder / "data.toml"
    dataset.write_text(
        f"[[datasets]]\nresolution = {pixels}\nbatch_size = 1\n[[datasets.subsets]]\n"
        f"image_dir = '{ROOT / 'examples/photos/duck'}'\nnum_repeats = 100\n"
    )
    options = {
        "pretrained_model_name_or_path": model,
        "dataset_config": dataset,
        "output_dir": folder / "out",
        "logging_dir": folder / "logs",
        "max_train_steps": updates,
        "max_data_loader_n_workers": 0,
        "learning_rate": LEARNING_RATE,
        "seed": 1,
    }
    with contextlib.suppress(SystemExit):
        train_db.main([*(f"--{name}={value}" for name, value in options.items()), "--cache_latents"])
    return times


def measure(kind: str, model: Path, size: str, updates: int) -> None:
    """Child process: print seconds per update of each part."""
    import torch

    torch.set_num_threads(1)
    loop = bare_loop if kind == "bare" else toolkit_loop
    times = loop(model, SIZES[size][0], updates)
    if len(times["all"]) != updates:
        sys.exit(f"{len(times['all'])} updates instead of {updates}")
    print(json.dumps({part: median(found[WARM_UP:]) for part, found in times.items()}))


def run(kind: str, model: Path, size: str, updates: int) -> dict[str, float]:
    command = [sys.executable, __file__, f"--kind={kind}", f"--model={model}", f"--size={size}", f"--updates={updates}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def compare(size: str, updates: int | None) -> list[dict[str, Any]]:
    from library.models.random_models import make_random_sd

    _, usual, rounds, limit = SIZES[size]
    found: dict[str, list[dict[str, float]]] = {"bare": [], "toolkit": []}
    with tempfile.TemporaryDirectory() as folder:
        model = make_random_sd(
            Path(folder) / "model.safetensors", family="sd1", size="thin" if size == "tiny" else size
        )
        for _ in range(rounds):
            for kind, results in found.items():
                results.append(run(kind, model, size, updates or usual))
    bare, ours = (min(results, key=lambda result: result["all"]) for results in found.values())
    for times in (bare, ours):
        times["everything else"] = times["all"] - sum(times[part] for part in PARTS)
    whole = bare["all"]
    rows = []
    for part in (*PARTS, "everything else", "all"):
        rows.append(
            {
                "part": part if part != "all" else "whole update",
                "bare loop, ms": 1000 * bare[part],
                "train_db.py, ms": 1000 * ours[part],
                "more, share of the bare loop": (ours[part] - bare[part]) / whole,
                "ratio": ours[part] / whole if part == "all" else "",
                "limit": limit if part == "all" else "",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--updates", type=int, default=None)
    parser.add_argument("--output")
    parser.add_argument("--kind", choices=("bare", "toolkit"), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        measure(args.kind, args.model, args.size, args.updates)
        return
    report(f"step_overhead_{args.size}", compare(args.size, args.updates), args.output)


if __name__ == "__main__":
    main()
