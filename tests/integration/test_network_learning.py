"""Networks learn: after a short training on four photographs the saved file brings the loss on them down.

The loss is measured here from the file alone, with a formula of its own, at fixed timesteps and with fixed noise: a
network that was not trained, was frozen, or was saved without its values leaves it where it was.
"""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.conftest import PHOTOS
from tests.support import train_network

MIDDLE, NOISY = (420, 500, 580), (985, 995)
"""Timesteps at which the loss is measured: amid those that are trained."""

FOUR = ("duck/00", "bear/01", "robot/02", "car/03")

LEARNERS = {
    "lora, U-Net": ("networks.lora", "--network_train_unet_only", 0.65),
    "lora, U-Net and text encoder": ("networks.lora", "", 0.65),
    "lora, convolutions": ("networks.lora", "--network_args conv_dim=4", 0.65),
    "lora_fa": ("networks.lora_fa", "--learning_rate=3e-2", 0.65),
    "dylora": ("networks.dylora", "--learning_rate=2e-2 --network_args unit=4", 0.75),
    "oft": (
        "networks.oft",
        "--network_dim=4 --network_alpha=1 --learning_rate=3e-2 --network_args enable_all_linear=True",
        0.65,
    ),
    "loha": ("networks.loha", "", 0.65),
    "lokr": ("networks.lokr", "--learning_rate=2e-2 --network_args factor=4", 0.65),
    "hypernetwork": ("networks.hypernetwork", "", 0.9),
    "dora": ("networks.lora", "--network_args dora_wd=True", 0.65),
    "lycoris locon": ("lycoris.kohya", "--network_args algo=locon conv_dim=4", 0.65),
}
"""Name -> network module, options, and the share of the loss that may be left."""


@pytest.fixture(scope="module")
def four_photos(tmp_path_factory) -> Path:
    """Four photographs of 64x64 pixels with captions."""
    folder = tmp_path_factory.mktemp("photos") / "1_things"
    folder.mkdir()
    for name in FOUR:
        target = folder / f"{name.replace('/', '_')}.png"
        with Image.open(PHOTOS / f"{name}.jpg") as photo:
            photo.convert("RGB").resize((64, 64)).save(target)
        shutil.copy(PHOTOS / f"{name}.caption", target.with_suffix(".caption"))
    return folder.parent


def train(model: Path, photos: Path, out: Path, module: str, *argv: str) -> Path:
    options = {
        "pretrained_model_name_or_path": model,
        "train_data_dir": photos,
        "output_dir": out,
        "output_name": "things",
        "resolution": 64,
        "train_batch_size": 4,
        "min_timestep": 400,
        "max_timestep": 600,
        "network_module": module,
        "network_dim": 8,
        "network_alpha": 8,
        "learning_rate": 1e-2,
        "max_train_steps": 18,
        "max_data_loader_n_workers": 0,
        "seed": 5,
    }
    if module.endswith("hypernetwork"):
        del options["network_dim"]
    assert train_network(*(f"--{name}={value}" for name, value in options.items()), "--cache_latents", *argv) == 0
    return out / "things.safetensors"


@torch.no_grad()
def loss_with(model: Path, batch, network: Path | None, module: str, *, velocity: bool = False) -> float:
    """Mean squared error of what the model with the network predicts for the pictures of a batch.

    With `velocity` the model is an SD2 that predicts velocities, measured where these are little but the picture.
    """
    from library.models.family import WeightPlan
    from library.models.options import MemoryOptions, ModelOptions, TextOptions
    from library.models.sd import StableDiffusion
    from library.models.specs import stable_diffusion_family

    options = ModelOptions(pretrained_model_name_or_path=str(model))
    spec = stable_diffusion_family("sd2" if velocity else "sd1", v_prediction=velocity)
    family = StableDiffusion.load(options, TextOptions(), MemoryOptions(), spec=spec, weights=WeightPlan())
    if network is not None:
        maker = importlib.import_module(module).create_network_from_weights
        made, _ = maker(1.0, str(network), None, family.text_encoder, family.unet)
        made.apply_to(family.text_encoder, family.unet, True, True)
        made.load_weights(str(network))
        made.eval()
    hidden = family.condition(batch, None)
    latents = batch.latents * 0.18215
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for t in NOISY if velocity else MIDDLE:
        noise = torch.randn(latents.shape, generator=generator)
        signal, sigma = float(alphas[t] ** 0.5), float((1 - alphas[t]) ** 0.5)
        target = signal * noise - sigma * latents if velocity else noise
        predicted = family.denoise(signal * latents + sigma * noise, torch.full((len(latents),), t), hidden)
        losses.append(float((predicted - target).square().mean()))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("name", LEARNERS)
def test_the_saved_network_brings_the_loss_down(tiny_sd1, four_photos, tmp_path, batches, name):
    module, argv, share = LEARNERS[name]
    if module.startswith("lycoris"):
        pytest.importorskip("lycoris")
    saved = train(tiny_sd1, four_photos, tmp_path, module, *argv.split())
    assert batches[0].size == 4
    bare = loss_with(tiny_sd1, batches[0], None, module)
    trained = loss_with(tiny_sd1, batches[0], saved, module)
    assert trained < share * bare, f"{bare:.3f} -> {trained:.3f}"


def test_a_text_encoder_alone_brings_the_loss_down(tiny_sd2_v, four_photos, tmp_path, batches):
    """A condition is the same all over a picture, so it can tell colours at most: less is to be had by it alone."""
    argv = "--v2 --v_parameterization --network_train_text_encoder_only --min_timestep=980 --max_timestep=1000"
    saved = train(tiny_sd2_v, four_photos, tmp_path, "networks.lora", *argv.split(), "--max_train_steps=24")
    bare = loss_with(tiny_sd2_v, batches[0], None, "networks.lora", velocity=True)
    trained = loss_with(tiny_sd2_v, batches[0], saved, "networks.lora", velocity=True)
    assert trained < 0.97 * bare, f"{bare:.4f} -> {trained:.4f}"


def test_without_a_learning_rate_to_speak_of_nothing_is_learnt(tiny_sd1, four_photos, tmp_path, batches):
    """The measure itself: it does not fall by saving and loading a network that has not moved."""
    saved = train(tiny_sd1, four_photos, tmp_path, "networks.lora", "--learning_rate=1e-9", "--max_train_steps=4")
    bare = loss_with(tiny_sd1, batches[0], None, "networks.lora")
    assert loss_with(tiny_sd1, batches[0], saved, "networks.lora") == pytest.approx(bare, rel=1e-3)
