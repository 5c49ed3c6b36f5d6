"""Cost of a micro-batch's noise, timesteps and noised latents, against torch's global generator and diffusers.

- draws: noise [B,4,64,64] and timesteps by name and counters, against `torch.randn` and `torch.randint`.
- objective: noisy latents, target, min-SNR weights and Huber thresholds, against the same written down with diffusers'
  scheduler and global draws.
- step: gradient norm, clipping and a fused AdamW step over many small tensors, against the fused step alone. This is
  where the time goes that is not arithmetic.

Times are CPU seconds of this process: on a GPU what the host needs to issue the work, which it never waits for.

    python benchmarks/draws.py
    python benchmarks/draws.py --device cuda
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.report import report  # noqa: E402
from library.contracts import ParamGroup, StepKey  # noqa: E402
from library.draws import Draws  # noqa: E402
from library.training.objective import DDPMObjective  # noqa: E402
from library.training.optimizers import build_optimizer  # noqa: E402
from library.training.options import LossOptions, NoiseOptions, OptimizerOptions  # noqa: E402
from library.training.stepping import step_or_skip  # noqa: E402

SHAPE = (4, 64, 64)
TENSORS = 880
"""About as many as the U-Net and the text encoder of SD1 have."""


def compare(ours: Callable[[int], object], theirs: Callable[[int], object], rounds: int) -> tuple[float, float]:
    """Return the milliseconds of both, the better half of interleaved rounds."""
    times: tuple[list[float], list[float]] = ([], [])
    for step in range(rounds):
        for found, work in zip(times, (ours, theirs), strict=True):
            start = time.process_time()
            work(step)
            found.append(time.process_time() - start)
    best = [sorted(found)[: max(1, rounds // 2)] for found in times]
    return tuple(1000 * sum(found) / len(found) for found in best)  # type: ignore[return-value]


def draws(batch: int, device: torch.device) -> tuple[Callable, Callable]:
    def ours(step: int) -> object:
        mine = Draws(42, StepKey(step, 0), batch, device)
        return mine.normal("noise", SHAPE), mine.integers("timestep", 0, 1000)

    def theirs(step: int) -> object:
        return torch.randn(batch, *SHAPE, device=device), torch.randint(0, 1000, (batch,)).to(device)

    return ours, theirs


def objective(batch: int, device: torch.device) -> tuple[Callable, Callable]:
    from diffusers import DDPMScheduler

    mine = DDPMObjective("epsilon", NoiseOptions(), LossOptions(loss_type="huber", min_snr_gamma=5.0), device)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    alphas = scheduler.alphas_cumprod.to(device)
    snr = alphas / (1 - alphas)
    latents = torch.randn(batch, *SHAPE, device=device)

    def ours(step: int) -> object:
        return mine.noise(latents, Draws(42, StepKey(step, 0), batch, device))

    def theirs(step: int) -> object:
        noise, t = torch.randn_like(latents), torch.randint(0, 1000, (batch,)).to(device)
        weight = snr[t].clamp(max=5) / snr[t]
        huber_c = 0.9 / (1 + ((1 - alphas[t]) / alphas[t]).sqrt()) ** 2 + 0.1
        return scheduler.add_noise(latents, noise, t), noise, weight, huber_c

    return ours, theirs


def stepping(side: int, device: torch.device) -> tuple[Callable, Callable]:
    params = [torch.nn.Parameter(torch.randn(side, side, device=device)) for _ in range(TENSORS)]
    for param in params:
        param.grad = torch.randn_like(param)
    built = build_optimizer(OptimizerOptions(), [ParamGroup("unet", tuple(params), 1e-6)])
    reference = torch.optim.AdamW(params, lr=1e-6, fused=True)
    return lambda step: step_or_skip(built, params, 1.0), lambda step: reference.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--output")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    cases = [
        (f"{work.__name__}, batch {batch}", work(batch, device)) for work in (draws, objective) for batch in (1, 4, 20)
    ]
    cases += [(f"step, {TENSORS} tensors of {side}x{side}", stepping(side, device)) for side in (32, 256)]
    rows = []
    for name, pair in cases:
        ours, theirs = compare(*pair, options.rounds)
        row = {"CPU per micro-batch": name, "ours, ms": ours, "reference, ms": theirs, "ratio": ours / theirs}
        rows.append({**row, "device": options.device})
    report("draws" if options.device == "cpu" else f"draws_{device.type}", rows, options.output)


if __name__ == "__main__":
    main()
