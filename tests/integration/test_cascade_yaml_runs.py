"""The YAML files of the original trainer, and those of our examples, start the scripts as they are."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from library.models.random_cascade import TINY_B, TINY_C
from library.option_parser import parse
from tests.cascade_runs import train_stage_b, train_stage_c
from tests.conftest import PHOTOS, ROOT
from tests.support import tensor_digest

EXAMPLES = ROOT / "examples" / "stable_cascade"
SMALL = (
    "--resolution=256",
    "--max_train_steps=1",
    "--gradient_accumulation_steps=1",
    "--global_batch_size=2",
    "--seed=1",
)


@pytest.fixture
def workplace(tmp_path, tiny_cascade, monkeypatch) -> Path:
    """A folder with models and tar files under the names that the examples use; the scripts run in it."""
    models = tmp_path / "models"
    models.mkdir()
    for name, path in (
        ("stage_c_bf16", tiny_cascade.stage_c),
        ("stage_c_lite_bf16", tiny_cascade.stage_c),
        ("stage_b_bf16", tiny_cascade.stage_b),
        ("stage_a", tiny_cascade.stage_a),
        ("effnet_encoder", tiny_cascade.effnet),
        ("previewer", tiny_cascade.previewer),
        ("text_model", tiny_cascade.text),
    ):
        shutil.copy(path, models / f"{name}.safetensors")
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "dataset.tar", "w") as tar:
        for number, picture in enumerate(sorted((PHOTOS / "duck").glob("*.jpg"))[:4]):
            for suffix, content in ((".jpg", picture.read_bytes()), (".txt", b"a duck")):
                member = tarfile.TarInfo(f"dataset/{number:04d}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("library.models.cascade.sources.CONFIGS", {("c", "1B"): TINY_C, ("b", "700M"): TINY_B})
    return tmp_path


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("stage_*.yaml")))
def test_every_example_trains(workplace, example):
    train = train_stage_b if example.startswith("stage_b") else train_stage_c
    assert train(str(EXAMPLES / example), *SMALL) == 0
    (folder,) = (workplace / "output").iterdir()
    assert (folder / f"{folder.name}.safetensors").is_file()


def test_a_run_that_is_started_again_goes_on_by_itself(workplace, monkeypatch, capfd):
    """The same words after a signal: the same seed, though none is given, and the same end as without the signal."""
    folder = workplace / "output" / "stage_c_1b_finetuning"
    more = ("--resolution=256", "--gradient_accumulation_steps=1", "--global_batch_size=2", "--max_train_steps=2")
    words = (str(EXAMPLES / "stage_c_1b.yaml"), *more, "--save_every_n_steps=1")
    with monkeypatch.context() as patch:
        patch.setenv("SD_FAULT", "step.forward:term:1")
        assert train_stage_c(*words) == 143
    state = folder / "stage_c_1b_finetuning-step00000001-state"
    seed = json.loads((state / "resume.json").read_text())["info"]["seed"]
    written = state.stat().st_mtime_ns
    assert train_stage_c(*words) == 0
    assert state.stat().st_mtime_ns == written
    assert train_stage_c(*words, f"--seed={seed}", f"--output_dir={workplace / 'straight'}") == 0
    ends = [path / "stage_c_1b_finetuning.safetensors" for path in (folder, workplace / "straight")]
    assert tensor_digest(ends[0]) == tensor_digest(ends[1])
    capfd.readouterr()
    assert train_stage_c(*words) == 0
    assert "all 2 updates of this run are done" in capfd.readouterr().err
    assert train_stage_c(*words, "--learning_rate=3e-3") == 2
    assert "--learning_rate" in capfd.readouterr().err


def options(config: Path, *more: str):
    from stable_cascade_train_stage_c import Options

    return parse(Options, [str(config), *more])


def test_keys_become_options_and_the_command_line_wins(workplace):
    found = options(EXAMPLES / "stage_c.yaml", "--learning_rate=3e-5")
    assert found.optimizer.learning_rate == 3e-5
    assert found.save.output_dir == "output/stage_c_finetuning"
    assert (found.precision.full_bf16, found.precision.mixed_precision) == (True, "bf16")
    assert (found.data.batch_size, found.length.gradient_accumulation_steps) == (8, 4)
    assert (found.ema.ema_start_steps, found.ema.ema_every_n_steps, found.ema.ema_decay) == (1250, 25, 0.9)
    assert found.subset.caption_dropout_rate == 0.05
    assert found.state.resume == "auto"
    assert found.cascade.adaptive_loss_weight
    assert any("ema_iters" in note for note in found.notices)


def test_processes_share_the_global_batch(workplace, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert options(EXAMPLES / "stage_c.yaml").data.batch_size == 2


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("edm_objective: true", "edm_objective: no version of the original trainer knows this key"),
        ("effnet_checkpoint_pth: x", "unknown key. Did you mean effnet_checkpoint_path?"),
        ("train_tokens: [['[x]', null]]", "train_tokens: has no effect in this script"),
        ("batch_size: 33", "33 samples cannot be shared evenly"),
        ("lr: quick", "expected a number"),
    ],
)
def test_wrong_keys_are_named(workplace, capsys, line, expected):
    config = workplace / "run.yaml"
    key = line.partition(":")[0]
    kept = [row for row in (EXAMPLES / "stage_c.yaml").read_text().splitlines() if not row.startswith(f"{key}:")]
    config.write_text("\n".join([*kept, line]))
    assert train_stage_c("--config_file", str(config)) == 2
    told = [row for row in capsys.readouterr().err.splitlines() if row.startswith("error:")]
    assert len(told) == 1
    assert expected in told[0]


def test_sharing_weights_takes_several_processes(workplace, monkeypatch):
    config = workplace / "run.yaml"
    kept = [row for row in (EXAMPLES / "stage_c.yaml").read_text().splitlines() if not row.startswith("optimizer_")]
    config.write_text("\n".join([*kept, "use_fsdp: true"]))
    assert any("no effect in one process" in str(warning) for warning in options(config).warnings)
    assert not options(config).shares_weights
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert options(config).shares_weights


def test_a_toml_file_is_read_as_in_the_other_scripts(workplace):
    (workplace / "run.toml").write_text('effnet_checkpoint_path = "models/effnet_encoder.safetensors"\n')
    from stable_cascade_train_stage_c import Options

    words = ["--stage_c_checkpoint_path=models/stage_c_bf16.safetensors", "--train_data_dir=data", "--output_dir=o"]
    found = parse(Options, ["--config_file=run.toml", *words, "--resolution=64"])
    assert found.model.effnet_checkpoint_path == "models/effnet_encoder.safetensors"
    assert found.state.resume is None


def test_versions_are_compared_with_the_file(workplace, tiny_cascade, capsys):
    from library.checkpoints.save_cascade import save_part
    from library.models.random_cascade import random_part

    narrow = replace(TINY_C, blocks_down=(4, 12), blocks_up=(12, 4))
    made = random_part("stage_c", narrow)
    path = save_part(workplace / "narrow.safetensors", "stage_c", made.tensors, made.config)
    assert train_stage_c(str(EXAMPLES / "stage_c.yaml"), f"--stage_c_checkpoint_path={path}", *SMALL) == 2
    assert "is stage C (1B), but --model_version says 3.6B" in capsys.readouterr().err
