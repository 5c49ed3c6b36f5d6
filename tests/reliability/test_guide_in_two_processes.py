"""The commands of docs/stable_cascade.md for several GPUs, in two processes that share their gradients."""

from __future__ import annotations

from library.checkpoints.lora_file import read_lora
from tests import guides
from tests.conftest import ROOT
from tests.guides import DOCS
from tests.support import tensor_digest

GUIDE = DOCS / "stable_cascade.md"


def test_commands_for_several_gpus(fork_server, tiny_cascade, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    guides.cascade_models(tmp_path / "models", tiny_cascade)
    guides.cascade_data(tmp_path)
    guides.write_files(GUIDE, tmp_path)
    guides.pack(tmp_path / "dataset.tar", tmp_path / "dataset")
    lines = [line for line in guides.ours(GUIDE) if "--num_processes 2" in line]
    assert [line.split(".py ")[0].rpartition("_")[2] for line in lines] == ["c", "network"]
    for line in lines:
        script, words, _ = guides.parsed(line)
        told = fork_server.run_ranks(str(ROOT / script), [*words, *guides.cascade_size(line)], cwd=tmp_path)
        assert any("running on 2 processes" in text for text in told)
    written = tmp_path / "output" / "stage_c_run" / "stage_c_run.safetensors"
    assert tensor_digest(written) != tensor_digest(tiny_cascade.stage_c)
    assert (tmp_path / "output" / "stage_c_run" / "stage_c_run-state").is_dir()
    assert read_lora(tmp_path / "trained" / "two_gpus.safetensors").modules
