import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.models.attention_syntax import LARGEST, parse_attention


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain text", [("plain text", 1.0)]),
        ("", [("", 1.0)]),
        ("(word)", [("word", 1.1)]),
        ("[word]", [("word", 1 / 1.1)]),
        ("((word))", [("word", 1.1 * 1.1)]),
        ("(word:1.3)", [("word", 1.3)]),
        ("(a:-0.5) b", [("a", -0.5), (" b", 1.0)]),
        ("(n:+.7)", [("n", 0.7)]),
        (r"\(a\) \[b\] \\", [(r"(a) [b] " + "\\", 1.0)]),
        ("(open", [("open", 1.1)]),
        ("[open", [("open", 1 / 1.1)]),
        ("a) b] c", [("a) b] c", 1.0)]),
        ("(a)(b)", [("ab", 1.1)]),
        ("a:1.2 b", [("a:1.2 b", 1.0)]),
        ("a:1.2) b", [("a:1.2) b", 1.0)]),
        ("(x:y)", [("x:y", 1.1)]),
        ("(x:1.2.3)", [("x:1.2.3", 1.1)]),
        ("(x:.)", [("x:.", 1.1)]),
        ("(a:" + "9" * 400 + ")", [("a:" + "9" * 400, 1.1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.1 * (1 / 1.1)), (" c", 1 / 1.1)]),
        ("()", [("", 1.0)]),
    ],
)
def test_syntax(text, expected):
    found = parse_attention(text)
    assert [piece for piece, _ in found] == [piece for piece, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


@given(st.text(alphabet="()[]\\:.+-019 ab,", max_size=60))
def test_never_raises_and_keeps_text(text):
    found = parse_attention(text)
    assert found
    assert all(math.isfinite(weight) and abs(weight) <= LARGEST for _, weight in found)
    letters = [character for piece, _ in found for character in piece if character in "ab"]
    assert letters == [character for character in text if character in "ab"]


@pytest.mark.parametrize("text", ["(" * 10_000 + "a", "(a" * 10_000, "(" * 5000 + "a" + ")" * 5000, "[a]" * 300_000])
def test_hostile_captions_are_quick(text):
    start = time.process_time()
    found = parse_attention(text)
    assert time.process_time() - start < 2
    assert "a" in found[0][0] + found[-1][0]
