"""The image encoder and decoder of a family: built when it is needed, given back when it is not."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from library.models.assemble import build_module, check_weights, from_config
from library.models.memory import give_back_memory, use_channels_last
from library.models.vae_slices import compute_in_slices

logger = logging.getLogger(__name__)

_FLAT = 1e-3
"""A decoded picture whose values differ by less than this is taken for the black picture of an overflow."""


class ImageCoder:
    """An `AutoencoderKL` over tensors that stay in their file until the first picture.

    Args:
        tensors: state dict in diffusers' names.
        config: configuration of `AutoencoderKL`.
        device: where pictures are encoded and decoded.
        dtype: type of the weights; half precision falls back to float32 for batches that overflow.
        allow_nan: build it although some weights are not numbers.
        keep_cache: leave the memory that `release` frees with PyTorch, where the next phase finds it at once.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any],
        *,
        device: torch.device,
        dtype: torch.dtype,
        allow_nan: bool = False,
        keep_cache: bool = False,
    ) -> None:
        self.tensors = tensors
        self.config = config
        self.device = device
        self.dtype = dtype
        self._allow_nan = allow_nan
        self._keep_cache = keep_cache
        self._model: Any = None
        self._slices = 1
        self._channels_last = False
        self._warned = False

    @property
    def model(self) -> Any:
        """The `AutoencoderKL`, built now if it was not there."""
        if self._model is None:
            from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

            model = build_module(
                lambda: from_config(AutoencoderKL, self.config),
                self.tensors,
                what="VAE",
                device=self.device,
                dtype=self.dtype,
            )
            check_weights(model.state_dict(), "VAE", allow_nan=self._allow_nan)
            if self._slices > 1:
                compute_in_slices(model, self._slices)
            if self._channels_last:
                use_channels_last(model)
            self._model = model
        return self._model

    def work_in(self, *, slices: int = 1, channels_last: bool = False) -> None:
        """Say how pictures are computed, which changes them by no more than rounding does.

        Args:
            slices: number of horizontal bands that blocks work through one after the other, to save memory.
            channels_last: lay the weights of convolutions out channels last.
        """
        self.release()
        self._slices, self._channels_last = slices, channels_last

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._model is not None

    def release(self) -> None:
        """Free the model; it is built again from its file when it is needed."""
        was_loaded, self._model = self._model is not None, None
        if was_loaded:
            give_back_memory(self.device, keep=self._keep_cache)

    @torch.no_grad()
    def encode(self, pixels: Tensor, noise: Tensor, *, check: bool = True) -> Tensor:
        """Return `mean + std * noise` of the posterior, float32 and unscaled.

        Args:
            pixels: [B,3,H,W] in [-1,1].
            noise: [B,C,h,w] standard normal.
            check: look for overflow, which waits for the device, and encode such a batch again in float32. Rows that
                are not finite even then are returned as they are: the picture itself is at fault.
        """
        latents = self._encode(pixels, noise)
        if check and self.dtype != torch.float32 and not bool(latents.isfinite().all()):
            self._warn("encoding")
            with self._float32():
                latents = self._encode(pixels, noise)
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels [B,3,H,W] in float32 for unscaled latents, again in float32 where half precision overflowed."""
        pixels = self._decode(latents)
        if self.dtype != torch.float32 and _overflowed(pixels):
            self._warn("decoding")
            with self._float32():
                pixels = self._decode(latents)
        return pixels

    def _encode(self, pixels: Tensor, noise: Tensor) -> Tensor:
        model = self.model
        posterior = model.encode(pixels.to(self.device, model.dtype), return_dict=False)[0]
        return posterior.mean.float() + posterior.std.float() * noise.to(self.device, torch.float32)

    def _decode(self, latents: Tensor) -> Tensor:
        model = self.model
        return model.decode(latents.to(self.device, model.dtype), return_dict=False)[0].float()

    @contextmanager
    def _float32(self) -> Iterator[None]:
        """Widen the weights for one batch: what is computed for it must not depend on batches before it."""
        # Not `model.to`: diffusers warns of a change of type, whatever the model.
        nn.Module.to(self.model, torch.float32)
        try:
            yield
        finally:
            nn.Module.to(self.model, self.dtype)

    def _warn(self, action: str) -> None:
        if not self._warned:
            logger.warning(
                "the VAE overflows in %s while %s: such batches are repeated in float32. "
                "--no_half_vae, or a VAE made for half precision, avoids the repetition",
                str(self.dtype).removeprefix("torch."),
                action,
            )
        self._warned = True


def _overflowed(pixels: Tensor) -> bool:
    """Tell whether any picture has non-finite values or is one flat colour."""
    flat = pixels.flatten(1)
    spread = flat.amax(1) - flat.amin(1)
    return bool((~(spread > _FLAT)).any() | ~flat.isfinite().all())
