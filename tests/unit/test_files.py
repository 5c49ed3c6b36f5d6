"""Files appear complete or not at all, with the right mode, and say why they cannot be saved."""

import errno
import json
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from library import files
from library.errors import UserError
from library.faults import VARIABLE, fault_point
from library.files import CannotSave, LockFile, NewFile, atomic_file, atomic_folder


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    """Set the umask inside a test and bring the old one back."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def temporary_name(name: str, kind: str = "tmp", pid: int = 2**22 - 3, host: str | None = None) -> str:
    return f".{name}.{kind}-{pid}-{host or files._host_mark()}0123abcd"


class TestAtomicFile:
    def test_writes_and_replaces_without_leaving_anything_else(self, tmp_path):
        files.write_bytes(tmp_path / "a.bin", [b"one", memoryview(b"two")])
        files.write_bytes(tmp_path / "a.bin", b"three")
        files.write_text(tmp_path / "b.txt", "ä\n")
        files.write_json(tmp_path / "c.json", {"x": [1, 2.5], "ü": None})
        assert (tmp_path / "a.bin").read_bytes() == b"three"
        assert (tmp_path / "b.txt").read_bytes() == "ä\n".encode()
        assert json.loads((tmp_path / "c.json").read_text(encoding="utf-8")) == {"x": [1, 2.5], "ü": None}
        assert names(tmp_path) == ["a.bin", "b.txt", "c.json"]

    def test_json_refuses_numbers_that_json_has_not(self, tmp_path):
        with pytest.raises(ValueError):
            files.write_json(tmp_path / "c.json", {"x": float("nan")})
        assert names(tmp_path) == []

    def test_missing_folders_are_made(self, tmp_path):
        files.write_text(tmp_path / "x" / "y" / "z.txt", "z")
        assert (tmp_path / "x" / "y" / "z.txt").read_text() == "z"

    @pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), UserError("no")])
    def test_an_error_in_the_block_keeps_the_old_file_and_its_own_type(self, tmp_path, error):
        files.write_text(tmp_path / "a", "old")
        with pytest.raises(type(error)), atomic_file(tmp_path / "a") as temporary:
            temporary.write_text("new")
            raise error
        assert (tmp_path / "a").read_text() == "old"
        assert names(tmp_path) == ["a"]

    def test_the_check_sees_the_new_file_and_can_refuse_it(self, tmp_path):
        files.write_text(tmp_path / "a", "old")

        def check(path):
            raise ValueError(path.read_text())

        with pytest.raises(ValueError, match="new"), atomic_file(tmp_path / "a", check=check) as temporary:
            temporary.write_text("new")
        assert (tmp_path / "a").read_text() == "old"

    @pytest.mark.parametrize("mask", [0o022, 0o002, 0o077, 0o000])
    def test_the_mode_follows_the_umask_even_if_the_writer_sets_another(self, tmp_path, umask, mask):
        umask(mask)
        with atomic_file(tmp_path / "a") as temporary:
            temporary.unlink()
            temporary.touch(mode=0o600)
        assert mode(tmp_path / "a") == 0o666 & ~mask

    def test_the_mode_of_a_replaced_file_is_kept(self, tmp_path):
        files.write_text(tmp_path / "a", "old")
        (tmp_path / "a").chmod(0o640)
        files.write_text(tmp_path / "a", "new")
        assert mode(tmp_path / "a") == 0o640

    def test_a_link_stays_and_its_target_is_replaced(self, tmp_path):
        (tmp_path / "real").mkdir()
        files.write_text(tmp_path / "real" / "a", "old")
        (tmp_path / "link").symlink_to(tmp_path / "real" / "a")
        files.write_text(tmp_path / "link", "new")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real" / "a").read_text() == "new"

    @pytest.mark.parametrize("name", ["with space", "ünï\u0301", "n" * 255, "ü" * 127, "dot.", ".hidden", "a\nb"])
    def test_unusual_names(self, tmp_path, name):
        files.write_text(tmp_path / name, "x")
        assert names(tmp_path) == [name]

    def test_a_folder_of_that_name_is_named(self, tmp_path):
        (tmp_path / "a").mkdir()
        with pytest.raises(CannotSave, match="cannot save .*a: Is a directory"):
            files.write_text(tmp_path / "a", "x")
        assert names(tmp_path) == ["a"]

    def test_errors_of_other_files_are_not_called_save_errors(self, tmp_path):
        with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "a"):
            (tmp_path / "source").read_bytes()

    def test_safetensors_failures_are_understood(self, tmp_path):
        class SafetensorError(Exception):
            pass

        files.write_text(tmp_path / "a", "old")
        with pytest.raises(CannotSave) as caught, atomic_file(tmp_path / "a", size=3 << 30):
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        assert caught.value.exit_code == 4
        assert caught.value.disk_full
        assert f"cannot save {tmp_path / 'a'}: disk full (needs 3.0 GiB, free " in str(caught.value)
        assert str(caught.value).endswith("Previous a is untouched.")

    def test_torch_cannot_swallow_an_error(self, tmp_path, monkeypatch):
        import torch

        for count in range(1, 200):
            monkeypatch.setenv(VARIABLE, f"save.mid:eio:{count}")
            try:
                with atomic_file(tmp_path / "a") as temporary, NewFile(temporary) as file:
                    torch.save({"x": torch.zeros(3)}, file)
            except CannotSave:
                assert names(tmp_path) == []
            else:
                break
        assert count > 10
        assert torch.load(tmp_path / "a")["x"].tolist() == [0.0, 0.0, 0.0]

    def test_torch_cannot_hide_the_cause(self, tmp_path):
        def write(temporary):
            with NewFile(temporary) as file:
                try:
                    file._guard(lambda: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
                except OSError as error:
                    raise RuntimeError("unexpected pos 64 vs 0") from error

        with pytest.raises(CannotSave, match="Input/output error"), atomic_file(tmp_path / "a") as temporary:
            write(temporary)


class TestAtomicFolder:
    def fill(self, path, text):
        with atomic_folder(path) as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner" / "x").write_text(text)
            files.write_text(temporary / "y", text)

    def test_replaces_a_whole_folder(self, tmp_path):
        with atomic_folder(tmp_path / "s") as temporary:
            (temporary / "only_old").write_text("1")
        self.fill(tmp_path / "s", "2")
        assert names(tmp_path) == ["s"]
        assert names(tmp_path / "s") == ["inner", "y"]
        assert (tmp_path / "s" / "inner" / "x").read_text() == "2"

    def test_an_error_keeps_the_old_one(self, tmp_path):
        self.fill(tmp_path / "s", "1")
        with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "s") as temporary:
            (temporary / "y").write_text("2")
            raise ZeroDivisionError
        assert (tmp_path / "s" / "y").read_text() == "1"
        assert names(tmp_path) == ["s"]

    def test_files_inside_get_the_mode_of_the_umask(self, tmp_path, umask):
        umask(0o027)
        with atomic_folder(tmp_path / "s") as temporary:
            (temporary / "x").touch(mode=0o600)
        assert mode(tmp_path / "s" / "x") == 0o640

    def test_a_file_in_the_way_is_not_replaced(self, tmp_path):
        files.write_text(tmp_path / "s", "precious")
        with pytest.raises(CannotSave, match="in the way"):
            self.fill(tmp_path / "s", "1")
        assert (tmp_path / "s").read_text() == "precious"

    def test_a_failure_inside_names_the_folder_not_the_temporary_file(self, tmp_path, monkeypatch):
        self.fill(tmp_path / "s", "1")
        monkeypatch.setenv(VARIABLE, "save.mid:enospc")
        with pytest.raises(CannotSave) as caught:
            self.fill(tmp_path / "s", "2")
        assert str(caught.value).startswith(f"cannot save {tmp_path / 's'}: disk full (needs ")
        assert ".tmp-" not in str(caught.value)
        assert (tmp_path / "s" / "y").read_text() == "1"
        assert names(tmp_path) == ["s"]


class TestOrder:
    @pytest.fixture
    def events(self, monkeypatch):
        """Record synchronizations and renames, in order."""
        seen = []
        real_sync, real_replace, real_rename = os.fsync, Path.replace, Path.rename

        def fsync(descriptor):
            seen.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
            real_sync(descriptor)

        def replace(path, target):
            seen.append(("rename", Path(target).name))
            return real_replace(path, target)

        def rename(path, target):
            seen.append(("rename", Path(target).name))
            return real_rename(path, target)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(Path, "replace", replace)
        monkeypatch.setattr(Path, "rename", rename)
        return seen

    def test_a_file_is_on_disk_before_it_gets_its_name_and_the_name_afterwards(self, tmp_path, events):
        files.write_text(tmp_path / "a", "x")
        assert [kind for kind, _ in events] == ["sync", "rename", "sync"]
        assert events[0][1].startswith(".a.tmp-")
        assert events[1:] == [("rename", "a"), ("sync", tmp_path.name)]

    def test_a_file_that_can_be_made_again_is_not_waited_for(self, tmp_path, events):
        with atomic_file(tmp_path / "a", sync=False) as temporary:
            temporary.write_text("x")
        assert events == [("rename", "a")]

    def test_every_file_of_a_folder_is_on_disk_before_the_folder_gets_its_name(self, tmp_path, events):
        with atomic_folder(tmp_path / "s") as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner" / "x").write_text("x")
            (temporary / "y").write_text("y")
        position = events.index(("rename", "s"))
        assert {name for kind, name in events[:position] if kind == "sync"} > {"x", "y", "inner"}
        assert events[position + 1] == ("sync", tmp_path.name)

    def test_an_old_folder_leaves_after_the_new_one_is_there(self, tmp_path, events):
        for _ in range(2):
            with atomic_folder(tmp_path / "s") as temporary:
                (temporary / "x").write_text("x")
        renames = [name for kind, name in events if kind == "rename"]
        assert [name.partition("-")[0] for name in renames[1:]] == [".s.old", "s", "..s.old"]


class TestLitter:
    def make(self, folder, name, age=7200.0):
        path = folder / name
        path.mkdir()
        (path / "x").write_text("x")
        os.utime(path, (time.time() - age,) * 2)
        return path

    def test_removes_old_temporary_names_of_dead_processes_only(self, tmp_path):
        self.make(tmp_path, temporary_name("dead"))
        kept = [
            self.make(tmp_path, temporary_name("young"), age=60),
            self.make(tmp_path, temporary_name("alive", pid=os.getppid())),
            self.make(tmp_path, temporary_name("elsewhere", host="zzzz".replace("z", "f"))),
            self.make(tmp_path, ".foreign.tmp-1"),
            self.make(tmp_path, "ordinary"),
        ]
        assert files.clean_litter(tmp_path) == []
        assert names(tmp_path) == sorted(path.name for path in kept)

    def test_brings_back_what_was_set_aside(self, tmp_path):
        self.make(tmp_path, temporary_name("s", "old"), age=0)
        assert files.clean_litter(tmp_path) == [tmp_path / "s"]
        assert (tmp_path / "s" / "x").read_text() == "x"

    def test_removes_what_was_set_aside_when_the_new_one_is_there(self, tmp_path):
        self.make(tmp_path, temporary_name("s", "old"), age=0)
        self.make(tmp_path, temporary_name("t", "del"), age=0)
        self.make(tmp_path, "s")
        files.clean_litter(tmp_path)
        assert names(tmp_path) == ["s"]

    def test_a_missing_folder_is_no_error(self, tmp_path):
        assert files.clean_litter(tmp_path / "none") == []


class TestRemoveTree:
    def test_files_links_and_folders(self, tmp_path):
        (tmp_path / "keep").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "keep")
        (tmp_path / "d" / "e").mkdir(parents=True)
        (tmp_path / "f").write_text("")
        for name in ("link", "d", "f", "missing"):
            files.remove_tree(tmp_path / name)
        assert names(tmp_path) == ["keep"]


class TestFolders:
    def test_a_writable_folder_is_made_and_left_empty(self, tmp_path):
        assert files.check_writable_folder(tmp_path / "new" / "er") == []
        assert names(tmp_path / "new" / "er") == []

    def test_a_file_is_not_a_folder(self, tmp_path):
        (tmp_path / "f").write_text("")
        (problem,) = files.check_writable_folder(tmp_path / "f", "--output_dir")
        assert str(problem).startswith("--output_dir: ")
        assert "not a folder" in problem.what

    def test_a_folder_below_a_file(self, tmp_path):
        (tmp_path / "f").write_text("")
        (problem,) = files.check_writable_folder(tmp_path / "f" / "g")
        assert "Not a directory" in problem.what

    def test_free_bytes_of_a_folder_to_come(self, tmp_path):
        assert files.free_bytes(tmp_path / "a" / "b") > 0

    @pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (2040109466, "1.9 GiB")])
    def test_format(self, count, text):
        assert files.format_bytes(count) == text


class TestFaultPoints:
    def test_nothing_happens_without_the_variable(self, monkeypatch):
        monkeypatch.delenv(VARIABLE, raising=False)
        assert fault_point("a") is None

    def test_hits(self, monkeypatch):
        monkeypatch.setenv(VARIABLE, "a:nan:2-3,b:enospc:2+,c@1:raise")
        assert [fault_point("a") for _ in range(5)] == [None, "nan", "nan", None, None]
        fault_point("b")
        for _ in range(3):
            with pytest.raises(OSError, match="No space left"):
                fault_point("b")
        fault_point("c")
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv(VARIABLE, "c@1:raise")
        with pytest.raises(RuntimeError):
            fault_point("c")

    @pytest.mark.parametrize("text", ["a", "a:explode"])
    def test_nonsense_is_refused(self, monkeypatch, text):
        monkeypatch.setenv(VARIABLE, text)
        with pytest.raises(ValueError, match=VARIABLE):
            fault_point("a")


HOLD = """
import sys, time
from library.files import LockFile
lock = LockFile(sys.argv[1]); lock.acquire(); print("held", flush=True); time.sleep(60)
"""


class TestLockFile:
    def test_held_once_and_removed(self, tmp_path):
        path = tmp_path / ".name.lock"
        with LockFile(path):
            holder = json.loads(path.read_text())
            assert holder == {"pid": os.getpid(), "host": socket.gethostname()}
            with pytest.raises(UserError, match="in use by another run"):
                LockFile(path).acquire()
        assert names(tmp_path) == []
        with LockFile(path):
            pass

    def test_another_process_is_refused_until_it_dies(self, tmp_path):
        path = tmp_path / ".name.lock"
        holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE)
        try:
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(UserError, match=f"pid {holder.pid}"):
                LockFile(path).acquire()
            assert json.loads(path.read_text())["pid"] == holder.pid
        finally:
            holder.kill()
            holder.wait()
        with LockFile(path):
            assert json.loads(path.read_text())["pid"] == os.getpid()

    @pytest.mark.parametrize("content", ["", "garbage", '{"pid": 4194301, "host": "elsewhere"}', '{"pid": "x"}'])
    def test_a_stale_lock_is_taken_over(self, tmp_path, content):
        path = tmp_path / ".name.lock"
        path.write_text(content)
        with LockFile(path):
            assert json.loads(path.read_text())["pid"] == os.getpid()

    def test_a_forked_child_does_not_release_it(self, tmp_path):
        path = tmp_path / ".name.lock"
        with LockFile(path) as lock:
            child = os.fork()
            if child == 0:
                lock.release()
                os._exit(0)
            os.waitpid(child, 0)
            assert path.exists()
