"""What stages C and B have in common as models that are trained: text encoder, EfficientNet, loading, saving."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.checkpoints.parts import SaveSettings
from library.contracts import Condition
from library.garbage import collection_paused
from library.models.assemble import check_weights
from library.models.cascade.effnet import EffNetEncoder
from library.models.cascade.options import CascadeModelOptions, CascadeTextOptions
from library.models.cascade.sources import (
    NO_TEXT,
    CascadeSources,
    LazyPart,
    build_part_stage,
    build_part_text,
    open_sources,
)
from library.models.cascade.text import ProjectedTextEncoder, TextStates, encode_chunks
from library.models.family import WeightPlan
from library.models.family_base import FamilyBase
from library.models.tokenizer import ClipTokenizer, tokenizers_for

if TYPE_CHECKING:
    from typing_extensions import Self

    from library.checkpoints.load_cascade import LoadedPart
    from library.contracts import Batch, FamilySpec
    from library.draws import Draws
    from library.models.options import MemoryOptions

TEXT_SUFFIX = "_text_model"
"""Ends the name of the file of a trained text encoder, beside that of the stage."""


class CascadeFamily(FamilyBase):
    """Base of the model families of stages C and B; see `library.models.family.ModelFamily`."""

    def __init__(
        self,
        spec: FamilySpec,
        sources: CascadeSources,
        model: CascadeModelOptions,
        text: CascadeTextOptions,
        weights: WeightPlan,
        *,
        seed: int = 0,
        highvram: bool = False,
    ) -> None:
        super().__init__(spec, weights, highvram=highvram)
        self.sources = sources
        self.tokenizers: tuple[ClipTokenizer, ...] = tokenizers_for(spec, text)
        self.unet = build_part_stage(sources, weights, seed)
        self.text_encoder: ProjectedTextEncoder = build_part_text(sources, weights)
        self.effnet = self.lazy(sources.effnet, EffNetEncoder, "EfficientNet encoder", keep_cache=highvram)
        self.saved_beside = (TEXT_SUFFIX,) if "text_encoder" in weights.trained else ()
        self._masked = not text.no_text_mask
        self._allow_nan = model.allow_nan_weights

    @classmethod
    def load(
        cls,
        model: Any,
        text: CascadeTextOptions,
        memory: MemoryOptions,
        *,
        spec: FamilySpec,
        weights: WeightPlan,
        seed: int = 0,
    ) -> Self:
        """Load the models that options name.

        Args:
            model: the files.
            text: how captions become conditions.
            memory: whether freed GPU memory stays with PyTorch.
            spec: of the stage.
            weights: device, types, and which parts are going to train.
            seed: of fresh weights, where no file of the stage is given.

        Raises:
            UserError: a file cannot be read, or is not what its option is for.
        """
        with collection_paused():
            family = cls(
                spec, open_sources(model, weights.unused), model, text, weights, seed=seed, highvram=memory.highvram
            )
        for part, module in family.parts().items():
            if part not in weights.unused:
                where = f"{family.source_name} ({part})"
                check_weights(module.state_dict(), where, allow_nan=model.allow_nan_weights or not model.stage_path)
        return family

    def lazy(
        self, loaded: LoadedPart[Any] | None, make: Callable[[Any], nn.Module], what: str, *, keep_cache: bool = False
    ) -> LazyPart:
        """Return a part that encodes or decodes pictures, in the type for those."""
        plan = self.weights
        return LazyPart(loaded, make, what, device=plan.device, dtype=plan.vae_dtype, keep_cache=keep_cache)

    @property
    def text_config(self) -> dict[str, Any]:
        """Sizes of the text encoder, in the words of transformers."""
        return NO_TEXT if self.sources.text is None else self.sources.text.config

    @property
    def source_name(self) -> str:
        """Where the stage came from, for messages."""
        return str(self.sources.stage.path) if self.sources.stage is not None else "fresh weights"

    @property
    def source_kind(self) -> str:
        """How the stage came: `safetensors`, `ckpt` or `diffusers`."""
        return self.sources.kind

    def parameter_count(self) -> int:
        """Return the number of values in what a save writes: the stage, and a text encoder that trains."""
        modules = [module for name, module in self.parts().items() if name == "unet" or name in self.weights.trained]
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    def unused_parameters(self) -> list[nn.Parameter]:
        """Return nothing: every parameter gets a gradient."""
        return []

    def encode_images(self, pixels: Tensor, draws: Draws) -> Tensor:
        """Return latents, float32, of pixels [B,3,H,W] in [-1,1] in a training step; nothing is drawn."""
        return self.encode(pixels)

    def encode_latents(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Return latents as `encode_images` does, for a cache; there is no posterior, so the noise means nothing."""
        return self.encode(pixels)

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Return the latents that this stage learns to predict, float32, of pixels [B,3,H,W] in [-1,1]."""

    @abstractmethod
    def denoise(
        self, noisy: Tensor, t: Tensor, condition: Condition, control: Mapping[Any, Any] | None = None
    ) -> Tensor:
        """Return the predicted noise in latents, where t [B] is the ratio in [0,1]."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels in [-1,1] for latents, float32."""

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Return the latents in the scale in which noise is added."""
        return latents * self.spec.latent_scale if self.spec.latent_scale != 1 else latents

    # Text ----------------------------------------------------------------------------------------------------------

    def condition(self, batch: Batch, draws: Draws) -> Condition:
        """Return the condition of a batch: the cached arrays of its captions, or its token ids through the encoder."""
        arrays = batch.text_arrays
        if arrays is None:
            return self.encode_text(batch.token_ids, batch.token_weights)
        hidden, pooled = (arrays[name].to(self.weights.device) for name in self.spec.text_array_names)
        return Condition(hidden=hidden, pooled=pooled)

    def encode_text(self, token_ids: tuple[Tensor, ...], weights: tuple[Tensor, ...] | None = None) -> Condition:
        """Return the condition of token ids ([B,n,77],) and token weights alike or None."""
        states = self._encode_text(token_ids, weights)
        return Condition(hidden=states.hidden, pooled=states.pooled)

    def _encode_text(self, token_ids: tuple[Tensor, ...], weights: tuple[Tensor, ...] | None) -> TextStates:
        encoder = self.text_encoder
        if self._parked:
            encoder.to(self.weights.device)
        device = encoder.device
        factors = None if weights is None else weights[0].to(device, non_blocking=True)
        return encode_chunks(encoder, token_ids[0].to(device, non_blocking=True), factors, masked=self._masked)

    def text_arrays(self, token_ids: tuple[Tensor, ...], weights: tuple[Tensor, ...] | None) -> dict[str, Tensor]:
        """Return hidden states [B,S,D] and pooled vectors [B,P] under the names that a text cache gives them."""
        states = self._encode_text(token_ids, weights)
        return dict(zip(self.spec.text_array_names, states, strict=True))

    def release_vae(self) -> None:
        """Free the memory of what encodes pictures; it is built again when it is needed."""
        self.effnet.release()

    def fingerprinted(self, part: str) -> Mapping[str, Tensor]:
        """Return the tensors that the fingerprint of a part tells apart."""
        stage = self.sources.stage
        if part == "unet":
            return self.unet.state_dict() if stage is None else stage.tensors
        source = self.sources.text if part == "text_encoder" else self.sources.effnet
        return {} if source is None else source.tensors

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
        """Write the stage in the official layout, and beside it the text encoder if that was trained.

        Args:
            target: path without suffix.
            kind: `safetensors` or `ckpt`, or `diffusers` for the folder of that component; None: that of the source.
            precision: type of the written weights; None: as they are.
            metadata: header entries of a safetensors file.
            epoch: epochs done, for `.ckpt`.
            step: updates done, for `.ckpt`.
            zero_terminal_snr: means nothing here.

        Returns:
            The file or folder of the stage.
        """
        from library.checkpoints.save import is_folder_kind
        from library.checkpoints.save_cascade import save_component, save_part

        kind = kind or self.source_kind
        settings = SaveSettings(precision, metadata, epoch, step, allow_nan=self._allow_nan)
        trained = {"unet": ("stage_c" if self.sources.config.stage == "c" else "stage_b", self.sources.config)}
        if "text_encoder" in self.weights.trained:
            trained["text_encoder"] = ("text", self.text_config)  # type: ignore[assignment]
        written = target
        for name, (part, config) in reversed(trained.items()):
            beside = target if name == "unet" else target.with_name(f"{target.name}{TEXT_SUFFIX}")
            tensors: Any = self.parts()[name].state_dict()
            if is_folder_kind(kind):
                written = save_component(beside, part, tensors, config, settings)  # type: ignore[arg-type]
            else:
                file = beside.with_name(f"{beside.name}.{kind}")
                written = save_part(file, part, tensors, config, settings)  # type: ignore[arg-type]
        return written
