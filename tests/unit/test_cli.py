"""What entry scripts have in common: exit status, messages, summary."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from library import cli, log
from library.errors import Problem, StopTraining, UserError
from library.option_groups import OptionGroup, OptionSet, opt
from library.option_parser import ConfigOptions


@dataclass(frozen=True, kw_only=True)
class JobOptions(OptionGroup, title="job"):
    """A job."""

    output_dir: str | None = opt(None, path=True, help="Folder.")
    size: int = opt(1, at_least=1, help="Size.")
    fast: bool = opt(False, matters_when={"size": (2,)}, help="Fast.")
    console_log_level: str | None = opt(None, choices=("DEBUG", "INFO", "WARNING"), help="Level.")
    console_log_file: str | None = opt(None, path=True, help="File.")
    console_log_simple: bool = opt(True, help="Simple.")


@dataclass(frozen=True, kw_only=True)
class Job(OptionSet, script="job"):
    """Options of a job."""

    job: JobOptions = field(default_factory=JobOptions)
    config: ConfigOptions = field(default_factory=ConfigOptions)

    def check_folders(self):
        if self.job.size == 99:
            yield Problem("--output_dir", "is full")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", cli.TRACEBACK_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    root, level = list(logging.getLogger().handlers), logging.getLogger().level
    yield
    log.summary.reset()
    logging.captureWarnings(capture=False)
    logging.getLogger().handlers[:] = root
    logging.getLogger().setLevel(level)


def summary_of(folder: Path) -> dict:
    return json.loads((folder / cli.SUMMARY_NAME).read_text(encoding="utf-8"))


def run(tmp_path, work, *argv):
    return cli.run_script(Job, work, [f"--output_dir={tmp_path}", *argv])


def raiser(error):
    def work(options):
        raise error

    return work


def test_success(tmp_path, capfd):
    seen = []

    def work(options):
        seen.append(options.job.size)
        log.summary.step = 7
        log.summary.skip("broken image", 2)

    assert run(tmp_path, work, "--size=3") == 0
    assert seen == [3]
    summary = summary_of(tmp_path)
    assert (summary["status"], summary["exit_code"], summary["step"]) == ("done", 0, 7)
    assert summary["skipped"] == {"broken image": 2}
    assert "left out or replaced: 2 broken image" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (UserError("is bad", "Mend it.", where="--size"), 2, "user error"),
        (StopTraining("no room", 4), 4, "could not save"),
        (StopTraining("diverged at step 3", 5), 5, "diverged"),
        (StopTraining("interrupted", 130), 130, "interrupted"),
        (StopTraining("terminated", 143), 143, "interrupted"),
        (StopTraining("nothing left to do", 0), 0, "done"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "/x/y"), 4, "could not save"),
        (SystemExit(3), 3, "failed"),
        (SystemExit(0), 0, "done"),
        (ZeroDivisionError("oops"), 1, "bug"),
    ],
)
def test_exit_status(tmp_path, capfd, error, code, status):
    assert run(tmp_path, raiser(error)) == code
    summary = summary_of(tmp_path)
    assert (summary["exit_code"], summary["status"]) == (code, status)
    stderr = capfd.readouterr().err
    assert ("Traceback" in stderr) == (status == "bug")
    if summary["message"]:
        assert stderr.rstrip().endswith(summary["message"])


def test_user_errors_are_one_line_each(tmp_path, capfd):
    error = UserError.of([Problem("a\x1b[31m\nb.png", "is broken", "Remove it."), Problem("--x", "is odd")])
    assert run(tmp_path, raiser(error)) == 2
    assert capfd.readouterr().err == "error: a\\x1b[31m\\nb.png: is broken. Remove it.\nerror: --x: is odd.\n"


def test_traceback_of_user_errors_on_request(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
    assert run(tmp_path, raiser(UserError("is bad"))) == 2
    assert "Traceback" in capfd.readouterr().err


def test_bugs_show_versions_and_end_with_the_message(tmp_path, capfd):
    assert run(tmp_path, raiser(KeyError("x"))) == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines[-2].startswith("versions: python 3.")
    assert " torch " in lines[-2]
    assert lines[-1].startswith("error: this is a bug in the toolkit")
    assert lines[-1].endswith("KeyError: 'x'")


def test_out_of_memory_is_not_a_bug(tmp_path, capfd):
    class OutOfMemoryError(RuntimeError):
        pass

    assert run(tmp_path, raiser(OutOfMemoryError("CUDA out of memory.\nlots of text"))) == 2
    stderr = capfd.readouterr().err
    assert "--gradient_checkpointing" in stderr
    assert "lots of text" not in stderr


def test_bad_options_replace_the_summary_of_an_earlier_run(tmp_path, capfd):
    def work(options):
        pytest.fail("must not start")

    assert run(tmp_path, lambda options: None) == 0
    assert run(tmp_path, work, "--size=0", "--sise=1") == 2
    assert capfd.readouterr().err.count("error: ") == 2
    assert summary_of(tmp_path)["exit_code"] == 2
    assert run(tmp_path, work, "--size=99") == 2
    assert "is full" in summary_of(tmp_path)["message"]


def test_no_output_folder_is_made_for_bad_options(tmp_path):
    target = tmp_path / "new"
    assert cli.run_script(Job, print, [f"--output_dir={target}", "--size=0"]) == 2
    assert not target.exists()


def test_warnings_are_shown_and_counted(tmp_path, capfd):
    assert run(tmp_path, lambda options: None, "--fast") == 0
    assert "--fast: has no effect without --size 2." in capfd.readouterr().err
    assert summary_of(tmp_path)["warnings"] == [{"message": "--fast: has no effect without --size 2.", "count": 1}]


def test_help(capsys):
    assert cli.run_script(Job, raiser(ValueError()), ["--help"]) == 0
    out = capsys.readouterr().out
    assert "job: A job." in out
    assert "--console_log_level {DEBUG,INFO,WARNING}" in out


def test_output_config(tmp_path, capfd):
    target = tmp_path / "new.toml"
    assert run(tmp_path, raiser(ValueError()), "--size=5", f"--config_file={target}", "--output_config") == 0
    assert "size = 5" in target.read_text(encoding="utf-8")
    assert run(tmp_path, raiser(ValueError()), f"--config_file={target}", "--output_config") == 2
    assert "already exists" in capfd.readouterr().err


def test_other_ranks_leave_option_errors_to_the_first_and_sign_their_own(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(tmp_path, print, "--size=0") == 2
    assert capfd.readouterr().err == ""
    assert run(tmp_path, raiser(UserError("is bad"))) == 2
    assert capfd.readouterr().err == "[rank 1] error: is bad.\n"
    assert run(tmp_path, raiser(ValueError("x"))) == 1
    assert all(line.startswith("[rank 1] ") for line in capfd.readouterr().err.splitlines())
    assert not (tmp_path / cli.SUMMARY_NAME).exists()


def test_console_log_file(tmp_path, capfd):
    target = tmp_path / "logs" / "run.log"
    work = lambda options: logging.getLogger("library.x").info("caf\u00e9 %s", "here")  # noqa: E731
    assert run(tmp_path, work, f"--console_log_file={target}") == 0
    assert target.read_text(encoding="utf-8") == "caf\u00e9 here\n"
    assert run(tmp_path, work, f"--console_log_file={tmp_path}") == 2
    assert "error: --console_log_file" in capfd.readouterr().err


def test_main_ends_the_process(tmp_path):
    code = (
        "from tests_unit_cli import Job; from library import cli; from library.errors import UserError\n"
        "def work(options): raise UserError('caf\\u00e9 \\u732b is bad')\n"
        "cli.main(Job, work)"
    )
    module = tmp_path / "tests_unit_cli.py"
    module.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"}
    environment["WORLD_SIZE"] = "2"
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert ended.stderr.decode("cp1252").splitlines()[-1] == "error: caf\u00e9 ? is bad."
