"""Starts programs in 0.05 s instead of 5: a server process imports torch, diffusers and transformers once and forks.

    def test_kill(fork_server, tmp_path):
        child = fork_server.start("train_db.py", ["--max_train_steps=9", ...], env={"SD_FAULT": "step.after:kill9:3"})
        assert child.wait() == -signal.SIGKILL          # negative: killed by that signal, as subprocess does it
        child = fork_server.start("train_db.py", [..., "--resume=latest"])
        assert child.wait(timeout=120) == 0, child.output()

`target` is a script (run as `__main__` with these arguments) or `module:function` (called with strings).
Every child has a process group of its own, which `Child.kill` hits as a whole: loader workers die with their parent.
Children share nothing with the tests but files. `child.send(signal.SIGTERM)` reaches the main process alone.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_GRACE = 0.01


class Child:
    """A program that the server started."""

    def __init__(self, server: ForkServer, pid: int, log: Path) -> None:
        self.pid = pid
        self.log = log
        self.returncode: int | None = None
        self._server = server

    def output(self) -> str:
        """Everything that it has written to standard output and standard error so far."""
        return self.log.read_text(errors="replace")

    def send(self, signum: int) -> None:
        """Send a signal to the process itself."""
        os.kill(self.pid, signum)

    def kill(self) -> int:
        """End the process and all its children with SIGKILL at once, and return the exit status."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        return self.wait()

    def wait_for(self, text: str, timeout: float = 60.0) -> None:
        """Wait until `text` was written."""
        deadline = time.monotonic() + timeout
        while text not in self.output():
            if self.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{text!r} was not written:\n{self.output()}")
            time.sleep(_GRACE)

    def poll(self) -> int | None:
        """Return the exit status if the process has ended."""
        if self.returncode is None:
            self.returncode = self._server._ask({"poll": self.pid})["status"]
        return self.returncode

    def wait(self, timeout: float = 120.0) -> int:
        """Wait for the end and return the exit status; a process that takes too long is killed and fails the test."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(f"not finished after {timeout} s:\n{self.output()}")
            time.sleep(_GRACE)
        return self.returncode


class ForkServer:
    """The client's side. Use it as a context, or through the fixture `fork_server`."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fork-server-")
        self._count = 0
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment.pop("SD_FAULT", None)
        command = [sys.executable, __file__, "--serve"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )
        assert self._process.stdout.readline() == "ready\n"

    def start(self, target: str, arguments: list[str] = (), *, env: dict[str, str] | None = None, cwd=ROOT) -> Child:
        """Start `target` with `arguments`; `env` adds variables to those of the tests."""
        self._count += 1
        log = Path(self._folder.name) / f"{self._count}.log"
        log.touch()
        variables = {name: value for name, value in os.environ.items() if name != "SD_FAULT"} | (env or {})
        request = {"target": target, "arguments": list(map(str, arguments)), "env": variables}
        answer = self._ask({"start": {**request, "cwd": str(cwd), "log": str(log)}})
        return Child(self, answer["pid"], log)

    def run(self, target: str, arguments: list[str] = (), *, env: dict[str, str] | None = None, timeout=120.0) -> Child:
        """Start `target` and wait for its end; see `returncode` and `output()`."""
        child = self.start(target, arguments, env=env)
        child.wait(timeout)
        return child

    def run_ranks(
        self, target: str, arguments: list[str], *, env: dict[str, str] | None = None, status=0, timeout=120.0, cwd=ROOT
    ) -> list[str]:
        """Run `target` as two processes that work together, as a launcher starts them, on the CPU.

        When one fails the other is killed, which may wait for it in vain.

        Args:
            target: As for `start`.
            arguments: As for `start`.
            env: Variables besides those of a launcher; empty values are left out.
            status: What both are to return.
            timeout: Seconds for both together.
            cwd: Their working folder.

        Returns:
            What each has written.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
        children = []
        for rank in ("0", "1"):
            launched = {**meeting, "LOCAL_WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "1"}
            settings = {name: value.format(rank=rank) for name, value in {**launched, **(env or {})}.items()}
            chosen = {name: value for name, value in settings.items() if value}
            children.append(self.start(target, arguments, env=chosen, cwd=cwd))
        deadline = time.monotonic() + timeout
        try:
            while any(child.poll() is None for child in children):
                failed = any(child.returncode not in (None, status) for child in children)
                assert not failed and time.monotonic() < deadline, "\n".join(child.output() for child in children)
                time.sleep(_GRACE)
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
        assert {child.returncode for child in children} == {status}, children[0].output()
        return [child.output() for child in children]

    def run_killed(self, target: str, arguments: list[str], faults: Sequence[str]) -> int:
        """Run a training, killed at one fault after the other, resumed each time; then once more to its end.

        Returns:
            How many of the runs died, since some may end before their fault.
        """
        deaths = 0
        for number, fault in enumerate(faults):
            again = ["--resume=latest"] if number else []
            child = self.run(target, [*arguments, *again], env={"SD_FAULT": fault})
            assert child.returncode in (-signal.SIGKILL, 0), f"{fault}: {child.output()}"
            deaths += child.returncode != 0
        finished = self.run(target, [*arguments, "--resume=latest"])
        assert finished.returncode == 0, finished.output()
        return deaths

    def close(self) -> None:
        """End the server and all that it started."""
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()
        self._folder.cleanup()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: dict) -> dict:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def serve() -> None:
    """Fork a child per request read from standard input; answer on standard output."""
    _preload()
    statuses: dict[int, int] = {}
    answers = os.fdopen(os.dup(1), "w")
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer = {"pid": _fork(request["start"])}
        else:
            answer = {"status": _status(request["poll"], statuses)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _preload() -> None:
    import accelerate  # noqa: F401
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel  # noqa: F401

    # Half a second for each child.
    import library.models.cascade.stage_c
    import library.models.sd
    import library.training.caching
    import library.training.loop
    import library.training.opening
    import library.training.run  # noqa: F401

    torch.set_num_threads(1)
    os.fsync = lambda _: None  # see tests/conftest.py


def _status(pid: int, statuses: dict[int, int]) -> int | None:
    if pid not in statuses:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            return None
        statuses[pid] = os.waitstatus_to_exitcode(status)
    return statuses[pid]


def _fork(request: dict) -> int:
    pid = os.fork()
    if pid:
        # On both sides, so that the group exists whoever comes first.
        with suppress(OSError):
            os.setpgid(pid, pid)
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        _redirect(request["log"])
        os.environ.clear()
        os.environ.update(request["env"] | {"OMP_NUM_THREADS": "1"})
        os.chdir(request["cwd"])
        code = _call(request["target"], request["arguments"])
    except BaseException:  # noqa: BLE001 - a child must never return into the server's loop
        traceback.print_exc()
    finally:
        _leave(code)
    raise AssertionError("unreachable")


def _redirect(log: str) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    out = os.open(log, os.O_WRONLY | os.O_APPEND)
    for source, target in ((null, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    sys.stdout = os.fdopen(1, "w", buffering=1, errors="replace", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="replace", closefd=False)
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr


def _call(target: str, arguments: list[str]) -> int:
    """Run a script or a function and return its exit status."""
    try:
        if target.endswith(".py"):
            sys.argv = [target, *arguments]
            sys.path.insert(0, str(Path(target).resolve().parent))
            runpy.run_path(target, run_name="__main__")
        else:
            module, _, function = target.partition(":")
            sys.path.insert(0, str(Path(__file__).parent))
            getattr(__import__(module), function)(*arguments)
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0


def _leave(code: int) -> None:
    """End like an interpreter does, without returning into the server's own code."""
    import atexit
    import logging

    try:
        atexit._run_exitfuncs()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__" and sys.argv[1:] == ["--serve"]:
    serve()
