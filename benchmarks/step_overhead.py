"""What a training step costs beyond its arithmetic.

Compares the toolkit's whole update (loader, noise, loss, clipping, optimizer, bookkeeping) with forward and backward of
U-Net and text encoder and fused AdamW on tensors that are in memory already, and shows where the rest goes. `--size
full` is SD 1.5 in float32 with 256x256 pictures (it needs 18 GB of memory); `--size tiny` keeps all layers, with few
channels, at 64 pixels: the time that one CPU thread needs to issue a step.

The bare loop does not clip gradients; `with clipping` compares with one that does, by torch's `clip_grad_norm_`.

train_db.py runs as a person runs it. After each of its updates the bare loop makes one with the same model, optimizer
and memory, so that whatever else the machine does meets both alike. Medians of CPU seconds of the whole process with
one thread of torch, those of the loader's thread included.

    python benchmarks/step_overhead.py
    python benchmarks/step_overhead.py --size full
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report import report  # noqa: E402

WARM_UP = 2
SIZES = {"tiny": ("thin", 64, 100, 1.15), "full": ("full", 256, 6, 1.03)}
"""By size: name of the random model, pixels, updates, limit of the ratio."""
FORWARD, BACKWARD, STEP = "text encoder and U-Net", "backward", "optimizer"
NORM, NOISE, REST = "norm of the gradients", "noise and timestep", "everything else"
PARTS = (FORWARD, BACKWARD, STEP, NORM, NOISE, "loss", "curves", "between updates")

WHOLE = "whole update"

Times = dict[str, list[float]]


@contextlib.contextmanager
def clocked(times: Times, part: str) -> Iterator[None]:
    begin = time.process_time()
    try:
        yield
    finally:
        times[part][-1] += time.process_time() - begin


def new_update(times: Times, parts: tuple[str, ...] = PARTS) -> None:
    for part in (*parts, WHOLE):
        times[part].append(0.0)


class BareLoop:
    """The arithmetic alone, on the model and with the optimizer of a training run."""

    def __init__(self, training: Any, pixels: int) -> None:
        import torch

        self.family, self.optimizer = training.family, training.built.optimizer
        spec = self.family.spec
        side = pixels // spec.latent_downscale
        self.latents, self.noise = torch.randn(2, 1, spec.latent_channels, side, side)
        self.ids = torch.from_numpy(self.family.tokenizers[0].encode("a photo of sks duck")[0])[None]
        self.timestep = torch.tensor([500])
        self.loss = torch.nn.functional.mse_loss
        self.step = torch.optim.AdamW.step
        self.clip = torch.nn.utils.clip_grad_norm_
        self.params = [param for group in self.optimizer.param_groups for param in group["params"]]
        if not (isinstance(self.optimizer, torch.optim.AdamW) and self.optimizer.defaults["fused"]):
            raise TypeError("the script was to use the fused AdamW")

    def predict(self) -> Any:
        """Run text encoder and U-Net."""
        hidden = self.family.encode_text((self.ids,)).hidden
        unet = self.family.unet
        return unet(self.latents, self.timestep, encoder_hidden_states=hidden, return_dict=False)[0]

    def update(self, times: Times) -> None:
        """Make one update."""
        new_update(times)
        with clocked(times, WHOLE):
            with clocked(times, FORWARD):
                prediction = self.predict()
            loss = self.loss(prediction, self.noise)
            with clocked(times, BACKWARD):
                loss.backward()
        with clocked(times, NORM):
            self.clip(self.params, 1.0, foreach=True)
        with clocked(times, WHOLE):
            with clocked(times, STEP):
                self.step(self.optimizer)
            self.optimizer.zero_grad(set_to_none=True)


def watch(owner: Any, name: str, times: Times, part: str, *, less: tuple[str, ...] = ()) -> None:
    """Let every call of `owner.name` add its time, without that of the parts `less` inside it, to `part`."""
    inner: Callable[..., Any] = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        if not times[WHOLE]:  # not in the loop yet
            return inner(*args, **kwargs)
        before = sum(times[other][-1] for other in less)
        with clocked(times, part):
            result = inner(*args, **kwargs)
        times[part][-1] -= sum(times[other][-1] for other in less) - before
        return result

    setattr(owner, name, watched)


def watch_training(times: Times, bare: Times, pixels: int, family: Any, objective: Any, loop: Any = BareLoop) -> None:
    """Measure the parts of the toolkit's updates, each followed by a bare one, and leave out the last save."""
    from library.training import stepper
    from library.training.loop import Loop
    from library.training.saving import Saver
    from library.training.step import TrainStep
    from library.training.stepper import Stepper

    watch(family, "condition", times, FORWARD)
    watch(family, "denoise", times, FORWARD)
    watch(objective, "noise", times, NOISE)
    watch(TrainStep, "forward", times, "loss", less=(FORWARD, NOISE))
    watch(Stepper, "backward", times, BACKWARD)
    watch(stepper, "gradient_norm", times, NORM)
    watch(Stepper, "step", times, STEP, less=(NORM,))
    watch(Loop, "_track", times, "curves")
    watch(Loop, "_between_updates", times, "between updates")
    update, between = Loop._update, Loop._between_updates
    loops: list[BareLoop] = []

    def whole(self: Loop, batches: Any) -> None:
        new_update(times)
        with clocked(times, WHOLE):
            update(self, batches)

    def then_bare(self: Loop) -> None:
        with clocked(times, WHOLE):
            between(self)
        if not loops:
            loops.append(loop(self.training, pixels))
        loops[0].update(bare)

    Loop._update, Loop._between_updates = whole, then_bare  # type: ignore[method-assign]
    Saver.finish = lambda self, position: None  # type: ignore[method-assign]


def train(script: Any, models: Mapping[str, Path], pixels: int, updates: int, *more: str) -> None:
    """Run a training script on latents cached in memory; models by their options, and further options."""
    folder = next(iter(models.values())).parent
    dataset = folder / "data.toml"
    dataset.write_text(
        f"[[datasets]]\nresolution = {pixels}\nbatch_size = 1\n[[datasets.subsets]]\n"
        f"image_dir = '{ROOT / 'examples/photos/duck'}'\nclass_tokens = 'sks duck'\nnum_repeats = 100\n"
    )
    options = {
        **models,
        "dataset_config": dataset,
        "output_dir": folder / "out",
        "logging_dir": folder / "logs",
        "max_train_steps": updates,
        "max_data_loader_n_workers": 0,
        "seed": 1,
    }
    try:
        script.main([*(f"--{name}={value}" for name, value in options.items()), "--cache_latents", *more])
    except SystemExit as end:
        if end.code:
            raise


def measure(size: str, updates: int | None) -> tuple[dict[str, float], dict[str, float]]:
    """Return median seconds of each part of an update, of the bare loop and of train_db.py."""
    import torch

    import train_db
    from library.models.random_models import make_random_sd
    from library.models.sd import StableDiffusion
    from library.training.objective import DDPMObjective

    torch.set_num_threads(1)
    kind, pixels, usual, _ = SIZES[size]
    bare: Times = defaultdict(list)
    ours: Times = defaultdict(list)
    watch_training(ours, bare, pixels, StableDiffusion, DDPMObjective)
    with tempfile.TemporaryDirectory() as folder:
        model = make_random_sd(Path(folder) / "model.safetensors", family="sd1", size=kind)
        models = {"pretrained_model_name_or_path": model}
        train(train_db, models, pixels, updates or usual, "--learning_rate=1e-6")
    return medians(bare), medians(ours)


def medians(times: Times) -> dict[str, float]:
    """Return the median seconds of each part."""
    return {part: median(seconds[WARM_UP:]) for part, seconds in times.items()}


def compare(bare: dict[str, float], ours: dict[str, float], script: str, limit: float) -> list[dict[str, Any]]:
    """Return the rows of the table."""
    clipping, bare[NORM] = bare[NORM], 0.0
    for times in (bare, ours):
        times[REST] = times[WHOLE] - sum(times[part] for part in PARTS)
    rows = []
    for part in (*PARTS, REST, WHOLE):
        more = (ours[part] - bare[part]) / bare[WHOLE]
        rows.append(
            {
                "part": part,
                "bare loop, ms": 1000 * bare[part],
                f"{script}, ms": 1000 * ours[part],
                "more, %": 100 * more,
                "ratio": "",
                "limit": "",
            }
        )
    rows[-1] |= {"ratio": ours[WHOLE] / bare[WHOLE], "limit": limit}
    whole, bare_whole = ours[WHOLE], bare[WHOLE] + clipping
    rows.append({"part": "with clipping", "bare loop, ms": 1000 * bare_whole, f"{script}, ms": 1000 * whole})
    rows[-1] |= {"more, %": 100 * (whole / bare_whole - 1), "ratio": whole / bare_whole, "limit": ""}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--updates", type=int, default=None)
    parser.add_argument("--output")
    args = parser.parse_args()
    bare, ours = measure(args.size, args.updates)
    report(f"step_overhead_{args.size}", compare(bare, ours, "train_db.py", SIZES[args.size][3]), args.output)


if __name__ == "__main__":
    main()
