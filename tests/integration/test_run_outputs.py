"""What a run of train_db.py leaves behind: samples, saves, logs, settings, summaries, and nothing private."""

from __future__ import annotations

import json
import platform
import socket
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from library.checkpoints.parameter_order import in_reference_order
from library.training.options_output import SAMPLERS
from tests.support import tensor_digest, train_db

FINAL = "duck.safetensors"


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def run(base_options):
    """Train with the base options and some more; later ones win."""

    def go(*argv: object) -> int:
        return train_db(*base_options, *argv)

    return go


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def summary(folder: Path) -> dict:
    return json.loads((folder / "run_summary.json").read_text(encoding="utf-8"))


def scalars(logs: Path, pattern: str) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = logs.glob(pattern)
    log = EventAccumulator(str(events)).Reload()
    return {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def test_every_sampler_draws(run, out, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a duck --w 64 --h 64 --s 3 --d 1 --ss {name}\n" for name in SAMPLERS))
    assert run("--max_train_steps=1", f"--sample_prompts={prompts}", "--sample_every_n_steps=1") == 0
    pictures = sorted((out / "sample").glob("duck_000001_*_1.png"))
    assert len(pictures) == len(SAMPLERS)
    assert {Image.open(path).size for path in pictures} == {(64, 64)}
    assert not summary(out)["skipped"]


def test_the_samplers_option_is_for_prompts_without_one(run, out, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a duck --w 64 --h 64 --s 3 --d 1\na duck --w 64 --h 64 --s 3 --d 1 --ss ddim\n")
    argv = ("--max_train_steps=1", f"--sample_prompts={prompts}", "--sample_at_first", "--sample_sampler=k_euler")
    assert run(*argv) == 0
    first, second = (Image.open(path).tobytes() for path in sorted((out / "sample").glob("duck_e000000_*.png")))
    assert first != second


def test_a_prompt_that_fails_is_reported_and_training_goes_on(run, out, tmp_path, monkeypatch):
    from library.inference.render import DiffusionRenderer

    def fail(*_args, **_more):
        raise RuntimeError("no picture today")

    monkeypatch.setattr(DiffusionRenderer, "render", fail)
    (tmp_path / "prompts.txt").write_text("a duck\n")
    assert run(f"--sample_prompts={tmp_path / 'prompts.txt'}", "--sample_every_n_steps=1") == 0
    found = summary(out)
    assert found["skipped"] == {"sample pictures that failed": 3}
    assert any("no picture today" in warning["message"] for warning in found["warnings"])


def test_epoch_ratio_and_a_state_at_the_end_only(run, out):
    assert (
        run("--max_train_epochs=4", "--save_n_epoch_ratio=2", "--save_state_on_train_end", "--train_batch_size=8") == 0
    )
    assert names(out) == {"duck-000002.safetensors", FINAL, "duck-state", "run_summary.json"}
    found = summary(out)
    assert (found["status"], found["exit_code"], found["step"]) == ("done", 0, 4)
    assert found["last_state"] == str(out / "duck-state")


def test_steps_that_are_kept(run, out):
    argv = ("--max_train_steps=6", "--save_every_n_steps=1", "--save_last_n_steps=2", "--save_last_n_steps_state=1")
    assert run(*argv, "--save_state") == 0
    steps = [f"duck-step{step:08d}.safetensors" for step in (4, 5, 6)]
    states = [f"duck-step{step:08d}-state" for step in (5, 6)]
    assert names(out) == {*steps, *states, FINAL, "duck-state", "run_summary.json"}


def test_rates_in_the_log_follow_the_schedule(run, tmp_path):
    argv = ("--lr_scheduler=linear", "--lr_warmup_steps=50%", "--max_train_steps=4", "--learning_rate_te=1e-4")
    assert run(*argv, f"--logging_dir={tmp_path / 'logs'}", "--log_prefix=pre_", "--log_tracker_name=mine") == 0
    found = scalars(tmp_path / "logs", "pre_*/mine/events*")
    assert [step for step, _ in found["lr/unet"]] == [1, 2, 3, 4]
    assert [rate for _, rate in found["lr/unet"]] == pytest.approx([5e-4, 1e-3, 5e-4, 0])
    assert [rate for _, rate in found["lr/text_encoder1"]] == pytest.approx([5e-5, 1e-4, 5e-5, 0])
    assert {"grad_norm", "images_per_second", "peak_memory_mb", "data_wait_seconds", "loss/average"} <= set(found)


def test_the_logged_loss_is_the_one_that_is_trained(run, tmp_path):
    """With its weights, as validation losses are: they can be compared."""
    found = {}
    for weight in ("", "--min_snr_gamma=1e-9"):
        logs = tmp_path / f"logs{weight}"
        assert run("--max_train_steps=1", f"--logging_dir={logs}", *weight.split()) == 0
        ((_, found[weight]),) = scalars(logs, "*/dreambooth/events*")["loss"]
    assert found["--min_snr_gamma=1e-9"] < 1e-3 * found[""]


def test_images_kept_for_validation_are_judged_after_every_epoch(run, photo_folders, tmp_path):
    config = tmp_path / "data.toml"
    config.write_text(
        "[general]\nresolution = 64\n[[datasets]]\nbatch_size = 2\nvalidation_split = 0.4\nvalidation_seed = 1\n"
        f'[[datasets.subsets]]\nimage_dir = "{photo_folders / "2_sks duck"}"\n'
    )
    argv = (f"--dataset_config={config}", f"--logging_dir={tmp_path / 'logs'}", "--learning_rate=1e-4")
    assert run(*argv, "--max_train_epochs=2") == 0
    found = scalars(tmp_path / "logs", "*/dreambooth/events*")
    averages, divergence = found["loss/validation/epoch_average"], found["loss/validation/epoch_divergence"]
    assert [epoch for epoch, _ in averages] == [1, 2]
    means = dict(found["loss/epoch"])
    for (epoch, average), (_, difference) in zip(averages, divergence, strict=True):
        assert difference == pytest.approx(average - means[epoch], abs=1e-5)
    assert averages[0][1] == pytest.approx(averages[1][1], rel=0.2)


def test_settings_in_the_log_hold_no_path(run, tmp_path):
    argv = (f"--logging_dir={tmp_path / 'logs'}", "--log_config", "--log_every_n_steps=3", "--optimizer_type=Prodigy")
    assert run(*argv, "--learning_rate=1", "--log_with=tensorboard") == 0
    (file,) = (tmp_path / "logs").rglob("hparams.yml")
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert (settings["optimizer_type"], settings["max_train_steps"], settings["seed"]) == ("Prodigy", 3, 7)
    assert str(tmp_path) not in file.read_text(encoding="utf-8")
    assert [step for step, _ in scalars(tmp_path / "logs", "*/dreambooth/events*")["lr/d*lr/unet"]] == [3]


def test_wandb_without_its_package_is_refused_before_anything_starts(run, out, capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else find(name, *more))
    assert run("--log_with=wandb") == 2
    assert "--log_with wandb: the package wandb is not installed" in capsys.readouterr().err
    assert not out.exists()


def test_a_written_config_file_gives_the_same_run(run, out, tmp_path):
    more = ("--clip_skip=2", "--lr_scheduler=cosine", "--lr_warmup_steps=50%", "--optimizer_args", "weight_decay=0.1")
    assert run(*more) == 0
    expected = tensor_digest(out / FINAL)
    config = tmp_path / "settings"
    assert run(*more, f"--config_file={config}", "--output_config", "--huggingface_token=hf_secret") == 0
    assert "hf_secret" not in config.with_suffix(".toml").read_text(encoding="utf-8")
    again = tmp_path / "again"
    assert train_db(f"--config_file={config}", f"--output_dir={again}") == 0
    assert tensor_digest(again / FINAL) == expected


def test_a_finished_run_that_is_resumed_does_nothing(run, out):
    assert run("--save_state") == 0
    written = (out / FINAL).stat().st_mtime_ns
    for _ in range(2):
        assert run("--save_state", "--resume=latest") == 0
        assert (out / FINAL).stat().st_mtime_ns == written
    assert names(out) == {FINAL, "duck-state", "run_summary.json"}
    found = summary(out)
    assert (found["status"], found["step"], found["last_state"]) == ("done", 3, str(out / "duck-state"))
    (out / FINAL).unlink()
    assert run("--resume=latest") == 0
    assert (out / FINAL).exists()


def test_another_vae_is_noticed_at_a_resume(run, tiny_sd1, capsys):
    assert run("--save_state_on_train_end", "--max_train_steps=1") == 0
    argv = ("--resume=latest", "--resume_override", "steps")
    assert run(*argv, f"--vae={tiny_sd1}") == 2
    assert "model: vae name" in capsys.readouterr().err
    assert run(*argv, "model", f"--vae={tiny_sd1}") == 0


def test_what_differs_at_a_resume_is_shown_as_a_table(run, capsys):
    assert run("--save_state") == 0
    capsys.readouterr()
    assert run("--resume=latest", "--learning_rate=1e-4", "--loss_type=l1") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-4].split() == ["saved", "now"]
    rows = [line.split() for line in lines[-3:-1]]
    assert sorted(rows) == [["--learning_rate", "0.001", "0.0001"], ["--loss_type", "l2", "l1"]]
    assert lines[-1].endswith("--resume_override loss_type lr") or "--resume_override" in lines[-1]


def test_exit_status_of_a_run_that_diverges(run, out, capsys):
    argv = ("--optimizer_type=SGD", "--learning_rate=1e30", "--max_grad_norm=0", "--max_train_steps=9")
    assert run(*argv, "--max_nan_steps=2") == 5
    found = summary(out)
    assert (found["status"], found["exit_code"]) == ("diverged", 5)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == found["message"] and "--learning_rate" in last
    assert FINAL not in names(out)


def test_exit_status_of_a_run_that_cannot_save(run, out, monkeypatch):
    monkeypatch.setenv("SD_FAULT", "save.mid:enospc:1")
    assert run("--save_retry_minutes=0") == 4
    found = summary(out)
    assert (found["status"], found["exit_code"], found["step"]) == ("could not save", 4, 3)
    assert "disk full" in found["message"]
    assert names(out) == {"run_summary.json"}


def test_warnings_are_in_the_summary(run, out):
    assert run("--tokenizer_cache_dir=/nowhere", "--huber_c=0.5", "--zero_terminal_snr", "--max_train_steps=1") == 0
    said = " ".join(warning["message"] for warning in summary(out)["warnings"])
    for option in ("--tokenizer_cache_dir", "--huber_c", "--zero_terminal_snr"):
        assert option in said


def test_clip_skip_with_sd2_warns(run, out, tiny_sd2):
    model = f"--pretrained_model_name_or_path={tiny_sd2}"
    assert run(model, "--v2", "--clip_skip=2", "--max_train_steps=1") == 0
    assert any("--clip_skip" in warning["message"] for warning in summary(out)["warnings"])


@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "diffusers_safetensors"])
def test_no_shared_file_tells_where_it_was_made(tiny_sd1, photo_folders, tmp_path, monkeypatch, kind):
    """Models and sample pictures: no path, user, host or key, in any byte."""
    monkeypatch.setattr(socket, "gethostname", lambda: "marked-host")
    monkeypatch.setattr(platform, "node", lambda: "marked-host")
    monkeypatch.setenv("USER", "marked_user")
    monkeypatch.setenv("LOGNAME", "marked_user")
    marker = tmp_path / "marked_home_of_jane"
    out = marker / "marked_output"
    marker.mkdir()
    model, photos = marker / "base_model.safetensors", marker / "marked_photos"
    model.write_bytes(Path(tiny_sd1).read_bytes())
    photo_folders.rename(photos)
    prompts = marker / "marked_prompts.txt"
    prompts.write_text("a duck --w 64 --h 64 --s 1\n")
    argv = {
        "pretrained_model_name_or_path": model,
        "train_data_dir": photos,
        "output_dir": out,
        "output_name": "duck",
        "resolution": 64,
        "max_train_steps": 1,
        "max_data_loader_n_workers": 0,
        "vae": model,
        "save_model_as": kind,
        "sample_prompts": prompts,
        "sample_every_n_steps": 1,
        "logging_dir": marker / "marked_logs",
        "huggingface_token": "hf_marked_secret",
        "caption_extension": ".caption",
    }
    assert train_db(*(f"--{name}={value}" for name, value in argv.items()), "--log_config", "--save_state") == 0
    private = ("marked_", "marked-", str(tmp_path))
    states = [path for path in out.rglob("*") if any(part.endswith("-state") for part in path.parts)]
    shared = [path for path in out.rglob("*") if path.is_file() and path not in states]
    assert {path.suffix for path in shared} >= {".png"} and len(shared) > 2
    for path in shared:
        if path.name == "run_summary.json":  # for the user alone, like states and logs
            continue
        content = path.read_bytes()
        for text in private:
            assert text.encode() not in content, path
            assert text.encode("utf-16-le") not in content, path
    events = [path for path in (marker / "marked_logs").rglob("*") if path.is_file()]
    assert events and all("marked-host" not in path.name for path in events)
    assert all(b"hf_marked_secret" not in path.read_bytes() for path in (*events, *out.rglob("*.json")))


def test_a_state_of_another_trainer_gives_weights_optimizer_and_step(run, out, tmp_path):
    """A folder as accelerate writes it, without resume.json. Its rate is 0, so the final model holds its weights."""
    from accelerate import Accelerator

    from library.models.random_models import make_random_sd

    folder = make_random_sd(tmp_path / "folder", layout="diffusers_safetensors", seed=9)
    state = tmp_path / "old-step00000002-state"
    expected = _save_with_accelerate(Accelerator(cpu=True), folder, state)
    argv = (f"--resume={state}", "--save_model_as=diffusers_safetensors")
    assert run(*argv) == 0
    found = summary(out)
    assert found["step"] == 3
    told = [warning for warning in found["warnings"] if "position in the epoch is unknown" in warning["message"]]
    assert [warning["count"] for warning in told] == [1]
    unet = load_file(out / "duck" / "unet" / "diffusion_pytorch_model.safetensors")
    text = load_file(out / "duck" / "text_encoder" / "model.safetensors")
    assert all(torch.equal(value, unet[name]) for name, value in expected[0].items())
    assert all(torch.equal(value, text[name]) for name, value in expected[1].items())


def _save_with_accelerate(accelerator, folder: Path, state: Path):
    """Train U-Net and text encoder of `folder` for two updates and save the state; returns their weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    clip = CLIPTextModel.from_pretrained(folder / "text_encoder")
    text = torch.nn.Module()
    text.text_model = getattr(clip, "text_model", clip)
    ordered = [parameter for part in (unet, text) for _, parameter in in_reference_order(part)]
    optimizer = torch.optim.AdamW(ordered, lr=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    unet, text, optimizer, schedule = accelerator.prepare(unet, text, optimizer, schedule)
    for _ in range(2):
        for parameter in (*unet.parameters(), *text.parameters()):
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        schedule.step()
    accelerator.save_state(str(state))
    return unet.state_dict(), text.state_dict()
