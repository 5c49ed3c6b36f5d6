"""Options that are given by their place on the command line."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from library.cli import run_script
from library.errors import UserError
from library.option_groups import OptionGroup, OptionSet, opt
from library.option_parser import ConfigOptions, parse


@dataclass(frozen=True, kw_only=True)
class CopyOptions(OptionGroup, title="copy"):
    """From here to there."""

    source: str = opt("", positional=True, path=True, help="What to copy.")
    target: str = opt("", positional=True, path=True, help="Where to.")
    title: str | None = opt(None, positional=True, help="What to call it.")
    fast: bool = opt(False, help="Hurry.")
    times: int = opt(1, at_least=1, help="How often.")
    tags: tuple[str, ...] = opt((), help="Words.")


@dataclass(frozen=True, kw_only=True)
class Copy(OptionSet, script="copy"):
    """Options of a tool: neither a configuration file nor an output folder."""

    copy: CopyOptions = field(default_factory=CopyOptions)


@dataclass(frozen=True, kw_only=True)
class ListOptions(OptionGroup, title="list"):
    """Any number of files, at least one."""

    files: tuple[str, ...] = opt((), positional=True, help="Files.")
    level: int = opt(0, help="Level.")


@dataclass(frozen=True, kw_only=True)
class Listing(OptionSet, script="listing"):
    """Options of a tool that takes many files, and of one that knows configuration files."""

    files: ListOptions = field(default_factory=ListOptions)
    config: ConfigOptions = field(default_factory=ConfigOptions)


def values(*words, options=Copy):
    found = parse(options, words).values()
    return found.get("source"), found.get("target"), found.get("title")


def problems(*words, options=Copy):
    with pytest.raises(UserError) as caught:
        parse(options, words)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a", "b"], ("a", "b", None)),
        (["a", "b", "c"], ("a", "b", "c")),
        (["--fast", "a", "b"], ("a", "b", None)),
        (["a", "--fast", "b"], ("a", "b", None)),
        (["a", "--times", "3", "b"], ("a", "b", None)),
        (["a", "b", "--tags", "x", "y"], ("a", "b", None)),
        (["C:\\models\\a.ckpt", "-5"], ("C:\\models\\a.ckpt", "-5", None)),
        (["a", "true"], ("a", "true", None)),
    ],
)
def test_words_are_taken_in_order(words, expected):
    assert values(*words) == expected


EXPECTED = "Expected: source target [title]."


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], f"missing: source and target. {EXPECTED} See --help."),
        (["a"], f"missing: target. {EXPECTED} See --help."),
        (["a", "b", "c", "d"], f"unexpected argument 'd'. {EXPECTED} Put quotes around values that contain spaces."),
        (["a", "b", "c", "d", "e"], f"unexpected arguments 'd', 'e'. {EXPECTED} Put quotes around values that"),
        (["", "b"], "source: is empty. Is a variable of the shell not set?"),
        (["--source", "a", "b", "c"], f"--source: is given by its place, without a name. {EXPECTED}"),
        (["a", "-fast", "b"], "unexpected argument '-fast'. Options start with two dashes."),
        (["a", "b", "--fast", "true"], "--fast: takes no value, but 'true' follows. Write --fast=true."),
        # The unknown option may have swallowed the words, so that these are not called missing.
        (["--fats", "a", "b"], "--fats: unknown option. Did you mean --fast?"),
        (["--sour", "a", "b"], "--sour: unknown option."),
    ],
)
def test_one_clear_line(words, message):
    (found,) = problems(*words)
    assert found.startswith(message)


def test_a_list_takes_all_that_are_left():
    assert parse(Listing, ["a", "--level", "2", "b"]).files == ListOptions(files=("a", "b"), level=2)
    assert problems(options=Listing) == ["missing: files. Expected: files [files ...]. See --help."]


def test_words_may_come_from_a_configuration_file(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('files = ["x"]\n')
    assert parse(Listing, ["--config_file", str(path)]).files.files == ("x",)
    assert parse(Listing, ["y", "--config_file", str(path)]).files.files == ("y",)


def test_tool_without_files_and_folders_runs(capsys):
    seen = []
    assert run_script(Copy, seen.append, ["a", "b", "--fast"]) == 0
    assert (seen[0].copy.source, seen[0].copy.target, seen[0].copy.fast) == ("a", "b", True)
    assert run_script(Copy, seen.append, ["a"]) == 2
    assert capsys.readouterr().err == f"error: missing: target. {EXPECTED} See --help.\n"


def test_help_shows_the_places(capsys):
    assert run_script(Copy, print, ["--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: copy.py source target [title] [options]\n")
    assert "\n  source                          What to copy.\n" in text
    assert "--source" not in text and "--config_file" not in text
    assert run_script(Listing, print, ["--help"]) == 0
    assert "usage: listing.py files [files ...] [options]\n" in capsys.readouterr().out
