"""train_db.py from the command line to the files that a user opens elsewhere."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


def metadata(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(size)).get("__metadata__", {})


def changed(before: dict, after: dict, prefix: str) -> bool:
    return any(not torch.equal(before[name], after[name]) for name in before if name.startswith(prefix))


def read_log(logs: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = logs.glob("*/dreambooth/events*")
    return EventAccumulator(str(events)).Reload()


UNET, TEXT, VAE = "model.diffusion_model.", "cond_stage_model.", "first_stage_model."


def test_a_run_gives_a_checkpoint_with_the_same_tensors_and_trained_values(train_db, base_options, tiny_sd1, tmp_path):
    assert train_db(*base_options, "--enable_bucket", "--cache_latents") == 0
    before, after = load_file(tiny_sd1), load_file(tmp_path / "out" / "duck.safetensors")
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    assert changed(before, after, UNET)
    assert changed(before, after, TEXT)
    assert not changed(before, after, VAE)
    written = metadata(tmp_path / "out" / "duck.safetensors")
    assert written["modelspec.architecture"] == "stable-diffusion-v1"
    assert written["modelspec.title"] == "duck"
    summary = json.loads((tmp_path / "out" / "run_summary.json").read_text())
    assert (summary["status"], summary["exit_code"], summary["step"]) == ("done", 0, 3)


def test_negative_text_encoder_stop_trains_the_unet_alone(train_db, base_options, tiny_sd1, tmp_path):
    assert train_db(*base_options, "--stop_text_encoder_training=-1") == 0
    before, after = load_file(tiny_sd1), load_file(tmp_path / "out" / "duck.safetensors")
    assert changed(before, after, UNET)
    assert not changed(before, after, TEXT)


def test_text_encoder_stops_at_the_given_step(train_db, base_options, tmp_path):
    """With the stop at 1 the text encoder has the values of the save after step 1; the U-Net goes on."""
    assert train_db(*base_options, "--stop_text_encoder_training=1", "--save_every_n_steps=1") == 0
    first = load_file(tmp_path / "out" / "duck-step00000001.safetensors")
    last = load_file(tmp_path / "out" / "duck.safetensors")
    assert not changed(first, last, TEXT)
    assert changed(first, last, UNET)


@pytest.mark.parametrize("kind", ["ckpt", "diffusers", "diffusers_safetensors"])
def test_every_output_kind_is_written(train_db, base_options, tmp_path, kind):
    assert train_db(*base_options, f"--save_model_as={kind}", "--max_train_steps=1") == 0
    out = tmp_path / "out"
    if kind == "ckpt":
        content = torch.load(out / "duck.ckpt", weights_only=True)
        assert content["global_step"] == 1
        assert any(name.startswith(UNET) for name in content["state_dict"])
        return
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(out / "duck", local_files_only=True)
    assert pipeline.unet.config.cross_attention_dim == pipeline.text_encoder.config.hidden_size


def test_sd2_with_velocity_and_regularization_images(
    train_db, base_options, tiny_sd2_v, regularization_folders, tmp_path
):
    options = [option for option in base_options if "pretrained_model" not in option]
    status = train_db(
        *options,
        f"--pretrained_model_name_or_path={tiny_sd2_v}",
        "--v2",
        "--v_parameterization",
        f"--reg_data_dir={regularization_folders}",
        "--prior_loss_weight=0.5",
        "--save_precision=fp16",
    )
    assert status == 0
    after = load_file(tmp_path / "out" / "duck.safetensors")
    assert {t.dtype for t in after.values() if t.is_floating_point()} == {torch.float16}
    assert metadata(tmp_path / "out" / "duck.safetensors")["modelspec.prediction_type"] == "v"


def test_epoch_saves_are_numbered_and_pruned(train_db, base_options, tmp_path):
    options = [option for option in base_options if "max_train_steps" not in option]
    assert (
        train_db(*options, "--max_train_epochs=4", "--save_every_n_epochs=1", "--save_last_n_epochs=2", "--save_state")
        == 0
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"duck-000002.safetensors", "duck-000003.safetensors", "duck.safetensors", "duck-state"} <= names
    assert "duck-000001.safetensors" not in names
    assert "duck-000004.safetensors" not in names
    assert {"duck-000002-state", "duck-000003-state"} <= names
    assert "duck-000001-state" not in names


def test_samples_and_logs_are_written(train_db, base_options, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "a photo of sks duck --w 64 --h 64 --s 2 --d 5\n# a comment\nblurry --n sharp --w 64 --h 128 --s 2\n"
    )
    logs = tmp_path / "logs"
    status = train_db(
        *base_options,
        f"--sample_prompts={prompts}",
        "--sample_every_n_steps=3",
        "--sample_at_first",
        "--sample_sampler=euler_a",
        f"--logging_dir={logs}",
    )
    assert status == 0
    pictures = sorted(path.name for path in (tmp_path / "out" / "sample").glob("*.png"))
    assert len(pictures) == 4
    assert pictures[0].startswith("duck_000003_00_") and pictures[0].endswith("_5.png")
    assert pictures[2].startswith("duck_e000000_00_")
    log = read_log(logs)
    scalars = set(log.Tags()["scalars"])
    assert {"loss", "lr/unet", "loss/current", "loss/average"} <= scalars
    assert [event.step for event in log.Scalars("loss")] == [1, 2, 3]


def test_debug_dataset_needs_no_model_and_writes_the_report(train_db, photo_folders, tmp_path):
    status = train_db(
        "--debug_dataset",
        f"--train_data_dir={photo_folders}",
        f"--output_dir={tmp_path / 'out'}",
        "--resolution=512",
        "--enable_bucket",
        "--train_batch_size=2",
    )
    assert status == 0
    report = json.loads((tmp_path / "out" / "dataset_report.json").read_text(encoding="utf-8"))
    (dataset,) = report["datasets"]
    assert report["version"] == 1 and len(dataset["images"]) == 5
    image = next(image for image in dataset["images"] if "sks duck" in image["path"])
    assert image["num_repeats"] == 2 and len(image["token_ids"][0]) == 77
    html = (tmp_path / "out" / "dataset_report.html").read_text(encoding="utf-8")
    assert "http://" not in html.replace("http://www.w3.org", "") and "https://" not in html


def test_validation_images_are_kept_apart_and_their_loss_is_logged(train_db, base_options, photo_folders, tmp_path):
    config = tmp_path / "data.toml"
    folder = photo_folders / "2_sks duck"
    config.write_text(
        f"[[datasets]]\nresolution = 64\nvalidation_split = 0.34\nvalidation_seed = 3\n"
        f"[[datasets.subsets]]\nimage_dir = '{folder}'\n"
    )
    options = [option for option in base_options if not option.startswith(("--train_data_dir", "--max_train_steps"))]
    more = [f"--dataset_config={config}", "--max_train_epochs=2", f"--logging_dir={tmp_path / 'logs'}"]
    assert train_db(*options, *more) == 0
    log = read_log(tmp_path / "logs")
    losses = [event.value for event in log.Scalars("loss/validation/epoch_average")]
    assert len(losses) == 2 and losses[0] != losses[1]
    assert [event.step for event in log.Scalars("loss")] == [1, 2, 3, 4]


def test_a_data_set_class_of_the_users_own_is_trained_on(train_db, base_options, tmp_path, monkeypatch):
    (tmp_path / "my_data.py").write_text(
        "import torch\n"
        "class Two:\n"
        "    def __init__(self, tokenizer, max_token_length, resolution, debug_dataset):\n"
        "        assert tokenizer is None and resolution == (64, 64)\n"
        "    def __len__(self):\n"
        "        return 2\n"
        "    def __getitem__(self, index):\n"
        "        return {'images': torch.full((2, 3, 64, 64), index * 0.5), 'captions': ['one', 'two']}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = [option for option in base_options if not option.startswith("--train_data_dir")]
    assert train_db(*options, "--dataset_class=my_data.Two") == 0
    assert metadata(tmp_path / "out" / "duck.safetensors")["ss_num_batches_per_epoch"] == "2"


DOCUMENTED = {
    "dreambooth": "--prior_loss_weight=1.0 --resolution=64 --train_batch_size=1 --learning_rate=1e-6 "
    "--max_train_steps=2 --use_8bit_adam --xformers --mixed_precision=bf16 --cache_latents --gradient_checkpointing",
    "aspect ratios": "--resolution=128,64 --train_batch_size=4 --learning_rate=5e-6 --max_train_steps=2 "
    "--use_8bit_adam --xformers --mixed_precision=bf16 --save_every_n_epochs=1 --save_state --save_precision=bf16 "
    "--enable_bucket --min_bucket_reso=64 --max_bucket_reso=192 --color_aug --flip_aug --gradient_checkpointing "
    "--seed 42",
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_command_lines_run_as_written(
    train_db, tiny_sd1, photo_folders, regularization_folders, tmp_path, name
):
    status = train_db(
        f"--pretrained_model_name_or_path={tiny_sd1}",
        f"--train_data_dir={photo_folders}",
        f"--reg_data_dir={regularization_folders}",
        f"--output_dir={tmp_path / 'out'}",
        f"--logging_dir={tmp_path / 'logs'}",
        *DOCUMENTED[name].split(),
    )
    assert status == 0
    assert (tmp_path / "out" / "last.safetensors").exists()
