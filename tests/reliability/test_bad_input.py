"""Wrong options, files and folders: one clear line each, exit status 2, no traceback, nothing started."""

from __future__ import annotations

import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support import train_db


@pytest.fixture
def base(tiny_sd1, photo_folders, tmp_path):
    return {
        "pretrained_model_name_or_path": tiny_sd1,
        "train_data_dir": photo_folders,
        "output_dir": tmp_path / "out",
        "resolution": "64",
        "min_bucket_reso": "64",
        "max_train_steps": "1",
        "max_data_loader_n_workers": "0",
    }


def run(values: dict, *more: str) -> int:
    return train_db(*(f"--{name}={value}" for name, value in values.items() if value is not None), *more)


def refused(capsys, values: dict, *more: str) -> str:
    capsys.readouterr()
    assert run(values, *more) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert not list(Path(values.get("output_dir") or ".").glob("*.safetensors"))
    return message


OPTIONS = {
    "adaptive noise without offset": (["--adaptive_noise_scale=0.1"], ["adaptive_noise_scale", "noise_offset"]),
    "scale_v without v": (["--scale_v_pred_loss_like_noise_pred"], ["v_parameterization"]),
    "two optimizers": (["--use_8bit_adam", "--use_lion_optimizer"], ["use_8bit_adam", "use_lion_optimizer"]),
    "unknown optimizer": (["--optimizer_type=AdamX"], ["AdamX"]),
    "optimizer argument": (["--optimizer_args", "weight_decay"], ["optimizer_args", "weight_decay"]),
    "warm-up with constant": (["--lr_warmup_steps=10"], ["lr_warmup_steps", "constant_with_warmup"]),
    "unknown schedule": (["--lr_scheduler=cosin"], ["cosin", "cosine"]),
    "half precision": (["--full_fp16"], ["full_fp16", "mixed_precision"]),
    "timesteps": (["--min_timestep=900", "--max_timestep=100"], ["min_timestep"]),
    "typo": (["--resolutoin=512"], ["resolutoin", "resolution"]),
    "abbreviation": (["--train_data=x"], ["--train_data_dir"]),
    "fp8": (["--fp8_base", "--mixed_precision=bf16"], ["fp8_base"]),
    "fused with accumulation": (
        ["--fused_backward_pass", "--optimizer_type=Adafactor", "--gradient_accumulation_steps=2"],
        ["fused_backward_pass", "gradient_accumulation_steps"],
    ),
    "augmentation with caches": (["--cache_latents", "--color_aug"], ["cache_latents", "color_aug"]),
    "samples without prompts": (["--sample_every_n_steps=1"], ["sample_prompts"]),
    "tensorboard without folder": (["--log_with=tensorboard"], ["logging_dir"]),
    "no such state": (["--resume=nowhere-state"], ["resume", "nowhere-state"]),
    "zero steps": (["--max_train_steps=0"], ["max_train_steps"]),
    "output name": (["--output_name=../escape"], ["output_name"]),
    "v2 for an SD1 file": (["--v2"], ["v2"]),
    "bucket limits": (["--enable_bucket", "--resolution=128", "--max_bucket_reso=64"], ["max_bucket_reso"]),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_wrong_options_are_refused_by_name(base, capsys, name):
    more, words = OPTIONS[name]
    message = refused(capsys, base, *more)
    for word in words:
        assert word in message, message


def test_all_problems_of_the_options_come_together(base, capsys):
    base.update(pretrained_model_name_or_path=None, output_dir=None, train_data_dir=None)
    message = refused(capsys, base, "--full_bf16", "--adaptive_noise_scale=1")
    for word in ("pretrained_model_name_or_path", "output_dir", "train_data_dir", "full_bf16", "adaptive_noise_scale"):
        assert word in message, message


def small_sdxl(path: Path) -> None:
    save_file({"conditioner.embedders.1.model.text_projection": torch.zeros(8, 8)}, path)


def hostile_pickle(path: Path) -> None:
    class Payload:
        def __reduce__(self):
            return (Path.touch, (path.with_name("executed"),))

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"state_dict": Payload()}, protocol=2))
        archive.writestr("archive/version", "3")


MODELS = {
    "missing.safetensors": (None, ["missing.safetensors"]),
    "truncated.safetensors": ("truncate", ["truncated.safetensors", "incomplete"]),
    "page.safetensors": (lambda path: path.write_text("<html>404</html>"), ["page.safetensors", "HTML"]),
    "pointer.safetensors": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"),
        ["pointer.safetensors", "git lfs pull"],
    ),
    "xl.safetensors": (small_sdxl, ["xl.safetensors", "SDXL"]),
    "lora.safetensors": (
        lambda path: save_file({"lora_unet_down.lora_up.weight": torch.zeros(4, 4)}, path),
        ["lora.safetensors", "LoRA"],
    ),
    "huge_header.safetensors": (
        lambda path: path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}"),
        ["huge_header.safetensors"],
    ),
    "hostile.ckpt": (hostile_pickle, ["hostile.ckpt", "refused"]),
    "empty.ckpt": (lambda path: path.write_bytes(b""), ["empty.ckpt", "empty"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_wrong_models_are_refused_and_never_executed(base, tiny_sd1, tmp_path, capsys, name):
    make, words = MODELS[name]
    path = tmp_path / name
    if make == "truncate":
        path.write_bytes(tiny_sd1.read_bytes()[:-1000])
    elif make is not None:
        make(path)
    base["pretrained_model_name_or_path"] = path
    message = refused(capsys, base)
    for word in words:
        assert word.lower() in message.lower(), message
    assert not (tmp_path / "executed").exists()


def test_an_sd2_file_without_the_flag_names_the_flag(base, tiny_sd2, capsys):
    base["pretrained_model_name_or_path"] = tiny_sd2
    assert "--v2" in refused(capsys, base)


def with_bad_files(photos: Path) -> Path:
    folder = photos / "2_sks duck"
    (folder / "zero.png").write_bytes(b"")
    (folder / "page.jpg").write_text("<!DOCTYPE html><html></html>")
    (folder / "pointer.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    return folder


def test_bad_pictures_are_listed_together(base, photo_folders, capsys):
    with_bad_files(photo_folders)
    message = refused(capsys, base)
    for word in ("zero.png", "page.jpg", "pointer.png", "--skip_bad_files"):
        assert word in message, message


def test_a_caption_in_another_encoding_is_named(base, photo_folders, capsys):
    (photo_folders / "2_sks duck" / "00.caption").write_bytes("日本語のキャプション".encode("cp932"))
    assert "00.caption" in refused(capsys, base)


def test_folders_without_repeats_suggest_the_rename(base, photo_folders, capsys):
    for folder in list(photo_folders.iterdir()):
        folder.rename(folder.with_name(folder.name.split("_", 1)[1]))
    message = refused(capsys, base)
    assert "sks duck" in message and "_sks duck" in message


def test_dataset_config_errors_come_together_with_suggestions(base, photo_folders, tmp_path, capsys):
    config = tmp_path / "data.toml"
    config.write_text(
        "[general]\nshuffle_captions = true\n[[datasets]]\nresolution = 64\nbatch_size = true\n"
        f"[[datasets.subsets]]\nimage_dir = '{photo_folders / '2_sks duck'}'\nnum_repeat = 3\nresolution = 32\n"
    )
    base["train_data_dir"] = None
    message = refused(capsys, base, f"--dataset_config={config}")
    for word in ("shuffle_captions", "shuffle_caption", "batch_size", "num_repeat", "num_repeats", "data.toml"):
        assert word in message, message


def test_an_empty_folder_is_an_error(base, tmp_path, capsys):
    empty = tmp_path / "empty"
    (empty / "3_nothing").mkdir(parents=True)
    base["train_data_dir"] = empty
    assert "empty" in refused(capsys, base)


def test_a_training_that_diverges_ends_with_status_5_and_writes_nothing_bad(base, tmp_path):
    base.update(max_train_steps="40", learning_rate="1e30")
    assert run(base, "--max_nan_steps=2") == 5
    assert not (tmp_path / "out" / "last.safetensors").exists()


def test_a_read_only_model_folder_is_left_alone(base, tiny_sd1, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    model = folder / "model.safetensors"
    shutil.copy(tiny_sd1, model)
    before = model.read_bytes()
    base.update(pretrained_model_name_or_path=model, output_dir=folder, output_name="model")
    assert run(base) == 0
    assert (folder / "model.bak-1.safetensors").exists() or model.read_bytes() != before
