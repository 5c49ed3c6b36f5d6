"""What lies under a final name is complete, whatever goes wrong while it is written: full disk, I/O errors, SIGKILL."""

import json
import re
import signal
import time
from pathlib import Path

import pytest
import save_children
from save_children import WRITERS

from library import files
from library.faults import VARIABLE
from library.files import CannotSave
from library.training.state import find_state, load_state, verify_state

SIZES = [1, 511, 4097, 20000, 65536, 133000]
COUNTS = [1, 2, 3, 4, 5, 6, 7, 8, 10, 13, 17, 22, 29, 38, 50, 66, 86, 112, 146, 190, 250, 330]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(path: Path):
    """Bytes of a file, or of all files in a folder."""
    if path.is_dir():
        return {
            str(inner.relative_to(path)): inner.read_bytes() for inner in sorted(path.rglob("*")) if inner.is_file()
        }
    return path.read_bytes()


def complete(writer: str, path: Path, version: int) -> bool:
    """Whether `path` is what `writer` makes of `version`, read as its users do."""
    if writer == "write_state":
        found = save_children.parts(0)
        info = load_state(verify_state(path), found)
        wanted = save_children.parts(version).modules["unet"].weight
        return info.position.step == version and bool((found.modules["unet"].weight == wanted).all())
    if writer == "write_folder":
        return complete("write_text", path / "a.txt", version) and complete(
            "write_json", path / "b" / "c.json", version
        )
    if writer == "write_text":
        return path.read_text() == "".join(f"{version} {number}\n" for number in range(30000))
    if writer == "write_json":
        return json.loads(path.read_text()) == [[version, number] for number in range(9000)]
    if writer == "numpy_savez":
        import numpy as np

        with np.load(path) as arrays:
            return all((arrays[f"t{number}"] == version + number).all() for number in range(8))
    from library.checkpoints.tensor_files import open_tensors

    tensors = open_tensors(path)
    return len(tensors) == 8 and all(bool((tensors[f"t{number}"] == version + number).all()) for number in range(8))


@pytest.fixture(params=WRITERS)
def writer(request):
    return request.param


@pytest.fixture
def target(tmp_path, writer):
    """A folder that holds version 1 of what the writer writes, and nothing else."""
    path = tmp_path / "out" / "target.safetensors"
    WRITERS[writer](path, 1)
    return path


class TestErrors:
    @pytest.mark.parametrize("action", ["enospc", "eio", "eacces"])
    def test_an_error_at_every_write(self, writer, target, monkeypatch, action):
        """The n-th write call fails, for growing n until the operation succeeds."""
        before = content(target)
        for count in COUNTS:
            monkeypatch.setenv(VARIABLE, f"save.mid:{action}:{count}")
            try:
                WRITERS[writer](target, 2)
            except CannotSave as error:
                assert f"cannot save {target}: " in str(error)
                assert "Previous target.safetensors is untouched." in str(error)
                expected = {"enospc": "disk full", "eio": "Input/output error", "eacces": "Permission denied"}[action]
                assert expected in str(error)
                assert content(target) == before
                assert names(target.parent) == [target.name]
            else:
                break
            finally:
                monkeypatch.delenv(VARIABLE)
        assert complete(writer, target, 2)
        if writer not in {"foreign_safetensors", "numpy_savez"}:
            assert count > 1, "the writer passes no fault point"

    @pytest.mark.parametrize("point", ["open", "before_fsync", "before_replace"])
    def test_an_error_around_the_write(self, writer, target, monkeypatch, point):
        before = content(target)
        monkeypatch.setenv(VARIABLE, f"save.{point}:enospc")
        with pytest.raises(CannotSave, match=re.escape(f"cannot save {target}: disk full (needs ")):
            WRITERS[writer](target, 2)
        assert content(target) == before
        assert names(target.parent) == [target.name]

    def test_the_limit_of_the_system(self, writer, target, fork_server):
        """RLIMIT_FSIZE: errors from the system itself, at many sizes."""
        before = content(target)
        whole = max(path.stat().st_size for path in ([target] if target.is_file() else target.rglob("*")))
        for size in [size for size in SIZES if size < whole]:
            child = fork_server.run("save_children:save", [writer, target, 2, size])
            assert child.returncode == 4, child.output()
            assert f"cannot save {target}: disk full (needs " in child.output()
            assert "Previous target.safetensors is untouched." in child.output()
            assert content(target) == before
            assert names(target.parent) == [target.name]
        assert fork_server.run("save_children:save", [writer, target, 2, whole + 20000]).returncode == 0
        assert complete(writer, target, 2)

    def test_a_folder_that_vanished_is_made_again(self, writer, target):
        files.remove_tree(target.parent)
        WRITERS[writer](target, 2)
        assert complete(writer, target, 2)


POINTS = ["save.open", "save.mid", "save.before_fsync", "save.before_replace", "save.after_replace"]


class TestKills:
    @pytest.mark.parametrize("hit", [1, 2, 3])
    @pytest.mark.parametrize("point", POINTS)
    @pytest.mark.parametrize("name", ["write_safetensors", "torch_save", "write_text"])
    def test_a_file(self, fork_server, tmp_path, name, point, hit):
        target = tmp_path / "target"
        WRITERS[name](target, 1)
        child = fork_server.run("save_children:save", [name, target, 2], env={VARIABLE: f"{point}:kill9:{hit}"})
        survived = child.returncode == 0
        assert survived or child.returncode == -signal.SIGKILL
        assert complete(name, target, 2 if survived or point == "save.after_replace" else 1)
        files.clean_litter(tmp_path, min_age=-1)
        assert names(tmp_path) == ["target"]

    @pytest.mark.parametrize("hit", [1, 2, 3])
    @pytest.mark.parametrize("point", [*POINTS, "save.between_renames", "state.between_files", "state.before_manifest"])
    def test_a_state(self, fork_server, tmp_path, point, hit):
        target = tmp_path / "n-state"
        WRITERS["write_state"](target, 1)
        child = fork_server.run(
            "save_children:save", ["write_state", target, 2], env={VARIABLE: f"{point}:kill9:{hit}"}
        )
        assert child.returncode in (0, -signal.SIGKILL)
        found = find_state(str(target), tmp_path, "n")
        assert complete("write_state", target, found.info.position.step)
        assert found.info.position.step == 2 or child.returncode != 0
        files.clean_litter(tmp_path, min_age=-1)
        assert names(tmp_path) == ["n-state"]

    @pytest.mark.parametrize("name", ["write_text", "write_safetensors", "write_folder", "write_state"])
    def test_at_random_moments(self, fork_server, tmp_path, name):
        target = tmp_path / "target"
        for round_number in range(12):
            child = fork_server.start("save_children:save_for_ever", [name, target])
            child.wait_for("started")
            time.sleep(0.002 + 0.011 * round_number)
            while round_number == 11 and not target.exists():
                time.sleep(0.01)
            assert child.kill() == -signal.SIGKILL
            files.clean_litter(tmp_path, min_age=-1)
            if target.exists():
                assert any(complete(name, target, version) for version in (1, 2))
        assert target.exists()
        assert names(tmp_path) == ["target"]

    def test_two_processes_write_the_same_name(self, fork_server, tmp_path):
        target = tmp_path / "target"
        children = [fork_server.start("save_children:save_for_ever", ["write_safetensors", target]) for _ in range(2)]
        for child in children:
            child.wait_for("started")
        for _ in range(20):
            time.sleep(0.01)
            if target.exists():
                seen = tmp_path / "seen"
                seen.write_bytes(target.read_bytes())
                assert any(complete("write_safetensors", seen, version) for version in (1, 2))
        for child in children:
            assert child.kill() == -signal.SIGKILL

    @pytest.mark.parametrize("point", ["retention.before_delete", "save.after_replace", "state.before_manifest"])
    @pytest.mark.parametrize("hit", [1, 2, 5])
    def test_keeping_the_last_ones_never_loses_the_newest(self, fork_server, tmp_path, point, hit):
        child = fork_server.run("save_children:keep_the_last", [tmp_path], env={VARIABLE: f"{point}:kill9:{hit}"})
        assert child.returncode == -signal.SIGKILL, child.output()
        files.clean_litter(tmp_path, min_age=-1)
        models = {int(path.stem[6:]): path for path in tmp_path.glob("*.safetensors")}
        states = {int(path.name[6:14]): path for path in tmp_path.glob("*-state")}
        for step, path in models.items():
            assert complete("write_safetensors", path, step)
        for step, path in states.items():
            assert complete("write_state", path, step)
        if max(models, default=0) > 1:
            assert max(states) >= max(models) - 1
            assert find_state("latest", tmp_path, "n").info.position.step == max(states)
        assert fork_server.run("save_children:keep_the_last", [tmp_path]).returncode == 0
        assert find_state("latest", tmp_path, "n").folder.name == "n-state"
        assert (tmp_path / "n.safetensors").exists()


class TestTwoProcesses:
    def test_both_random_generators_are_in_the_state(self, fork_server, tmp_path):
        arguments = [tmp_path / "n-state"]
        children = [
            fork_server.start("save_children:save_as_rank", [*arguments, rank, tmp_path / "store"]) for rank in (0, 1)
        ]
        assert [child.wait() for child in children] == [0, 0], children[0].output() + children[1].output()
        assert verify_state(tmp_path / "n-state").info.world == 2
        assert (tmp_path / "n-state" / "random_states_1.pkl").exists()

    def test_both_learn_that_the_disk_is_full(self, fork_server, tmp_path):
        arguments, fault = [tmp_path / "n-state"], {VARIABLE: "save.mid@0:enospc:5", "RANK": "0"}
        children = [
            fork_server.start("save_children:save_as_rank", [*arguments, rank, tmp_path / "store"], env=fault)
            for rank in (0, 1)
        ]
        assert [child.wait() for child in children] == [4, 4], children[0].output() + children[1].output()
        assert all("n-state: disk full" in child.output() for child in children)
        assert [path.name for path in tmp_path.iterdir() if path.name != "store"] == []
