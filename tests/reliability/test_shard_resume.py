"""Training on tar files, indexed and streamed: it starts from the command line, and resumes with the same bits."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support import fine_tune, run_tool, tensor_digest, train_network
from tools import make_webdataset

PHOTOS = Path(__file__).resolve().parent.parent.parent / "examples" / "photos"
FINAL = "duck.safetensors"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Three tar files of photographs, made by the tool."""
    folder = tmp_path_factory.mktemp("tars")
    assert run_tool(make_webdataset.main, PHOTOS, folder, "--recursive", "--shard_size=3") == 0
    assert len(list(folder.glob("*.tar"))) >= 3
    return folder


def options(model: Path, shards: Path, out: Path, *more: str) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={model}",
        f"--webdataset_path={shards}",
        f"--output_dir={out}",
        "--output_name=duck",
        "--resolution=64",
        "--enable_bucket",
        "--min_bucket_reso=64",
        "--max_bucket_reso=128",
        "--train_batch_size=2",
        "--flip_aug",
        "--shuffle_caption",
        "--learning_rate=1e-2",
        "--max_train_steps=4",
        "--max_data_loader_n_workers=0",
        "--seed=7",
        *more,
    ]


LORA = ("--network_module=networks.lora", "--network_dim=2")
VARIANTS = {
    "indexed": (),
    "indexed, cached latents": ("--cache_latents_to_disk", "--cache_dir={out}/cache"),
    "streamed": ("--webdataset_streaming", "--webdataset_shuffle=3"),
    "streamed, two workers": ("--webdataset_streaming", "--max_data_loader_n_workers=2", "--webdataset_epoch_size=5"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_with_the_same_bits(tiny_sd1, shards, tmp_path, variant):
    def run(name: str, *more: str) -> int:
        extra = [item.format(out=tmp_path / name) for item in (*LORA, *VARIANTS[variant])]
        return train_network(*options(tiny_sd1, shards, tmp_path / name, *extra, *more))

    assert run("straight", "--save_state", "--save_every_n_steps=2") == 0
    assert run("again", f"--resume={tmp_path / 'straight' / 'duck-step00000002-state'}") == 0
    assert tensor_digest(tmp_path / "again" / FINAL) == tensor_digest(tmp_path / "straight" / FINAL)
    assert tensor_digest(tmp_path / "again" / FINAL) != tensor_digest(
        tmp_path / "straight" / "duck-step00000002.safetensors"
    )


@pytest.mark.parametrize("streamed", [(), ("--webdataset_streaming",)])
def test_killed_and_resumed_with_the_same_bits(fork_server, tiny_sd1, shards, tmp_path, streamed):
    more = (*LORA, *streamed, "--save_state", "--save_every_n_steps=1")
    assert train_network(*options(tiny_sd1, shards, tmp_path / "straight", *more)) == 0
    argv = options(tiny_sd1, shards, tmp_path / "killed", *more)
    child = fork_server.run("train_network.py", argv, env={"SD_FAULT": "step.backward:kill9:3"})
    assert child.returncode == -signal.SIGKILL, child.output()
    assert train_network(*argv, "--resume=latest") == 0
    assert tensor_digest(tmp_path / "killed" / FINAL) == tensor_digest(tmp_path / "straight" / FINAL)


def test_full_fine_tuning_takes_tar_files_with_filters(tiny_sd1, shards, tmp_path):
    more = ("--max_train_steps=1", "--dataset_filter", "score: score > 1")
    assert fine_tune(*options(tiny_sd1, shards, tmp_path, *more)) == 2
    assert fine_tune(*options(tiny_sd1, shards, tmp_path, "--max_train_steps=1")) == 0
    assert (tmp_path / FINAL).is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--dataset_filter=score: score.__class__",), "--dataset_filter, filter 1 (score)"),
        (("--webdataset_path=pipe:touch pwned",), "pipe: would run a command"),
        (("--cache_latents_to_disk",), "--cache_dir: is needed"),
        (("--webdataset_streaming", "--cache_latents"), "--cache_latents: needs samples that are known beforehand"),
        (("--caption_field=json:none",), "has a caption (json:none)"),
        (("--multi_aspect_ratio", "1/0"), "'1/0' is no ratio"),
    ],
)
def test_what_cannot_be_had_is_one_line(tiny_sd1, shards, tmp_path, capsys, more, message):
    assert train_network(*options(tiny_sd1, shards, tmp_path / "out", *LORA, *more)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
