"""What a training step costs beyond its arithmetic.

Compares the toolkit's whole step (loader, noise, loss, clipping, optimizer, bookkeeping) with U-Net and text encoder
forward, backward and fused AdamW on tensors already in memory. `--size full` is SD 1.5 in float32 with 256x256 pictures;
`--size tiny` keeps all layers with few channels at 64 pixels: the time that one CPU thread needs to issue a step.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report import report  # noqa: E402


def reference_loop(model: Path, size: int, steps: int, lr: float) -> float:
    """CPU seconds per step of the bare loop."""
    import torch

    from library.contracts import Condition
    from library.models.family import WeightPlan
    from library.models.options import MemoryOptions, ModelOptions, TextOptions
    from library.models.sd import StableDiffusion
    from library.models.specs import stable_diffusion_spec

    options = ModelOptions(pretrained_model_name_or_path=str(model))
    spec = stable_diffusion_spec(options)
    family = StableDiffusion.load(options, TextOptions(), MemoryOptions(), spec=spec, weights=WeightPlan())
    unet, encoder = family.unet.train(), family.text_encoder.train()
    unet.requires_grad_(True)
    encoder.requires_grad_(True)
    params = [*unet.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(params, lr=lr, fused=True)
    latents, noise = torch.randn(1, 4, size // 8, size // 8), torch.randn(1, 4, size // 8, size // 8)
    ids, _ = family.tokenizers[0].encode("a photo of sks duck")
    ids = torch.from_numpy(ids)[None]
    times = []
    for step in range(steps):
        begin = time.process_time()
        hidden: Condition = family.encode_text((ids,))
        prediction = unet(latents, torch.tensor([500]), encoder_hidden_states=hidden.hidden, return_dict=False)[0]
        torch.nn.functional.mse_loss(prediction, noise).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step >= 2:
            times.append(time.process_time() - begin)
    return sorted(times)[len(times) // 2]


def toolkit_loop(model: Path, size: int, steps: int, folder: str) -> tuple[float, dict[str, float]]:
    """CPU seconds per update of train_db.py, and where they go."""
    import train_db
    from library.training import loop, step

    times: list[float] = []
    parts: dict[str, float] = {"forward": 0.0, "backward": 0.0, "step": 0.0, "between": 0.0}

    def timed(owner: type, method: str, part: str) -> None:
        inner = getattr(owner, method)

        def wrapper(*args: object, **kwargs: object) -> object:
            begin = time.process_time()
            try:
                return inner(*args, **kwargs)
            finally:
                parts[part] += time.process_time() - begin

        setattr(owner, method, wrapper)

    from library.training.stepper import Stepper

    timed(step.TrainStep, "forward", "forward")
    timed(Stepper, "backward", "backward")
    timed(Stepper, "step", "step")
    timed(loop.Loop, "_between_updates", "between")
    update = loop.Loop._update

    def measured(self: object, batches: object) -> None:
        begin = time.process_time()
        update(self, batches)  # type: ignore[arg-type]
        times.append(time.process_time() - begin)

    loop.Loop._update = measured  # type: ignore[assignment, method-assign]
    dataset = Path(folder) / "data.toml"
    dataset.write_text(
        f"[[datasets]]\nresolution = {size}\nbatch_size = 1\n[[datasets.subsets]]\n"
        f"image_dir = '{ROOT / 'examples/photos/duck'}'\nnum_repeats = 100\n"
    )
    import contextlib

    # The final save of 4 GB is not what is measured: leave through the same door as a signal.
    original = loop.Loop.train

    def train(self: object) -> None:
        self.saver.finish = lambda position: None  # type: ignore[attr-defined]
        original(self)  # type: ignore[arg-type]

    loop.Loop.train = train  # type: ignore[assignment, method-assign]
    with contextlib.suppress(SystemExit):
        train_db.main(
            [
                f"--pretrained_model_name_or_path={model}",
                f"--dataset_config={dataset}",
                f"--output_dir={folder}/out",
                f"--max_train_steps={steps}",
                "--cache_latents",
                "--max_data_loader_n_workers=0",
                "--learning_rate=1e-6",
                "--seed=1",
            ]
        )
    kept = times[2:]
    return sorted(kept)[len(kept) // 2], {name: seconds / len(times) for name, seconds in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--output")
    args = parser.parse_args()
    import torch

    from library.models.random_models import make_random_sd

    torch.set_num_threads(1)
    pixels, steps = (64, args.steps or 40) if args.size == "tiny" else (256, args.steps or 5)
    with tempfile.TemporaryDirectory() as folder:
        model = make_random_sd(Path(folder) / "model.safetensors", family="sd1", size=args.size)
        bare = reference_loop(model, pixels, steps, 1e-6)
        ours, parts = toolkit_loop(model, pixels, steps, folder)
    limit = 1.15 if args.size == "tiny" else 1.03
    rows = [{"what": "bare loop", "cpu_s_per_step": bare, "ratio": 1.0, "limit": ""}]
    rows.append({"what": "train_db.py", "cpu_s_per_step": ours, "ratio": ours / bare, "limit": limit})
    rows += [
        {"what": f"  {name}", "cpu_s_per_step": value, "ratio": value / bare, "limit": ""}
        for name, value in parts.items()
    ]
    report(f"step_overhead_{args.size}", rows, args.output)


if __name__ == "__main__":
    main()
