"""What a LoRA step costs beyond forward and backward of the bare, frozen U-Net.

train_network.py runs as a person runs it (networks.lora, rank 16, latents cached); the denominator is one forward and
backward pass of diffusers' U-Net with the same weights, towards its input, and nothing else: no optimizer. `--size
full` is SD 1.5 in float32 with 256x256 pictures; `--size tiny` keeps all layers, with few channels, at 64 pixels: the
time that one CPU thread needs to issue a step.

A bare pass follows each update, so that whatever else the machine does meets both alike. Medians of CPU seconds of the
whole process with one thread of torch.

    python benchmarks/network_overhead.py
    python benchmarks/network_overhead.py --text
    python benchmarks/network_overhead.py --size full
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report import report  # noqa: E402
from benchmarks.step_overhead import WARM_UP, WHOLE, Times, clocked, new_update, train, watch  # noqa: E402

SIZES = {"tiny": ("thin", 64, 60), "full": ("full", 256, 6)}
LIMITS = {("tiny", "U-Net"): 1.4, ("tiny", "with text encoder"): 1.9}
LIMITS |= {("full", "U-Net"): 1.03, ("full", "with text encoder"): 1.08}
ELSEWHERE = {("tiny", "U-Net"): 2.3, ("tiny", "with text encoder"): 3.2, ("full", "U-Net"): 1.49}
"""Ratios of other trainers: sd-scripts for the tiny model, diffusers' example for the full one."""
FORWARD, BACKWARD, TEXT, STEP, NORM, NOISE = "U-Net", "backward", "text encoder", "optimizer", "norm", "noise"
PARTS = (TEXT, FORWARD, BACKWARD, STEP, NORM, NOISE, "curves", "between updates")


class BarePass:
    """Forward and backward of the U-Net alone, towards its input."""

    def __init__(self, training: Any, pixels: int) -> None:
        import torch
        from diffusers import UNet2DConditionModel

        own = training.family.unet
        with torch.device("meta"):
            self.unet = UNet2DConditionModel.from_config(dict(own.config))
        # As diffusers makes it, with the same weights.
        self.unet.load_state_dict(own.state_dict(), assign=True)
        self.unet.requires_grad_(False).eval()
        self.latents = torch.randn(1, 4, pixels // 8, pixels // 8).requires_grad_()
        self.hidden = torch.randn(1, 77, self.unet.config.cross_attention_dim)
        self.timestep = torch.tensor([500])
        self.gradient = torch.randn(1, 4, pixels // 8, pixels // 8)

    def run(self, times: Times) -> None:
        """Make one pass."""
        new_update(times, PARTS)
        with clocked(times, WHOLE):
            with clocked(times, FORWARD):
                out = self.unet(self.latents, self.timestep, encoder_hidden_states=self.hidden, return_dict=False)[0]
            with clocked(times, BACKWARD):
                out.backward(self.gradient)
        self.latents.grad = None


def watch_training(ours: Times, bare: Times, pixels: int) -> None:
    """Measure the parts of the toolkit's updates, each followed by a bare pass, and leave out the last save."""
    from library.models.sd import StableDiffusion
    from library.training import stepper
    from library.training.loop import Loop
    from library.training.objective import DDPMObjective
    from library.training.saving import Saver
    from library.training.stepper import Stepper

    watch(StableDiffusion, "condition", ours, TEXT)
    watch(StableDiffusion, "denoise", ours, FORWARD)
    watch(DDPMObjective, "noise", ours, NOISE)
    watch(Stepper, "backward", ours, BACKWARD)
    watch(stepper, "gradient_norm", ours, NORM)
    watch(Stepper, "step", ours, STEP, less=(NORM,))
    watch(Loop, "_track", ours, "curves")
    watch(Loop, "_between_updates", ours, "between updates")
    update, between = Loop._update, Loop._between_updates
    passes: list[BarePass] = []

    def whole(self: Loop, batches: Any) -> None:
        new_update(ours, PARTS)
        with clocked(ours, WHOLE):
            update(self, batches)

    def then_bare(self: Loop) -> None:
        with clocked(ours, WHOLE):
            between(self)
        if not passes:
            passes.append(BarePass(self.training, pixels))
        passes[0].run(bare)

    Loop._update, Loop._between_updates = whole, then_bare  # type: ignore[method-assign]
    Saver.finish = lambda self, position: None  # type: ignore[method-assign]


def measure(size: str, updates: int | None, rank: int, *, text: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Return median seconds of each part of a bare pass and of an update of train_network.py."""
    import torch

    import train_network
    from library.models.random_models import make_random_sd

    torch.set_num_threads(1)
    kind, pixels, usual = SIZES[size]
    bare: Times = defaultdict(list)
    ours: Times = defaultdict(list)
    watch_training(ours, bare, pixels)
    with tempfile.TemporaryDirectory() as folder:
        model = make_random_sd(Path(folder) / "model.safetensors", family="sd1", size=kind)
        more = ["--network_module=networks.lora", f"--network_dim={rank}", "--learning_rate=1e-4"]
        models = {"pretrained_model_name_or_path": model}
        train(train_network, models, pixels, updates or usual, *more, *([] if text else ["--network_train_unet_only"]))
    found = [{part: median(seconds[WARM_UP:]) for part, seconds in times.items()} for times in (bare, ours)]
    return found[0], found[1]


def compare(size: str, updates: int | None, rank: int, *, text: bool) -> list[dict[str, Any]]:
    bare, ours = measure(size, updates, rank, text=text)
    what = "with text encoder" if text else "U-Net"
    ours["everything else"] = ours[WHOLE] - sum(ours.get(part, 0.0) for part in PARTS)
    rows = []
    for part in (*PARTS, "everything else", WHOLE):
        mine, plain = ours.get(part, 0.0), bare.get(part, 0.0)
        rows.append(
            {
                "adapters": what,
                "part": part,
                "bare U-Net, ms": 1000 * plain,
                "train_network.py, ms": 1000 * mine,
                "more, %": 100 * (mine - plain) / bare[WHOLE],
                "ratio": "",
                "limit": "",
                "others": "",
            }
        )
    key = (size, what)
    rows[-1] |= {"ratio": ours[WHOLE] / bare[WHOLE], "limit": LIMITS[key], "others": ELSEWHERE.get(key, "")}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--updates", type=int, default=None)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--text", action="store_true", help="adapters on the text encoder too, which then runs")
    parser.add_argument("--output")
    args = parser.parse_args()
    name = f"network_overhead_{args.size}{'_text' if args.text else ''}"
    report(name, compare(args.size, args.updates, args.rank, text=args.text), args.output)


if __name__ == "__main__":
    main()
