"""Signals are noted while a run works, end it at once otherwise, and leave no trace afterwards."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from library.errors import StopTraining
from library.signals import StopFlag, parent_is_launcher, worker_signals


@pytest.fixture
def flag():
    with StopFlag(watch_parent=False, announce=False) as flag:
        yield flag


class TestFlag:
    @pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
    def test_a_signal_is_noted_inside_the_loop(self, flag, name, code):
        with flag.deferred():
            assert flag.requested is None
            os.kill(os.getpid(), getattr(signal, name))
            assert flag.requested == getattr(signal, name)
            os.kill(os.getpid(), signal.SIGTERM)
            assert (flag.exit_code, flag.stop("bye").exit_code) == (code, code)

    def test_a_signal_ends_the_program_before_the_loop(self, flag):
        with pytest.raises(SystemExit) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        assert caught.value.code == 143
        assert flag.requested == signal.SIGTERM

    def test_sigusr1_asks_for_a_state_and_goes_on(self, flag):
        assert not flag.take_save_request()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert flag.save_requested
        assert flag.requested is None
        assert flag.take_save_request()
        assert not flag.take_save_request()

    def test_one_keystroke_that_arrives_twice_is_one(self, flag):
        with flag.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            assert flag.requested == signal.SIGINT

    def test_long_jobs_leave(self, flag):
        flag.check("caching")
        flag.request(signal.SIGTERM)
        with pytest.raises(StopTraining, match="stopped by SIGTERM while caching") as caught:
            flag.check("caching")
        assert caught.value.exit_code == 143

    def test_another_rank_can_ask(self, flag):
        flag.request(15)
        flag.request(2)
        assert flag.exit_code == 143

    def test_handlers_come_back(self):
        before = {
            name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
        }
        with StopFlag(watch_parent=False):
            assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
        assert {name: signal.getsignal(name) for name in before} == before

    def test_other_threads_install_nothing(self):
        before = signal.getsignal(signal.SIGTERM)
        thread = threading.Thread(target=lambda: StopFlag(watch_parent=False).install())
        thread.start()
        thread.join()
        assert signal.getsignal(signal.SIGTERM) == before

    def test_a_hangup_that_nohup_ignores_stays_ignored(self):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with StopFlag(watch_parent=False):
                assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_a_notice_is_written_at_once(self, capfd):
        with StopFlag(watch_parent=False, announce=True) as flag, flag.deferred():
            os.kill(os.getpid(), signal.SIGINT)
        assert "do not close" in capfd.readouterr().err

    def test_a_forked_child_dies_of_sigterm_and_ignores_sigint(self, flag):
        with flag.deferred():
            child = os.fork()
            if child == 0:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGTERM)
                os._exit(0)
            _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert flag.requested is None


class TestWorkers:
    def test_signals_of_a_loader_worker(self):
        child = os.fork()
        if child == 0:
            worker_signals()
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM


TRAINER = """
import sys, time
from library.signals import StopFlag
with StopFlag() as flag, flag.deferred():
    print("ready", flush=True)
    for _ in range(600):
        if flag.requested is not None:
            break
        time.sleep(0.02)
    print("orphaned", flag.orphaned, flush=True)
sys.exit(flag.exit_code)
"""
LAUNCHER = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
child.wait()
"""


def environment(**extra):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "TORCHELASTIC"))}
    return kept | {"PYTHONPATH": str(Path.cwd())} | extra


class TestOrphans:
    @pytest.mark.parametrize("variables", [{"ACCELERATE_MIXED_PRECISION": "no"}, {}])
    def test_a_run_whose_launcher_was_killed_stops(self, variables):
        launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, TRAINER], stdout=subprocess.PIPE, env=environment(**variables), text=True
        )
        assert launcher.stdout.readline() == "ready\n"
        launcher.kill()
        launcher.wait()
        assert launcher.stdout.readline() == "orphaned True\n"
        launcher.stdout.close()

    def test_a_run_started_from_a_shell_survives_it(self, monkeypatch):
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        code = "from library.signals import parent_is_launcher; print(parent_is_launcher())"
        command = f'"{sys.executable}" -c "{code}"; true'
        found = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=environment(), check=True)
        assert found.stdout == "False\n"
        assert parent_is_launcher() in (True, False)


SECOND = """
import os, signal, time
from library.signals import StopFlag
with StopFlag(watch_parent=False) as flag, flag.deferred():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1.2)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
    print("still here")
"""


def test_a_second_ctrl_c_ends_at_once():
    found = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, env=environment())
    assert found.returncode == 130
    assert found.stdout == ""
    assert "at once" in found.stderr
