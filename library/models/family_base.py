"""What families of one denoiser and one text encoder do alike: moving, checkpointing, compiling, fingerprints."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from library.models.assemble import hash_tensors
from library.models.memory import compile_blocks, enable_gradient_checkpointing, give_back_memory, store_in_float8

if TYPE_CHECKING:
    from library.contracts import FamilySpec
    from library.models.family import WeightPlan


class FamilyBase(ABC):
    """A part of `library.models.family.ModelFamily`: what follows from `unet` and `text_encoder`.

    Args:
        spec: of the family.
        weights: where the weights go.
        highvram: keep memory that was freed for what comes next.
    """

    saved_beside: tuple[str, ...] = ()
    unet: Any
    text_encoder: Any

    def __init__(self, spec: FamilySpec, weights: WeightPlan, *, highvram: bool) -> None:
        self.spec, self.weights = spec, weights
        self._highvram = highvram
        self._parked = False
        self._fingerprints: dict[str, str] = {}

    @property
    def denoiser(self) -> nn.Module:
        """The U-Net, or the stage."""
        denoiser: nn.Module = self.unet
        return denoiser

    @property
    def text_encoders(self) -> tuple[nn.Module, ...]:
        """The text encoder."""
        return (self.text_encoder,)

    def parts(self) -> dict[str, nn.Module]:
        """Return what can be trained, in the order of states."""
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    def park_text_encoders(self) -> None:
        """Move the text encoder off the device; it comes back when something is encoded."""
        self._parked = True
        self.text_encoder.to("cpu")
        give_back_memory(self.weights.device, keep=self._highvram)

    def enable_gradient_checkpointing(self, *, preserve_rng_state: bool | None = None, offload: bool = False) -> None:
        """Recompute activations of denoiser and text encoder in the backward pass."""
        enable_gradient_checkpointing(
            self.unet, self.text_encoders, preserve_rng_state=preserve_rng_state, offload=offload
        )

    def compile(self, backend: str) -> None:
        """Compile the repeated blocks of the denoiser; call it when adapters are attached."""
        compile_blocks(self.unet, backend)

    def store_in_float8(self, parts: tuple[str, ...]) -> None:
        """Keep the frozen weights of these parts in 8 bits; whatever runs them must be in autocast."""
        for part in parts:
            store_in_float8(self.parts()[part])

    def fingerprint(self, part: str) -> str:
        """Return a hash of the loaded weights of `part` (`vae`, `text_encoder`, `unet`), names and types included."""
        if part not in self._fingerprints:
            self._fingerprints[part] = hash_tensors(self.fingerprinted(part))
        return self._fingerprints[part]

    @abstractmethod
    def fingerprinted(self, part: str) -> Mapping[str, Tensor]:
        """Return the tensors that the fingerprint of a part tells apart; `vae` is what latents are made by."""

    def note_change(self, part: str, digest: str) -> None:
        """Let the fingerprint of `part` tell that its weights in memory were changed, by what `digest` says."""
        self._fingerprints[part] = hashlib.sha256(f"{self.fingerprint(part)}:{digest}".encode()).hexdigest()[:32]
