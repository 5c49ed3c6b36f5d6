"""Caption steps beyond the golden cases: properties, determinism, and time."""

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.captions import CaptionPipeline, clean_caption, expand_wildcards
from library.data.dataset_spec import SubsetSpec

TAG = st.text(alphabet="abc xyz", min_size=1, max_size=6).map(str.strip).filter(bool)
TAGS = st.lists(TAG, min_size=1, max_size=10)


def process(subset, text, seed=0, epoch=1, step=0, **options):
    return CaptionPipeline(subset, 100, **options).process(text, random.Random(seed), epoch=epoch, step=step)


@given(TAGS, st.integers(0, 12), st.integers())
def test_shuffling_keeps_the_first_tags_and_loses_none(tags, keep, seed):
    made = process(SubsetSpec(shuffle_caption=True, keep_tokens=keep), ",".join(tags), seed).split(", ")
    assert made[:keep] == tags[:keep]
    assert sorted(made) == sorted(tags)


@given(TAGS, st.integers(0, 12), st.floats(0.01, 1), st.integers())
def test_tag_dropout_only_drops(tags, keep, rate, seed):
    subset = SubsetSpec(caption_tag_dropout_rate=rate, keep_tokens=keep)
    made = process(subset, ",".join(tags), seed)
    kept = made.split(", ") if made else []
    assert kept[:keep] == tags[:keep]
    rest = iter(tags)
    assert all(tag in rest for tag in kept)


@given(TAGS, TAGS, TAGS, st.integers())
def test_separator_protects_head_and_tail(head, middle, tail, seed):
    subset = SubsetSpec(shuffle_caption=True, keep_tokens_separator="|||")
    text = "|||".join(",".join(part) for part in (head, middle, tail))
    made = process(subset, text, seed).split(", ")
    assert made[: len(head)] == head
    assert made[len(made) - len(tail) :] == tail
    assert sorted(made) == sorted(head + middle + tail)


@given(st.text(max_size=40), st.integers())
def test_plain_settings_change_nothing_but_the_line(text, seed):
    assert process(SubsetSpec(), text, seed) == text.split("\n")[0]


@given(st.text(alphabet="{}|ab ", max_size=30), st.integers())
def test_wildcards_never_fail_and_settle(text, seed):
    made = expand_wildcards(text, random.Random(seed))
    assert len(made) <= len(text)
    if not set(text) & set("{}"):
        assert made == text


def test_dropout_rate_is_met():
    subset = SubsetSpec(caption_dropout_rate=0.25)
    dropped = sum(process(subset, "x", seed) == "" for seed in range(2000))
    assert 420 < dropped < 580


def test_same_generator_same_caption():
    subset = SubsetSpec(shuffle_caption=True, enable_wildcard=True, caption_tag_dropout_rate=0.3)
    text = "a, {b|c}, d, e, f\ng, h"
    assert process(subset, text, 5) == process(subset, text, 5)
    assert len({process(subset, text, seed) for seed in range(20)}) > 5


@pytest.mark.parametrize(
    ("options", "random_ones"),
    [
        ({}, ()),
        ({"caption_prefix": "p", "secondary_separator": ";", "keep_tokens": 2}, ()),
        ({"enable_wildcard": True}, ("enable_wildcard",)),
        ({"caption_dropout_every_n_epochs": 2}, ("caption_dropout_every_n_epochs",)),
        ({"shuffle_caption": True, "caption_dropout_rate": 0.1}, ("caption_dropout_rate", "shuffle_caption")),
        ({"token_warmup_step": 0.5}, ("token_warmup_step",)),
        ({"token_warmup_step": 0.001}, ()),
        ({"caption_tag_dropout_rate": 0.1}, ("caption_tag_dropout_rate",)),
    ],
)
def test_what_makes_captions_random(options, random_ones):
    pipeline = CaptionPipeline(SubsetSpec(**options), 100)
    assert pipeline.random_options() == random_ones
    assert pipeline.deterministic() is (not random_ones)


def test_validation_captions_have_nothing_random_but_wildcards():
    subset = SubsetSpec(
        shuffle_caption=True,
        caption_dropout_rate=1.0,
        caption_dropout_every_n_epochs=1,
        token_warmup_step=10,
        caption_tag_dropout_rate=1.0,
        flip_aug=True,
        caption_prefix="p",
    )
    quiet = subset.for_validation()
    assert CaptionPipeline(quiet).deterministic()
    assert process(quiet, "a,b") == "p a,b"
    assert not quiet.flip_aug


def test_share_of_the_run_needs_its_length():
    with pytest.raises(ValueError, match="token_warmup_step"):
        CaptionPipeline(SubsetSpec(token_warmup_step=0.5))


@pytest.mark.parametrize("text", ["{" * 10**6, "{a|" * 300_000, "{}" * 300_000, "a,{b|c}" * 100_000, "a," * 10**5])
def test_huge_captions_take_linear_time(text):
    subset = SubsetSpec(enable_wildcard=True, shuffle_caption=True, keep_tokens_separator="|||")
    begin = time.thread_time()
    process(subset, text)
    assert time.thread_time() - begin < 3


def test_control_characters_are_removed():
    assert clean_caption("a\x00b\r\nc\rd\te\x1b") == ("ab\nc\nd\te", True)
    assert clean_caption("a\r\nb") == ("a\nb", False)
    assert clean_caption("日本　語") == ("日本　語", False)
