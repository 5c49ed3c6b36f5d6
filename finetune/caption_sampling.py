"""Nucleus sampling in which every picture has its own random numbers: what else is in its batch does not matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from library.randomness import derive

if TYPE_CHECKING:
    from torch import Tensor


class NucleusRows:
    """Chooses a token for each row and leaves no other; under greedy decoding this is sampling.

    Tokens outside the smallest set with probability `top_p` (Holtzman et al., "The Curious Case of Neural Text
    Degeneration", section 3.1) and below the `top_k` best ones are left out. Of the others one is drawn by adding
    Gumbel noise to the logarithms of their probabilities and taking the greatest (Gumbel-max). The noise belongs to
    token, step and picture, so small numerical differences rarely change a caption.
    """

    def __init__(self, names: Sequence[str], *, seed: int, top_p: float, top_k: int = 50) -> None:
        """Prepare for one batch.

        Args:
            names: of the pictures, one for each row.
            seed: of the run.
            top_p: probability of the tokens that are kept together.
            top_k: most tokens that are kept.
        """
        self._generators = [torch.Generator().manual_seed(derive(seed, "caption", name)) for name in names]
        self._top_p, self._top_k = top_p, top_k

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [B, V] with 0 at the drawn tokens and minus infinity elsewhere.

        Args:
            input_ids: tokens so far, not used.
            scores: logits [B, V].
        """
        best, tokens = scores.float().topk(min(self._top_k, scores.shape[-1]), dim=-1)
        shares = best.softmax(dim=-1)
        # A token stays while those before it have less than top_p; the first one always does.
        before = shares.cumsum(dim=-1) - shares
        logs = shares.log().masked_fill((before >= self._top_p) & (before > 0), -torch.inf)
        noise = torch.stack([torch.rand(scores.shape[-1], generator=one) for one in self._generators])
        gumbel = -(-noise.clamp_min(1e-20).log()).clamp_min(1e-20).log()
        drawn = (logs + gumbel.to(scores.device).gather(-1, tokens)).argmax(dim=-1, keepdim=True)
        only = torch.full_like(scores, -torch.inf)
        return only.scatter(-1, tokens.gather(-1, drawn), 0.0)
