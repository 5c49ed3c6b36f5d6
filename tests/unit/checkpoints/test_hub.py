"""Names of models: paths first, then the cache, then one attempt at the network, and clear words when all fail."""

import os
import subprocess
import sys
import time
import types

import pytest

from library.checkpoints import hub
from library.checkpoints.load import load_parts, load_vae
from library.checkpoints.save import save_checkpoint
from library.checkpoints.tensor_files import write_safetensors
from library.errors import UserError


@pytest.fixture
def folder(tmp_path, small_file, spec_of):
    write_safetensors(tmp_path / "m.safetensors", small_file("sd1"))
    parts = load_parts(str(tmp_path / "m.safetensors"), "sd1")
    return save_checkpoint(tmp_path / "model", "diffusers_safetensors", parts, spec=spec_of("sd1"))


def repository_names(folder):
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def test_local_paths_win_and_links_are_followed(tmp_path, monkeypatch):
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "model").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "owner" / "model")
    monkeypatch.chdir(tmp_path)
    assert hub.resolve_model("owner/model") == (tmp_path / "owner" / "model").resolve()
    assert hub.resolve_model("link") == (tmp_path / "owner" / "model").resolve()


@pytest.mark.parametrize("name", ["modle.safetensors", "models/sub/x.ckpt", "/nowhere/x", "../x/y", "a/b/c"])
def test_a_path_that_does_not_exist_is_no_hub_id(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=f"--vae {name}: no such file or folder") as caught:
        hub.resolve_model(name, option="--vae")
    assert ("Did you mean model.safetensors" in str(caught.value)) is (name == "modle.safetensors")


def test_offline_the_message_says_so_at_once():
    start = time.monotonic()
    with pytest.raises(UserError, match="taken for a hub model.*offline mode is on.*hf download owner/model"):
        hub.resolve_model("owner/model")
    assert time.monotonic() - start < 10


def test_without_a_network_the_message_comes_soon(tmp_path):
    code = (
        "from library.errors import UserError\n"
        "from library.checkpoints.hub import resolve_model\n"
        "try: resolve_model('owner/model')\n"
        "except UserError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "the hub cannot be reached" in done.stdout, done.stderr
    assert time.monotonic() - start < 15


def test_a_cached_model_is_used_without_asking(folder, monkeypatch, small_file):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **kw: asked.append((name, kw)) or str(folder)
    )
    parts = load_parts("owner/model", "sd1")
    assert asked == [("owner/model", {"local_files_only": True})]
    assert parts.source.name == "owner/model" and parts.source.kind == "diffusers"


class FakeHub:
    """A repository in a folder; downloads are recorded."""

    def __init__(self, monkeypatch, folder, extra=()):
        import huggingface_hub

        self.folder, self.fetched = folder, []
        self.names = [*repository_names(folder), *extra]
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.nothing_cached)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.fetch)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", self.info)

    def nothing_cached(self, name, **_):
        raise OSError("not cached")

    def info(self, name, timeout):
        assert timeout <= 10
        return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=n) for n in self.names], sha="abc")

    def fetch(self, name, filename, *, revision, etag_timeout):
        assert revision == "abc" and etag_timeout <= 10
        self.fetched.append(filename)
        return str(self.folder / filename)


def test_a_download_fetches_one_set_of_weights_and_nothing_else(folder, monkeypatch):
    extra = ["unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors", "README.md",
             "safety_checker/model.safetensors", "model.ckpt", "../escape"]  # fmt: skip
    repository = FakeHub(monkeypatch, folder, extra)
    assert load_parts("owner/model", "sd1").unet
    assert not set(extra) & set(repository.fetched)
    assert "unet/diffusion_pytorch_model.safetensors" in repository.fetched


def test_a_vae_is_fetched_from_the_root_or_the_subfolder(folder, monkeypatch):
    repository = FakeHub(monkeypatch, folder / "vae")
    assert load_vae("owner/vae")[0]
    assert sorted(repository.fetched) == ["config.json", "diffusion_pytorch_model.safetensors"]
    repository = FakeHub(monkeypatch, folder)
    assert load_vae("owner/model")[0]


def test_a_repository_without_a_model_is_refused(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("x")
    FakeHub(monkeypatch, tmp_path)
    with pytest.raises(UserError, match="not a Diffusers model"):
        hub.resolve_model("owner/model")


def test_an_incomplete_cache_is_not_taken_for_a_model(folder):
    assert hub._is_complete(folder)
    (folder / "text_encoder" / "model.safetensors").unlink()
    assert not hub._is_complete(folder)
