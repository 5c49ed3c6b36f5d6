import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from library.errors import UserError
from library.models import tokenizer as module
from library.models.options import TextOptions
from library.models.specs import SD1, SD2, SD_V1_TOKENIZER, SD_V2_TOKENIZER
from library.models.tokenizer import NO_TOKEN, ClipTokenizer, tokenizers_for


def test_rows_are_padded_and_cut():
    tokenizer = ClipTokenizer(SD_V1_TOKENIZER)
    ids, weights = tokenizer.encode("a photo of a cat")
    assert weights is None
    assert ids.tolist() == [[49406, 320, 1125, 539, 320, 2368, *[49407] * 71]]
    assert tokenizer.encode("cat " * 500)[0].tolist() == [[49406, *[2368] * 75, 49407]]
    assert tokenizer.token_count("cat " * 500) == 500


def test_without_padding_nothing_follows_the_end_token():
    (tokenizer,) = tokenizers_for(SD2, TextOptions(no_token_padding=True, weighted_captions=True))
    ids, weights = tokenizer.encode("(cat:1.5)")
    assert ids.tolist() == [[49406, 2368, 49407, *[NO_TOKEN] * 74]]
    assert weights.tolist() == [[1.0, 1.5, *[1.0] * 75]]
    assert tokenizer.encode("cat " * 500)[0].tolist() == [[49406, *[2368] * 75, 49407]]


def test_unpadded_long_captions_are_refused():
    with pytest.raises(UserError, match="--no_token_padding"):
        tokenizers_for(SD1, TextOptions(no_token_padding=True, max_token_length=150))


def test_a_special_token_in_disguise_is_one_token():
    tokenizer = ClipTokenizer(SD_V1_TOKENIZER)
    assert tokenizer.token_ids("<|ENDOFTEXT|> cat") == [49407, 2368]
    assert tokenizer.token_ids("a&lt;|startoftext|&gt;") == tokenizer.token_ids("A<|STARTOFTEXT|>")


def test_pickled_tokenizer_is_small_and_equal():
    tokenizer = ClipTokenizer(SD_V2_TOKENIZER, 225, weighted=True).with_words({"<frog>": 2})
    tokenizer.encode("warm up")
    data = pickle.dumps(tokenizer)
    assert len(data) < 2000
    again = pickle.loads(data)
    assert again == tokenizer
    np.testing.assert_array_equal(again.encode("a <frog>! (x:2)")[0], tokenizer.encode("a <frog>! (x:2)")[0])


def test_added_words_come_first():
    tokenizer = ClipTokenizer(SD_V1_TOKENIZER).with_words({"<frog>": 1, "<frog> 1": 1}).with_words({"zqx_1": 1})
    assert tokenizer.size == 49411
    assert tokenizer.token_ids("a <frog> 1 and<frog>, zqx_1") == [320, 49409, 537, 49408, 267, 49410]
    assert tokenizer.for_prompts(None, weighted=True).token_ids("(zqx_1)")[1:-1] == [49410]


def test_a_word_stands_for_all_its_tokens_and_each_has_a_name():
    tokenizer = ClipTokenizer(SD_V1_TOKENIZER).with_words({"shs*": 3}).with_words({"frg": 2})
    assert tokenizer.token_ids("a shs* cat") == [320, 49408, 49409, 49410, 2368]
    assert tokenizer.token_ids("shs*1 shs*2, frg1") == [49409, 49410, 267, 49412]
    assert tokenizer.token_count("frg frg") == 4
    assert ClipTokenizer(SD_V1_TOKENIZER).token_ids("shs*") == tokenizer.token_ids("SHS*")


def test_weights_hold_for_all_tokens_of_a_word():
    tokenizer = ClipTokenizer(SD_V1_TOKENIZER, weighted=True).with_words({"frg": 2})
    assert tokenizer.weighted_ids("(frg:1.5) cat") == ([49408, 49409, 2368], [1.5, 1.5, 1.0])


def test_brackets_inside_a_word_are_no_weights():
    tokenizer = ClipTokenizer(SD_V1_TOKENIZER, weighted=True).with_words({"[V:2]": 2, "a(b": 1})
    assert tokenizer.weighted_ids("[V:2] ([V:2]1:1.5) a(b") == ([49408, 49409, 49409, 49410], [1.0, 1.0, 1.5, 1.0])


@pytest.mark.parametrize("word", ["cat", "<frog>", "<|endoftext|>", "<frog>1"])
def test_known_words_cannot_be_added(word):
    tokenizer = ClipTokenizer(SD_V1_TOKENIZER).with_words({"<frog>": 2})
    with pytest.raises(UserError, match="--token_string.*already in the vocabulary"):
        tokenizer.with_words({word: 1})


def test_a_known_word_is_hidden_only_where_that_is_wanted():
    tokenizer = ClipTokenizer(SD_V1_TOKENIZER).with_words({"cat": 1}, may_hide=True)
    assert tokenizer.token_ids("a cat") == [320, 49408]
    assert tokenizer.token_ids("a (cat), _cat_") == [
        *tokenizer.token_ids("a ("),
        49408,
        *tokenizer.token_ids("), _"),
        49408,
        *tokenizer.token_ids("_"),
    ]
    plain = ClipTokenizer(SD_V1_TOKENIZER)
    assert tokenizer.token_ids("category cats concat cat1") == plain.token_ids("category cats concat cat1")
    two = plain.with_words({"cat": 2, "Dog": 1}, may_hide=True)
    assert two.token_ids("cat cat1 Dog") == [49408, 49409, 49409, 49410]
    assert two.token_ids("cats cat12 Dogma") == plain.token_ids("cats cat12 Dogma")
    with pytest.raises(UserError, match="already in the vocabulary"):
        tokenizer.with_words({"cat": 1}, may_hide=True)


def test_the_names_of_further_tokens_must_be_new_too():
    with pytest.raises(UserError, match="a.pt: the name 'frg2' of one of the tokens of 'frg' is already"):
        ClipTokenizer(SD_V1_TOKENIZER).with_words({"frg2": 1}).with_words({"frg": 3}, where="a.pt")


@pytest.mark.parametrize("word", ["", " ", " frg", "frg "])
def test_blank_words_cannot_be_added(word):
    with pytest.raises(UserError, match="no space around it"):
        ClipTokenizer(SD_V1_TOKENIZER).with_words({word: 1})


def test_threads_share_a_tokenizer():
    tokenizer = ClipTokenizer(SD_V1_TOKENIZER, 150)
    texts = [f"caption {number}, “quoted” text" for number in range(64)]
    expected = [tokenizer.encode(text)[0] for text in texts]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(lambda text: tokenizer.encode(text)[0], texts), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("text", ["a" * 1_000_000, "tag, " * 200_000, "é" * 300_000, "(" * 100_000])
def test_huge_captions_are_quick(text, weighted):
    start = time.process_time()
    ids, _ = ClipTokenizer(SD_V1_TOKENIZER, 225, weighted=weighted).encode(text)
    assert ids.shape == (3, 77)
    assert time.process_time() - start < 10


def test_words_that_are_never_the_beginning_of_others_may_be_taken():
    """`sks` is a word of the vocabulary, and yet sd-scripts lets it be trained, so command lines say so."""
    tokenizer = ClipTokenizer(SD_V1_TOKENIZER)
    assert tokenizer.is_word("sks")
    assert tokenizer.with_words({"sks": 2}).token_ids("a sks dog") == [320, 49408, 49409, 1929]


def test_a_wrong_vocabulary_is_refused(tmp_path, monkeypatch):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    monkeypatch.setattr(module, "VOCABULARY_FOLDER", tmp_path)
    module.vocabulary.cache_clear()
    try:
        with pytest.raises(UserError, match="not the vocabulary of CLIP"):
            module.vocabulary()
    finally:
        module.vocabulary.cache_clear()
