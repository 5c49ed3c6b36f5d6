"""The text encoder of Stable Cascade, CLIP bigG: hidden states before the final norm, and a pooled vector.

The attention mask hides padding from all tokens, as in the models' own training and in the tools people draw with.
Without it the states of padding change by as much as their own size, and stage C looks at all 77 of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from library.contracts import END_ID
from library.models.assemble import build_module
from library.models.clip_text import TextEncoder, join_chunks, join_factors, make_text_encoder


class TextStates(NamedTuple):
    """What the encoder makes of a text: states [N,L,D] of the last layer before the final norm, and pooled [N,P]."""

    hidden: Tensor
    pooled: Tensor


class ProjectedTextEncoder(TextEncoder):
    """Holds CLIP's text transformer as `text_model` and the projection of its pooled state."""

    def __init__(self, text_model: nn.Module, projection: nn.Linear) -> None:
        super().__init__(text_model)
        self.text_projection = projection
        for layer in self.layers:
            # A mask is always given here, and the attention takes only one of the two.
            layer.self_attn.is_causal = False

    def forward(self, input_ids: Tensor, masked: bool = True) -> TextStates:  # type: ignore[override]
        """Encode token ids [N,L].

        Args:
            input_ids: each row ends, and is padded, with `END_ID`.
            masked: hide what follows the first `END_ID`.

        Returns:
            States of all positions, and the projected final norm of the state at the first `END_ID`, whatever
            larger ids new tokens have.
        """
        ends = (input_ids == END_ID).int().argmax(dim=-1)
        mask = _mask(input_ids, ends if masked else None)
        # Embeddings that train are float32 whatever the rest is.
        hidden = self.text_model.embeddings(input_ids=input_ids).to(self.dtype)
        for layer in self.layers:
            hidden = self._run(partial(layer, attention_mask=mask, causal_attention_mask=None), hidden)
        last = hidden[torch.arange(len(hidden), device=hidden.device), ends]
        return TextStates(hidden, self.text_projection(self.text_model.final_layer_norm(last)))


def _mask(input_ids: Tensor, ends: Tensor | None) -> Tensor:
    """Return which tokens [N or 1,1,L,L] each token sees: itself and earlier ones, up to the end of the text."""
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    earlier = places[None, :] <= places[:, None]
    if ends is None:
        return earlier[None, None]
    return (earlier[None] & (places[None, None, :] <= ends[:, None, None]))[:, None]


def build_projected_text_encoder(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, device: torch.device, dtype: torch.dtype
) -> ProjectedTextEncoder:
    """Build the encoder from a configuration of transformers and tensors in the names of transformers; frozen.

    Raises:
        UserError: names or shapes do not fit the configuration.
    """
    return build_module(
        lambda: make_projected_text_encoder(config), tensors, what="text encoder", device=device, dtype=dtype
    )


def make_projected_text_encoder(config: Mapping[str, Any]) -> ProjectedTextEncoder:
    """Create an encoder from a configuration of transformers; meant for the meta device."""
    projection = nn.Linear(config["hidden_size"], config["projection_dim"], bias=False)
    return ProjectedTextEncoder(make_text_encoder(config).text_model, projection)


def encode_chunks(
    encoder: ProjectedTextEncoder, token_ids: Tensor, weights: Tensor | None = None, *, masked: bool = True
) -> TextStates:
    """Encode chunks of token ids and join them to one sequence per caption.

    Args:
        encoder: the text encoder.
        token_ids: [B,n,77] int64; all chunks are encoded in one call.
        weights: [B,n,77] factors of the hidden states or None.
        masked: hide padding.

    Returns:
        Hidden states [B, n*75 + 2, D], and the pooled vector [B,P] of the first chunk.
    """
    batch, chunks, length = token_ids.shape
    hidden, pooled = encoder(token_ids.reshape(batch * chunks, length), masked)
    hidden = hidden.unflatten(0, (batch, chunks))
    if weights is not None:
        hidden = hidden * join_factors(weights).to(hidden).unsqueeze(-1)
    return TextStates(join_chunks(hidden), pooled.unflatten(0, (batch, chunks))[:, 0])
