"""The network script for stage C: from pictures and captions to files that other programs load."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import stable_cascade_gen_img
import stable_cascade_train_c_network as script
from library.checkpoints.embedding_file import read_embedding
from library.checkpoints.headers import read_header
from library.checkpoints.lora_file import read_lora
from library.models.random_models import make_random_sd
from library.training.step import TrainStep
from networks.convert_stable_cascade_lora import main as convert
from tests.conftest import PHOTOS
from tests.lora_files import save
from tests.support import run_tool, tensor_digest

WORDS = ("--train_tokens", "[fernando]=^dog</w>", "^duck</w>")


@pytest.fixture(scope="module")
def models(tiny_cascade):
    return tiny_cascade


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos") / "1_things"
    folder.mkdir()
    for number, path in enumerate(sorted((PHOTOS / "duck").glob("*.jpg"))[:3]):
        shutil.copy(path, folder / path.name)
        (folder / path.name).with_suffix(".caption").write_text(f"[fernando] the duck, photo {number}")
    return folder.parent


@pytest.fixture
def steps(monkeypatch):
    """(Loss, weights of the samples) of every micro-batch."""
    seen, forward = [], TrainStep.forward

    def spy(self, batch):
        result = forward(self, batch)
        seen.append((result[0].item(), batch.loss_weight.tolist()))
        return result

    monkeypatch.setattr(TrainStep, "forward", spy)
    return seen


def train(models, photos, out, *more):
    """Run the script; the status."""
    usual = [
        f"--stage_c_checkpoint_path={models.stage_c}",
        f"--effnet_checkpoint_path={models.effnet}",
        f"--text_model_checkpoint_path={models.text}",
        f"--train_data_dir={photos}",
        f"--output_dir={out}",
        "--output_name=duck",
        "--resolution=64",
        "--network_module=networks.lora",
        "--network_dim=4",
        "--learning_rate=1e-2",
        "--max_train_steps=2",
        "--max_data_loader_n_workers=0",
        "--seed=7",
    ]
    return run_tool(script.main, *usual, *more)


def test_what_training_shows_is_what_its_file_draws(models, photos, tmp_path):
    prompts = tmp_path / "prompts.txt"
    lines = [
        "a photo of [fernando] --w 128 --h 128 --s 2 --d 1",
        "(a:1.3) [Fernando] --w 192 --h 128 --s 3 --d 2 --f 1.5",
    ]
    prompts.write_text("\n".join(lines), encoding="utf-8")
    preview = f"--previewer_checkpoint_path={models.previewer}"
    tokens = ("--train_tokens", "[fernando]=^dog</w>", "^photo</w>", "--network_train_unet_only")
    sampling = (f"--sample_prompts={prompts}", "--sample_every_n_steps=2", preview)
    assert train(models, photos, tmp_path, *tokens, *sampling, "--save_precision=float") == 0
    words = (
        f"--stage_c_checkpoint_path={models.stage_c}",
        f"--text_model_checkpoint_path={models.text}",
        f"--network_weights={tmp_path / 'duck.safetensors'}",
    )
    drawn = (f"--from_file={prompts}", "--decoder=previewer", "--sequential_file_name", preview)
    assert run_tool(stable_cascade_gen_img.main, *words, *drawn, f"--outdir={tmp_path / 'drawn'}") == 0
    shown, made = (sorted((tmp_path / folder).glob("*.png")) for folder in ("sample", "drawn"))
    assert len(shown) == len(made) == 2
    for one, other in zip(shown, made, strict=True):
        assert np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other)))


def test_a_lora_with_words(models, photos, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of [fernando] --w 128 --h 128 --s 2 --d 1")
    sampling = (f"--sample_prompts={prompts}", "--sample_every_n_steps=2")
    more = (*WORDS, "--network_args", "module_filters=.attn", *sampling, "--save_precision=bf16")
    preview = f"--previewer_checkpoint_path={models.previewer}"
    assert train(models, photos, tmp_path, "--network_train_unet_only", preview, *more) == 0
    assert len(list((tmp_path / "sample").glob("*.png"))) == 1
    file = read_lora(tmp_path / "duck.safetensors")
    assert (file.base, file.layout, file.unknown) == ("stable_cascade", "kohya", ())
    assert len(file.modules) == 16 and all("_attention_attn_" in name for name in file.modules)
    assert all(weights.tensors["lora_up.weight"].any() for weights in file.modules.values())
    assert file.metadata["ss_base_model_version"] == "stable_cascade" and file.metadata["ss_v2"] == "False"
    assert file.metadata["modelspec.architecture"] == "stable-cascade/lora"
    assert file.metadata["modelspec.resolution"] == "64x64"
    words = json.loads(file.metadata["ss_train_tokens"])
    assert [(word["token"], word["ids"], word["rows"]) for word in words] == [
        ("[fernando]", [1929], [49408]),
        ("^duck</w>", [6910], [6910]),
    ]
    changes, ids = file.bundled["embeddings.embeddings"], file.bundled["embeddings.indices"]
    assert ids.tolist() == [49408, 6910] and changes.abs().sum(1).gt(0).all()
    table = load_file(models.text)["text_model.embeddings.token_embedding.weight"]
    vector = read_embedding(tmp_path / "duck_fernando.safetensors").rows["clip_g"]
    torch.testing.assert_close(vector[0], table[1929] + changes[0], atol=2e-3, rtol=1e-2)
    torch.testing.assert_close(file.bundled["bundle_emb.[fernando].clip_g"][0], table[1929] + changes[0])


def test_words_learn_while_the_rest_stays(models, photos, tmp_path):
    rates = ("--unet_lr=0", "--text_encoder_lr=0", "--embedding_lr=0.1", *WORDS)
    assert train(models, photos, tmp_path, *rates) == 2  # nothing of the network trains: say so rather than go on
    rates = ("--unet_lr=1e-9", "--network_train_unet_only", "--embedding_lr=0.1", *WORDS)
    assert train(models, photos, tmp_path, *rates) == 0
    file = read_lora(tmp_path / "duck.safetensors")
    assert file.bundled["embeddings.embeddings"].abs().max() > 0.05
    assert max(weights.tensors["lora_up.weight"].abs().max() for weights in file.modules.values()) < 1e-6


def test_going_on_from_a_file_of_either_layout(models, photos, tmp_path):
    """With next to no rate training ends where the file was, words included."""
    attention = ("--network_train_unet_only", "--network_args", "module_filters=.attn", *WORDS)
    assert train(models, photos, tmp_path / "first", *attention) == 0
    first = tmp_path / "first" / "duck.safetensors"
    official = tmp_path / "official.safetensors"
    assert run_tool(convert, first, official, "--stage_c_checkpoint_path", models.stage_c) == 0
    assert "embeddings.embeddings" in read_header(official).shapes
    for source, more in ((first, ()), (official, ("--dim_from_weights",))):
        out = tmp_path / f"from_{source.stem}"
        still = ("--learning_rate=1e-12", f"--network_weights={source}", "--max_train_steps=1", *more)
        assert train(models, photos, out, *attention, *still) == 0
        before, after = read_lora(first), read_lora(out / "duck.safetensors")
        assert before.modules.keys() == after.modules.keys()
        for name, weights in before.modules.items():
            deltas = [
                one.scale * one.tensors["lora_up.weight"] @ one.tensors["lora_down.weight"]
                for one in (weights, after.modules[name])
            ]
            torch.testing.assert_close(*deltas, atol=1e-6, rtol=1e-4)
        for key, tensor in before.bundled.items():
            torch.testing.assert_close(after.bundled[key], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "module",
    ["lora dora_wd=True", "lora_fa", "dylora unit=2", "loha", "lokr factor=4", "lora conv_dim=4 loraplus_lr_ratio=4"],
)
def test_every_kind_of_network(models, photos, tmp_path, module):
    name, *arguments = module.split()
    network = (f"--network_module=networks.{name}", *(["--network_args", *arguments] if arguments else []))
    assert train(models, photos, tmp_path, *network, "--gradient_checkpointing", "--mixed_precision=bf16") == 0
    file = read_lora(tmp_path / "duck.safetensors")
    assert file.base == "stable_cascade" and not file.unknown
    # Every linear layer and 1x1 convolution of the tiny stage C, and those of two text layers.
    assert len([name for name in file.modules if name.startswith("lora_unet_")]) == 47
    assert len([name for name in file.modules if name.startswith("lora_te_text_model_")]) == 12


def test_regularization_images_count_with_their_weight(models, photos, regularization_folders, tmp_path, steps):
    reg = (f"--reg_data_dir={regularization_folders}", "--prior_loss_weight=0.25", "--max_train_steps=6")
    assert train(models, photos, tmp_path / "quarter", *reg) == 0
    assert {weight for _, weights in steps for weight in weights} == {1.0, 0.25}
    reg = (f"--reg_data_dir={regularization_folders}", "--prior_loss_weight=1", "--max_train_steps=6")
    quarter = steps.copy()
    steps.clear()
    assert train(models, photos, tmp_path / "whole", *reg) == 0
    assert steps[0][0] == pytest.approx(quarter[0][0] / quarter[0][1][0])


def test_caches_change_nothing_but_rounding(models, photos, tmp_path, steps):
    losses = []
    for name, more in {"plain": (), "cached": ("--cache_latents", "--cache_text_encoder_outputs")}.items():
        assert train(models, photos, tmp_path / name, "--network_train_unet_only", *more) == 0
        losses.append([loss for loss, _ in steps])
        steps.clear()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_stage_c_s_dropout_works_when_it_is_asked_for(models, photos, tmp_path, steps):
    digests = {}
    for dropout in ("0", "0.3", "0.30"):
        out = tmp_path / dropout
        assert train(models, photos, out, f"--stage_c_dropout={dropout}", "--network_train_unet_only") == 0
        digests[dropout] = tensor_digest(out / "duck.safetensors")
    assert digests["0"] != digests["0.3"] == digests["0.30"]


def test_the_original_s_configuration(models, photos, tmp_path):
    config = tmp_path / "finetune_c_lora.yaml"
    config.write_text(
        f"""
experiment_id: stage_c_lora
checkpoint_path: {tmp_path / "trained"}
output_path: {tmp_path / "pictures"}
lr: 1.0e-4
batch_size: 2
image_size: 64
grad_accum_steps: 2
updates: 2
backup_every: 2
save_every: 1
warmup_updates: 1
use_fsdp: False
adaptive_loss_weight: True
effnet_checkpoint_path: {models.effnet}
previewer_checkpoint_path: {models.previewer}
generator_checkpoint_path: {models.stage_c}
clip_text_model_name: {models.text}
module_filters: ['.attn']
rank: 4
train_tokens:
  # - ['^snail', null] # token starts with "snail" -> "snail" & "snails", don't need to be reinitialized
  - ['[fernando]', '^dog</w>'] # custom token [fernando], initialize as average of all tokens that match
"""
    )
    assert run_tool(script.main, config, f"--train_data_dir={photos}", "--max_data_loader_n_workers=0") == 0
    file = read_lora(tmp_path / "trained" / "stage_c_lora" / "stage_c_lora.safetensors")
    assert len(file.modules) == 16 and {weights.rank for weights in file.modules.values()} == {4}
    assert {weights.alpha for weights in file.modules.values()} == {1.0}
    assert file.bundled["embeddings.indices"].tolist() == [49408]


def bad_lora(folder):
    name = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{name}.lora_{side}.weight": torch.ones(2, 2, 1, 1) for side in ("down", "up")}
    return save(folder / "sd.safetensors", tensors)


BAD = {
    "no match": (lambda folder: ("--train_tokens", "^notaword"), "no token of the vocabulary matches"),
    "cached outputs": (
        lambda folder: (*WORDS, "--network_train_unet_only", "--cache_text_encoder_outputs"),
        "cannot be combined with --train_tokens",
    ),
    "LoRA for SD": (lambda folder: (f"--network_weights={bad_lora(folder)}",), "was made for Stable Diffusion 1.x"),
    "SD as stage C": (
        lambda folder: (f"--stage_c_checkpoint_path={make_random_sd(Path(folder) / 'sd1.safetensors')}",),
        "Stable Diffusion 1.x",
    ),
    "fresh weights": (
        lambda folder: ("--stage_c_checkpoint_path=", "--model_version=1B"),
        "belongs to a trained model",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line(models, photos, tmp_path, capfd, case):
    more, message = BAD[case]
    assert train(models, photos, tmp_path / "out", *more(tmp_path)) == 2
    printed = capfd.readouterr().err
    assert message in printed and "Traceback" not in printed
    assert not (tmp_path / "out" / "duck.safetensors").exists()
