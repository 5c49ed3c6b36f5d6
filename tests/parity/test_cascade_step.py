"""Two updates of each Stable Cascade script, from the command line to the saved file, equal those of a reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.cascade_runs import train_stage_b, train_stage_c, words
from tests.control_training import train_control_net
from tests.parity.cascade_reference import Recipe, Trainer, largest_error, write_pictures
from tests.parity.cascade_reference_models import inject, make_stage, make_text, read_stage
from tests.parity.cascade_reference_nets import (
    ALPHA,
    RANK,
    ReferenceControlNet,
    attach_lora,
    attach_word,
    lora_layers,
    random_lora,
)
from tests.support import run_tool

pytestmark = pytest.mark.compat

SEED = 11
TOLERANCE = 1e-4
"""Share of the longest way that float32 arithmetic in another order may be off by after two updates."""

CAPTIONS = {"duck/00": "a yellow rubber duck", "duck/01": "[zog] on a blue carpet, at night", "duck/02": "a duck"}


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Photographs of 128x96 pixels, which nothing resizes."""
    write_pictures(tmp_path / "pictures" / "1_duck", CAPTIONS, (128, 96))
    return tmp_path / "pictures"


def argv(files, pictures: Path, out: Path, recipe: Recipe, *more: str, **changes: object) -> list[str]:
    options = {
        "stage_c_checkpoint_path": files.stage_c,
        "effnet_checkpoint_path": files.effnet,
        "text_model_checkpoint_path": files.text,
        "train_data_dir": pictures,
        "output_dir": out,
        "output_name": "new",
        "resolution": "128,96",
        "train_batch_size": 3,
        "max_train_steps": 2,
        "seed": SEED,
        "max_data_loader_n_workers": 0,
        "save_precision": "float",
        "learning_rate": next(iter(recipe.rates.values())),
    }
    return words(options | changes, *recipe.argv.split(), *more)


def named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def assert_equal_training(files, stage, recipe, batches, out: Path, *, text: Path | None = None) -> None:
    """The saved stage, and text encoder, are what the reference makes of the start with the same micro-batches."""
    encoder = make_text(files.text)
    values = named("stage", dict(stage.named_parameters()))
    found = named("stage", read_stage(out / "new.safetensors"))
    if text is not None:
        values |= named("text", dict(encoder.named_parameters()))
        found |= named("text", load_file(text))
    before = {name: value.detach().clone() for name, value in values.items()}
    expected = Trainer(files, out.parent, stage, encoder, recipe, values).train(batches)
    assert expected.keys() == found.keys()
    for part in ("stage.", "text.")[: 2 if text else 1]:
        own = {name: value for name, value in expected.items() if name.startswith(part)}
        error = largest_error(before, own, found)
        assert error < TOLERANCE, f"{part} {error:.2e}"


RATES = {"stage": 1e-2}
STAGE_C = {
    "warm-up": (
        "--lr_scheduler=constant_with_warmup --lr_warmup_steps=2",
        Recipe(seed=SEED, rates=RATES, lr_warmup_steps=2),
    ),
    "text encoder of its own rate, offset noise, checkpointing": (
        "--train_text_encoder --learning_rate_te1=4e-3 --noise_offset=0.3 --gradient_checkpointing",
        Recipe(seed=SEED, rates={**RATES, "text": 4e-3}, noise_offset=0.3),
    ),
    "adaptive weights, accumulation": (
        "--adaptive_loss_weight --gradient_accumulation_steps=3 --train_batch_size=1 --max_grad_norm=0 "
        "--min_timestep=700 --max_timestep=702",
        Recipe(
            seed=SEED,
            rates=RATES,
            adaptive_loss_weight=True,
            gradient_accumulation_steps=3,
            max_grad_norm=0,
            min_timestep=700,
            max_timestep=702,
        ),
    ),
    "min-snr, debiased, pictures as conditions, dropped captions": (
        "--min_snr_gamma=2 --debiased_estimation_loss --clip_image_cond_rate=0.6 --caption_dropout_rate=0.4 "
        "--image_model_checkpoint_path={vision}",
        Recipe(seed=SEED, rates=RATES, min_snr_gamma=2, debiased_estimation_loss=True, clip_image_cond_rate=0.6),
    ),
}


@pytest.mark.parametrize("name", STAGE_C)
def test_stage_c(tiny_cascade, pictures, tmp_path, batches, name):
    more, recipe = STAGE_C[name]
    command = argv(tiny_cascade, pictures, tmp_path / "out", recipe, "--stage_c_dropout=0")
    assert train_stage_c(*command, *more.format(vision=tiny_cascade.vision).split()) == 0
    assert len(batches) == 2 * recipe.gradient_accumulation_steps
    text = tmp_path / "out" / "new_text_model.safetensors" if "text" in recipe.rates else None
    stage = make_stage(tiny_cascade.stage_c)
    assert_equal_training(tiny_cascade, stage, recipe, batches, tmp_path / "out", text=text)


def test_regularization_images_and_masks(tiny_cascade, pictures, tmp_path, batches):
    """Transparent pictures count by their alpha, regularization images by their weight."""
    cover = np.full((96, 128), 255, np.uint8)
    cover[:, :50] = 0
    cover[:40, 50:] = 128
    path = pictures / "1_duck" / "duck_00.png"
    with Image.open(path) as picture:
        picture.putalpha(Image.fromarray(cover))
        picture.save(path)
    write_pictures(tmp_path / "regular" / "1_toy", {"robot/00": "a robot"}, (128, 96))
    recipe = Recipe(seed=SEED, rates=RATES)
    more = ("--stage_c_dropout=0", "--alpha_mask", f"--reg_data_dir={tmp_path / 'regular'}", "--prior_loss_weight=0.25")
    assert train_stage_c(*argv(tiny_cascade, pictures, tmp_path / "out", recipe, *more)) == 0
    weights = {
        Path(key).name: weight
        for batch in batches
        for key, weight in zip(batch.record_keys, batch.loss_weight, strict=True)
    }
    assert weights["robot_00.png"] == 0.25 and weights["duck_00.png"] == 1
    assert_equal_training(tiny_cascade, make_stage(tiny_cascade.stage_c), recipe, batches, tmp_path / "out")


def test_stage_b(tiny_cascade, pictures, tmp_path, batches, monkeypatch):
    """Its own dropout is off, which diffusers applies in another place."""
    monkeypatch.setattr("library.checkpoints.cascade_configs._DROPOUT", 0.0)
    recipe = Recipe(seed=SEED, rates=RATES, effnet_dropout_rate=0.4)
    files = {"stage_b_checkpoint_path": tiny_cascade.stage_b, "stage_a_checkpoint_path": tiny_cascade.stage_a}
    command = argv(tiny_cascade, pictures, tmp_path / "out", recipe, "--effnet_dropout_rate=0.4", **files)
    assert train_stage_b(*(word for word in command if "stage_c" not in word)) == 0
    assert_equal_training(tiny_cascade, make_stage(tiny_cascade.stage_b, "b"), recipe, batches, tmp_path / "out")


LORA = {
    "attention of stage C, a word": (
        "--network_train_unet_only --network_args module_filters=.attn",
        Recipe(seed=SEED, rates={"lora_unet": 1e-2, "word": 3e-2}),
        True,
    ),
    "all of stage C and the text encoder, checkpointing": (
        "--text_encoder_lr=4e-3 --gradient_checkpointing",
        Recipe(seed=SEED, rates={"lora_unet": 1e-2, "lora_te": 4e-3}),
        False,
    ),
}


@pytest.mark.parametrize("name", LORA)
def test_lora(tiny_cascade, pictures, tmp_path, batches, name):
    import stable_cascade_train_c_network as script

    more, recipe, word = LORA[name]
    stage, text = make_stage(tiny_cascade.stage_c), make_text(tiny_cascade.text)
    layers = lora_layers(stage, None if word else text, only=".attention." if word else "")
    assert len(layers) == (16 if word else 47 + 12)
    start = random_lora(layers)
    save_file(start, tmp_path / "start.safetensors", metadata={"ss_base_model_version": "stable_cascade"})
    network = {"network_module": "networks.lora", "network_dim": RANK, "network_alpha": int(ALPHA)}
    command = argv(
        tiny_cascade,
        pictures,
        tmp_path / "out",
        recipe,
        f"--network_weights={tmp_path / 'start.safetensors'}",
        **network,
    )
    tokens = ("--train_tokens", "[zog]=^snail", "--embedding_lr=0.03") if word else ()
    assert run_tool(script.main, *command, *more.split(), *tokens) == 0
    values = {key: value.clone() for key, value in start.items() if not key.endswith("alpha")}
    attach_lora(layers, values)
    if word:
        values["word"] = torch.zeros(1, 32)
        attach_word(text, values["word"], tiny_cascade.text, "snail")
    before = {key: value.clone() for key, value in values.items()}
    trainer = Trainer(tiny_cascade, tmp_path, stage, text, recipe, values, words={"[zog]": 49408} if word else {})
    expected = trainer.train(batches)
    found = load_file(tmp_path / "out" / "new.safetensors")
    found["word"] = found.get("embeddings.embeddings")
    assert {key for key in found if key.startswith("lora_") and not key.endswith("alpha")} == {
        key for key in expected if key != "word"
    }
    for part in recipe.rates:
        own = {key: value for key, value in expected.items() if key.startswith(part)}
        assert largest_error(before, own, found) < TOLERANCE, part


def test_control_net(control_cascade, pictures, tmp_path, batches):
    """Canny edges of a copy of 64x64 pixels, residuals before four of six blocks, offset noise."""
    recipe = Recipe(seed=SEED, rates={"": 1e-2}, noise_offset=0.1)
    more = (f"--controlnet_checkpoint_path={control_cascade.controlnet}", "--controlnet_filter=canny",
            "--controlnet_filter_params", "resize=64", "--noise_offset=0.1")  # fmt: skip
    assert train_control_net(*argv(control_cascade, pictures, tmp_path / "out", recipe, *more)) == 0
    stage = make_stage(control_cascade.stage_c, blocks=(1, 2))
    net = ReferenceControlNet(load_file(control_cascade.controlnet), blocks=(0, 1, 4, 5), edges_side=64)
    inject(stage, lambda: net.residuals)
    before = {name: value.clone() for name, value in net.trained.items()}
    text = make_text(control_cascade.text)
    trainer = Trainer(control_cascade, tmp_path, stage, text, recipe, net.trained, guide=net.look)
    expected = trainer.train(batches)
    assert largest_error(before, expected, load_file(tmp_path / "out" / "new.safetensors")) < TOLERANCE
