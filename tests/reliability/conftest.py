"""The fork server for tests that kill programs, and the small network training that tests spoil."""

import io
import shutil
import sys
import tarfile
from pathlib import Path

import pytest

from tests.conftest import PHOTOS
from tests.support import train_network

sys.path.insert(0, str(Path(__file__).parent))

from fork_server import ForkServer  # noqa: E402


@pytest.fixture(scope="session")
def fork_server():
    """Starts scripts and functions as children that may be killed; see `fork_server.py`."""
    with ForkServer() as server:
        yield server


@pytest.fixture(scope="session")
def few_photos(tmp_path_factory) -> Path:
    """`1_sks duck`: two photographs with captions."""
    tree = tmp_path_factory.mktemp("tree")
    (tree / "1_sks duck").mkdir()
    for name in ("00.jpg", "00.caption", "01.jpg", "01.caption"):
        shutil.copy(PHOTOS / "duck" / name, tree / "1_sks duck")
    return tree


@pytest.fixture(scope="session")
def caption_shards(tmp_path_factory) -> Path:
    """Three tar files with eight photographs, whose captions hold `[fernando]` and some tags."""
    folder = tmp_path_factory.mktemp("shards")
    pictures = [path for kind in ("bear", "duck") for path in sorted((PHOTOS / kind).glob("*.jpg"))[:4]]
    for number in range(3):
        with tarfile.open(folder / f"data-{number}.tar", "w") as tar:
            for place, picture in enumerate(pictures[number::3]):
                caption = f"[fernando] the duck {place}, yellow, on water".encode()
                for suffix, content in ((".jpg", picture.read_bytes()), (".txt", caption)):
                    member = tarfile.TarInfo(f"set/{number}{place:03d}{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture(scope="session")
def network_command(tiny_sd1, few_photos):
    """Return the command line of a small run: options by name, None leaves one out; then more words."""

    def words(out: Path, *more: object, **changes: object) -> list[str]:
        values = {
            "pretrained_model_name_or_path": tiny_sd1,
            "train_data_dir": few_photos,
            "output_dir": out,
            "output_name": "duck",
            "resolution": 64,
            "max_train_steps": 1,
            "max_data_loader_n_workers": 0,
            "learning_rate": 1e-2,
            "network_module": "networks.lora",
            "seed": 1,
        } | changes
        return [f"--{name}={value}" for name, value in values.items() if value is not None] + [*map(str, more)]

    return words


@pytest.fixture(scope="session")
def trained_lora(network_command, tmp_path_factory) -> Path:
    """A LoRA of rank 4 for the tiny model."""
    out = tmp_path_factory.mktemp("trained")
    assert train_network(*network_command(out)) == 0
    return out / "duck.safetensors"


@pytest.fixture
def no_loading(monkeypatch):
    """Loading a model fails the test: what is tested must be found out before."""

    def load(*_args, **_more):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("library.models.sd.StableDiffusion.load", load)


@pytest.fixture
def refused(network_command, tmp_path, capsys):
    """Run a command line that must be refused; returns the lines that say why."""

    def run(*more: object, lines: int = 1, **changes: object) -> str:
        out = tmp_path / "out"
        capsys.readouterr()
        assert train_network(*network_command(out, *more, **changes)) == 2, capsys.readouterr().err
        said = capsys.readouterr().err
        assert "Traceback" not in said
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == lines and said.splitlines()[-lines:] == errors, said
        assert not [path.name for path in out.glob("*") if path.name != "run_summary.json"]
        return "\n".join(errors)

    return run
