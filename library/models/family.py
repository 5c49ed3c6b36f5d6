"""What every model family offers to the training loop, the renderer and the caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from library.contracts import Batch, Condition, FamilySpec
    from library.draws import Draws
    from library.models.tokenizer import ClipTokenizer


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """Where the weights of a family go, in which type, and which parts are going to train.

    Attributes:
        device: device of denoiser and text encoders; the VAE goes there while it is in use.
        trained: names of the parts (`parts()`) that train in this run.
        trained_dtype: type of those parts: float32 unless everything runs in half precision.
        frozen_dtype: type of the other parts.
        vae_dtype: type in which pictures are encoded and decoded.
        trained_device: where the parts that train wait until they are shared between GPUs; None: on `device`.
        unused: names of parts that are never run: they are built without weights.
    """

    device: torch.device = torch.device("cpu")
    trained: tuple[str, ...] = ("unet", "text_encoder")
    trained_dtype: torch.dtype = torch.float32
    frozen_dtype: torch.dtype = torch.float32
    vae_dtype: torch.dtype = torch.float32
    trained_device: torch.device | None = None
    unused: tuple[str, ...] = ()

    def dtype_of(self, part: str) -> torch.dtype:
        """Return the type of the weights of `part`."""
        return self.trained_dtype if part in self.trained else self.frozen_dtype

    def device_of(self, part: str) -> torch.device:
        """Return where the weights of `part` are put when they are loaded."""
        if part in self.unused:
            return torch.device("meta")
        return self.trained_device or self.device if part in self.trained else self.device


class ModelFamily(Protocol):
    """A denoiser with everything around it. Pixels are [B,3,H,W] in [-1,1]; latents [B,C,h,w]."""

    spec: FamilySpec
    tokenizers: tuple[ClipTokenizer, ...]
    saved_beside: tuple[str, ...]
    """Endings of the names of files that `save` writes beside the model's."""

    @property
    def denoiser(self) -> nn.Module:
        """The network that predicts noise or velocity."""

    @property
    def text_encoders(self) -> tuple[nn.Module, ...]:
        """The text encoders, in the order of `tokenizers`."""

    @property
    def source_kind(self) -> str:
        """How the model came: `safetensors`, `ckpt` or `diffusers`."""

    def parameter_count(self) -> int:
        """Return the number of values in all parts of the model."""

    def unused_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that never get a gradient."""

    def parts(self) -> dict[str, nn.Module]:
        """Return what can be trained, in the reference's order; the names appear in state folders and log names."""

    def encode_images(self, pixels: Tensor, draws: Draws) -> Tensor:
        """Return an unscaled sample of the posterior, float32, with noise from `draws`."""

    def encode_latents(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Return the unscaled posterior sample `mean + std * noise`, float32: what a latent cache stores."""

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Return the latents in the scale in which noise is added."""

    def condition(self, batch: Batch, draws: Draws) -> Condition:
        """Return what the denoiser is conditioned on, from cached arrays or through the encoders."""

    def encode_text(self, token_ids: tuple[Tensor, ...], weights: tuple[Tensor, ...] | None = None) -> Condition:
        """Return the condition of token ids, one [B,n,L] per encoder, and token weights alike or None."""

    def text_arrays(self, token_ids: tuple[Tensor, ...], weights: tuple[Tensor, ...] | None) -> dict[str, Tensor]:
        """Return what a text cache stores, each [B, ...] of one shape for all captions; `condition` reads the names."""

    def park_text_encoders(self) -> None:
        """Move the text encoders off the device; they come back when something is encoded."""

    def denoise(
        self, noisy: Tensor, t: Tensor, condition: Condition, control: Mapping[str, object] | None = None
    ) -> Tensor:
        """Return the prediction for scaled noisy latents at timesteps t [B]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels for scaled latents, float32."""

    def release_vae(self) -> None:
        """Free the memory of the image encoder; it is built again when it is needed."""

    def enable_gradient_checkpointing(self, *, preserve_rng_state: bool | None = None, offload: bool = False) -> None:
        """Recompute activations in the backward pass; None asks the modules whether a dropout is on.

        With `offload` what the recomputation starts from waits in main memory.
        """

    def store_in_float8(self, parts: tuple[str, ...]) -> None:
        """Keep the frozen weights of these parts in 8 bits; whatever runs them must be in autocast."""

    def note_change(self, part: str, digest: str) -> None:
        """Let the fingerprint of `part` tell that its weights in memory were changed, by what `digest` says."""

    def compile(self, backend: str) -> None:
        """Compile the repeated blocks of the denoiser; after adapters are attached."""

    def fingerprint(self, part: str) -> str:
        """Return a hash of the weights of `part` as they were loaded (vae, text_encoder or unet)."""

    def save(
        self,
        target: Path,
        kind: str | None,
        precision: torch.dtype | None,
        metadata: dict[str, str] | None,
        *,
        epoch: int,
        step: int,
        zero_terminal_snr: bool = False,
    ) -> Path:
        """Write the model for use and return its path; `target` has no suffix, kind None is that of the source."""
