"""From the text of prompts to the condition of pictures: chunks of 75 tokens, brackets, mean-preserving weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.contracts import Condition
from library.models.tokenizer import BODY

if TYPE_CHECKING:
    from library.models.family import ModelFamily

logger = logging.getLogger(__name__)

PICTURE_TOKEN_LENGTH = 225
"""Longest prompt of a picture in tokens, whatever length the captions of a training run have."""


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt as chunks: ids and weights, one array [n,77] per text encoder, and how many chunks hold text."""

    ids: tuple[Any, ...]
    weights: tuple[Any, ...]
    chunks: int


class PromptEncoder:
    """Encodes prompts with the text encoders of a family.

    Every chunk of 75 tokens is encoded with its own start and end token, and the outputs are put one after the other
    (length 77 n), as the web UIs do. A prompt and its negative prompt get equally many chunks.
    """

    def __init__(self, family: ModelFamily) -> None:
        """Make tokenizers for pictures, which know the same words as the family's own."""
        self._family = family
        self._tokenizers = tuple(
            tokenizer.for_prompts(PICTURE_TOKEN_LENGTH, weighted=True) for tokenizer in family.tokenizers
        )

    def tokenize(self, text: str) -> TokenizedPrompt:
        """Split `text` into chunks; brackets become weights. What exceeds 225 tokens is cut off with a warning."""
        longest = max(tokenizer.token_count(text) for tokenizer in self._tokenizers)
        if longest > PICTURE_TOKEN_LENGTH:
            logger.warning("only the first %d of %d tokens are used: %.60s", PICTURE_TOKEN_LENGTH, longest, text)
        encoded = [tokenizer.encode(text) for tokenizer in self._tokenizers]
        return TokenizedPrompt(
            ids=tuple(ids for ids, _ in encoded),
            weights=tuple(weights for _, weights in encoded),
            chunks=max(1, -(-min(longest, PICTURE_TOKEN_LENGTH) // BODY)),
        )

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
            hidden=weight_tokens(hidden, weights),
            pooled=None if pooled is None else pooled[::chunks],
        )


def weight_tokens(hidden: Tensor, weights: Tensor) -> Tensor:
    """Multiply each token's output by its weight and scale the prompt back to the mean that it had.

    Args:
        hidden: outputs [B,L,D].
        weights: [B,L] on the CPU; prompts whose weights are all 1 are returned bit for bit.
    """
    if bool((weights == 1).all()):
        return hidden
    weights, wide = weights.to(hidden.device), hidden.float()
    weighted = wide * weights[..., None].float()
    before, after = wide.mean(dim=(1, 2), keepdim=True), weighted.mean(dim=(1, 2), keepdim=True)
    ratio = torch.where(after == 0, torch.ones_like(after), before / after)
    changed = (weights != 1).any(dim=1)[:, None, None]
    return torch.where(changed, weighted * ratio, wide).to(hidden.dtype)
