"""tools/cache_latents.py and tools/cache_text_encoder_outputs.py: what they write is what training then uses."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests import support
from tests.support import tensor_digest
from tools import cache_latents, cache_text_encoder_outputs

BUCKETS = ("--enable_bucket", "--flip_aug")
NETWORK = ("--network_module=networks.lora", "--network_train_unet_only")


def run(tool, *argv):
    with pytest.raises(SystemExit) as ended:
        tool.main([str(item) for item in argv])
    return ended.value.code


def files(folder):
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*.npz"))}


@pytest.fixture
def common(tiny_sd1, photo_folders):
    """Options that tools and training have in common."""
    return (
        f"--pretrained_model_name_or_path={tiny_sd1}",
        f"--train_data_dir={photo_folders}",
        "--resolution=64",
        "--min_bucket_reso=64",
    )


def test_latents_are_those_of_training(common, base_options, photo_folders, tmp_path, caplog):
    assert run(cache_latents, *common, *BUCKETS, "--cache_dir", tmp_path / "c", "--vae_batch_size=2") == 0
    assert "caching latents: 5 pictures done" in caplog.text
    written = files(tmp_path / "c")
    assert len(written) == 5 and not files(photo_folders)
    cached = (*BUCKETS, "--cache_latents_to_disk", "--cache_dir", tmp_path / "c", "--vae_batch_size=2")
    assert support.train_db(*base_options, *cached) == 0
    assert "latent cache: 5 reused, 0 to encode" in caplog.text
    assert files(tmp_path / "c") == written
    with_tool = tensor_digest(tmp_path / "out" / "duck.safetensors")
    assert support.train_db(*base_options, *BUCKETS, "--cache_latents", "--vae_batch_size=2", "--overwrite") == 0
    assert tensor_digest(tmp_path / "out" / "duck.safetensors") == with_tool


def test_network_training_finds_everything(common, base_options, photo_folders, caplog):
    assert run(cache_latents, *common, *BUCKETS) == 0
    assert run(cache_text_encoder_outputs, *common) == 0
    assert "caching text encoder outputs: 5 pictures done" in caplog.text
    written = files(photo_folders)
    assert len(written) == 10
    caplog.clear()
    options = (*BUCKETS, *NETWORK, "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")
    assert support.train_network(*base_options, *options) == 0
    assert "latent cache: 5 reused, 0 to encode" in caplog.text
    assert "text encoder outputs: 5 reused, 0 to encode" in caplog.text
    assert files(photo_folders) == written


def test_a_training_command_line_is_understood(common, tmp_path, caplog):
    old = shlex.split(
        "--output_dir=o --network_module=networks.lora --network_dim=4 --learning_rate=1e-4 --max_train_steps=10 "
        "--use_8bit_adam --xformers --mixed_precision=no --gradient_checkpointing --save_every_n_epochs=1 "
        "--caption_extention=.txt --skip_existing --no_half_vae --train_batch_size=2 --seed=1"
    )
    assert run(cache_latents, *common, *old) == 0
    (warning,) = [one.getMessage() for one in caplog.records if "have no effect" in one.getMessage()]
    for option in ("--network_module", "--learning_rate", "--use_8bit_adam", "--gradient_checkpointing"):
        assert option in warning
    for option in ("--skip_existing", "--train_batch_size", "--no_half_vae", "--seed", "--mixed_precision"):
        assert option not in warning
    assert not (tmp_path / "o").exists() and not Path("o").exists()


def test_bad_pictures_do_not_end_the_work(common, photo_folders, caplog):
    photo = photo_folders / "2_sks duck" / "00.jpg"
    (photo_folders / "2_sks duck" / "cut.jpg").write_bytes(photo.read_bytes()[:3000])
    (photo_folders / "2_sks duck" / "page.png").write_text("<html>")
    assert run(cache_latents, *common) == 0
    assert "5 pictures done, 2 failed" in caplog.text
    assert "cut.jpg" in caplog.text and "page.png" in caplog.text
    assert len(files(photo_folders)) == 5
    caplog.clear()
    assert run(cache_latents, *common) == 0
    assert "0 pictures done, 5 skipped because their result exists, 2 failed" in caplog.text


def test_nothing_usable_is_an_error(common, photo_folders, capsys):
    for path in photo_folders.rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:3000])
    assert run(cache_latents, *common) == 2
    assert "none of 5 pictures could be used" in capsys.readouterr().err


def test_pictures_for_validation_are_left_to_training(common, tiny_sd1, photo_folders, tmp_path):
    split = (*common, "--validation_split=0.5", "--seed=3")
    assert run(cache_latents, *split) == 0
    assert len(files(photo_folders)) == 3
    assert run(cache_text_encoder_outputs, *split) == 0
    assert len(files(photo_folders)) == 6


@pytest.mark.parametrize(
    ("tool", "options", "message"),
    [
        (cache_latents, ("--sdxl",), "SDXL models are not supported yet"),
        (cache_text_encoder_outputs, ("--flux",), "FLUX models are not supported yet"),
        (cache_latents, ("--color_aug",), "cannot be combined with --cache_latents"),
        (cache_latents, ("--dataset_class=a.B",), "never cached"),
        (cache_text_encoder_outputs, ("--shuffle_caption",), "shuffle_caption makes captions vary"),
        (cache_latents, ("--pretrained_model_name_or_path=none.safetensors",), "not found"),
        (cache_latents, ("--resolutoin=3",), "Did you mean --resolution?"),
    ],
)
def test_refusals(common, capsys, tool, options, message):
    assert run(tool, *common, *options) == 2
    assert message in capsys.readouterr().err


def test_what_needs_no_model_needs_none(common, tmp_path):
    options = (f"--output_dir={tmp_path / 'report'}", "--debug_dataset")
    assert run(cache_latents, *common[1:], *options) == 0
    assert (tmp_path / "report" / "dataset_report.json").is_file()
