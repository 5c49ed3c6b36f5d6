import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loading_helpers import bucketed, fill, some_pictures, training_data

from library.contracts import Position, RunLength
from library.data.loader import PlannedBatches, available_cores, worker_count
from library.data.options import CacheOptions, LoaderOptions
from library.data.serving import BatchDataset
from library.errors import UserError

WILD = {"flip_aug": True, "random_crop": True, "color_aug": True, "shuffle_caption": True, "caption_dropout_rate": 0.2}


def length_of(data, total_steps, accumulation=1, world=1):
    return RunLength(total_steps, 100, data.batch_count(), accumulation * world, accumulation, world)


def planned(data, length, workers=0, rank=0, **options):
    loader = LoaderOptions(max_data_loader_n_workers=workers)
    batches = PlannedBatches(data, length, rank=rank, seed=5, loader=loader, **options)
    batches.workers = workers if not data.reads_only_latents else min(workers, 1)
    return batches


def content(batch):
    values = [batch.key, batch.captions, batch.record_keys, batch.replaced]
    for tensor in (batch.pixels, batch.latents, batch.mask, batch.sizes_hw, batch.loss_weight, *batch.token_ids):
        values.append(None if tensor is None else tensor.numpy().tobytes())
    return values


def contents(batches, start=Position()):  # noqa: B008 - frozen
    return [content(batch) for batch in batches.iterate(start)]


@pytest.fixture
def data(tmp_path):
    return training_data(some_pictures(tmp_path, 8), [bucketed(tmp_path, **WILD)])


@pytest.mark.parametrize(("workers", "method"), [(1, "fork"), (4, "fork"), (2, "spawn")])
def test_batches_are_the_same_for_any_number_of_workers(data, workers, method):
    length = length_of(data, 14, accumulation=2)
    expected = contents(planned(data, length))
    assert len(expected) > 14
    assert contents(planned(data, length, workers, start_method=method)) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_continues_in_the_middle(data, workers):
    length = length_of(data, 12, accumulation=2)
    whole = contents(planned(data, length))
    position = Position()
    for _ in range(7):
        position = position.advance(length)
    rest = contents(planned(data, length, workers), position)
    assert rest == [entry for entry in whole if entry[0].step_key.step >= 7]


def test_ranks_together_serve_what_one_process_accumulates(data):
    alone = contents(planned(data, length_of(data, 6, accumulation=2)))
    ranks = [contents(planned(data, length_of(data, 6, world=2), rank=rank)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    merged = [entry for pair in zip(*ranks, strict=True) for entry in pair if entry[0].share]
    assert [entry[1:] for entry in merged] == [entry[1:] for entry in alone]


def test_cached_latents_are_served_by_one_reader(tmp_path):
    data = training_data(
        some_pictures(tmp_path), [bucketed(tmp_path, flip_aug=True)], cache=CacheOptions(cache_latents=True)
    )
    assert worker_count(LoaderOptions(), cached=False) == min(8, available_cores())
    fill(data)
    length = length_of(data, 7)
    batches = PlannedBatches(data, length, rank=0, seed=5, loader=LoaderOptions())
    assert batches.workers == 0
    assert PlannedBatches(data, length, rank=0, seed=5, loader=LoaderOptions(), pin_memory=True).workers == 1
    assert contents(batches) == contents(planned(data, length))
    assert contents(planned(data, length, 1, start_method="spawn")) == contents(planned(data, length))


def test_no_more_workers_than_cores():
    assert worker_count(LoaderOptions(max_data_loader_n_workers=10_000), cached=False) == available_cores()
    assert worker_count(LoaderOptions(max_data_loader_n_workers=0), cached=True) == 0


def test_waiting_is_counted(data, monkeypatch):
    original = BatchDataset.__getitem__

    def slow(self, key):
        time.sleep(0.03)
        return original(self, key)

    monkeypatch.setattr(BatchDataset, "__getitem__", slow)
    batches = planned(data, length_of(data, 5))
    assert len(contents(batches)) == 5
    assert batches.wait_seconds > 0.1


def test_replacements_are_counted_and_told(data, caplog):
    Path(data.table.path(0)).unlink()
    batches = planned(data, length_of(data, data.batch_count()))
    contents(batches)
    assert batches.replaced == 1
    assert "00.png" in caplog.text


def test_an_empty_data_folder_ends_the_run(data):
    for row in range(len(data.table)):
        Path(data.table.path(row)).unlink()
    with pytest.raises(UserError, match=r"20 batches in a row.*No such file"):
        contents(planned(data, length_of(data, 100)))


@pytest.mark.parametrize("workers", [0, 2])
def test_closing_early_leaves_nothing_behind(data, workers):
    iterator = planned(data, length_of(data, 1000), workers).iterate(Position())
    next(iterator)
    iterator.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("plan", "loader"))]
    deadline = time.time() + 10
    while time.time() < deadline and torch.multiprocessing.active_children():
        time.sleep(0.05)
    assert not torch.multiprocessing.active_children()


def kill_workers():
    for child in torch.multiprocessing.active_children():
        with suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)


def test_killed_workers_are_started_once_more(data, caplog):
    length = length_of(data, 12)
    expected = contents(planned(data, length))
    found = []
    for batch in planned(data, length, 2).iterate(Position()):
        found.append(content(batch))
        if len(found) == 3:
            kill_workers()
    assert found == expected
    assert "starting the workers once more" in caplog.text


def test_workers_that_die_again_end_the_run(data):
    with pytest.raises(UserError, match=r"killed, probably because memory ran out.*--max_data_loader_n_workers"):
        for batch in planned(data, length_of(data, 100), 2).iterate(Position()):
            if batch.key.step_key.step in (1, 20):
                kill_workers()


def test_workers_that_die_with_a_shared_lock_do_not_stop_the_run(data, monkeypatch):
    """Workers look at an event between batches; one that is killed right then never gives its lock back."""
    looked_at = torch.multiprocessing.get_context("fork").Event

    def slow(self):
        with self._cond:
            time.sleep(0.03)
            return self._flag.acquire(False) and not self._flag.release()

    monkeypatch.setattr(type(looked_at()), "is_set", slow)
    length = length_of(data, 12)
    found = []
    for batch in planned(data, length, 2, start_method="fork").iterate(Position()):
        found.append(content(batch))
        if len(found) == 3:
            time.sleep(0.01)
            kill_workers()
    assert found == contents(planned(data, length))


def test_a_dead_worker_raises_only_where_batches_are_asked_for(data):
    before = signal.getsignal(signal.SIGCHLD)
    iterator = planned(data, length_of(data, 30), 2).iterate(Position())
    next(iterator)
    assert signal.getsignal(signal.SIGCHLD) is before
    kill_workers()
    time.sleep(0.3)  # torch's own handler would raise here
    iterator.close()


def test_bugs_in_a_worker_are_not_taken_for_deaths(data, monkeypatch):
    def broken(self, key):
        raise ZeroDivisionError("bug")

    monkeypatch.setattr(BatchDataset, "__getitem__", broken)
    for workers in (0, 1):
        with pytest.raises(ZeroDivisionError, match="bug"):
            contents(planned(data, length_of(data, 5), workers, start_method="fork"))


def test_nothing_draws_from_global_generators(data, monkeypatch):
    def forbidden(*_args, **_kwargs):
        raise AssertionError("a global generator was used")

    state = torch.get_rng_state()
    for name in ("random", "randint", "uniform", "shuffle", "choice"):
        monkeypatch.setattr(f"random.{name}", forbidden)
    monkeypatch.setattr("numpy.random.permutation", forbidden)
    contents(planned(data, length_of(data, 5)))
    contents(planned(data, length_of(data, 5), 1, start_method="fork"))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_wrong_length_is_a_bug(data):
    length = replace(length_of(data, 5), batches_per_epoch=3)
    with pytest.raises(ValueError, match="expects 3 batches"):
        PlannedBatches(data, length, rank=0, seed=0, loader=LoaderOptions())


GROUP_SIGNAL = """
import os, signal, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
from loading_helpers import bucketed, some_pictures, training_data
from library.contracts import Position, RunLength
from library.data.loader import PlannedBatches
from library.data.options import LoaderOptions

if __name__ == "__main__":
    caught = []
    signal.signal(signal.SIGTERM, lambda *_: caught.append("term"))
    signal.signal(signal.SIGINT, lambda *_: caught.append("int"))
    data = training_data(some_pictures(Path({folder!r}), 8), [bucketed({folder!r})])
    length = RunLength(60, 100, data.batch_count(), 1, 1, 1)
    batches = PlannedBatches(data, length, rank=0, seed=0, loader=LoaderOptions(max_data_loader_n_workers=2))
    batches.workers = 2
    count = 0
    for batch in batches.iterate(Position()):
        count += 1
        if count == 5:
            os.killpg(os.getpgrp(), signal.SIGINT)
            os.killpg(os.getpgrp(), signal.SIGTERM)
            time.sleep(0.5)
    print(count, caught, [name for name in ("diffusers", "transformers") if name in sys.modules])
"""


def test_signals_to_the_group_leave_workers_alive(tmp_path):
    here = Path(__file__).parent
    script = tmp_path / "run.py"
    (tmp_path / "data").mkdir()
    script.write_text(GROUP_SIGNAL.format(root=str(here.parents[2]), tests=str(here), folder=str(tmp_path / "data")))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=100, start_new_session=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "60 ['int', 'term'] []"
    assert "once more" not in done.stderr
