"""fine_tune.py: metadata instead of folders, the U-Net alone unless asked, and runs that go on from their states."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import PHOTOS, ROOT
from tests.support import fine_tune, tensor_digest

UNET, TEXT = "model.diffusion_model.", "cond_stage_model."
FINAL = "tuned.safetensors"


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder with four photographs of two shapes, without captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for source in ("duck", "car"):
        for path in sorted((PHOTOS / source).glob("*.jpg"))[:2]:
            shutil.copy(path, folder / f"{source}{path.name}")
    return folder


@pytest.fixture
def metadata(pictures) -> Path:
    """Captions and tags by stem, as merge_captions_to_metadata.py writes them."""
    entries = {path.stem: {"caption": f"a {path.stem[:-2]}", "tags": "toy, red"} for path in pictures.glob("*.jpg")}
    file = pictures.parent / "metadata.json"
    file.write_text(json.dumps(entries), encoding="utf-8")
    return file


@pytest.fixture
def base_options(tiny_sd1, pictures, metadata, tmp_path) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={tiny_sd1}",
        f"--train_data_dir={pictures}",
        f"--in_json={metadata}",
        f"--output_dir={tmp_path / 'out'}",
        "--output_name=tuned",
        "--resolution=64,128",
        "--enable_bucket",
        "--min_bucket_reso=64",
        "--max_bucket_reso=192",
        "--learning_rate=1e-3",
        "--max_train_steps=3",
        "--max_data_loader_n_workers=0",
        "--seed=5",
    ]


def changed(before: dict, after: dict, prefix: str) -> bool:
    return any(not torch.equal(before[name], after[name]) for name in before if name.startswith(prefix))


def digest_of(options: list[str], out: Path, *more: str) -> str:
    assert fine_tune(*options, *more, f"--output_dir={out}") == 0
    return tensor_digest(out / FINAL)


def test_the_unet_alone_is_trained(base_options, tiny_sd1, tmp_path):
    assert fine_tune(*base_options) == 0
    before, after = load_file(tiny_sd1), load_file(tmp_path / "out" / FINAL)
    assert changed(before, after, UNET)
    assert not changed(before, after, TEXT)


def test_the_text_encoder_is_trained_on_request_at_its_own_rate(base_options, tiny_sd1, tmp_path):
    assert fine_tune(*base_options, "--train_text_encoder") == 0
    before, after = load_file(tiny_sd1), load_file(tmp_path / "out" / FINAL)
    assert changed(before, after, UNET)
    assert changed(before, after, TEXT)
    still = tmp_path / "still"
    assert fine_tune(*base_options, "--train_text_encoder", "--learning_rate_te=0", f"--output_dir={still}") == 0
    assert not changed(before, load_file(still / FINAL), TEXT)


def test_captions_and_tags_reach_the_model(base_options, metadata, tmp_path):
    """Tags alone, captions alone and both are three different trainings; the separator joins them."""
    both = digest_of(base_options, tmp_path / "both")
    entries = json.loads(metadata.read_text())
    for kept, name in (("caption", "captions"), ("tags", "tags")):
        metadata.write_text(json.dumps({key: {kept: value[kept]} for key, value in entries.items()}))
        assert digest_of(base_options, tmp_path / name) != both
    joined = {key: {"caption": f"{value['caption']},{value['tags']}"} for key, value in entries.items()}
    metadata.write_text(json.dumps(joined))
    assert digest_of(base_options, tmp_path / "joined") == both


def test_a_toml_file_does_what_the_options_do(base_options, pictures, metadata, tmp_path):
    data = ("train_data_dir", "in_json", "resolution", "bucket")
    options = [option for option in base_options if not any(word in option for word in data)]
    config = tmp_path / "data.toml"
    config.write_text(
        "[[datasets]]\nresolution = [64, 128]\nenable_bucket = true\nmin_bucket_reso = 64\nmax_bucket_reso = 192\n"
        f"[[datasets.subsets]]\nimage_dir = '{pictures}'\nmetadata_file = '{metadata}'\n"
    )
    wanted = digest_of(base_options, tmp_path / "options")
    assert digest_of(options, tmp_path / "toml", f"--dataset_config={config}") == wanted


def test_latents_on_disk_serve_a_run_without_the_images(base_options, pictures, tmp_path):
    first = digest_of(base_options, tmp_path / "first", "--cache_latents_to_disk")
    for image in pictures.glob("*.jpg"):
        image.unlink()
    assert digest_of(base_options, tmp_path / "second", "--cache_latents_to_disk") == first


def test_latents_that_do_not_fit_are_refused_when_the_images_are_gone(base_options, pictures, tmp_path, capsys):
    assert fine_tune(*base_options, "--cache_latents_to_disk") == 0
    gone = sorted(pictures.glob("*.jpg"))[0]
    gone.unlink()
    assert fine_tune(*base_options, "--cache_latents_to_disk", "--resolution=128", "--overwrite") == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert gone.stem in message and "the picture is gone" in message and "other resolution" in message


def test_prepared_metadata_say_the_resolution(base_options, pictures, metadata, tmp_path, caplog):
    """As the command lines of old guides have it: buckets come from the metadata, and no option names a size."""
    entries = json.loads(metadata.read_text())
    options = [option for option in base_options if "reso" not in option and "bucket" not in option]
    assert fine_tune(*options) == 2
    for entry in entries.values():
        entry["train_resolution"] = [64, 128]
    metadata.write_text(json.dumps(entries))
    prepared = digest_of(options, tmp_path / "without")
    assert digest_of(options, tmp_path / "with", "--resolution=64,128") == prepared
    assert "has no effect" not in caplog.text


def test_transparent_parts_are_not_trained(base_options, pictures, metadata, tiny_sd1, tmp_path):
    """Pictures that are transparent everywhere teach nothing with --alpha_mask, and something without."""
    for path in list(pictures.glob("*.jpg")):
        image = Image.open(path).resize((128, 96)).convert("RGBA")
        image.putalpha(0)
        image.save(path.with_suffix(".png"))
        path.unlink()
    before = load_file(tiny_sd1)
    options = [*base_options, "--optimizer_type=SGD", "--learning_rate=0.1"]
    for more, moves in ((["--alpha_mask"], False), ([], True), (["--alpha_mask", "--cache_latents"], False)):
        out = tmp_path / f"out{len(more)}"
        assert fine_tune(*options, *more, f"--output_dir={out}") == 0
        assert changed(before, load_file(out / FINAL), UNET) == moves


def test_long_captions_clip_skip_and_other_models(base_options, metadata, tiny_sd2_v, tmp_path):
    entries = json.loads(metadata.read_text())
    words = ", ".join(f"word {number}" for number in range(60))
    metadata.write_text(json.dumps({key: {"caption": words} for key in entries}))
    digests = {
        digest_of(base_options, tmp_path / "short"),
        digest_of(base_options, tmp_path / "long", "--max_token_length=225"),
        digest_of(base_options, tmp_path / "skip", "--max_token_length=225", "--clip_skip=2"),
    }
    assert len(digests) == 3
    velocity = [f"--pretrained_model_name_or_path={tiny_sd2_v}", "--v2", "--v_parameterization"]
    digest_of(base_options, tmp_path / "v", *velocity, "--max_token_length=150", "--train_text_encoder")


@pytest.mark.parametrize("more", [[], ["--train_text_encoder", "--cache_latents"]], ids=["unet", "both"])
def test_a_resumed_run_ends_with_the_same_bits(base_options, tmp_path, more):
    options = [*base_options, "--shuffle_caption", "--flip_aug", *more]
    straight = tmp_path / "straight"
    wanted = digest_of(options, straight, "--save_state", "--save_every_n_steps=1", "--save_precision=float")
    state = straight / "tuned-step00000001-state"
    assert digest_of(options, tmp_path / "again", f"--resume={state}") == wanted


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="the package bitsandbytes is not installed")
def test_the_documented_command_line_runs(tiny_sd1, pictures, metadata, tmp_path):
    """As users have it in their notes, but for the length; float16 is slow on a processor, but it works."""
    config = tmp_path / "D.toml"
    config.write_text(
        f"[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = '{pictures}'\n"
        f"metadata_file = '{metadata}'\n"
    )
    words = shlex.split(
        f"--num_cpu_threads_per_process 1 {ROOT / 'fine_tune.py'} --pretrained_model_name_or_path={tiny_sd1} "
        f"--output_dir={tmp_path / 'O'} --output_name=N --dataset_config={config} --save_model_as=safetensors "
        "--learning_rate=5e-6 --max_train_steps=2 --use_8bit_adam --xformers --gradient_checkpointing "
        "--mixed_precision=fp16"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *words]
    done = subprocess.run(
        launch, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    values = load_file(tmp_path / "O" / "N.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in values.values() if value.is_floating_point())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--train_data_dir=nowhere"], "--train_data_dir"),
        (["--in_json=nowhere.json"], "--in_json"),
        (["--fp8_base", "--mixed_precision=bf16"], "--fp8_base"),
        (["--train_text_encoder", "--cache_text_encoder_outputs"], "--train_text_encoder"),
        (["--stop_text_encoder_training=5"], "train_db.py"),
        (["--network_module=networks.lora"], "train_network.py"),
    ],
)
def test_options_that_cannot_work_are_named(base_options, capsys, more, words):
    assert fine_tune(*base_options, *more) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]


def test_folders_of_pictures_are_sent_to_the_other_scripts(base_options, pictures, tmp_path, capsys):
    config = tmp_path / "data.toml"
    config.write_text(f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{pictures}'\n")
    assert fine_tune(*base_options, f"--dataset_config={config}") == 2
    assert "metadata_file" in capsys.readouterr().err


def test_images_that_are_gone_are_named_all_at_once(base_options, metadata, capsys):
    entries = json.loads(metadata.read_text())
    entries |= {"/gone/one.jpg": {"caption": "x"}, "gone_two": {"caption": "y"}}
    metadata.write_text(json.dumps(entries))
    assert fine_tune(*base_options) == 2
    message = capsys.readouterr().err
    assert "/gone/one.jpg" in message and "gone_two" in message
