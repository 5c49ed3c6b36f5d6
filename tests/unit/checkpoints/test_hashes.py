import hashlib
import json
import os
import time

import pytest

from library.checkpoints import hashes


def settle(path):
    """Let a file look old enough to be remembered."""
    past = time.time() - 60
    os.utime(path, (past, past))


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(256)) * 8192)
    settle(path)
    return path


def test_both_hashes_are_those_of_other_tools(model):
    data = model.read_bytes()
    assert hashes.file_sha256(model) == hashlib.sha256(data).hexdigest()
    assert hashes.legacy_hash(model) == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]


def test_a_hash_is_computed_once_for_an_unchanged_file(model, monkeypatch):
    first = hashes.file_sha256(model)

    def no_reading(path, mode="r", **options):
        assert mode != "rb", "the file was read again"
        return opened(path, mode, **options)

    opened = hashes.Path.open
    with monkeypatch.context() as patched:
        patched.setattr(hashes.Path, "open", no_reading)
        assert hashes.file_sha256(model) == first
    with model.open("r+b") as file:
        file.write(b"changed")
    settle(model)
    os.utime(model, (time.time() - 30, time.time() - 30))
    assert hashes.file_sha256(model) == hashlib.sha256(model.read_bytes()).hexdigest() != first


def test_a_file_that_changed_just_now_is_not_remembered(model):
    os.utime(model)
    first = hashes.file_sha256(model)
    stat = model.stat()
    model.write_bytes(b"x" * stat.st_size)
    os.utime(model, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert hashes.file_sha256(model) != first


def test_the_memory_holds_no_paths_and_survives_damage(model, tmp_path):
    first = hashes.file_sha256(model)
    memory = hashes.cache_folder() / "hashes.json"
    assert str(tmp_path) not in memory.read_text() and "model" not in memory.read_text()
    for damage in ("", "[]", '{"a": 1}', json.dumps({next(iter(json.loads(memory.read_text()))): "x"})):
        memory.write_text(damage)
        assert hashes.file_sha256(model) == first


def test_a_memory_that_cannot_be_written_does_no_harm(model, tmp_path, monkeypatch):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    monkeypatch.setenv("SD_FINETUNE_CACHE", str(blocked / "cache"))
    assert hashes.file_sha256(model) == hashlib.sha256(model.read_bytes()).hexdigest()


def test_base_model_entries(model, tmp_path):
    table = hashes.model_hashes(str(model))
    assert table["sd_model_name"] == "model.safetensors"
    assert table["new_sd_model_hash"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert len(table["sd_model_hash"]) == 8
    assert hashes.model_hashes(str(tmp_path)) == {
        "sd_model_name": tmp_path.name,
        "sd_model_hash": "IsADirectory",
        "new_sd_model_hash": "IsADirectory",
    }
    assert hashes.vae_hashes("owner/vae") == {"vae_name": "owner/vae", "vae_hash": "NOFILE", "new_vae_hash": "NOFILE"}
