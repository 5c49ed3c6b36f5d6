"""Two updates of networks.lora, from the command line to the saved file, equal steps written independently."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import PHOTOS
from tests.integration.reference_step import Models, Recipe, text_condition
from tests.parity.lora_reference import ALPHA, RANK, ReferenceLora, Training, largest_error, write_start
from tests.support import tensor_digest, train_network

SEED = 11
TOLERANCE = 2e-3
"""Share of the longest way that float32 arithmetic in another order may be off by after two updates."""

CAPTIONS = {"00": "a yellow rubber duck", "01": "a pale duck on a blue carpet, at night"}


@pytest.fixture(scope="module")
def folder(model_folder) -> Path:
    from library.models.random_models import make_random_sd

    return make_random_sd(model_folder / "lora_folder_sd1", layout="diffusers_safetensors")


@pytest.fixture(scope="module")
def starts(folder, model_folder) -> dict[bool, Path]:
    """LoRA files to start from: for the U-Net alone, and for both."""
    found = {}
    for text in (False, True):
        found[text] = model_folder / f"start_{text}.safetensors"
        write_start(Models(folder), found[text], text=text)
    return found


@pytest.fixture
def pictures(tmp_path) -> Path:
    tree = tmp_path / "pictures" / "1_duck"
    tree.mkdir(parents=True)
    for name, caption in CAPTIONS.items():
        with Image.open(PHOTOS / "duck" / f"{name}.jpg") as photo:
            photo.convert("RGB").resize((128, 128)).save(tree / f"{name}.png")
        (tree / f"{name}.caption").write_text(caption)
    return tree.parent


@pytest.fixture
def not_flat(monkeypatch):
    """Parameters stay one by one, as they do for optimizers that look at whole matrices."""
    from library.training import setup

    build = setup.build_optimizer
    monkeypatch.setattr(setup, "build_optimizer", lambda options, groups, *, flat: build(options, groups))


def run(folder: Path, pictures: Path, out: Path, start: Path, *argv: str) -> Path:
    """Train for two updates; returns the saved network."""
    options = {
        "pretrained_model_name_or_path": folder,
        "output_dir": out,
        "output_name": "new",
        "resolution": 128,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 2,
        "seed": SEED,
        "max_data_loader_n_workers": 0,
        "max_grad_norm": 0,
        "network_module": "networks.lora",
        "network_dim": RANK,
        "network_alpha": int(ALPHA),
        "network_weights": start,
        "save_precision": "float",
    }
    where = () if any(word.startswith("--dataset_config") for word in argv) else (f"--train_data_dir={pictures}",)
    assert train_network(*(f"--{name}={value}" for name, value in options.items()), *where, *argv) == 0
    return out / "new.safetensors"


def expected(
    folder: Path, start: Path, recipe: Recipe, training: Training, batches: list, *, text: bool
) -> dict[str, torch.Tensor]:
    """What an independent training makes of the start with these micro-batches."""
    models = Models(folder)
    reference = ReferenceLora(models, load_file(start), training, text=text)
    count = recipe.gradient_accumulation_steps
    for number in range(len(batches) // count):
        reference.update(models, recipe, batches[number * count : (number + 1) * count], SEED, number + 1)
    return {name: value.detach() for name, value in reference.values.items()}


TWO = {"gradient_accumulation_steps": 2}
UNET_ONLY = "--network_train_unet_only"
CASES = {
    "U-Net": (UNET_ONLY, Recipe(**TWO), Training(), False),
    "text encoder too, clipped, own rates": (
        "--max_grad_norm=0.05",
        Recipe(**TWO, max_grad_norm=0.05),
        Training(text_encoder_lr=4e-3),
        True,
    ),
    "min_snr, noise offset, LoRA+": (
        f"{UNET_ONLY} --min_snr_gamma=5 --noise_offset=0.3 --network_args loraplus_lr_ratio=4",
        Recipe(**TWO, min_snr_gamma=5, noise_offset=0.3),
        Training(plus=4),
        False,
    ),
    "a text layer that never runs, LoRA+, limited norms": (
        "--clip_skip=2 --scale_weight_norms=0.35 --network_args loraplus_lr_ratio=2",
        Recipe(**TWO, clip_skip=2),
        Training(plus=2, scale_weight_norms=0.35),
        True,
    ),
    "dropouts": (
        "--network_dropout=0.2 --network_args rank_dropout=0.3 module_dropout=0.2",
        Recipe(**TWO),
        Training(neuron_dropout=0.2, rank_dropout=0.3, module_dropout=0.2),
        True,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_two_updates(folder, starts, pictures, tmp_path, batches, name):
    argv, recipe, training, text = CASES[name]
    saved = run(folder, pictures, tmp_path / "out", starts[text], *training.argv.split(), *argv.split())
    assert len(batches) == 4
    wanted = expected(folder, starts[text], recipe, training, batches, text=text)
    assert largest_error(load_file(starts[text]), wanted, saved) < TOLERANCE


def test_one_row_of_parameters_changes_no_bit(folder, starts, pictures, tmp_path, request):
    argv = [*Training().argv.split(), "--clip_skip=2", "--scale_weight_norms=0.35"]
    flat = run(folder, pictures, tmp_path / "flat", starts[True], *argv)
    request.getfixturevalue("not_flat")
    assert tensor_digest(run(folder, pictures, tmp_path / "single", starts[True], *argv)) == tensor_digest(flat)


def test_weighted_captions(folder, starts, pictures, tmp_path, batches):
    for path in pictures.rglob("*.caption"):
        path.write_text("a (rubber:1.5) duck [at night]")
    recipe = Recipe(**TWO, weighted=(("a", 1.0), ("rubber", 1.5), ("duck", 1.0), ("at night", 1 / 1.1)))
    argv = (*Training().argv.split(), "--weighted_captions")
    saved = run(folder, pictures, tmp_path / "out", starts[True], *argv)
    wanted = expected(folder, starts[True], recipe, Training(), batches, text=True)
    assert largest_error(load_file(starts[True]), wanted, saved) < TOLERANCE


def config(pictures: Path, target: Path, *lines: str, attributes: str = "") -> Path:
    target.write_text(
        "[[datasets]]\nresolution = 128\nbatch_size = 1\n" + "\n".join(lines) + "\n[[datasets.subsets]]\n"
        f'image_dir = "{pictures / "1_duck"}"\n{attributes}\n'
    )
    return target


def test_the_multiplier_of_a_data_set(folder, starts, pictures, tmp_path, batches):
    data = config(pictures, tmp_path / "data.toml", "network_multiplier = 0.5")
    training = Training(multiplier=0.5)
    saved = run(folder, pictures, tmp_path / "out", starts[True], f"--dataset_config={data}", *training.argv.split())
    wanted = expected(folder, starts[True], Recipe(**TWO), training, batches, text=True)
    assert largest_error(load_file(starts[True]), wanted, saved) < TOLERANCE


PRESERVING = {
    "U-Net": ("networks.lora", "--network_train_unet_only"),
    "text encoder too": ("networks.lora", ""),
    "dropout and checkpointing": ("networks.lora", "--network_dropout=0.3 --gradient_checkpointing"),
    "dora": ("networks.lora", "--network_args dora_wd=True"),
    "oft": ("networks.oft", "--network_alpha=1"),
    "lycoris diag-oft": ("lycoris.kohya", "--network_args algo=diag-oft"),
}


@pytest.mark.parametrize("name", PRESERVING)
def test_marked_images_are_to_be_drawn_as_the_bare_model_does(folder, pictures, tmp_path, batches, monkeypatch, name):
    """In a mixed batch; after an update, so that the network does something."""
    from library.training.methods.adapter import Adapter

    module, argv = PRESERVING[name]
    if module.startswith("lycoris"):
        pytest.importorskip("lycoris")
    (pictures / "2").mkdir()
    for path in (pictures / "1_duck").glob("01.*"):
        path.rename(pictures / "2" / path.name)
    data = config(pictures, tmp_path / "data.toml", attributes="custom_attributes = {diff_output_preservation = true}")
    data.write_text(data.read_text().replace("batch_size = 1", "batch_size = 2"))
    with data.open("a") as file:
        file.write(f'[[datasets.subsets]]\nimage_dir = "{pictures / "2"}"\n')
    seen = []
    make, predict = Adapter.target, Adapter.predict

    def target(self, noised, condition, batch):
        seen.append((noised, seen.pop(), make(self, noised, condition, batch)))
        return seen[-1][-1]

    monkeypatch.setattr(Adapter, "target", target)
    monkeypatch.setattr(Adapter, "predict", lambda *inputs: seen.append(predict(*inputs)) or seen[-1])
    options = {
        "pretrained_model_name_or_path": folder,
        "dataset_config": data,
        "output_dir": tmp_path / "out",
        "max_train_steps": 2,
        "learning_rate": 1e-2,
        "seed": SEED,
        "max_data_loader_n_workers": 0,
        "network_module": module,
        "network_dim": RANK,
    }
    assert train_network(*(f"--{name}={value}" for name, value in options.items()), *argv.split()) == 0
    noised, predicted, wanted = seen[1]
    captions = batches[1].captions
    assert sorted(captions) == sorted(CAPTIONS.values())
    models = Models(folder)
    with torch.no_grad():
        bare = models.unet(noised.noisy, noised.t, text_condition(models, Recipe(), captions)).sample
    marked = captions.index(CAPTIONS["00"])
    torch.testing.assert_close(wanted[marked], bare[marked], rtol=1e-4, atol=1e-5)
    assert torch.equal(wanted[1 - marked], noised.target[1 - marked])
    assert (predicted - bare).abs().max() > 1e-2
