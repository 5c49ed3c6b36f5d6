"""`--config_file`, `--output_config`, and messages about broken TOML."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from library.config_file import config_text, load_toml, parse_toml, write_config
from library.errors import UserError
from library.option_groups import OptionGroup, OptionSet, opt
from library.option_parser import ConfigOptions, parse
from library.option_values import number_pair, resolution_text


@dataclass(frozen=True, kw_only=True)
class CarOptions(OptionGroup, title="car"):
    """A car."""

    resolution: str | None = opt(None, convert=resolution_text, help="Size.")
    face_crop_aug_range: tuple[float, float] | None = opt(None, convert=number_pair, help="Crop.")
    warmup: int | float = opt(0, help="Warm-up.")
    seats: int = opt(4, at_least=1, help="Seats.")
    speed: float = opt(1.0, help="Speed.")
    colour: str | None = opt(None, choices=("red", "blue"), help="Colour.")
    caption_extension: str = opt(".caption", help="Extension.")
    open_roof: bool = opt(False, help="Roof.")
    parts: tuple[str, ...] = opt((), help="Parts.")
    garage: str | None = opt(None, path=True, help="Garage.")
    hub_token: str | None = opt(None, secret=True, help="Token.")


@dataclass(frozen=True, kw_only=True)
class Cars(OptionSet, script="cars"):
    """Options of a script."""

    car: CarOptions = field(default_factory=CarOptions)
    config: ConfigOptions = field(default_factory=ConfigOptions)


@pytest.fixture
def config(tmp_path):
    def write(text, *argv, name="run.toml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return parse(Cars, ["--config_file", str(path), *argv])

    return write


@pytest.fixture
def refused(config):
    def read(text, *argv):
        with pytest.raises(UserError) as caught:
            config(text, *argv)
        return [str(problem) for problem in caught.value.problems]

    return read


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("resolution = 512", "resolution", "512"),
        ('resolution = "512,768"', "resolution", "512,768"),
        ("resolution = [512, 768]", "resolution", "512,768"),
        ('warmup = "5%"', "warmup", 0.05),
        ("warmup = 100", "warmup", 100),
        ("warmup = 0.1", "warmup", 0.1),
        ("seats = 5.0", "seats", 5),
        ('seats = "5"', "seats", 5),
        ("speed = 3", "speed", 3.0),
        ("open_roof = true", "open_roof", True),
        ("open_roof = 1", "open_roof", True),
        ('open_roof = "true"', "open_roof", True),
        ('parts = ["a=1", "b=2"]', "parts", ("a=1", "b=2")),
        ('parts = "a=1"', "parts", ("a=1",)),
        ("face_crop_aug_range = [1, 2.5]", "face_crop_aug_range", (1.0, 2.5)),
        ('face_crop_aug_range = "1,2.5"', "face_crop_aug_range", (1.0, 2.5)),
        ('caption_extention = ".txt"', "caption_extension", ".txt"),
        ('colour = ""', "colour", None),
        ("[anything]\nseats = 7", "seats", 7),
        ("garage = 'C:\\Users\\new'", "garage", "C:\\Users\\new"),
        ("\ufeffseats = 6\r\n", "seats", 6),
    ],
)
def test_values(config, text, name, value):
    read = config(text).value(name)
    assert read == value
    assert type(read) is type(value)


def test_the_command_line_wins(config):
    options = config("seats = 5\nopen_roof = true\nspeed = 9", "--seats", "6", "--open_roof=false")
    assert (options.car.seats, options.car.open_roof, options.car.speed) == (6, False, 9.0)
    assert options.given["seats"] == "command line"
    assert "run.toml, line 3" in options.given["speed"]


def test_extension_may_be_left_out(config, tmp_path):
    config("seats = 5")
    assert parse(Cars, ["--config_file", str(tmp_path / "run")]).car.seats == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('seats = "many"', "run.toml, line 1: seats: expected a whole number, got 'many'."),
        ("\n\nseats = 0", "run.toml, line 3: seats: must be at least 1, got 0."),
        ("seats = true", "seats: expected a whole number, got True."),
        ("seats = [1]", "seats: expected a whole number, got [1]."),
        ('colour = "green"', "colour: 'green' is not one of red, blue."),
        ("colour = ['red']", "colour: expected text, got ['red']."),
        ("speed = inf", "speed: expected a finite number, got inf."),
        ("seat = 5", "run.toml, line 1: seat: unknown option. Did you mean seats?"),
        ("open-roof = true", "open-roof: unknown option. Did you mean open_roof?"),
        ('garage = "D:\\new\\train"', "garage: 'D:\\new\\train' contains a control character."),
        ("[a]\n[a.b]\nseats = 1", "b is a table of tables. Tables may not hold tables here."),
        ("[[datasets]]\nx = 1", "This looks like a description of data sets: name it with --dataset_config."),
    ],
)
def test_refused_values(refused, text, message):
    (found,) = refused(text)
    assert message in found


def test_keys_of_other_tools_give_one_warning(config):
    options = config('noise_offset_type = "Original"\nnetwork_dim = 4\nblah_blah = 1\nseats = 5')
    (warning,) = options.warnings
    assert "noise_offset_type (the kohya_ss interface)" in str(warning)
    assert "network_dim (training networks (train_network.py)), blah_blah" in str(warning)
    assert options.car.seats == 5


def test_keys_of_other_tools_that_are_off_need_no_word(config):
    assert config('noise_offset_type = ""\nsdxl = false\nnetwork_dim = 0').warnings == ()


@pytest.mark.parametrize(
    ("text", "position", "hint"),
    [
        ('x = 1\ngarage = "C:\\Users\\x"\n', "line 2", "single quotes"),
        ("open_roof = True", "line 1", "true and false in small letters"),
        ("colour = None", "line 1", "leave the line out"),
        ("colour = red", "line 1", "Text needs quotes"),
        ("seats = 1\nseats = 2", "line 2", "only once"),
        ("[a]\n[a]", "line 2", "only once"),
        ("seats", "line 1", "key = value"),
    ],
)
def test_broken_toml_names_line_and_hint(refused, text, position, hint):
    (found,) = refused(text)
    assert "run.toml" in found
    assert position in found
    assert hint in found
    assert "\n" not in found


def test_broken_toml_shows_the_line_but_no_secret(refused):
    assert ": colour = red. Text" in refused("colour = red")[0]
    assert "abc123" not in refused("hub_token = abc123")[0]


def test_an_unreadable_file_is_the_only_complaint(refused):
    assert len(refused("colour = red", "--speed", "2")) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("seats = 1".encode("utf-16"), "not UTF-8 (looks like UTF-16)"),
        (b"a = 1\ncolour = '\xff'", "not UTF-8 (line 2)"),
        (b"x = " + b"[" * 100_000, "nested too deeply"),
        (b"a = '" + b"x" * (17 << 20) + b"'", "is larger than 16 MB"),
    ],
)
def test_hostile_files(refused, data, message):
    (found,) = refused(data)
    assert message in found


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.toml: file not found\. Looked for /"):
        parse(Cars, ["--config_file", str(tmp_path / "none")])
    with pytest.raises(UserError, match="is not a file"):
        load_toml(tmp_path, "--dataset_config")
    (tmp_path / "c.yaml").touch()
    with pytest.raises(UserError, match="This script reads options from TOML"):
        parse(Cars, ["--config_file", str(tmp_path / "c.yaml")])


def test_the_toml_package_serves_python_3_10(tmp_path, monkeypatch):
    pytest.importorskip("toml")
    monkeypatch.setitem(__import__("sys").modules, "tomllib", None)
    assert parse_toml("seats = 5\n[a]\nb = 'x'", tmp_path) == {"seats": 5, "a": {"b": "x"}}
    with pytest.raises(UserError, match="line 1"):
        parse_toml("colour = red", tmp_path)


def test_output_config_and_back(tmp_path):
    target = tmp_path / "out"
    words = [
        "--seats=7",
        "--speed=1.0",
        "--warmup=5%",
        "--face_crop_aug_range=1,2.5",
        "--parts",
        "a='x'",
        'b="\t\\"',
        "--open_roof",
        "--garage=C:\\Users\\é",
        "--hub_token=abc123",
    ]
    options = parse(Cars, [*words, f"--config_file={target}", "--output_config"])
    write_config(options, str(target))
    text = target.with_suffix(".toml").read_text(encoding="utf-8")
    assert "abc123" not in text
    assert "speed" not in text
    assert "config" not in text
    again = parse(Cars, ["--config_file", str(target)])
    assert config_text(again) == config_text(options)
    assert again.car.garage == "C:\\Users\\é"
    with pytest.raises(UserError, match="already exists"):
        write_config(options, str(target))


def test_output_config_needs_a_file():
    with pytest.raises(UserError, match="--output_config: needs --config_file"):
        parse(Cars, ["--output_config"])
