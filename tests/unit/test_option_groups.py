"""Declaring options, and reading them from a command line."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from library.errors import Problem, UserError
from library.option_groups import OptionGroup, OptionSet, loggable, opt, options_of, resume_fingerprint
from library.option_parser import ConfigOptions, parse
from library.option_values import int_or_float, number_pair, resolution_text, resolution_wh
from library.retired import NO_EFFECT_IN, NoEffect


@dataclass(frozen=True, kw_only=True)
class ShapeOptions(OptionGroup, title="shape"):
    """The shape of things."""

    shape: str = opt("round", choices=("round", "square"), help="Shape.")
    corner_radius: float | None = opt(None, at_least=0, matters_when={"shape": ("square",)}, help="Radius.")
    corners: int = opt(0, needs={"shape": ("square",)}, at_most=8, help="Corners.")
    warmup: int | float = opt(0, help="Warm-up.")
    shape_args: tuple[str, ...] = opt((), help="Arguments.")
    span: tuple[float, float] | None = opt(None, convert=number_pair, more_than=0, help="Span.")
    every: int | None = opt(None, zero_is_off="warn", help="Every.")
    hidden_key: str | None = opt(None, flag=None, help="Only in files.")

    def check(self) -> Iterator[Problem]:
        if self.warmup == 13:
            yield Problem("--warmup", "is unlucky")


@dataclass(frozen=True, kw_only=True)
class PaintOptions(OptionGroup, title="paint", resume="free"):
    """Its colour."""

    colour: str | None = opt(None, help="Colour.")
    glossy: bool = opt(False, resume="exact", excludes={"matt": "a surface is one or the other"}, help="Glossy.")
    matt: bool = opt(False, help="Matt.")
    varnish: bool = opt(False, implies={"primer": True}, help="Varnish.")
    primer: bool = opt(False, help="Primer.")
    oil_paint: bool = opt(False, means={"shape": "square"}, help="Old word for square.")
    batch: int = opt(1, flag="paint_batch", help="Batch.")
    token: str | None = opt(None, secret=True, help="Token.")
    folder: str | None = opt(None, path=True, help="Folder.")


@dataclass(frozen=True, kw_only=True)
class Things(OptionSet, script="things"):
    """Options of a script."""

    shape: ShapeOptions = field(default_factory=ShapeOptions)
    paint: PaintOptions = field(default_factory=PaintOptions)
    config: ConfigOptions = field(default_factory=ConfigOptions)


def problems(*argv, options=Things):
    with pytest.raises(UserError) as caught:
        parse(options, argv)
    return [str(problem) for problem in caught.value.problems]


def only_problem(*argv, options=Things):
    (found,) = problems(*argv, options=options)
    return found


def test_defaults_and_given():
    options = parse(Things, [])
    assert options == Things()
    assert dict(options.given) == {}
    options = parse(Things, ["--colour", "red", "--shape=square", "--paint_batch", "1"])
    assert (options.paint.colour, options.shape.shape) == ("red", "square")
    # What equals the default counts as not given: front ends write defaults out.
    assert set(options.given) == {"colour", "shape"}


def test_options_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse(Things, []).paint.colour = "blue"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--colour", "a", "--colour", "b"], "colour", "b"),
        (["--colour="], "colour", None),
        (["--colour=--x=1"], "colour", "--x=1"),
        (["--colour", "-x"], "colour", "-x"),
        (["--glossy"], "glossy", True),
        (["--glossy=false"], "glossy", False),
        (["--shape_args", "a=1", "b=2"], "shape_args", ("a=1", "b=2")),
        (["--shape_args", "a=1", "--glossy"], "shape_args", ("a=1",)),
        (["--shape_args"], "shape_args", ()),
        (["--shape_args=a=1,2"], "shape_args", ("a=1,2",)),
        (["--span", "1,2.5"], "span", (1.0, 2.5)),
        (["--paint_batch", "4"], "paint_batch", 4),
        (["--shape=square", "--corner_radius", "2"], "corner_radius", 2.0),
    ],
)
def test_values_of_the_command_line(words, name, value):
    assert parse(Things, words).value(name) == value


@pytest.mark.parametrize(
    ("text", "value"), [("5%", 0.05), ("100", 100), ("0.1", 0.1), ("0", 0.0), (7, 7), (7.0, 7), (0.5, 0.5)]
)
def test_int_or_float(text, value):
    read = int_or_float(text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("text", ["100.0", "x", "", "nan", "1e400", True, None, "150.5%x"])
def test_int_or_float_refuses(text):
    with pytest.raises(ValueError, match="expected"):
        int_or_float(text)


@pytest.mark.parametrize(
    ("value", "text", "wh"),
    [
        (512, "512", (512, 512)),
        ("512", "512", (512, 512)),
        ("768, 512", "768,512", (768, 512)),
        ([768, 512], "768,512", (768, 512)),
        (512.0, "512", (512, 512)),
    ],
)
def test_resolution(value, text, wh):
    assert resolution_text(value) == text
    assert resolution_wh(text) == wh


@pytest.mark.parametrize("value", ["abc", "", "1,2,3", "0", "-5", [512.5], [], None, True, "512x512"])
def test_resolution_refuses(value):
    with pytest.raises(ValueError, match="expected a size"):
        resolution_text(value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shape", "triangle"], "--shape: 'triangle' is not one of round, square."),
        (["--shape", "squar"], "--shape: 'squar' is not one of round, square (did you mean 'square'?)."),
        (["--paint_batch", "two"], "--paint_batch: expected a whole number, got 'two'."),
        (["--paint_batch", "9" * 5000], "--paint_batch: expected a whole number, got '9"),
        (["--shape=square", "--corner_radius", "-1"], "--corner_radius: must be at least 0, got -1.0."),
        (["--shape=square", "--corners", "9"], "--corners: must be at most 8, got 9."),
        (["--span", "0,1"], "--span: must be more than 0, got 0.0."),
        (["--span", "2,1"], "--span: the first number must not be larger"),
        (["--warmup", "nan"], "--warmup: expected a finite number, got 'nan'."),
        (["--colour"], "--colour: needs a value."),
        (["--colour", "--glossy"], "--colour: needs a value. Write --colour=--glossy if the value starts with --."),
        (["--glossy", "true"], "--glossy: takes no value, but 'true' follows. Write --glossy=true."),
        (["--glossy=maybe"], "--glossy: expected true or false, got 'maybe'."),
        (["--colour", "light", "blue"], "unexpected argument 'blue'. Put quotes around values that contain spaces."),
        (["-colour"], "unexpected argument '-colour'. Options start with two dashes."),
        (["--folder", "C:\new"], "--folder: 'C:\\new' contains a control character. A backslash"),
    ],
)
def test_refused_values(words, message):
    assert only_problem(*words).startswith(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gloss"], "--gloss: options may not be abbreviated. Write --glossy."),
        (["--shape_a", "x=1"], "--shape_a: options may not be abbreviated. Write --shape_args."),
        (["--color", "red"], "--color: unknown option. Did you mean --colour?"),
        (["--paint-batch", "2"], "--paint-batch: unknown option. Write --paint_batch."),
        (["--zzzzzz=1"], "--zzzzzz: unknown option. See --help for all options."),
        (["--hidden_key=1"], "--hidden_key: unknown option. See --help for all options."),
        (
            ["--network_module=networks.lora"],
            "--network_module: is not an option of this script; it belongs to training networks (train_network.py).",
        ),
    ],
)
def test_unknown_options(words, message):
    assert only_problem(*words) == message


def test_all_problems_are_reported_together_and_follow_ups_are_not():
    found = problems("--shap=1", "--corners=3", "--colour", "--paint_batch=x", "--warmup=13", "--glossy", "--matt")
    assert [line.split(":")[0] for line in found] == ["--shap", "--colour", "--paint_batch", "--glossy", "--warmup"]


def test_needs_excludes_and_matters():
    assert only_problem("--corners", "3") == "--corners: needs --shape square."
    assert only_problem("--glossy", "--matt") == (
        "--glossy: cannot be combined with --matt: a surface is one or the other."
    )
    options = parse(Things, ["--corner_radius", "1"])
    assert [str(warning) for warning in options.warnings] == ["--corner_radius: has no effect without --shape square."]
    assert only_problem("--corner_radius=1", "--strict_args").startswith("--corner_radius: has no effect")
    assert not parse(Things, ["--corner_radius=1", "--shape=square"]).warnings
    assert not parse(Things, ["--corner_radius=0"]).warnings


def test_implied_options():
    options = parse(Things, ["--varnish"])
    assert options.paint.primer
    assert PaintOptions(varnish=True).primer
    assert options.notices == ("--varnish switches --primer on",)
    assert not options.warnings


def test_secrets_on_the_command_line_are_pointed_out(tmp_path):
    assert "list of processes" in parse(Things, ["--token=abc"]).notices[0]
    (tmp_path / "c.toml").write_text("token = 'abc'", encoding="utf-8")
    assert parse(Things, [f"--config_file={tmp_path / 'c.toml'}"]).notices == ()


def test_zero_switches_off():
    options = parse(Things, ["--every", "0"])
    assert options.shape.every is None
    assert [str(warning) for warning in options.warnings] == ["--every: 0 switches it off."]


def test_options_without_effect_in_a_script(monkeypatch):
    monkeypatch.setitem(NO_EFFECT_IN, "glossy", {"things": NoEffect("it is dark", refuse=False)})
    monkeypatch.setitem(NO_EFFECT_IN, "matt", {"things": NoEffect("it is dark", refuse=True)})
    options = parse(Things, ["--glossy"])
    assert str(options.warnings[0]) == "--glossy: has no effect in things.py: it is dark."
    assert only_problem("--matt") == "--matt: has no effect in things.py: it is dark."


def test_a_script_adapts_what_it_inherits():
    @dataclass(frozen=True, kw_only=True)
    class Others(Things, changes={"shape": {"default": "oval", "choices": ("oval",)}}, leave_out=("matt",)):
        pass

    options = parse(Others, [])
    assert options.shape.shape == "oval"
    assert parse(Others, ["--shape=oval"]).given == {}
    assert "is not one of oval" in only_problem("--shape=round", options=Others)
    assert only_problem("--matt", options=Others).startswith("--matt: unknown option")
    assert "matt" not in options.values()
    assert parse(Things, []).shape.shape == "round"


def test_option_names_are_unique():
    @dataclass(frozen=True, kw_only=True)
    class MoreShapes(OptionGroup, title="more"):
        shape: str = opt("", help="Again.")

    @dataclass(frozen=True, kw_only=True)
    class Twice(Things):
        more: MoreShapes = field(default_factory=MoreShapes)

    sys.modules[__name__].MoreShapes = MoreShapes  # type: ignore[attr-defined] - annotations are looked up here
    with pytest.raises(TypeError, match="declared twice"):
        Twice.options()


def test_opt_refuses_unknown_notes():
    with pytest.raises(TypeError, match="halp"):
        opt(1, halp="me")  # type: ignore[call-arg]


def test_fingerprint_and_loggable():
    options = parse(Things, ["--glossy", "--token=abc", "--folder=/home/me", "--colour=red"])
    assert resume_fingerprint(options)["paint"] == {"glossy": True}
    assert resume_fingerprint(options)["shape"]["shape"] == "round"
    # An old spelling and the new one are the same run.
    assert resume_fingerprint(parse(Things, ["--oil_paint"])) == resume_fingerprint(parse(Things, ["--shape=square"]))
    shown = loggable(options)
    assert shown["colour"] == "red"
    assert not {"token", "folder"} & set(shown)


def test_declarations_can_be_listed():
    names = {option.name: option for option in options_of(PaintOptions)}
    assert names["paint_batch"].field_name == "batch"
    assert names["paint_batch"].annotation is int
    assert names["glossy"].exact
    assert not names["colour"].exact
    assert names["token"].secret
