"""A job over pictures that is stopped leaves complete results and no processes, and goes on where it was."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.caption_models import make_pictures

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")

CHILD = Path(__file__).with_name("picture_job_child.py")
COUNT = 16


def start(folder: Path, workers: int) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(CHILD), str(folder), str(workers)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def texts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.txt"))


def assert_complete(folder: Path) -> None:
    for path in texts(folder):
        lines = path.read_text().splitlines()
        assert len(lines) == 500
        assert set(lines) == {f"{path.stem}.png is {60 + 10 * int(path.stem)} wide"}


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def group_is_empty(group: int) -> bool:
    """Whether all processes of a session have ended."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 2), (signal.SIGTERM, 0), (signal.SIGKILL, 2)])
def test_a_stopped_job_goes_on(tmp_path, number, workers):
    folder = make_pictures(tmp_path / "pictures", COUNT)
    child = start(folder, workers)
    wait_for(lambda: len(texts(folder)) >= 3)
    if number == signal.SIGINT:
        os.killpg(child.pid, number)  # as the terminal does
    else:
        child.send_signal(number)
    said = child.communicate(timeout=30)[1]
    wait_for(lambda: group_is_empty(child.pid), 10)
    assert 3 <= len(texts(folder)) < COUNT
    assert_complete(folder)
    before = {path: path.stat().st_mtime_ns for path in texts(folder)}
    if number == signal.SIGKILL:
        assert child.returncode == -number
    else:
        assert child.returncode == 128 + number
        assert f"stopped while describing: {len(before)} pictures are done, {COUNT - len(before)} are left" in said
        assert not list(folder.glob(".*")), "no temporary files"
        assert "Traceback" not in said

    again = start(folder, workers)
    again.communicate(timeout=60)
    assert again.returncode == 0
    assert len(texts(folder)) == COUNT
    assert_complete(folder)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items()), "done ones are left alone"
