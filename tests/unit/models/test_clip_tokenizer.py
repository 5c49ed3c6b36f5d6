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
    tokenizer = ClipTokenizer(SD_V2_TOKENIZER, 225, weighted=True).with_tokens(["<frog>"])
    tokenizer.encode("warm up")
    data = pickle.dumps(tokenizer)
    assert len(data) < 2000
    again = pickle.loads(data)
    assert again == tokenizer
    np.testing.assert_array_equal(again.encode("a <frog>! (x:2)")[0], tokenizer.encode("a <frog>! (x:2)")[0])


def test_extra_tokens_come_first():
    tokenizer = ClipTokenizer(SD_V1_TOKENIZER).with_tokens(["<frog>", "<frog> 1"]).with_tokens(["zqx_1"])
    assert tokenizer.size == 49411
    assert tokenizer.token_ids("a <frog> 1 and<frog>, zqx_1") == [320, 49409, 537, 49408, 267, 49410]
    assert tokenizer.for_prompts(None, weighted=True).token_ids("(zqx_1)")[1:-1] == [49410]


@pytest.mark.parametrize("token", ["cat", "<frog>", "<|endoftext|>", " "])
def test_known_words_cannot_be_added(token):
    tokenizer = ClipTokenizer(SD_V1_TOKENIZER).with_tokens(["<frog>"])
    with pytest.raises(UserError, match="already in the vocabulary"):
        tokenizer.with_tokens([token])


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


def test_a_wrong_vocabulary_is_refused(tmp_path, monkeypatch):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    monkeypatch.setattr(module, "VOCABULARY_FOLDER", tmp_path)
    module.vocabulary.cache_clear()
    try:
        with pytest.raises(UserError, match="not the vocabulary of CLIP"):
            module.vocabulary()
    finally:
        module.vocabulary.cache_clear()
