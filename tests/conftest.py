"""Fixtures for every test: a tiny random model of the true structure, photographs, no network, one thread."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ROOT / "examples" / "photos"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Connections to anything but this machine fail at once."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family == socket.AF_UNIX or (isinstance(address, tuple) and address[0] in ("127.0.0.1", "::1")):
            return connect(self, address)
        raise OSError(f"the tests use no network: {address}")

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def no_faults_left(monkeypatch):
    """Fault points count from the beginning in every test, even where the one before asked for the same fault."""
    monkeypatch.setattr("library.faults._plan", None)


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """Saving waits until bytes are on the disk, gigabytes over all tests; only lost power would show a difference."""
    patch = pytest.MonkeyPatch()
    patch.setattr(os, "fsync", lambda _: None)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def one_torch_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, one_torch_thread) -> Path:
    """A folder for models that several tests only read."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def tiny_sd1(model_folder) -> Path:
    from library.models.random_models import make_random_sd

    return make_random_sd(model_folder / "tiny_sd1.safetensors", family="sd1")


@pytest.fixture(scope="session")
def tiny_sd2(model_folder) -> Path:
    from library.models.random_models import make_random_sd

    return make_random_sd(model_folder / "tiny_sd2.safetensors", family="sd2")


@pytest.fixture(scope="session")
def tiny_sd2_v(model_folder) -> Path:
    from library.models.random_models import make_random_sd

    return make_random_sd(model_folder / "tiny_sd2_v.safetensors", family="sd2", v_prediction=True)


@pytest.fixture(scope="session")
def control_cascade(model_folder):
    """Files of a tiny Stable Cascade model whose stage C has six residual blocks."""
    from library.models.random_cascade import make_random_cascade
    from tests.control_training import STAGE

    return make_random_cascade(model_folder / "control_cascade", config_c=STAGE)


@pytest.fixture
def photo_folders(tmp_path) -> Path:
    """A DreamBooth tree: `2_sks duck` with captions and three photographs, `1_sks bear` without captions and two."""
    tree = tmp_path / "photos"
    for folder, source, count, captions in (("2_sks duck", "duck", 3, True), ("1_sks bear", "bear", 2, False)):
        (tree / folder).mkdir(parents=True)
        for path in sorted((PHOTOS / source).glob("*.jpg"))[:count]:
            shutil.copy(path, tree / folder / path.name)
            if captions:
                shutil.copy(path.with_suffix(".caption"), tree / folder / path.with_suffix(".caption").name)
    return tree


@pytest.fixture
def regularization_folders(tmp_path) -> Path:
    """A DreamBooth tree with regularization images: `1_duck` with two photographs."""
    tree = tmp_path / "regularization"
    (tree / "1_duck").mkdir(parents=True)
    for path in sorted((PHOTOS / "robot").glob("*.jpg"))[:2]:
        shutil.copy(path, tree / "1_duck" / path.name)
    return tree


@pytest.fixture(scope="session")
def tiny_cascade(model_folder):
    """The files of a tiny Stable Cascade model, as `CascadeFiles`."""
    from library.models.random_cascade import make_random_cascade

    return make_random_cascade(model_folder / "cascade")


@pytest.fixture
def cascade_command(tiny_cascade, photo_folders):
    """Return what makes the command line of a small training of stage C or B; see `tests.cascade_runs`."""
    from tests.cascade_runs import command_maker

    return command_maker(tiny_cascade, photo_folders)


@pytest.fixture
def losses(monkeypatch):
    """The losses of all micro-batches."""
    from library.training.step import TrainStep

    seen = []
    forward = TrainStep.forward

    def spy(self, batch):
        result = forward(self, batch)
        seen.append(result[0].item())
        return result

    monkeypatch.setattr(TrainStep, "forward", spy)
    return seen


@pytest.fixture
def batches(monkeypatch):
    """The micro-batches that reached the training step, in order."""
    from library.training.step import TrainStep

    seen = []
    forward = TrainStep.forward

    def spy(self, batch):
        seen.append(batch)
        return forward(self, batch)

    monkeypatch.setattr(TrainStep, "forward", spy)
    return seen
