import time

import numpy as np
import pytest
import torch

from library.contracts import END_ID, START_ID, TokenizerSpec
from library.inference.prompt_text import PromptEncoder, split_parts, weight_tokens
from library.models.tokenizer import ClipTokenizer

CPU = torch.device("cpu")


def hidden(encoder, text, chunks=None):
    tokens = encoder.tokenize(text)
    return encoder.encode([tokens], chunks or tokens.chunks, CPU).hidden


@pytest.fixture
def encoder(family):
    return PromptEncoder(family, breaks=True)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a fox BREAK a duck", ["a fox", "a duck"]),
        ("a fox,BREAK, a duck", ["a fox,", ", a duck"]),
        ("fox BREAK duck\tBREAK  bear", ["fox", "duck", "bear"]),
        ("BREAK fox BREAK BREAK duck BREAK", ["fox", "duck"]),
        ("fox " * 80 + "BREAK duck", ["fox " * 75, "fox " * 5, "duck"]),
        ("fox " * 75 + "BREAK duck", ["fox " * 75, "duck"]),
        ("a BREAKFAST break Break", ["a BREAKFAST break Break"]),
        ("BREAK", [""]),
    ],
)
def test_break_starts_the_next_chunk(family, encoder, text, parts):
    tokens = encoder.tokenize(text)
    assert tokens.chunks == len(parts)
    alone = [hidden(encoder, part, 1) for part in parts]
    assert torch.equal(hidden(encoder, text), torch.cat(alone, dim=1))


def test_hostile_prompts_are_read_quickly(encoder):
    start = time.process_time()
    for text in (" " * 200_000, "BREAK " * 50_000, " AND" * 50_000):
        encoder.tokenize(text)
        split_parts(text)
    assert time.process_time() - start < 3


def test_brackets_reach_across_a_break(encoder):
    tokens = encoder.tokenize("a (fox BREAK duck:1.5) bear")
    assert tokens.chunks == 2
    assert tokens.weights[0][0, :4].tolist() == [1, 1, 1.5, 1]
    assert tokens.weights[0][1, :4].tolist() == [1, 1.5, 1, 1]
    assert tokens.ids[0].shape == (3, 77)


def test_sample_pictures_of_training_read_the_word(family):
    training = PromptEncoder(family)
    one, other = training.tokenize("fox BREAK duck"), training.tokenize("fox break duck")
    assert one.chunks == 1
    assert np.array_equal(one.ids[0], other.ids[0])


@pytest.mark.parametrize(
    "text", ["", "a fox", "(fox:1.2) [duck]", "fox " * 75, "fox " * 150, "fox! " * 112, "! " * 300]
)
@pytest.mark.parametrize("pad", [(END_ID, None), (0, "!")])
def test_without_the_word_both_read_the_same(family, text, pad):
    family.tokenizers = (ClipTokenizer(TokenizerSpec("toy", *pad)),)
    one, other = PromptEncoder(family).tokenize(text), PromptEncoder(family, breaks=True).tokenize(text)
    assert one.chunks == other.chunks
    assert np.array_equal(one.ids[0], other.ids[0])
    assert np.array_equal(one.weights[0], other.weights[0])


def test_a_chunk_that_ends_early_is_padded_as_it_would_be_alone(family):
    family.tokenizers = (ClipTokenizer(TokenizerSpec("sd2", 0, "!")),)
    fox = family.tokenizers[0].token_ids("fox")
    row = PromptEncoder(family, breaks=True).tokenize("fox BREAK fox").ids[0]
    assert row[0].tolist() == row[1].tolist() == [START_ID, *fox, END_ID, *[0] * (75 - len(fox))]
    assert row[2].tolist() == [START_ID, END_ID, *[0] * 75]


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_how_long_a_prompt_may_be(family, caplog, chunks):
    encoder = PromptEncoder(family, max_chunks=chunks, breaks=True)
    assert hidden(encoder, "fox " * 1000).shape[1] == 77 * chunks
    assert f"first {75 * chunks} of 1000" in caplog.text
    caplog.clear()
    assert encoder.tokenize("fox " * 75 * chunks).chunks == chunks
    assert not caplog.text
    assert encoder.tokenize("fox BREAK duck BREAK " * 4).chunks == chunks
    assert f"first {chunks} chunks" in caplog.text


@pytest.mark.parametrize("normalize", ["original", "abs", "none"])
def test_what_weights_leave_as_it_was(family, normalize):
    text = "a (red:1.6) [fox] in the snow"
    weighted = hidden(PromptEncoder(family, normalize=normalize), text)
    plain = hidden(PromptEncoder(family), "a red fox in the snow")
    weights = torch.ones(77)
    weights[2], weights[3] = 1.6, 1 / 1.1
    expected = plain * weights[:, None]
    factor = {
        "original": plain.mean() / expected.mean(),
        "abs": plain.abs().mean() / expected.abs().mean(),
        "none": torch.tensor(1.0),
    }[normalize]
    assert torch.allclose(weighted, expected * factor, rtol=1e-4, atol=1e-5)
    assert torch.equal(hidden(PromptEncoder(family, normalize=normalize), "a red fox in the snow"), plain)


def test_modes_differ():
    values = torch.randn(2, 77, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.ones(2, 77)
    weights[1, 3] = 1.7
    made = [weight_tokens(values, weights, mode) for mode in ("original", "abs", "none")]
    assert all(torch.equal(one[0], values[0]) for one in made)
    assert len({float(one[1].sum()) for one in made}) == 3


def test_the_whole_prompt_has_one_mean(family):
    """Over all of its chunks, so a weight in one of them changes the others a little."""
    encoder = PromptEncoder(family, breaks=True)
    plain, weighted = hidden(encoder, "a fox BREAK a duck"), hidden(encoder, "a fox BREAK a (duck:1.8)")
    assert torch.allclose(plain.mean(), weighted.mean(), rtol=1e-4)
    assert not torch.equal(plain[:, :77], weighted[:, :77])


def test_words_of_embeddings_may_lie_across_chunks(family):
    tokenizer = family.tokenizers[0].with_words({"cat*": 4})
    family.tokenizers = (tokenizer,)
    tokens = PromptEncoder(family).tokenize("fox " * 73 + "cat* duck")
    body = np.concatenate([tokens.ids[0][0, 1:76], tokens.ids[0][1, 1:76]])
    assert body[73:77].tolist() == [49408, 49409, 49410, 49411]
    assert tokens.chunks == 2


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a fox AND a duck", ["a fox", "a duck"]),
        ("a fox and ANDY AND, x", ["a fox and ANDY AND, x"]),
        ("a AND AND b", ["a", "", "b"]),
        ("AND a", ["AND a"]),
        ("", [""]),
    ],
)
def test_parts(text, parts):
    assert split_parts(text) == parts
