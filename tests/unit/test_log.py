"""Messages on the console."""

from __future__ import annotations

import logging
import warnings

import pytest

from library import log


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    log.summary.reset()
    root, level = list(logging.getLogger().handlers), logging.getLogger().level
    yield
    log.summary.reset()
    logging.captureWarnings(capture=False)
    logging.getLogger().handlers[:] = root
    logging.getLogger().setLevel(level)


OURS, THEIRS = logging.getLogger("library.test"), logging.getLogger("other_library.test")


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("plain caf\u00e9 \u732b", "plain caf\u00e9 \u732b"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("\udcff.png", "\\udcff.png"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
    ],
)
def test_safe_text(text, safe):
    assert log.safe_text(text) == safe


def test_levels(capfd):
    log.set_up(simple=True)
    OURS.debug("no")
    OURS.info("ours")
    THEIRS.info("no")
    THEIRS.warning("theirs")
    assert capfd.readouterr().err == "ours\ntheirs\n"
    log.set_up("ERROR", simple=True)
    OURS.warning("no")
    THEIRS.warning("no")
    OURS.error("yes")
    assert capfd.readouterr().err == "yes\n"


def test_time_and_level_unless_simple(capfd):
    log.set_up()
    OURS.info("hello")
    assert capfd.readouterr().err.endswith(" INFO    hello\n")


def test_other_ranks_only_warn(capfd, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    log.set_up(simple=True)
    OURS.info("no")
    OURS.warning("yes")
    assert capfd.readouterr().err == "[rank 3] yes\n"


def test_repeated_warnings_are_counted(capfd):
    log.set_up(simple=True)
    for number in range(8):
        OURS.warning("image %d is odd", number)
    OURS.warning("another")
    shown = capfd.readouterr().err.splitlines()
    assert shown[:4] == [f"image {number} is odd" for number in range(4)]
    assert shown[4].startswith("image 4 is odd (said 5 times")
    assert shown[5:] == ["another"]
    assert log.summary.warnings == {"image 0 is odd": 8, "another": 1}


def test_python_warnings_are_shown_and_counted_apart(capfd):
    log.set_up(simple=True)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=False)
        logging.captureWarnings(capture=True)
        warnings.warn("first", stacklevel=1)
        warnings.warn("second", stacklevel=1)
        logging.captureWarnings(capture=False)
    assert len(log.summary.warnings) == 2
    assert "first" in capfd.readouterr().err


def test_control_characters_are_escaped(capfd):
    log.set_up(simple=True)
    OURS.info("two\nlines and \x1b[2J")
    assert capfd.readouterr().err == "two\nlines and \\x1b[2J\n"


def test_messages_go_above_a_progress_bar(capfd):
    tqdm = pytest.importorskip("tqdm")
    log.set_up(simple=True)
    with tqdm.tqdm(total=3, ncols=60) as bar:
        bar.update(1)
        OURS.info("hello")
    assert "\rhello\n" in capfd.readouterr().err.replace(" " * 60, "")
