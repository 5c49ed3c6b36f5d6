"""CLIP text encoders: token ids in chunks to one sequence of hidden states.

The encoder is a module of ours with a single child called `text_model`, whatever transformers calls its classes, so
that module and tensor names equal those in checkpoint and LoRA files.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.errors import UserError
from library.models.assemble import build_module
from library.models.tokenizer import NO_TOKEN


class TextEncoder(nn.Module):
    """Holds CLIP's text transformer as `text_model` and runs it layer by layer.

    Running the layers here, instead of through transformers' own forward pass, stops after the last layer that is
    wanted, needs no mask tensors, and works the same in transformers 4 and 5.
    """

    text_model: Any

    def __init__(self, text_model: nn.Module) -> None:
        super().__init__()
        self.text_model = text_model
        self.gradient_checkpointing = False
        self.preserve_rng_state = False
        for layer in self.layers:
            # The attention of both transformers versions reads this where it is given no mask.
            layer.self_attn.is_causal = True

    @property
    def layers(self) -> Any:
        """The transformer layers."""
        return self.text_model.encoder.layers

    @property
    def width(self) -> int:
        """Number of features of a hidden state."""
        return int(self.text_model.final_layer_norm.weight.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.text_model.final_layer_norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.text_model.final_layer_norm.weight.device

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token embedding, by the name that transformers gives this method."""
        return self.text_model.embeddings.token_embedding

    def enable_gradient_checkpointing(self, *, preserve_rng_state: bool = False) -> None:
        """Recompute each layer in the backward pass."""
        self.gradient_checkpointing = True
        self.preserve_rng_state = preserve_rng_state

    def forward(self, input_ids: Tensor, skip: int = 0) -> Tensor:
        """Return the hidden states [N,L,D] after the final norm, leaving out the last `skip` layers; ids are [N,L]."""
        hidden = self.text_model.embeddings(input_ids=input_ids)
        layers = self.layers
        for layer in layers[: len(layers) - skip] if skip else layers:
            hidden = self._run(partial(layer, attention_mask=None, causal_attention_mask=None), hidden)
        return self.text_model.final_layer_norm(hidden)

    def _run(self, layer: Any, hidden: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            result = checkpoint(layer, hidden, use_reentrant=False, preserve_rng_state=self.preserve_rng_state)
        else:
            result = layer(hidden)
        return result[0] if isinstance(result, tuple) else result


def build_text_encoder(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, device: torch.device, dtype: torch.dtype
) -> TextEncoder:
    """Build an encoder from a configuration of transformers and tensors named `text_model.…`."""
    return build_module(lambda: make_text_encoder(config), tensors, what="text encoder", device=device, dtype=dtype)


def make_text_encoder(config: Mapping[str, Any]) -> TextEncoder:
    """Create an encoder from a configuration of transformers; meant to be called with the meta device as default."""
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel

    clip_config = CLIPTextConfig.from_dict(dict(config))
    clip_config._attn_implementation = "sdpa"
    clip = CLIPTextModel(clip_config)
    # From transformers 5 on the model itself is what used to be its only child.
    return TextEncoder(getattr(clip, "text_model", clip))


def check_clip_skip(clip_skip: int | None, encoder: TextEncoder) -> int:
    """Return how many of the last layers `--clip_skip` leaves out.

    Raises:
        UserError: the encoder has fewer layers than that.
    """
    if clip_skip is None:
        return 0
    layers = len(encoder.layers)
    if not 1 <= clip_skip <= layers:
        raise UserError(
            f"{clip_skip} is out of range: this text encoder has {layers} layers",
            f"Give a number from 1 (nothing is left out) to {layers}.",
            where="--clip_skip",
        )
    return clip_skip - 1


def encode_tokens(
    encoder: TextEncoder,
    token_ids: Tensor,
    weights: Tensor | None = None,
    *,
    skip: int = 0,
    pad_id: int | None = None,
) -> Tensor:
    """Encode chunks of token ids and join them to one sequence per caption.

    Args:
        encoder: the text encoder.
        token_ids: [B,n,77] int64; all chunks are encoded in one call.
        weights: [B,n,77] factors of the hidden states or None; the mean is not restored afterwards.
        skip: number of last layers to leave out; the final norm is applied either way.
        pad_id: for captions without padding: cut the batch to its longest caption and fill shorter ones with this.
            Waits for the device, since the length must be known.

    Returns:
        Hidden states [B,S,D] with S = n*75 + 2, less where a batch was cut.
    """
    if pad_id is not None:
        longest = int((token_ids != NO_TOKEN).sum(-1).amax())
        token_ids = token_ids[..., :longest].masked_fill(token_ids[..., :longest] == NO_TOKEN, pad_id)
        weights = None if weights is None else weights[..., :longest]
    batch, chunks, length = token_ids.shape
    hidden = encoder(token_ids.reshape(batch * chunks, length), skip)
    hidden = hidden.reshape(batch, chunks, length, -1)
    if weights is not None:
        hidden = hidden * join_factors(weights).to(hidden).unsqueeze(-1)
    return join_chunks(hidden)


def join_factors(weights: Tensor) -> Tensor:
    """Return weights [B,n,L] with 1 where several chunks have their outer tokens, which no weight applies to."""
    if weights.shape[1] == 1:
        return weights
    inner = torch.ones_like(weights)
    inner[..., 1:-1] = weights[..., 1:-1]
    return inner


def join_chunks(hidden: Tensor) -> Tensor:
    """Join [B,n,L,D] to [B,n*(L-2)+2,D]: the first state of the first chunk, all inner ones, the last of the last."""
    if hidden.shape[1] == 1:
        return hidden[:, 0]
    return torch.cat([hidden[:, 0, :1], hidden[:, :, 1:-1].flatten(1, 2), hidden[:, -1, -1:]], dim=1)
