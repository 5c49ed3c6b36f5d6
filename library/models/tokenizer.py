"""CLIP's byte-pair tokenizer over the vocabulary in `library/assets`, without torch, transformers or a network.

Text is split at special tokens first; every piece between them is repaired (ftfy), freed of surplus white space,
lower-cased and encoded. Ids are laid out in chunks of 77: start, 75 tokens of text, end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from library.contracts import END_ID, START_ID
from library.errors import UserError
from library.models.attention_syntax import parse_attention

if TYPE_CHECKING:
    from library.contracts import FamilySpec, TokenizerSpec
    from library.models.options import TextOptions

START, END = "<|startoftext|>", "<|endoftext|>"
NO_TOKEN = -1
"""Stands behind the end token of captions that are not padded."""
VOCABULARY_SIZE = 49408
CHUNK = 77
BODY = CHUNK - 2
"""Tokens of text in a chunk."""

VOCABULARY_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "clip_vocab"

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_SPACE = re.compile(r"\s+")
_SYNTAX = re.compile(r"[()\[\]\\:]")
"""What means something to `parse_attention`."""
_PRIVATE = 0xF0000
"""First of the characters that Unicode leaves to programs; stands for a word with brackets while weights are read."""


class ClipTokenizer:
    """Turns a caption into ids and weights; cheap to pickle and safe to share between threads.

    Args:
        spec: padding and name.
        max_token_length: None for 75 tokens of text, else 150 or 225.
        weighted: read attention weights in captions.
        pad: fill up to the full length with the pad token. Without, the row keeps its length of 77 so that rows can be
            stacked, but what follows the end token is `NO_TOKEN`, and the encoder cuts a batch to its longest caption.
        words: further words and how many tokens each of them stands for, with the ids from 49408 on; see `with_words`.
        any_case: those of them that are found whatever letters of theirs are capitals.
    """

    def __init__(
        self,
        spec: TokenizerSpec,
        max_token_length: int | None = None,
        *,
        weighted: bool = False,
        pad: bool = True,
        words: Mapping[str, int] | None = None,
        any_case: Iterable[str] = (),
    ) -> None:
        if not pad and max_token_length is not None:
            raise UserError(
                "captions of more than one chunk of 75 tokens are always padded",
                "Leave out one of the two options.",
                where="--no_token_padding with --max_token_length",
            )
        self.spec = spec
        self.max_token_length = max_token_length
        self.weighted = weighted
        self.pad = pad
        self.words = dict(words or {})
        self.any_case = frozenset(any_case)
        self.length = CHUNK if max_token_length is None else max_token_length + 2
        self._special: dict[str, tuple[int, ...]] = {START: (START_ID,), END: (END_ID,)}
        if spec.pad_text is not None:
            self._special[spec.pad_text] = (spec.pad_id,)
        self._shields: dict[str, str] = {}
        self._folded: dict[str, tuple[int, ...]] = {}
        for word, ids in _word_table(self.words):
            self._special[word] = ids
            if word in self.any_case:
                self._folded[word.lower()] = ids
            if _SYNTAX.search(word):
                self._shields[word] = chr(_PRIVATE + len(self._shields))
                self._special[self._shields[word]] = ids
        known = {word: count for word, count in self.words.items() if self.is_word(word.lower())}
        alone = {name for name, _ in _word_table(known)}
        self._splitter = _splitter(self._special, alone=alone, any_case=self.any_case)

    @property
    def chunks(self) -> int:
        """Number of chunks of a padded caption."""
        return max(1, (self.length - 2) // BODY)

    @property
    def size(self) -> int:
        """Number of ids, those of added words included."""
        return VOCABULARY_SIZE + sum(self.words.values())

    def for_prompts(self, max_token_length: int | None, *, weighted: bool) -> ClipTokenizer:
        """Return a tokenizer for prompts: the same vocabulary and added words, always padded."""
        return ClipTokenizer(self.spec, max_token_length, weighted=weighted, words=self.words, any_case=self.any_case)

    def with_words(
        self,
        words: Mapping[str, int],
        *,
        where: str = "--token_string",
        may_hide: bool = False,
        any_case: bool = False,
    ) -> ClipTokenizer:
        """Return a tokenizer that knows further words, after the added words of this one.

        A word that stands for n tokens is written as one word, `cat*`, and becomes n ids; the second of its tokens
        alone is `cat*1`, the third `cat*2`. Words are found before anything else in their own spelling: capital letters
        count. A word that the vocabulary does not have is found inside longer words too, one that it has is not: `cat`
        is no part of `category`. Words with brackets keep them, whatever brackets mean around them.

        Args:
            words: word to number of tokens, at least 1.
            where: what gave the words, for messages.
            may_hide: a word may be one that CLIP's vocabulary has, which is then not to be had any more.
            any_case: capital letters do not count.

        Raises:
            UserError: a word, or the name of one of its tokens, is known already, is blank, or begins or ends with a
                space.
        """
        known = set(self._special)
        for word, count in words.items():
            if not word or word != word.strip():
                raise UserError(
                    "a new word must have letters, and no space around it", "Choose a new word.", where=where
                )
            for token in _token_names(word, count):
                # As the beginning of words, which is what sd-scripts asks, too: `sks`, only ever a whole one, is taken.
                if token in known or (not may_hide and token in vocabulary()):
                    raise UserError(_known(word, token), "Choose another word that no language has.", where=where)
                known.add(token)
        return ClipTokenizer(
            self.spec,
            self.max_token_length,
            weighted=self.weighted,
            pad=self.pad,
            words={**self.words, **words},
            any_case=self.any_case.union(words if any_case else ()),
        )

    def is_word(self, text: str) -> bool:
        """Whether the vocabulary has `text` as a whole word."""
        return f"{text}</w>" in vocabulary()

    def token_ids(self, text: str) -> list[int]:
        """Return the ids of all tokens of `text`: no start, end or padding, nothing cut off."""
        ids: list[int] = []
        for piece in self._splitter.split(text):
            special = self._special.get(piece)
            if special is None and self._folded:
                special = self._folded.get(piece.lower())
            if special is not None:
                ids.extend(special)
            elif piece:
                ids.extend(_plain_ids(piece))
        return ids

    def weighted_ids(self, text: str) -> tuple[list[int], list[float]]:
        """Return the ids of `text` and a weight for each; without `weighted` all weights are 1."""
        return self.weighted_parts(text, None)[0]

    def weighted_parts(self, text: str, separator: re.Pattern[str] | None) -> list[tuple[list[int], list[float]]]:
        """Return what `weighted_ids` does for each part of `text` between `separator`s; brackets reach across them."""
        pieces = [(text, 1.0)]
        if self.weighted:
            for word, shield in self._shields.items():
                text = re.sub(re.escape(word), shield, text, flags=re.IGNORECASE if word in self.any_case else 0)
            pieces = parse_attention(text)
        parts: list[tuple[list[int], list[float]]] = [([], [])]
        for piece, weight in pieces:
            for place, part in enumerate([piece] if separator is None else separator.split(piece)):
                if place:
                    parts.append(([], []))
                found = self.token_ids(part)
                parts[-1][0].extend(found)
                parts[-1][1].extend([weight] * len(found))
        return parts

    def token_count(self, text: str) -> int:
        """Return how many tokens `text` has; those beyond `length - 2` are cut off by `encode`."""
        return len(self.weighted_ids(text)[0])

    def encode(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.float32] | None]:
        """Return ids int64 [n,77] and weights float32 [n,77] (None unless weighted)."""
        return self.lay_out(*self.weighted_ids(text))

    def lay_out(
        self, body: Sequence[int], factors: Sequence[float]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32] | None]:
        """Return the ids of a text and their weights as `encode` does: in chunks, cut or padded to the full length."""
        body, factors = body[: self.length - 2], factors[: self.length - 2]
        missing = self.length - 2 - len(body)
        padding = self.spec.pad_id if self.pad else NO_TOKEN
        ids = np.array([START_ID, *body, END_ID, *[padding] * missing], np.int64)
        weights = np.array([1.0, *factors, 1.0, *[1.0] * missing], np.float32) if self.weighted else None
        if self.max_token_length is None:
            return ids[None], None if weights is None else weights[None]
        return self._cut_ids(ids), None if weights is None else _cut(weights)

    def _cut_ids(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        chunks = _cut(ids)
        pad = self.spec.pad_id
        if pad == END_ID:
            return chunks
        for chunk in chunks:
            if chunk[-2] not in (END_ID, pad):
                chunk[-1] = END_ID
            if chunk[1] == pad:
                chunk[1] = END_ID
        return chunks

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClipTokenizer) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __repr__(self) -> str:
        return f"ClipTokenizer({self.spec.name!r}, {self.max_token_length}, weighted={self.weighted}, pad={self.pad})"

    def _identity(self) -> tuple[Any, ...]:
        return (
            self.spec, self.max_token_length, self.weighted, self.pad, tuple(self.words.items()), self.any_case
        )  # fmt: skip


def tokenizers_for(spec: FamilySpec, text: TextOptions) -> tuple[ClipTokenizer, ...]:
    """Return the tokenizers of a family, in the order of its text encoders."""
    return tuple(
        ClipTokenizer(one, text.max_token_length, weighted=text.weighted_captions, pad=not text.no_token_padding)
        for one in spec.tokenizers
    )


def _cut(row: NDArray[Any]) -> NDArray[Any]:
    """Cut a row of n*75+2 values into [n,77]: every chunk gets the first and the last value around its 75."""
    body = row[1:-1].reshape(-1, BODY)
    ends = np.empty((len(body), 1), row.dtype)
    return np.concatenate([np.full_like(ends, row[0]), body, np.full_like(ends, row[-1])], axis=1)


def _token_names(word: str, count: int) -> list[str]:
    return [word, *(f"{word}{index}" for index in range(1, count))]


def _word_table(words: Mapping[str, int]) -> list[tuple[str, tuple[int, ...]]]:
    """Return the ids of every added word, and of each of its tokens by name; the longest names first."""
    table: dict[str, tuple[int, ...]] = {}
    next_id = VOCABULARY_SIZE
    for word, count in words.items():
        ids = tuple(range(next_id, next_id + count))
        table.update({name: (one,) for name, one in zip(_token_names(word, count), ids, strict=True)})
        table[word] = ids
        next_id += count
    return sorted(table.items(), key=lambda item: len(item[0]), reverse=True)


def _known(word: str, token: str) -> str:
    if token == word:
        return f"the word {word!r} is already in the vocabulary, so it cannot be new"
    return f"the name {token!r} of one of the tokens of {word!r} is already in the vocabulary"


def _splitter(special: Iterable[str], *, alone: Container[str], any_case: Container[str]) -> re.Pattern[str]:
    """Return what finds special pieces of a text; those in `alone` only where no letter or digit touches them."""

    def pattern(piece: str) -> str:
        found = f"(?i:{re.escape(piece)})" if piece in any_case else re.escape(piece)
        return rf"(?<![^\W_]){found}(?![^\W_])" if piece in alone else found

    return re.compile("(" + "|".join(map(pattern, sorted(special, key=len, reverse=True))) + ")")


def _clean(text: str) -> str:
    # Printable ASCII without entities is what ftfy leaves alone, and what most captions are.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy

        text = ftfy.fix_text(text)
    return _SPACE.sub(" ", text).strip().lower()


def _plain_ids(text: str) -> list[int]:
    encoder = _encoder()
    cleaned = _clean(text)
    if "<|" not in cleaned:
        return encoder.encode(cleaned, add_special_tokens=False).ids
    # A special token that was written in capitals or as an entity is one word here, as in CLIP's own tokenizer.
    ids: list[int] = []
    for word, _ in encoder.pre_tokenizer.pre_tokenize_str(cleaned):
        ids.extend([_SPECIAL_WORDS[word]] if word in _SPECIAL_WORDS else _word_ids(encoder, word))
    return ids


_SPECIAL_WORDS = {START: START_ID, END: END_ID}


def _word_ids(encoder: Any, word: str) -> list[int]:
    return [token.id for token in encoder.model.tokenize(word)]


@lru_cache(maxsize=1)
def vocabulary() -> dict[str, int]:
    """Return CLIP's vocabulary: token (with `</w>` at the end of a word) to id.

    Raises:
        UserError: the file of this installation is damaged.
    """
    path = VOCABULARY_FOLDER / "vocab.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read ({error})", "Install the toolkit again.", where=str(path)) from error
    if len(found) != VOCABULARY_SIZE or found.get(END) != END_ID:
        raise UserError("is not the vocabulary of CLIP", "Install the toolkit again.", where=str(path))
    return found


@lru_cache(maxsize=1)
def _encoder() -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    lines = (VOCABULARY_FOLDER / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [(first, second) for first, second in (line.split() for line in lines[1:] if line)]
    encoder = Tokenizer(models.BPE(vocab=vocabulary(), merges=merges, end_of_word_suffix="</w>"))
    words = r"<\|startoftext\|>|<\|endoftext\|>|" + _WORDS
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return encoder
