"""One update of train_db.py, from the command line to the saved weights, equals a step that was written independently.

Pictures have 128 pixels: at 64 the deepest group norms see two values each, and gradients are mostly rounding errors.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import PHOTOS
from tests.integration.reference_step import Models, Recipe, largest_error, one_update, read_folder
from tests.support import train_db

SEED = 11
TOLERANCE = 1e-3
"""Share of the largest step that float32 arithmetic in another order may be off by."""

LONG = "a yellow duck on a rock by the sea with waves and a blue sky behind it, " * 6


@pytest.fixture(scope="module")
def folder_sd1(model_folder) -> Path:
    from library.models.random_models import make_random_sd

    return make_random_sd(model_folder / "folder_sd1", layout="diffusers_safetensors")


@pytest.fixture(scope="module")
def folder_sd2_v(model_folder) -> Path:
    from library.models.random_models import make_random_sd

    return make_random_sd(model_folder / "folder_sd2", "sd2", layout="diffusers_safetensors", v_prediction=True)


def small_picture(source: str, target: Path, *, alpha: bool = False) -> None:
    """A photograph of 128x128 pixels as PNG, which nothing resizes; with alpha its left half is transparent."""
    with Image.open(PHOTOS / source) as photo:
        picture = photo.convert("RGB").resize((128, 128))
    if alpha:
        cover = np.full((128, 128), 255, np.uint8)
        cover[:, :64] = 0
        cover[:40, 64:] = 128
        picture.putalpha(Image.fromarray(cover))
    target.parent.mkdir(parents=True, exist_ok=True)
    picture.save(target)


@pytest.fixture
def pictures(tmp_path) -> Path:
    tree = tmp_path / "pictures"
    for name, caption in (("00", "a yellow rubber duck"), ("01", "a pale duck on a blue carpet, at night")):
        small_picture(f"duck/{name}.jpg", tree / "1_duck" / f"{name}.png")
        (tree / "1_duck" / f"{name}.caption").write_text(caption)
    return tree


def run(model: Path, data: Path, out: Path, *argv: str) -> dict[str, torch.Tensor]:
    """Train with gradient descent; returns the saved weights."""
    options = {
        "pretrained_model_name_or_path": model,
        "output_dir": out,
        "output_name": "new",
        "resolution": 128,
        "train_batch_size": 2,
        "max_train_steps": 1,
        "seed": SEED,
        "max_data_loader_n_workers": 0,
        "optimizer_type": "SGD",
        "learning_rate": 0.1,
        "max_grad_norm": 0,
    }
    where = () if any(word.startswith("--dataset_config") for word in argv) else (f"--train_data_dir={data}",)
    assert train_db(*(f"--{name}={value}" for name, value in options.items()), *where, *argv) == 0
    return read_folder(out / "new")


def assert_equal_step(model: Path, recipe: Recipe, batches: list, found: dict[str, torch.Tensor]) -> None:
    before = read_folder(model)
    expected = one_update(Models(model), recipe, batches, SEED)
    assert largest_error(before, expected, found) < TOLERANCE


EPSILON = {
    "plain": ("", Recipe()),
    "min_snr, debiased, v-like": (
        "--min_snr_gamma=5 --debiased_estimation_loss --v_pred_like_loss=0.5",
        Recipe(min_snr_gamma=5, debiased_estimation_loss=True, v_pred_like_loss=0.5),
    ),
    "huber by snr": ("--loss_type=huber --huber_c=0.3", Recipe(loss_type="huber", huber_c=0.3)),
    "smooth_l1, exponential": (
        "--loss_type=smooth_l1 --huber_schedule=exponential --huber_scale=2",
        Recipe(loss_type="smooth_l1", huber_schedule="exponential", huber_scale=2),
    ),
    "huber, constant": (
        "--loss_type=huber --huber_schedule=constant --huber_scale=0.5",
        Recipe(loss_type="huber", huber_schedule="constant", huber_scale=0.5),
    ),
    "l1 in a range of timesteps": (
        "--loss_type=l1 --min_timestep=200 --max_timestep=300",
        Recipe(loss_type="l1", min_timestep=200, max_timestep=300),
    ),
    "noise offset, adaptive and random": (
        "--noise_offset=0.5 --noise_offset_random_strength --adaptive_noise_scale=0.3",
        Recipe(noise_offset=0.5, noise_offset_random_strength=True, adaptive_noise_scale=0.3),
    ),
    "multires noise": (
        "--multires_noise_iterations=6 --multires_noise_discount=0.6",
        Recipe(multires_noise_iterations=6, multires_noise_discount=0.6),
    ),
    "input perturbation": (
        "--ip_noise_gamma=0.4 --ip_noise_gamma_random_strength",
        Recipe(ip_noise_gamma=0.4, ip_noise_gamma_random_strength=True),
    ),
    "clip_skip": ("--clip_skip=2", Recipe(clip_skip=2)),
    "no_token_padding": ("--no_token_padding", Recipe(no_token_padding=True)),
    "norm and rates": (
        "--max_grad_norm=0.01 --learning_rate_te=0.5 --learning_rate=2",
        Recipe(max_grad_norm=0.01, learning_rate=2, learning_rate_te=0.5),
    ),
}


@pytest.mark.parametrize("name", EPSILON)
def test_noise_prediction(folder_sd1, pictures, tmp_path, batches, name):
    argv, recipe = EPSILON[name]
    found = run(folder_sd1, pictures, tmp_path / "out", *argv.split())
    (batch,) = batches
    assert sorted(batch.captions) == ["a pale duck on a blue carpet, at night", "a yellow rubber duck"]
    assert_equal_step(folder_sd1, recipe, batches, found)


def test_the_pixels_of_a_batch_are_those_of_the_files(folder_sd1, pictures, tmp_path, batches):
    run(folder_sd1, pictures, tmp_path / "out")
    captions = {path.read_text(): path.with_suffix(".png") for path in pictures.rglob("*.caption")}
    for row, caption in enumerate(batches[0].captions):
        wanted = torch.from_numpy(np.asarray(Image.open(captions[caption])).copy()).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(batches[0].pixels[row], wanted)


def test_cached_latents_are_a_draw_from_the_posterior(folder_sd1, pictures, tmp_path, batches):
    run(folder_sd1, pictures, tmp_path / "out", "--cache_latents_to_disk")
    captions = {path.read_text(): path.with_suffix(".png") for path in pictures.rglob("*.caption")}
    vae = Models(folder_sd1).vae
    draws = []
    for caption, latents in zip(batches[0].captions, batches[0].latents, strict=True):
        pixels = torch.from_numpy(np.asarray(Image.open(captions[caption])).copy()).permute(2, 0, 1) / 127.5 - 1
        with torch.no_grad():
            posterior = vae.encode(pixels[None]).latent_dist
        draws.append((latents - posterior.mean[0]) / posterior.std[0])
        (file,) = captions[caption].parent.glob(f"{captions[caption].stem}_*_sd.npz")
        stored = [value for name, value in np.load(file).items() if name.startswith("latents_") and value.ndim == 3]
        assert any(np.array_equal(value, latents.numpy()) for value in stored)
    together = torch.cat(draws)
    assert abs(together.mean()) < 0.1 and abs(together.std() - 1) < 0.1
    assert not torch.allclose(draws[0], draws[1])


def test_velocity_with_zero_terminal_snr(folder_sd2_v, pictures, tmp_path, batches):
    argv = (
        "--v2 --v_parameterization --zero_terminal_snr --min_snr_gamma=5 --scale_v_pred_loss_like_noise_pred "
        "--debiased_estimation_loss"
    )
    found = run(folder_sd2_v, pictures, tmp_path / "out", *argv.split())
    recipe = Recipe(
        v2=True,
        v_parameterization=True,
        zero_terminal_snr=True,
        min_snr_gamma=5,
        scale_v_pred_loss_like_noise_pred=True,
        debiased_estimation_loss=True,
    )
    assert_equal_step(folder_sd2_v, recipe, batches, found)


@pytest.mark.parametrize("v2", [False, True])
def test_captions_of_225_tokens(folder_sd1, folder_sd2_v, pictures, tmp_path, batches, v2):
    (pictures / "1_duck" / "00.caption").write_text(LONG)
    model = folder_sd2_v if v2 else folder_sd1
    flags = ("--v2", "--v_parameterization") if v2 else ()
    found = run(model, pictures, tmp_path / "out", "--max_token_length=225", *flags)
    assert_equal_step(model, Recipe(v2=v2, v_parameterization=v2, max_token_length=225), batches, found)


@pytest.mark.parametrize("length", [75, 150])
def test_weighted_captions(folder_sd1, pictures, tmp_path, batches, length):
    for path in pictures.rglob("*.caption"):
        path.write_text("a (rubber:1.5) duck [at night] \\(sea\\)")
    pieces = (("a", 1.0), ("rubber", 1.5), ("duck", 1.0), ("at night", 1 / 1.1), ("(sea)", 1.0))
    longer = () if length == 75 else (f"--max_token_length={length}",)
    found = run(folder_sd1, pictures, tmp_path / "out", "--weighted_captions", *longer)
    assert_equal_step(folder_sd1, Recipe(weighted=pieces, max_token_length=length), batches, found)


def test_accumulation_divides_by_the_number_of_micro_batches(folder_sd1, pictures, tmp_path, batches):
    found = run(folder_sd1, pictures, tmp_path / "out", "--train_batch_size=1", "--gradient_accumulation_steps=2")
    assert [batch.size for batch in batches] == [1, 1]
    assert_equal_step(folder_sd1, Recipe(gradient_accumulation_steps=2), batches, found)


def test_regularization_images_have_their_weight(folder_sd1, pictures, tmp_path, batches):
    regular = tmp_path / "regular"
    for name in ("00", "01"):
        small_picture(f"robot/{name}.jpg", regular / "1_toy" / f"{name}.png")
    found = run(
        folder_sd1,
        pictures,
        tmp_path / "out",
        f"--reg_data_dir={regular}",
        "--prior_loss_weight=0.25",
        "--train_batch_size=4",
    )
    (batch,) = batches
    weights = dict(zip(batch.captions, batch.loss_weight.tolist(), strict=True))
    assert weights == {"a yellow rubber duck": 1, "a pale duck on a blue carpet, at night": 1, "toy": 0.25}
    assert_equal_step(folder_sd1, Recipe(), batches, found)


@pytest.mark.parametrize("cached", [False, True])
def test_alpha_masks(folder_sd1, pictures, tmp_path, batches, cached):
    """One picture has an alpha channel, the other counts everywhere; cached latents bring the mask along."""
    small_picture("duck/00.jpg", pictures / "1_duck" / "00.png", alpha=True)
    found = run(folder_sd1, pictures, tmp_path / "out", "--alpha_mask", *(("--cache_latents",) if cached else ()))
    (batch,) = batches
    masks = {caption: mask for caption, mask in zip(batch.captions, batch.mask, strict=True)}
    mask = masks["a yellow rubber duck"][0]
    assert (mask[:, :64] == 0).all() and (mask[40:, 64:] == 1).all()
    torch.testing.assert_close(mask[:40, 64:], torch.full((40, 64), 128 / 255))
    assert (masks["a pale duck on a blue carpet, at night"] == 1).all()
    assert (batch.latents is not None) == cached
    assert_equal_step(folder_sd1, Recipe(), batches, found)


@pytest.mark.parametrize("cached", [False, True])
def test_masked_loss_with_mask_pictures(folder_sd1, pictures, tmp_path, batches, cached):
    """Masks of a dataset configuration: the red channel of a picture of the same name."""
    for number, name in enumerate(("00", "01")):
        red = np.zeros((128, 128, 3), np.uint8)
        red[..., 1:] = 255
        red[20 * number :, 40:, 0] = 200
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(red).save(tmp_path / "masks" / f"{name}.png")
    config = tmp_path / "data.toml"
    config.write_text(
        "[[datasets]]\nresolution = 128\nbatch_size = 2\n[[datasets.subsets]]\n"
        f'image_dir = "{pictures / "1_duck"}"\nconditioning_data_dir = "{tmp_path / "masks"}"\n'
    )
    argv = (f"--dataset_config={config}", "--masked_loss", *(("--cache_latents",) if cached else ()))
    found = run(folder_sd1, pictures, tmp_path / "out", *argv)
    (batch,) = batches
    levels = sorted(mask.sum().item() for mask in batch.mask)
    assert levels == pytest.approx([108 * 88 * 200 / 255, 128 * 88 * 200 / 255])
    assert_equal_step(folder_sd1, Recipe(), batches, found)


def test_default_optimizer_is_adamw(folder_sd1, pictures, tmp_path, batches):
    """After one step from zero moments AdamW moves every weight with a gradient by the rate, against its sign."""
    found = run(folder_sd1, pictures, tmp_path / "out", "--optimizer_type=", "--learning_rate=0.001")
    before = read_folder(folder_sd1)
    expected = one_update(Models(folder_sd1), Recipe(), batches, SEED)
    name = "unet.conv_in.weight"
    gradient = (before[name] - expected[name]) / 0.1
    large = gradient.abs() > 1e-5
    step = before[name] * (1 - 0.001 * 0.01) - 0.001 * gradient.sign()
    assert large.float().mean() > 0.5
    torch.testing.assert_close(found[name][large], step[large], rtol=0, atol=2e-5)


def test_replacing_vae_in_every_form(folder_sd1, tiny_sd1, pictures, tmp_path, batches):
    """`--vae` as a whole checkpoint, as a file with bare names, as `.bin` weights and as folders: used and saved."""
    from library.models.random_models import make_random_sd

    other = make_random_sd(tmp_path / "other", layout="diffusers_safetensors", seed=5)
    whole = make_random_sd(tmp_path / "other_whole", seed=5)
    prefix = "first_stage_model."
    tensors = load_file(whole)
    bare = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    torch.save({"state_dict": bare}, tmp_path / "bare.ckpt")
    torch.save(load_file(other / "vae" / "diffusion_pytorch_model.safetensors"), tmp_path / "weights.bin")
    wanted = load_file(other / "vae" / "diffusion_pytorch_model.safetensors")
    forms = (whole, tmp_path / "bare.ckpt", tmp_path / "weights.bin", other, other / "vae")
    results = []
    for number, form in enumerate(forms):
        results.append(run(folder_sd1, pictures, tmp_path / f"out{number}", f"--vae={form}"))
        saved = load_file(tmp_path / f"out{number}" / "new" / "vae" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(saved[name], value) for name, value in wanted.items())
    mixed = tmp_path / "mixed"
    shutil.copytree(folder_sd1, mixed)
    shutil.rmtree(mixed / "vae")
    shutil.copytree(other / "vae", mixed / "vae")
    expected = one_update(Models(mixed), Recipe(), batches[:1], SEED)
    for found in results:
        assert largest_error(read_folder(folder_sd1), expected, found) < TOLERANCE
