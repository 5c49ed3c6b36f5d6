import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.errors import UserError
from library.inference.dynamic_prompts import MOST_PROMPTS, close_braces, expand, is_dynamic


def chosen(text, count=200, seed=0):
    return set(expand(text, random.Random(seed), count))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a fox", {"a fox"}),
        ("a {red|green} fox", {"a red fox", "a green fox"}),
        ("{a}", {"a"}),
        ("{|a}b", {"b", "ab"}),
        ("{2$$a|b|c}", {"a, b", "b, a", "a, c", "c, a", "b, c", "c, b"}),
        ("{1-2$$a|b}", {"a", "b", "a, b", "b, a"}),
        ("{2-1$$a|b}", {"a", "b", "a, b", "b, a"}),
        ("{0$$a|b}c", {"c"}),
        ("{9$$a|b}", {"a, b", "b, a"}),
        ("{2$$ and $$a|b}", {"a and b", "b and a"}),
        ("{ and $$a|b}", {"a", "b"}),
        ("{a {b|c}|d}", {"a b", "a c", "d"}),
        ("{{a|b}|{c|d}}", {"a", "b", "c", "d"}),
        ("{2${$a|b}", {"{2$$a", "{2$b"}),
        (r"\{a|b\}", {"{a|b}"}),
        (r"{\{a\}|b}", {"{a}", "b"}),
        (r"\\{a|b}", {r"\\a", r"\\b"}),
        ("a | b", {"a | b"}),
        ("{} {a|b}", {"{} a", "{} b"}),
        ("x {a|b", {"x {a|b"}),
        ("x} {a|b}", {"x} a", "x} b"}),
        (r"({a|b}:1.2) \(c\)", {r"(a:1.2) \(c\)", r"(b:1.2) \(c\)"}),
        ("{a|b} --w {256|512}", {f"{x} --w {w}" for x in "ab" for w in (256, 512)}),
    ],
)
def test_variants(text, expected):
    assert chosen(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{e$$a|b} fox", ["a fox", "b fox"]),
        ("{E$$a|b}{e$$1|2|3}", ["a1", "a2", "a3", "b1", "b2", "b3"]),
        ("{e$$a|b} {e$$a|b}", ["a a", "a b", "b a", "b b"]),
        ("{e$$2$$a|b|c}", ["a, b", "a, c", "b, c"]),
        ("{e$$0-1$$a|b}", ["", "a", "b"]),
        ("{e$$2$$ and $$a|b|c}", ["a and b", "a and c", "b and c"]),
        ("{e$$a|{e$$b|c} d}", ["a", "b d", "c d"]),
        ("{x {e$$a|b}}", ["x a", "x b"]),
    ],
)
def test_enumeration_gives_each_combination_once(text, expected):
    assert expand(text, random.Random(1), 7) == expected


def test_groups_beside_an_enumerated_one_are_chosen_anew_for_each():
    made = expand("{e$$" + "|".join("abcdefgh") + "} {1|2|3|4}", random.Random(3))
    assert [one[0] for one in made] == list("abcdefgh")
    assert len({one[-1] for one in made}) > 1


def test_counts_and_the_generator_decide():
    text = "{a|b|c} {2$$d|e|f}"
    assert expand(text, random.Random(5), 20) == expand(text, random.Random(5), 20)
    assert len(expand(text, random.Random(5), 20)) == 20
    assert len({tuple(expand(text, random.Random(seed), 5)) for seed in range(10)}) > 1


def test_all_variants_come_equally_often():
    made = expand("{a|b|c|d}", random.Random(1), 4000)
    assert all(900 < made.count(letter) < 1100 for letter in "abcd")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{e$$a|b}" * 14, "combinations"),
        ("{e$$0-30$$" + "|".join("a" * 30) + "}", "combinations"),
        ("{e$$1500$$" + "|".join("a" * 3000) + "}", "combinations"),
        ("{e$$" * 12 + "a|b" + "}|c" * 11 + "}" + "{e$$1|2}" * 12, "combinations"),
        ("{a|b}" * 600, "500 variant groups"),
        ("{" * 25 + "a" + "}" * 25, "inside each other"),
        ("{a|b}" + "x" * 20_000, "20000 characters"),
        ("{4000$$" + "x" * 8000 + "$$" + "|" * 5000 + "}", "separators"),
        ("{1-$$a|b}", "'1-'"),
        ("{-$$a|b}", "{2$$a|b|c}"),
        ("{1-2-3$$a|b}", "'1-2-3'"),
        ("{" + "9" * 5000 + "$$a|b}", "number of variants"),
    ],
)
def test_what_would_explode_is_refused_quickly(text, words):
    start = time.process_time()
    with pytest.raises(UserError) as caught:
        expand(text, random.Random(0))
    assert words in str(caught.value)
    assert time.process_time() - start < 2


def test_many_combinations_are_possible():
    assert len(set(expand("{e$$0|1}" * 13, random.Random(0)))) == 2**13 <= MOST_PROMPTS


PIECES = st.sampled_from(
    ["{", "}", "|", "$$", "e$$", "2$$", "1-3$$", "0$$", " and $$", "a", "b ", "\\", "\0", "é", ", "]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=60).map("".join), st.integers(0, 5))
def test_any_text_is_expanded_or_refused(text, seed):
    try:
        made = expand(text, random.Random(seed), 3)
    except UserError as error:
        assert str(error)
        return
    assert 1 <= len(made) <= MOST_PROMPTS
    if not is_dynamic(text):
        assert made == [text] * 3
    assert expand(text, random.Random(seed), 3) == made
    assert expand(close_braces(text), random.Random(seed), 3) == made


TREE = st.recursive(
    st.sampled_from(["a", "b", "c d", ""]),
    lambda inner: st.lists(inner, min_size=2, max_size=3).map(lambda found: "{e$$x" + "|".join(found) + "y}"),
    max_leaves=6,
)


def all_of(tree):
    """The plainest way to enumerate: replace the first innermost group, again and again."""
    end = tree.find("}")
    if end < 0:
        return [tree]
    start = tree.rindex("{", 0, end)
    options = tree[start + 4 : end].split("|")
    return list(itertools.chain.from_iterable(all_of(tree[:start] + one + tree[end + 1 :]) for one in options))


@settings(deadline=None)
@given(TREE, TREE)
def test_enumeration_finds_what_replacing_one_by_one_finds(one, two):
    text = f"{one} {two}"
    made = expand(text, random.Random(0))
    assert set(made) == set(all_of(text))
