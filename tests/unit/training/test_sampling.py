import logging
import re
import subprocess
import sys
from contextlib import contextmanager

import pytest
from PIL import Image

from library.errors import UserError
from library.inference.diffusion import RenderingStopped
from library.training.options_output import SampleOptions, SaveOptions
from library.training.sampling import Process, SampleImages, sampling_problems

PROMPTS = "a fox --d 42\na duck\na bear --w 64 --n blurry\n"


class StubRenderer:
    """Records what it is asked for; prompts that hold `broken` fail, `stop` asks to stop."""

    def __init__(self):
        self.requests = []
        self.sessions = 0

    @contextmanager
    def session(self):
        self.sessions += 1
        yield

    def render(self, requests, *, watch):
        (request,) = requests
        self.requests.append(request)
        if "broken" in request.prompt:
            raise RuntimeError("out of memory")
        if "stop" in request.prompt:
            raise RenderingStopped
        return [Image.new("RGB", (request.width, request.height), "red")]


@pytest.fixture
def make(tmp_path):
    def build(text=PROMPTS, name="run", **more):
        options = {"sample_every_n_steps": 10, **more.pop("options", {})}
        (tmp_path / "prompts.txt").write_text(text, encoding="utf-8")
        options = SampleOptions(sample_prompts=str(tmp_path / "prompts.txt"), **options)
        save = SaveOptions(output_dir=str(tmp_path / "out"), output_name=name)
        return SampleImages(options, save, StubRenderer(), seed=3, **more)

    return build


def names(sampled):
    return [re.sub(r"_\d{14}", "_TIME", one.path.name) for one in sampled]


def test_names_by_step(make, tmp_path):
    sampled = make().run(30, 2)
    assert names(sampled) == ["run_000030_00_TIME_42.png", "run_000030_01_TIME.png", "run_000030_02_TIME.png"]
    assert all(one.path.parent == tmp_path / "out" / "sample" for one in sampled)
    assert [Image.open(one.path).size for one in sampled] == [(512, 512), (512, 512), (64, 512)]


def test_names_by_epoch_at_first_and_without_output_name(make):
    by_epoch = make(name=None, options={"sample_every_n_epochs": 1, "sample_at_first": True})
    assert names(by_epoch.run(30, 2))[0] == "e000002_00_TIME_42.png"
    assert names(by_epoch.run(0, 0))[1] == "e000000_01_TIME.png"
    assert names(make(options={"sample_at_first": True}).run(0, 0))[1] == "run_e000000_01_TIME.png"


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"sample_every_n_steps": 2}, [2, 4, 6]),
        ({"sample_every_n_steps": 2, "sample_every_n_epochs": 1}, [3, 6]),
        ({"sample_every_n_steps": None, "sample_every_n_epochs": 2}, [6]),
        ({"sample_every_n_steps": None, "sample_at_first": True}, []),
    ],
)
def test_when_samples_are_due(make, options, wanted):
    sampler = make(options=options)
    due = [step for step in range(1, 7) if sampler.due(step, step // 3, step % 3 == 0)]
    assert due == wanted
    assert sampler.wants_first(0) == ("sample_at_first" in options)
    assert not sampler.wants_first(4)


def test_switched_off_reads_nothing(tmp_path):
    options = SampleOptions(sample_prompts=str(tmp_path / "missing.txt"))
    sampler = SampleImages(options, SaveOptions(output_dir=str(tmp_path)), StubRenderer(), seed=0)
    assert not sampler.due(10, 1, True)
    assert not sampler.wants_first(0)
    assert sampling_problems(options) == ()


def test_prompts_are_dealt_to_the_ranks_in_turn(make):
    shares = [names(make(process=Process(rank, 2)).run(10, 1)) for rank in range(2)]
    assert shares == [["run_000010_00_TIME_42.png", "run_000010_02_TIME.png"], ["run_000010_01_TIME.png"]]


def test_seeds_are_derived_from_step_and_prompt_only(make):
    def seeds(step, **more):
        sampler = make(**more)
        sampler.run(step, 1)
        return [request.seed for request in sampler._renderer.requests]

    everything = seeds(10)
    assert everything[0] == 42
    assert len(set(everything)) == 3
    assert seeds(10) == everything
    assert seeds(20)[0] == 42
    assert seeds(20)[1:] != everything[1:]
    assert seeds(10, process=Process(1, 2)) == everything[1:2]
    assert all(0 <= seed < 2**32 for seed in everything)


def test_pictures_say_how_they_were_made(make):
    sampled = make(text="ein Füchslein 狐 --n blurry --s 7").run(10, 1)[0]
    text = Image.open(sampled.path).text
    assert text["prompt"] == "ein Füchslein 狐"
    assert text["negative-prompt"] == "blurry"
    assert text["seed"] == str(sampled.request.seed)
    assert (text["steps"], text["sampler"], text["scale"]) == ("7", "ddim", "7.5")


def test_one_broken_prompt_harms_nothing(make, caplog):
    sampler = make(text="a fox\nbroken\na bear\n")
    with caplog.at_level(logging.WARNING):
        sampled = sampler.run(10, 1)
    assert [one.index for one in sampled] == [0, 2]
    assert sampler.failures == 1
    assert "prompts.txt line 2" in caplog.text
    assert "out of memory" in caplog.text


def test_a_full_disk_harms_nothing(make, monkeypatch, caplog):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("library.files.write_bytes", full)
    sampler = make()
    assert sampler.run(10, 1) == []
    assert sampler.failures == 3
    assert "No space left" in caplog.text


def test_stop_leaves_the_rest_out_without_an_error(make):
    sampler = make(text="a fox\nstop\na bear\n")
    assert [one.index for one in sampler.run(10, 1)] == [0]
    assert sampler.failures == 0


def test_pictures_are_handed_over(make, caplog):
    got = []
    make(on_image=got.append).run(10, 1)
    assert [(one.tag, one.request.prompt, one.step, one.epoch) for one in got] == [
        ("sample_0", "a fox", 10, 1),
        ("sample_1", "a duck", 10, 1),
        ("sample_2", "a bear", 10, 1),
    ]

    def fail(sampled):
        raise ConnectionError("no tracker")

    make(on_image=fail).run(10, 1)
    assert "no tracker" in caplog.text


def test_bad_prompts_are_left_out_and_a_bad_file_is_refused_at_once(make, tmp_path):
    assert [prompt.prompt for prompt in make(text="a fox --zz\na duck\n").prompts] == ["a duck"]
    options = SampleOptions(sample_prompts=str(tmp_path / "missing.json"), sample_at_first=True)
    assert "missing.json" in str(sampling_problems(options)[0])
    with pytest.raises(UserError):
        SampleImages(options, SaveOptions(output_dir=str(tmp_path)), StubRenderer(), seed=0)


def test_default_sampler_is_that_of_the_option(make):
    assert make(options={"sample_sampler": "heun"}).prompts[0].sampler == "heun"


def test_the_checks_are_light():
    code = (
        "import library.training.sampling, sys;"
        "assert not {'torch', 'numpy', 'PIL', 'diffusers'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
