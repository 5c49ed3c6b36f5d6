"""When models and states are saved, under which names, which old ones go, and what happens when the disk is full."""

import errno
import logging

import pytest

from library import files
from library.contracts import Position, RunLength
from library.errors import UserError
from library.faults import VARIABLE
from library.files import CannotSave
from library.training import saving
from library.training.options import SaveOptions, StateOptions
from library.training.ranks import Ranks
from library.training.save_names import SavePoint, due, outdated_model, outdated_state, planned_saves
from library.training.saving import SaveActions, Saver


def length(total=60, per_epoch=10):
    return RunLength(total, -(-total // per_epoch), per_epoch, 1, 1, 1)


class Recorder:
    """Stands for the model and the state: writes small files and can be made to fail."""

    def __init__(self, folder, suffix=".safetensors"):
        self.folder, self.suffix = folder, suffix
        self.calls, self.uploads, self.slept = [], [], []
        self.fail = []

    def model(self, target, *, epoch, step):
        self.calls.append(("model", target.name, epoch, step))
        if self.fail and self.fail.pop(0):
            raise CannotSave(f"cannot save {target}: disk full (needs 1 B, free 0 B).", target, errno.ENOSPC)
        path = target.with_name(target.name + self.suffix)
        files.write_text(path, str(step))
        return path

    def state(self, folder):
        self.calls.append(("state", folder.name))
        if self.fail and self.fail.pop(0):
            raise OSError(errno.EIO, "Input/output error", str(folder))
        with files.atomic_folder(folder) as temporary:
            files.write_text(temporary / "resume.json", "{}")

    def actions(self):
        return SaveActions(
            self.model,
            self.state,
            upload=lambda path, state, final: self.uploads.append((path.name, state, final)),
            suffix=self.suffix,
            sleep=self.slept.append,
        )


@pytest.fixture
def recorder(tmp_path):
    return Recorder(tmp_path)


def saver_of(recorder, run=None, *, state=None, **save):
    options = SaveOptions(output_dir=str(recorder.folder), **{"output_name": "n"} | save)
    return Saver(options, StateOptions(**(state or {})), run or length(), recorder.actions())


def train(saver, run=None, start=0, stop=None):
    """Call the saver as the loop does."""
    run = run or length()
    position = Position(start, *divmod(start, run.updates_per_epoch))
    for _ in range(start, stop or run.total_steps):
        position = position.advance(run)
        saver.after_update(position, epoch_ended=position.update_in_epoch == 0)
    if stop is None:
        saver.finish(position)
    return position


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class TestNames:
    @pytest.mark.parametrize(
        ("point", "name", "stem", "state"),
        [
            (SavePoint("epoch", 2), "n", "n-000002", "n-000002-state"),
            (SavePoint("step", 400), "n", "n-step00000400", "n-step00000400-state"),
            (SavePoint("final"), "n", "n", "n-state"),
            (SavePoint("epoch", 2), None, "epoch-000002", "epoch-000002-state"),
            (SavePoint("step", 400), None, "at-step00000400", "at-step00000400-state"),
            (SavePoint("final"), None, "last", "last-state"),
        ],
    )
    def test_names(self, point, name, stem, state):
        assert (point.stem(name), point.state_name(name)) == (stem, state)

    @pytest.mark.parametrize(
        ("options", "numbers"),
        [
            ({"save_every_n_epochs": 2}, [("epoch", 2), ("epoch", 4)]),
            ({"save_every_n_epochs": 7}, []),
            ({"save_n_epoch_ratio": 3}, [("epoch", 2), ("epoch", 4)]),
            ({"save_n_epoch_ratio": 100}, [("epoch", number) for number in range(1, 6)]),
            ({"save_every_n_epochs": 1, "save_n_epoch_ratio": 2}, [("epoch", 3)]),
            ({"save_every_n_steps": 25}, [("step", 25), ("step", 50)]),
            ({"save_every_n_steps": 30}, [("step", 30), ("step", 60)]),
            ({"save_every_n_steps": 30, "save_every_n_epochs": 3}, [("step", 30), ("epoch", 3), ("step", 60)]),
            ({}, []),
        ],
    )
    def test_when(self, options, numbers):
        run, position, found = length(), Position(), []
        while position.step < run.total_steps:
            position = position.advance(run)
            points = due(SaveOptions(**options), run, position, epoch_ended=position.update_in_epoch == 0)
            found += [(point.kind, point.number) for point in points]
        assert found == numbers

    def test_the_documented_example_of_step_pruning(self):
        save = SaveOptions(save_every_n_steps=10, save_last_n_steps=30)
        removed = [outdated_model(save, length(), SavePoint("step", step)) for step in range(10, 70, 10)]
        assert removed == [None, None, None, None, SavePoint("step", 10), SavePoint("step", 20)]

    def test_states_have_windows_of_their_own(self):
        save = SaveOptions(save_every_n_epochs=1, save_last_n_epochs=3, save_every_n_steps=10, save_last_n_steps=10)
        own = StateOptions(save_last_n_epochs_state=1, save_last_n_steps_state=20)
        epoch, step = SavePoint("epoch", 5), SavePoint("step", 50)
        assert outdated_model(save, length(), epoch) == SavePoint("epoch", 2)
        assert outdated_state(save, StateOptions(), length(), epoch) == SavePoint("epoch", 2)
        assert outdated_state(save, own, length(), epoch) == SavePoint("epoch", 4)
        assert outdated_model(save, length(), step) == SavePoint("step", 30)
        assert outdated_state(save, own, length(), step) == SavePoint("step", 20)
        assert outdated_state(save, own, length(), SavePoint("final")) is None


class TestRun:
    def test_a_whole_run(self, recorder, tmp_path):
        saver = saver_of(recorder, save_every_n_epochs=2, save_every_n_steps=25, state={"save_state": True})
        train(saver)
        stems = ["n", "n-000002", "n-000004", "n-step00000025", "n-step00000050"]
        assert names(tmp_path) == sorted(
            [f"{stem}.safetensors" for stem in stems] + [f"{stem}-state" for stem in stems]
        )
        assert ("model", "n-step00000025", 2, 25) in recorder.calls
        assert (saver.last_model.name, saver.last_state.name) == ("n.safetensors", "n-state")
        assert recorder.uploads[-2:] == [("n.safetensors", False, True), ("n-state", True, True)]

    @pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ""])
    def test_keeping_the_last_ones(self, recorder, tmp_path, suffix):
        recorder.suffix = suffix
        saver = saver_of(recorder, save_every_n_epochs=1, save_last_n_epochs=2, state={"save_state": True})
        train(saver)
        kept = [f"n-{epoch:06d}{tail}" for epoch in (4, 5) for tail in (suffix, "-state")]
        assert names(tmp_path) == sorted([*kept, f"n{suffix}", "n-state"])

    def test_states_only_at_the_end(self, recorder, tmp_path):
        train(saver_of(recorder, save_every_n_epochs=2, state={"save_state_on_train_end": True}))
        assert [name for name in names(tmp_path) if name.endswith("-state")] == ["n-state"]

    def test_files_of_other_runs_stay(self, recorder, tmp_path):
        files.write_text(tmp_path / "n-000001.safetensors", "from an earlier run")
        (tmp_path / "n-000001-state").mkdir()
        saver = saver_of(recorder, save_every_n_epochs=1, save_last_n_epochs=1, state={"save_state": True})
        train(saver, start=10)
        assert (tmp_path / "n-000001.safetensors").read_text() == "from an earlier run"
        assert "n-000001-state" in names(tmp_path)
        assert "n-000004.safetensors" not in names(tmp_path)

    def test_a_resumed_run_removes_what_it_made_before(self, recorder, tmp_path):
        options = {"save_every_n_epochs": 1, "save_last_n_epochs": 1}
        first = saver_of(recorder, state={"save_state": True}, **options)
        train(first, stop=20)
        memory = first.to_json()
        second = saver_of(recorder, state={"save_state": True}, **options)
        second.restore(memory, tmp_path / "n-000002-state")
        assert "n-000002-state" in names(tmp_path)
        train(second, start=20, stop=30)
        assert names(tmp_path) == ["n-000003-state", "n-000003.safetensors"]

    def test_memory_from_elsewhere_cannot_point_outside(self, recorder, tmp_path):
        files.write_text(tmp_path / "precious", "x")
        (tmp_path / "out").mkdir()
        recorder.folder = tmp_path / "out"
        saver = saver_of(recorder, save_every_n_epochs=1, save_last_n_epochs=1)
        saver.restore({"models": {"n-000001": "../precious"}, "states": 3 * ["../precious"]}, tmp_path / "s")
        train(saver, start=10, stop=20)
        assert (tmp_path / "precious").exists()

    def test_a_new_file_is_complete_before_an_old_one_goes(self, recorder, tmp_path, monkeypatch):
        saver = saver_of(recorder, save_every_n_epochs=1, save_last_n_epochs=1)
        train(saver, stop=10)
        monkeypatch.setenv(VARIABLE, "retention.before_delete:raise")
        with pytest.raises(RuntimeError, match="before_delete"):
            train(saver, start=10, stop=20)
        assert names(tmp_path) == ["n-000001.safetensors", "n-000002.safetensors"]


class TestFailures:
    def test_training_goes_on_and_nothing_old_is_removed(self, recorder, tmp_path, caplog):
        saver = saver_of(recorder, save_every_n_epochs=1, save_last_n_epochs=1, state={"save_state": True})
        recorder.fail = [False, False, True, True]
        train(saver, stop=20)
        assert names(tmp_path) == ["n-000001-state", "n-000001.safetensors"]
        assert len(saver.failures) == 2
        assert "disk full" in caplog.text
        assert "Training goes on" in caplog.text
        train(saver, start=20, stop=30)
        assert "n-000003.safetensors" in names(tmp_path)

    def test_the_final_model_is_tried_again(self, recorder, caplog):
        saver = saver_of(recorder, save_retry_minutes=2)
        recorder.fail = [True, True, False]
        train(saver, start=59)
        assert recorder.slept == [30.0, 30.0]
        assert "trying again every 30 s, for 2.0 more minutes" in caplog.text

    def test_it_gives_up_after_the_given_time(self, recorder, tmp_path):
        saver = saver_of(recorder, save_retry_minutes=2, state={"save_state": True})
        recorder.fail = [True] * 5
        with pytest.raises(CannotSave, match="disk full") as caught:
            train(saver, start=59)
        assert caught.value.exit_code == 4
        assert len(recorder.slept) == 4
        assert names(tmp_path) == ["n-state"], "the state is saved even if the model cannot be"

    @pytest.mark.parametrize("minutes", [0, 10])
    def test_a_second_signal_ends_the_waiting(self, recorder, minutes):
        actions = SaveActions(recorder.model, recorder.state, sleep=recorder.slept.append, give_up=lambda: True)
        saver = Saver(SaveOptions(save_retry_minutes=minutes), StateOptions(), length(), actions)
        recorder.fail = [True] * 50
        with pytest.raises(CannotSave):
            saver.finish(Position(60, 6, 0))
        assert recorder.slept == []

    def test_all_ranks_learn_of_a_failure_on_the_first(self, recorder):
        other = Ranks(1, 2, broadcast=lambda value: "cannot save x: disk full.")
        actions = SaveActions(lambda target, *, epoch, step: None, lambda folder: None, sleep=recorder.slept.append)
        saver = Saver(SaveOptions(save_every_n_steps=1), StateOptions(save_state=True), length(), actions, other)
        saver.after_update(Position(1, 0, 1), epoch_ended=False)
        assert len(saver.failures) == 2
        assert saver.last_state is None


class TestStateNow:
    def test_named_by_step_and_once_per_step(self, recorder):
        saver = saver_of(recorder, save_every_n_steps=10, state={"save_state": True})
        assert saver.save_state_now(Position(3, 0, 3)).name == "n-step00000003-state"
        assert saver.save_state_now(Position(3, 0, 3)).name == "n-step00000003-state"
        train(saver, start=9, stop=10)
        assert saver.save_state_now(Position(10, 1, 0)).name == "n-step00000010-state"
        assert [call for call in recorder.calls if call[0] == "state"] == [
            ("state", "n-step00000003-state"),
            ("state", "n-step00000010-state"),
        ]

    def test_failure(self, recorder):
        saver = saver_of(recorder, save_retry_minutes=0.5)
        recorder.fail = [True] * 3
        assert saver.save_state_now(Position(3, 0, 3)) is None
        with pytest.raises(CannotSave, match="Input/output error"):
            saver.save_state_now(Position(3, 0, 3), insist=True)
        assert len(recorder.slept) == 1
        assert saver.save_state_now(Position(3, 0, 3), insist=True).name == "n-step00000003-state"


class TestEarlierFinalModel:
    @pytest.mark.parametrize("suffix", [".safetensors", ""])
    def test_is_kept_once_per_run(self, recorder, tmp_path, suffix, caplog):
        recorder.suffix = suffix
        for content in ("first", "second"):
            if suffix:
                files.write_text(tmp_path / f"n{suffix}", content)
            else:
                (tmp_path / "n").mkdir(exist_ok=True)
                files.write_text(tmp_path / "n" / "x", content)
                recorder.model = lambda target, *, epoch, step: files.write_text(target / "y", "new") or target
            saver = saver_of(recorder)
            train(saver, start=59)
            train(saver, start=59)
        assert f"n{suffix} of an earlier run is kept as n{suffix}.bak-1" in caplog.text
        kept = [tmp_path / f"n{suffix}.bak-{number}" for number in (1, 2)]
        assert [(path if suffix else path / "x").read_text() for path in kept] == ["first", "second"]
        assert len(names(tmp_path)) == 3

    def test_overwrite_keeps_nothing(self, recorder, tmp_path):
        files.write_text(tmp_path / "n.safetensors", "first")
        train(saver_of(recorder, overwrite=True), start=59)
        assert names(tmp_path) == ["n.safetensors"]

    def test_a_failed_save_leaves_it_under_its_name(self, recorder, tmp_path):
        files.write_text(tmp_path / "n.safetensors", "first")
        recorder.fail = [True]
        with pytest.raises(CannotSave):
            train(saver_of(recorder, save_retry_minutes=0), start=59)
        assert names(tmp_path) == ["n.safetensors"]
        assert (tmp_path / "n.safetensors").read_text() == "first"


class TestSpace:
    @pytest.mark.parametrize(
        ("save", "state", "counts"),
        [
            ({}, {}, (1, 0)),
            ({"save_every_n_epochs": 1}, {"save_state": True}, (6, 6)),
            ({"save_every_n_epochs": 1, "save_last_n_epochs": 2}, {"save_state_on_train_end": True}, (3, 1)),
            (
                {"save_every_n_steps": 10, "save_last_n_steps": 20},
                {"save_state": True, "save_last_n_steps_state": 5},
                (4, 2),
            ),
            ({"save_every_n_steps": 10}, {}, (7, 0)),
        ],
    )
    def test_planned(self, save, state, counts):
        planned = planned_saves(SaveOptions(**save), StateOptions(**state), length())
        assert (planned.models, planned.states) == counts

    def test_preflight(self, recorder, monkeypatch, caplog):
        saver = saver_of(recorder, save_every_n_epochs=1, state={"save_state": True})
        monkeypatch.setattr(saving, "free_bytes", lambda path: 10 << 30)
        with pytest.raises(UserError, match="10.0 GiB are free.*one save needs about 11.0 GiB"):
            saver.preflight(4 << 30, 7 << 30)
        with caplog.at_level(logging.WARNING):
            saver.preflight(1 << 30, 2 << 30)
        assert "6 models and 6 states need about 18.0 GiB" in caplog.text
        caplog.clear()
        saver.preflight(1 << 20, 1 << 20)
        assert caplog.text == ""
