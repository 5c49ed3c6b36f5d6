"""From the text of prompts to the condition of pictures: chunks of 75 tokens, brackets, mean-preserving weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from library.contracts import Condition
from library.models.tokenizer import BODY

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from library.models.family import ModelFamily
    from library.models.tokenizer import ClipTokenizer

logger = logging.getLogger(__name__)

PICTURE_CHUNKS = 3
"""Longest prompt of a picture in chunks of 75 tokens, whatever length the captions of a training run have."""

NORMALIZE_MODES = ("original", "abs", "none")

_BREAK = re.compile(r"\bBREAK\b")
_REGIONS = re.compile(r"(?<=\s)AND(?=\s)")


def split_parts(text: str) -> list[str]:
    """Return the parts of a prompt between ` AND `, which stand for regions; parts may be empty."""
    return [part.strip() for part in _REGIONS.split(text)]


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt as chunks: ids and weights, one array [n,77] per text encoder, and how many chunks hold text."""

    ids: tuple[Any, ...]
    weights: tuple[Any, ...]
    chunks: int


class PromptEncoder:
    """Encodes prompts with the text encoders of a family.

    Every chunk of 75 tokens is encoded with its own start and end token, and the outputs are put one after the other
    (length 77 n), as the web UIs do. A prompt and its negative prompt get equally many chunks. Words that stand for
    several tokens are cut at the end of a chunk as any other text is: each token goes to the chunk of its place.
    """

    def __init__(
        self,
        family: ModelFamily,
        *,
        max_chunks: int = PICTURE_CHUNKS,
        normalize: str = "original",
        breaks: bool = False,
    ) -> None:
        """Make tokenizers for pictures, which know the same words as the family's own.

        Args:
            family: the model; its tokenizers must have all words by now.
            max_chunks: what is longer is cut off, with a warning.
            normalize: what weights leave as it was: see `weight_tokens`.
            breaks: the word BREAK, in capitals, fills up its chunk: what follows starts the next one.
        """
        self._family = family
        self._max_chunks = max_chunks
        self._normalize = normalize
        self._separator = _BREAK if breaks else None
        self._tokenizers = tuple(
            tokenizer.for_prompts(BODY * max_chunks, weighted=True) for tokenizer in family.tokenizers
        )

    def tokenize(self, text: str) -> TokenizedPrompt:
        """Split `text` into chunks; brackets become weights."""
        encoded = [self._chunks(tokenizer, text) for tokenizer in self._tokenizers]
        # All tokenizers share the vocabulary, so the count is the same for each of them.
        return TokenizedPrompt(
            ids=tuple(ids for ids, _, _ in encoded),
            weights=tuple(weights for _, weights, _ in encoded),
            chunks=max(count for _, _, count in encoded),
        )

    def _chunks(self, tokenizer: ClipTokenizer, text: str) -> tuple[NDArray[np.int64], NDArray[np.float32], int]:
        """Return ids and weights [max_chunks,77], and how many of the chunks hold text."""
        parts = [part for part in tokenizer.weighted_parts(text, self._separator) if part[0]] or [([], [])]
        needed = [max(1, -(-len(ids) // BODY)) for ids, _ in parts]
        limit = self._max_chunks
        if sum(needed) > limit and tokenizer is self._tokenizers[0]:
            self._warn_cut(text, [len(ids) for ids, _ in parts])
        rows: list[Any] = [tokenizer.lay_out(*part) for part in parts]
        if len(rows) > 1:
            rows = [tuple(array[:count] for array in row) for row, count in zip(rows, needed, strict=True)]
            rows.append(tokenizer.lay_out([], []))
        ids, weights = (np.concatenate(arrays)[:limit] for arrays in zip(*rows, strict=True))
        return ids, weights, min(sum(needed), limit)

    def _warn_cut(self, text: str, counts: Sequence[int]) -> None:
        if len(counts) == 1:
            logger.warning("only the first %d of %d tokens are used: %.60s", BODY * self._max_chunks, counts[0], text)
        else:
            logger.warning("only the first %d chunks of 75 tokens are used: %.60s", self._max_chunks, text)

    def encode(self, prompts: Sequence[TokenizedPrompt], chunks: int, device: torch.device) -> Condition:
        """Return the condition of B prompts, each cut or filled to `chunks` chunks: hidden [B, 77*chunks, D].

        The pooled output, where the family has one, is that of the first chunk.
        """
        batch = len(prompts)
        ids = tuple(
            torch.stack([torch.as_tensor(prompt.ids[which][:chunks]) for prompt in prompts])
            .reshape(batch * chunks, 1, -1)
            .to(device)
            for which in range(len(self._tokenizers))
        )
        condition = self._family.encode_text(ids)
        hidden = condition.hidden.reshape(batch, -1, condition.hidden.shape[-1])
        # Encoders share the vocabulary, so the brackets give the same weights for each of them.
        weights = torch.stack([torch.as_tensor(prompt.weights[0][:chunks]).reshape(-1) for prompt in prompts])
        pooled = condition.pooled
        return replace(
            condition,
            hidden=weight_tokens(hidden, weights, self._normalize),
            pooled=None if pooled is None else pooled[::chunks],
        )


def weight_tokens(hidden: Tensor, weights: Tensor, normalize: str = "original") -> Tensor:
    """Multiply each token's output by its weight and scale the prompt back to the mean that it had.

    Args:
        hidden: outputs [B,L,D].
        weights: [B,L] on the CPU; prompts whose weights are all 1 are returned bit for bit.
        normalize: what the scaling keeps over all tokens and channels of a prompt: `original` the mean, `abs` the mean
            of absolute values; `none`: nothing is scaled.
    """
    if bool((weights == 1).all()):
        return hidden
    weights, wide = weights.to(hidden.device), hidden.float()
    weighted = wide * weights[..., None].float()
    if normalize != "none":
        before, after = (
            (one.abs() if normalize == "abs" else one).mean(dim=(1, 2), keepdim=True) for one in (wide, weighted)
        )
        weighted = weighted * torch.where(after == 0, torch.ones_like(after), before / after)
    changed = (weights != 1).any(dim=1)[:, None, None]
    return torch.where(changed, weighted, wide).to(hidden.dtype)
