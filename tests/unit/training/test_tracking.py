"""Curves: names, folders, averages, resuming, and that no tracker can disturb a run."""

import logging
import os
import re
import socket
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch

from library.contracts import Position, RunLength
from library.errors import UserError
from library.training.options import LogOptions
from library.training.options_cascade_run import CascadeLogOptions
from library.training.scalars import DeferredScalars, Histogram, LossAverage, learning_rates, peak_memory_mb
from library.training.tracking import Tracker

LENGTH = RunLength(6, 2, 3, 1, 1, 1)


def positions(start=0, stop=6):
    position = Position(start, *divmod(start, LENGTH.updates_per_epoch))
    for _ in range(start, stop):
        position = position.advance(LENGTH)
        yield position


def run(tracker, start=0, stop=6, **values):
    with tracker:
        for position in positions(start, stop):
            loss = torch.tensor(float(position.step))
            ended = position.update_in_epoch == 0
            tracker.update(position, {"loss": loss, "lr/unet": 1e-3, **values}, images=2, epoch_ended=ended)
    return tracker


def tracker_of(folder, **options):
    return Tracker(LogOptions(logging_dir=str(folder), **options), length=LENGTH)


def curves(folder):
    """Scalars as TensorBoard shows them: name -> [(step, value)]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def only(folder):
    (entry,) = folder.iterdir()
    return entry


class TestLossAverage:
    def test_moves_over_one_epoch(self):
        recorder = LossAverage()
        averages = []
        for loss in (1.0, 2.0, 3.0, 4.0, 5.0, 9.0):
            recorder.add(len(averages) % 3, loss)
            averages.append(recorder.average)
        assert averages == [1.0, 1.5, 2.0, 3.0, 4.0, 6.0]

    def test_state_continues_exactly(self):
        import json

        straight, saved = LossAverage(), LossAverage()
        losses = [0.1 * number / 3 for number in range(20)]
        for index, loss in enumerate(losses[:13]):
            straight.add(index % 7, loss)
            saved.add(index % 7, loss)
        resumed = LossAverage()
        resumed.load_state_dict(json.loads(json.dumps(saved.state_dict())))
        for index, loss in enumerate(losses[13:], 13):
            straight.add(index % 7, loss)
            resumed.add(index % 7, loss)
        assert resumed.average == straight.average

    def test_a_loss_that_is_no_number_does_not_spoil_it(self):
        recorder = LossAverage()
        for loss in (1.0, float("nan"), 3.0, float("inf")):
            recorder.add(0 if loss == 1.0 else 1, loss)
        assert recorder.average == 2.0

    @pytest.mark.parametrize("state", [{}, {"losses": 3}, {"losses": [1.0]}])
    def test_nonsense_starts_anew(self, state):
        recorder = LossAverage()
        recorder.load_state_dict(state)
        assert recorder.average == 0.0


class TestDeferredScalars:
    def test_one_push_late(self):
        queue, seen = DeferredScalars(), []
        value = torch.zeros(())
        for step in range(3):
            value.fill_(step)
            queue.push(step, {"x": value, "y": float(step), "z": torch.tensor([step], dtype=torch.int64)})
            seen.append(list(queue.ready()))
        assert [len(ready) for ready in seen] == [0, 1, 1]
        assert seen[1] == [(0, {"x": 0.0, "y": 0.0, "z": 0.0})]
        assert list(queue.drain()) == [(2, {"x": 2.0, "y": 2.0, "z": 2.0})]
        assert list(queue.drain()) == []


class TestTensorBoard:
    def test_folder_names_and_curves(self, tmp_path):
        before = time.strftime("%Y%m%d%H%M%S")
        run(tracker_of(tmp_path, log_prefix="p_"), grad_norm=torch.tensor(2.0))
        folder = only(tmp_path)
        assert re.fullmatch(r"p_\d{14}", folder.name)
        assert before <= folder.name[2:] <= time.strftime("%Y%m%d%H%M%S")
        assert only(folder).name == "dreambooth"
        found = curves(folder / "dreambooth")
        assert found["loss"] == found["loss/current"] == [(step, float(step)) for step in range(1, 7)]
        assert found["loss/average"] == [(1, 1.0), (2, 1.5), (3, 2.0), (4, 3.0), (5, 4.0), (6, 5.0)]
        assert found["loss/epoch"] == found["loss/epoch_average"] == [(1, 2.0), (2, 5.0)]
        assert (
            [step for step, _ in found["lr/unet"]]
            == [step for step, _ in found["images_per_second"]]
            == list(range(1, 7))
        )
        assert found["grad_norm"][0] == (1, 2.0)

    def test_the_host_is_not_named(self, tmp_path):
        host = socket.gethostname()
        run(tracker_of(tmp_path, log_config=True))
        assert socket.gethostname() == host
        for path in tmp_path.rglob("*"):
            assert host not in path.name

    def test_tracker_name_and_every_nth_step(self, tmp_path):
        run(tracker_of(tmp_path, log_tracker_name="mine", log_every_n_steps=2))
        found = curves(only(tmp_path) / "mine")
        assert [step for step, _ in found["loss"]] == [2, 4, 6]
        assert found["loss/average"][-1] == (6, 5.0)

    def test_a_resumed_run_continues_its_curves(self, tmp_path):
        first = tracker_of(tmp_path)
        with first:
            states = {}
            for position in positions(0, 5):
                first.update(position, {"loss": torch.tensor(float(position.step))})
                states[position.step] = (first.state_dict(), first.loss_average.state_dict())
        second = tracker_of(tmp_path)
        second.resume(*states[3], 3)
        run(second, 3)
        found = curves(only(tmp_path) / "dreambooth")
        assert found["loss"] == [(step, float(step)) for step in range(1, 7)]
        assert found["loss/average"][-1] == (6, 5.0)

    @pytest.mark.parametrize("folder", ["../outside", "/etc", "", None, 3])
    def test_a_folder_from_a_state_stays_inside(self, tmp_path, folder):
        tracker = tracker_of(tmp_path / "logs")
        tracker.resume({"folder": folder}, {}, 0)
        run(tracker)
        assert re.fullmatch(r"\d{14}", only(tmp_path / "logs").name)

    def test_two_runs_in_one_second_have_two_folders(self, tmp_path):
        for _ in range(2):
            run(tracker_of(tmp_path))
        assert len(list(tmp_path.iterdir())) == 2

    def test_hyper_parameters(self, tmp_path):
        hparams = {
            "learning_rate": 1e-3,
            "optimizer_args": ("a=1",),
            "wandb_api_key": "k" * 40,
            "huggingface_token": "t",
            "x": None,
        }
        with Tracker(LogOptions(logging_dir=str(tmp_path), log_config=True), length=LENGTH, hparams=hparams):
            pass
        (path,) = tmp_path.rglob("hparams.yml")
        assert path.parent.parent.name == "dreambooth"
        assert "learning_rate: 0.001" in path.read_text()
        everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        assert b"optimizer_args" in everything
        assert b"k" * 40 not in everything
        assert b"huggingface_token" not in everything

    def test_without_log_config_nothing_is_stored(self, tmp_path):
        with Tracker(LogOptions(logging_dir=str(tmp_path)), length=LENGTH, hparams={"learning_rate": 1e-3}):
            pass
        assert list(tmp_path.rglob("hparams.yml")) == []

    def test_tracker_config(self, tmp_path):
        config = tmp_path / "c.toml"
        config.write_text("[tensorboard]\nfilename_suffix = '.mine'\n")
        run(tracker_of(tmp_path / "logs", log_tracker_config=str(config)))
        assert list((tmp_path / "logs").rglob("*.mine"))
        config.write_text("[tensorboard]\nnonsense = 1\n")
        with pytest.raises(UserError, match="nonsense"), tracker_of(tmp_path / "logs", log_tracker_config=str(config)):
            pass

    def test_a_writer_that_fails_is_dropped(self, tmp_path, caplog):
        tracker = tracker_of(tmp_path)
        with tracker, caplog.at_level(logging.WARNING):
            tracker._writers[0]._writer.add_scalar = lambda *_: (_ for _ in ()).throw(
                OSError("No space left on device")
            )
            for position in positions():
                tracker.update(position, {"loss": torch.tensor(1.0)})
        assert caplog.text.count("is switched off; training goes on") == 1
        assert tracker.loss_average.average == 1.0

    def test_other_ranks_write_nothing(self, tmp_path):
        run(Tracker(LogOptions(logging_dir=str(tmp_path)), length=LENGTH, is_main=False))
        assert list(tmp_path.iterdir()) == []

    def test_without_logging_dir_only_the_progress_bar(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        tracker = run(Tracker(LogOptions(), length=LENGTH))
        assert list(tmp_path.iterdir()) == []
        assert tracker.loss_average.average == 5.0
        assert "6/6" in capsys.readouterr().err


def pictures():
    """Two ranks' sample pictures, as the sampler hands them over."""
    from PIL import Image

    def one(index):
        request = SimpleNamespace(prompt=f"prompt {index}")
        return SimpleNamespace(
            index=index, tag=f"sample_{index}", image=Image.new("RGB", (8, 8)), step=4, request=request
        )

    return [[one(0), one(2)], [one(1)]]


def test_pictures_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tracker_of(tmp_path) as tracker:
        tracker.add_pictures(pictures())
    found = EventAccumulator(str(only(tmp_path) / "dreambooth"))
    found.Reload()
    assert found.Tags()["images"] == ["sample_0", "sample_1", "sample_2"]
    assert found.Images("sample_2")[0].step == 4


HISTOGRAM = Histogram([-1.0, 0.0, 1.0, 2.0], [0.5, 0.25, 0.25])


def test_histograms_and_further_names(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = CascadeLogOptions(logging_dir=str(tmp_path))
    with Tracker(log, length=LENGTH) as tracker:
        for position in positions(0, 2):
            values = {"loss": torch.tensor(2.0), "lr/unet": 1e-3, "lr/text_encoder1": 1e-4}
            tracker.update(position, values, epoch_ended=False)
        tracker.write_histograms(lambda: {"adaptive_loss": HISTOGRAM}, 2)
    folder = only(tmp_path) / "dreambooth"
    found = curves(folder)
    assert found["total_steps"] == [(1, 1), (2, 2)]
    assert found["lr"] == [(1, pytest.approx(1e-3)), (2, pytest.approx(1e-3))]
    events = EventAccumulator(str(folder))
    events.Reload()
    (event,) = events.Histograms("adaptive_loss")
    assert (event.step, event.histogram_value.bucket_limit[-3:]) == (2, [0.0, 1.0, 2.0])
    assert event.histogram_value.bucket[-3:] == [0.5, 0.25, 0.25]


class TestWandb:
    @pytest.fixture
    def wandb(self, monkeypatch):
        """A stand-in that records what it is told."""
        module = ModuleType("wandb")
        module.rows, module.started, module.keys = [], [], []
        module.login = lambda key: module.keys.append(key)

        def init(**arguments):
            module.started.append(arguments)
            return SimpleNamespace(
                id=arguments.get("id") or "run1",
                log=lambda row, step: module.rows.append((step, row)),
                finish=lambda: module.rows.append("finished"),
            )

        module.init = init
        monkeypatch.setitem(sys.modules, "wandb", module)
        monkeypatch.delenv("WANDB_DIR", raising=False)
        monkeypatch.setenv("WANDB_DIR", "")
        return module

    def test_rows_never_go_back(self, tmp_path, wandb):
        options = {
            "log_with": "wandb",
            "wandb_run_name": "nice",
            "wandb_api_key": "secret",
            "log_tracker_name": "project",
        }
        tracker = run(tracker_of(tmp_path, **options))
        steps = [row[0] for row in wandb.rows if row != "finished"]
        assert steps == sorted(steps)
        assert (6, {"loss/epoch": 5.0, "loss/epoch_average": 5.0, "epoch": 2}) in wandb.rows
        assert wandb.rows[-1] == "finished"
        assert wandb.keys == ["secret"]
        assert wandb.started[0]["project"] == "project"
        assert wandb.started[0]["name"] == "nice"
        assert os.environ["WANDB_DIR"].endswith("project")
        assert list(tmp_path.rglob("events*")) == []
        assert tracker.state_dict()["folder"]

    def test_pictures_have_their_prompts(self, tmp_path, wandb):
        wandb.Image = lambda image, caption: caption
        with tracker_of(tmp_path, log_with="wandb") as tracker:
            tracker.add_pictures(pictures())
        assert wandb.rows[:3] == [(4, {f"sample_{index}": f"prompt {index}"}) for index in range(3)]

    def test_histograms(self, tmp_path, wandb):
        wandb.Histogram = lambda np_histogram: np_histogram
        with tracker_of(tmp_path, log_with="wandb") as tracker:
            tracker.write_histograms(lambda: {"adaptive_loss": HISTOGRAM}, 3)
        assert wandb.rows[0] == (3, {"adaptive_loss": ([0.5, 0.25, 0.25], [-1.0, 0.0, 1.0, 2.0])})

    def test_resuming_continues_the_run(self, tmp_path, wandb):
        first = tracker_of(tmp_path, log_with="all")
        with first:
            state = first.state_dict()
        second = tracker_of(tmp_path, log_with="all")
        second.resume(state, {}, 3)
        run(second, 3)
        assert [started["id"] for started in wandb.started] == [None, "run1"]
        assert list(tmp_path.rglob("events*"))


class TestValues:
    def test_learning_rates(self):
        parameter = torch.nn.Parameter(torch.zeros(1))
        other = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([{"params": [parameter], "lr": 0.5}, {"params": [other], "lr": 0.25, "d": 4.0}])
        assert learning_rates(["unet", "text_encoder1"], optimizer) == {
            "lr/unet": 0.5,
            "lr/text_encoder1": 0.25,
            "lr/d*lr/text_encoder1": 1.0,
        }

    def test_memory(self):
        assert peak_memory_mb(torch.device("cpu")) > 50
