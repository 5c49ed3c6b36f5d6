"""Stages C and B from the command line to the files that other programs load."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.models.random_cascade import TINY_C
from tests.cascade_runs import train_stage_b, train_stage_c
from tests.support import run_tool


def metadata(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(size)).get("__metadata__", {})


def unchanged(before: Path, after: Path) -> int:
    old, new = load_file(before), load_file(after)
    assert {name: tensor.shape for name, tensor in old.items()} == {name: tensor.shape for name, tensor in new.items()}
    return sum(torch.equal(old[name], new[name]) for name in old)


def test_stage_c_trains_and_is_saved_in_the_official_layout(cascade_command, tiny_cascade, tmp_path):
    assert train_stage_c(*cascade_command(tmp_path / "out")) == 0
    result = tmp_path / "out" / "duck.safetensors"
    assert "down_blocks.0.2.attention.attn.in_proj_weight" in load_file(result)
    assert unchanged(tiny_cascade.stage_c, result) == 0
    assert not (tmp_path / "out" / "duck_text_model.safetensors").exists()
    told = metadata(result)
    assert told["modelspec.architecture"] == "stable-cascade"
    assert told["modelspec.implementation"] == "https://github.com/Stability-AI/StableCascade"
    assert told["ss_base_model_version"] == "stable_cascade"
    scaled = {"resolution": 128, "max_train_steps": 1, "stage_c_checkpoint_path": result}
    assert train_stage_c(*cascade_command(tmp_path / "again", "--effnet_scale=0.5", **scaled)) == 0
    told = metadata(tmp_path / "again" / "duck.safetensors")
    assert (told["ss_resolution"], told["modelspec.resolution"], told["ss_effnet_scale"]) == ("64,64", "64x64", "0.5")


@pytest.mark.parametrize(
    ("more", "stage_trains"),
    [
        (("--train_text_encoder", "--learning_rate_te1=1e-3"), True),
        (("--train_text_encoder", "--learning_rate_te1=1e-3", "--learning_rate=0"), False),
        (("--train_text_encoder_only",), False),
    ],
)
def test_the_text_encoder_trains_with_the_stage_or_alone(cascade_command, tiny_cascade, tmp_path, more, stage_trains):
    assert train_stage_c(*cascade_command(tmp_path / "out"), *more, "--gradient_checkpointing") == 0
    text = tmp_path / "out" / "duck_text_model.safetensors"
    # Positions behind the longest caption are padding, and the rows of most tokens never occur.
    old, new = load_file(tiny_cascade.text), load_file(text)
    same = [name for name in old if torch.equal(old[name], new[name])]
    assert not same
    kept = unchanged(tiny_cascade.stage_c, tmp_path / "out" / "duck.safetensors")
    assert (kept == 0) == stage_trains


def test_rows_of_tokens_learn_in_float32_where_all_else_is_half(cascade_command, tiny_cascade, tmp_path):
    """A rate at which bfloat16 could not move them."""
    more = ("--train_text_encoder_only", "--learning_rate=1e-6", "--full_bf16", "--mixed_precision=bf16")
    assert train_stage_c(*cascade_command(tmp_path / "out", logging_dir=tmp_path / "log"), *more) == 0
    curves = next((tmp_path / "log").rglob("events*")).read_bytes()
    assert b"lr/text_encoder1" in curves and b"lr/unet" not in curves
    old, new = load_file(tiny_cascade.text), load_file(tmp_path / "out" / "duck_text_model.safetensors")
    name = "text_model.embeddings.token_embedding.weight"
    moved = (new[name] - old[name]).abs().max().item()
    assert new[name].dtype == torch.float32 and 0 < moved < 1e-5
    assert new["text_projection.weight"].dtype == torch.bfloat16


def test_stage_b_trains_with_and_without_cached_latents(cascade_command, tiny_cascade, tmp_path, losses):
    assert train_stage_b(*cascade_command(tmp_path / "a", stage="b")) == 0
    assert train_stage_b(*cascade_command(tmp_path / "b", "--cache_latents_to_disk", "--cache_latents", stage="b")) == 0
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5)
    result = tmp_path / "a" / "duck.safetensors"
    assert unchanged(tiny_cascade.stage_b, result) == 0
    assert list((tmp_path / "photos" / "2_sks duck").glob("*_sc_b_latents.npz"))


def test_cached_and_uncached_training_give_the_same_loss(cascade_command, tmp_path, losses, monkeypatch):
    """Also where captions are dropped, whose place the cached empty caption takes."""
    from library.training import text_caching
    from tools import stable_cascade_cache_latents, stable_cascade_cache_text_encoder_outputs

    dropped = "--caption_dropout_rate=0.5"
    with monkeypatch.context() as patch:
        patch.setattr(text_caching, "AUTOMATIC_BYTES", 0)
        assert train_stage_c(*cascade_command(tmp_path / "a", dropped)) == 0
    command = cascade_command(tmp_path / "b", dropped)
    assert run_tool(stable_cascade_cache_latents.main, *command) == 0
    assert run_tool(stable_cascade_cache_text_encoder_outputs.main, *command) == 0
    folder = tmp_path / "photos" / "2_sks duck"
    assert len(list(folder.glob("*_sc_latents.npz"))) == len(list(folder.glob("*_sc_te_outputs.npz"))) == 3
    caches = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")
    assert train_stage_c(*command, "--cache_latents", "--cache_text_encoder_outputs", *caches) == 0
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5)


def test_caches_of_training_are_those_of_the_tools_and_notice_other_models(
    cascade_command, tiny_cascade, tmp_path, caplog
):
    from tools import stable_cascade_cache_latents, stable_cascade_cache_text_encoder_outputs

    def changed(path: Path) -> Path:
        tensors = load_file(path)
        name = next(name for name, tensor in tensors.items() if tensor.dim() == 2 or "0.weight" in name)
        tensors[name] = tensors[name] * 1.5
        save_file(tensors, tmp_path / path.name)
        return tmp_path / path.name

    def told(tool, **changes: object) -> str:
        caplog.clear()
        with caplog.at_level("INFO"):
            assert run_tool(tool.main, *cascade_command(tmp_path / "tool", **changes)) == 0
        return next(line for line in caplog.messages if line.startswith(("latent cache", "text encoder outputs")))

    caches = "--cache_latents --cache_latents_to_disk --cache_text_encoder_outputs --cache_text_encoder_outputs_to_disk"
    assert train_stage_c(*cascade_command(tmp_path / "out", *caches.split(), max_train_steps=1)) == 0
    for tool, other in (
        (stable_cascade_cache_latents, {"effnet_checkpoint_path": changed(tiny_cascade.effnet)}),
        (stable_cascade_cache_text_encoder_outputs, {"text_model_checkpoint_path": changed(tiny_cascade.text)}),
    ):
        assert "5 reused, 0 to encode" in told(tool)
        assert "0 reused, 5 to encode" in told(tool, **other)


def test_latents_of_stable_diffusion_in_the_folder_are_left_alone(cascade_command, tmp_path):
    import numpy as np

    picture = next((tmp_path / "photos" / "2_sks duck").glob("*.jpg"))
    other = picture.with_suffix(".npz")
    np.savez(other, latents=np.zeros((4, 8, 8), np.float32))
    before = other.read_bytes()
    assert train_stage_c(*cascade_command(tmp_path / "out", "--cache_latents", "--cache_latents_to_disk")) == 0
    assert other.read_bytes() == before


@pytest.mark.parametrize(
    "more",
    [
        "--full_bf16 --mixed_precision=bf16 --optimizer_type=Adafactor --fused_backward_pass --gradient_checkpointing "
        "--lr_scheduler=constant --optimizer_args relative_step=False scale_parameter=False warmup_init=False",
        "--mixed_precision=bf16 --adaptive_loss_weight --noise_offset=0.05 --stage_c_dropout=0",
        "--loss_weighting=min-snr --min_timestep=100 --max_timestep=900 --no_text_mask --max_token_length=150",
        "--ema_decay=0.5 --ema_device=cpu --ema_every_n_steps=2",
        "--save_model_as=ckpt --no_half_vae --mixed_precision=bf16",
        "--save_model_as=diffusers",
    ],
)
def test_options_of_a_run(cascade_command, tmp_path, more):
    assert train_stage_c(*cascade_command(tmp_path / "out", *more.split(), max_train_steps=2)) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()} - {"run_summary.json"}
    suffix = "" if "diffusers" in more else ".ckpt" if "ckpt" in more else ".safetensors"
    assert written == {f"duck{suffix}"} | ({"duck_ema.safetensors"} if "ema" in more else set())
    if "diffusers" in more:
        from diffusers.models.unets.unet_stable_cascade import StableCascadeUNet

        StableCascadeUNet.from_pretrained(tmp_path / "out" / "duck")


def test_the_average_lies_between_and_goes_with_its_model(cascade_command, tiny_cascade, tmp_path):
    more = ("--ema_decay=0.5", "--save_every_n_steps=1", "--save_last_n_steps=1", "--backup_every_n_steps=2")
    assert train_stage_c(*cascade_command(tmp_path / "out", *more, max_train_steps=4)) == 0
    first, last, average = (
        load_file(path)
        for path in (
            tiny_cascade.stage_c,
            tmp_path / "out" / "duck.safetensors",
            tmp_path / "out" / "duck_ema.safetensors",
        )
    )
    name = "clf.1.weight"
    assert 0 < (average[name] - first[name]).norm() < (last[name] - first[name]).norm()
    names = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    steps = {f"duck{ending}" for number in (3, 4) for ending in (f"-step{number:08d}", f"-step{number:08d}_ema")}
    backups = {f"duck-backup-step{number:08d}{ending}" for number in (2, 4) for ending in ("", "_ema")}
    assert names == {f"{stem}.safetensors" for stem in {"duck", "duck_ema", *steps, *backups}}
    assert {path.name for path in (tmp_path / "out").glob("*-state")} == {
        f"duck-backup-step{number:08d}-state" for number in (2, 4)
    }


def test_fresh_weights_follow_from_the_seed(cascade_command, tmp_path, monkeypatch):
    from library.checkpoints import cascade_configs

    small = {**cascade_configs.CONFIGS, ("c", "1B"): replace(TINY_C, blocks_down=(1, 2), blocks_up=(2, 1))}
    monkeypatch.setattr("library.models.cascade.sources.CONFIGS", small)
    command = cascade_command(tmp_path / "out", "--model_version=1B", stage_c_checkpoint_path=None)
    assert train_stage_c(*command) == 0
    assert train_stage_c(*command, "--output_name=twin") == 0
    assert unchanged(tmp_path / "out" / "duck.safetensors", tmp_path / "out" / "twin.safetensors") > 100


def test_pictures_are_conditions_at_the_given_rate(cascade_command, tiny_cascade, tmp_path, losses):
    vision = f"--image_model_checkpoint_path={tiny_cascade.vision}"
    for rate in (0, 1):
        command = cascade_command(tmp_path / str(rate), vision, f"--clip_image_cond_rate={rate}", max_train_steps=1)
        assert train_stage_c(*command) == 0
    assert losses[0] != losses[1]


def test_samples_are_drawn_through_the_previewer(cascade_command, tiny_cascade, tmp_path):
    prompts = tmp_path / "prompts.txt"
    # Every line has an option that only Stable Cascade knows, so the file is read by its table from the first check on.
    prompts.write_text(
        "a duck --w 256 --h 192 --s 2 --d 5 --f 1.5\na duck --w 256 --h 192 --s 2 --d 5 --t 0.8 --le 2\n"
    )
    command = cascade_command(tmp_path / "out", f"--sample_prompts={prompts}", "--sample_every_n_steps=2")
    more = (f"--previewer_checkpoint_path={tiny_cascade.previewer}", f"--sample_dir={tmp_path / 'seen'}")
    assert train_stage_c(*command, *more, "--sample_at_first") == 0
    from PIL import Image

    pictures = sorted((tmp_path / "seen").glob("*.png"))
    assert len(pictures) == 4
    assert len({path.read_bytes() for path in pictures}) == 4
    texts = Image.open(pictures[0]).text
    assert (texts["prompt"], texts["seed"], texts["shift"]) == ("a duck", "5", "1.5")
    # Six latent pixels for 256, eight pixels of the previewer for each.
    assert Image.open(pictures[0]).size == (48, 40)


def test_stage_b_makes_pictures_again(cascade_command, tmp_path):
    picture = next((tmp_path / "photos" / "2_sks duck").glob("*.jpg"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"a duck --w 128 --h 96 --s 2 --d 5 --cn {picture}\na duck --w 128 --h 96 --s 2\n")
    more = (f"--sample_prompts={prompts}", "--sample_every_n_steps=3")
    assert train_stage_b(*cascade_command(tmp_path / "out", *more, stage="b")) == 0
    from PIL import Image

    (result,) = (tmp_path / "out" / "sample").glob("*.png")
    assert Image.open(result).size == (128, 96)
    summary = json.loads((tmp_path / "out" / "run_summary.json").read_text())
    assert summary["status"] == "done"


# Bad input ---------------------------------------------------------------------------------------------------------


def refused(capsys, status: int) -> str:
    assert status == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return "\n".join(line for line in text.splitlines() if line.startswith("error:"))


@pytest.fixture
def nothing_big_loads(monkeypatch):
    def build(*args, **kwargs):
        raise AssertionError("a model was built")

    monkeypatch.setattr("library.models.assemble.build_module", build)
    monkeypatch.setattr("library.models.cascade.base.build_part_stage", build)


def test_wrong_files_are_named_before_models_load(
    cascade_command, tiny_cascade, tiny_sd1, tmp_path, capsys, nothing_big_loads
):
    affine = tmp_path / "affine.safetensors"
    effnet = load_file(tiny_cascade.effnet)
    save_file({**effnet, "mapper.1.weight": torch.ones(16)}, affine)
    out = tmp_path / "out"
    for changes, expected in (
        ({"stage_c_checkpoint_path": tiny_cascade.stage_b}, "--stage_c_checkpoint_path"),
        ({"stage_c_checkpoint_path": tiny_sd1}, "Stable Diffusion"),
        ({"effnet_checkpoint_path": affine}, "Würstchen v2"),
        ({"effnet_checkpoint_path": tiny_cascade.stage_a}, "--stage_a_checkpoint_path takes stage A"),
        ({"text_model_checkpoint_path": tiny_cascade.effnet}, "--text_model_checkpoint_path"),
    ):
        told = refused(capsys, train_stage_c(*cascade_command(out, **changes)))
        assert expected in told, told
        assert told.count("\n") == 0


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("--stage_c_checkpoint_path=", "--stage_c_checkpoint_path: is required"),
        ("--full_fp16 --mixed_precision=fp16", "overflow in float16"),
        ("--train_text_encoder --cache_text_encoder_outputs", "cannot be combined with --train_text_encoder"),
        ("--learning_rate=0", "0 trains nothing"),
        ("--ema_decay=0.9 --optimizer_type=AdamWScheduleFree", "averages the weights itself"),
        ("--ema_decay=1", "never let the average change"),
        ("--clip_image_cond_rate=0.1", "needs --image_model_checkpoint_path"),
        ("--sample_prompts=p.txt --sample_every_n_steps=1", "--previewer_checkpoint_path"),
        ("--model_version=2B", "no structure of stage C"),
        ("--adaptive_loss_weight --loss_weighting=snr", "--adaptive_loss_weight"),
        ("--fp8_base", "has no effect"),
        ("--global_batch_size=3 --gradient_accumulation_steps=2", "batch_size"),
    ],
)
def test_options_that_cannot_be(cascade_command, tmp_path, capsys, nothing_big_loads, more, expected):
    (tmp_path / "p.txt").write_text("a duck\n")
    assert expected in refused(capsys, train_stage_c(*cascade_command(tmp_path / "out"), *more.split()))
