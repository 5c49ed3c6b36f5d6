"""Stable Diffusion 1.x and 2.x: U-Net and VAE of diffusers, CLIP of transformers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.checkpoints.parts import ModelParts, SaveSettings
from library.contracts import Condition
from library.garbage import collection_paused
from library.models.assemble import build_module, check_weights, from_config
from library.models.clip_text import TextEncoder, build_text_encoder, check_clip_skip, encode_tokens
from library.models.family import WeightPlan
from library.models.family_base import FamilyBase
from library.models.memory import use_channels_last
from library.models.sd_attention import choose_attention, name_modules, set_attention
from library.models.specs import check_prediction
from library.models.tokenizer import NO_TOKEN, ClipTokenizer, tokenizers_for
from library.models.vae import ImageCoder

if TYPE_CHECKING:
    from library.checkpoints.parts import LoadedParts
    from library.contracts import Batch, FamilySpec
    from library.draws import Draws
    from library.models.options import MemoryOptions, ModelOptions, TextOptions

logger = logging.getLogger(__name__)

_COUNT = "token_count"
"""Cached beside hidden states where captions are not padded: a batch is as long as its longest caption."""


class StableDiffusion(FamilyBase):
    """The model family of SD 1.x and 2.x; see `library.models.family.ModelFamily`."""

    def __init__(
        self,
        spec: FamilySpec,
        text: TextOptions,
        loaded: LoadedParts,
        weights: WeightPlan,
        *,
        allow_nan: bool = False,
        highvram: bool = False,
    ) -> None:
        super().__init__(spec, weights, highvram=highvram)
        self.tokenizers: tuple[ClipTokenizer, ...] = tokenizers_for(spec, text)
        self.unet = _build_unet(loaded, weights)
        self.text_encoder: TextEncoder = build_text_encoder(
            loaded.text_config,
            loaded.text,
            device=weights.device_of("text_encoder"),
            dtype=weights.dtype_of("text_encoder"),
        )
        self.vae = ImageCoder(
            loaded.vae,
            loaded.vae_config,
            device=weights.device,
            dtype=weights.vae_dtype,
            allow_nan=allow_nan,
            keep_cache=highvram,
        )
        self._skip = check_clip_skip(text.clip_skip, self.text_encoder)
        self._pad_id = None if self.tokenizers[0].pad else spec.tokenizers[0].pad_id
        self._loaded = loaded
        self._allow_nan = allow_nan

    @classmethod
    def load(
        cls,
        model: ModelOptions,
        text: TextOptions,
        memory: MemoryOptions,
        *,
        spec: FamilySpec,
        weights: WeightPlan,
    ) -> StableDiffusion:
        """Load a model from a file, a Diffusers folder or a hub id.

        Args:
            model: what to load.
            text: how captions become conditions.
            memory: which attention backend to use, and whether freed GPU memory stays with PyTorch.
            spec: from `library.models.specs.stable_diffusion_spec`.
            weights: device, types, and which parts are going to train.

        Raises:
            UserError: the model does not fit its family, or cannot be read.
        """
        from library.checkpoints.load import load_parts

        with collection_paused():
            loaded = load_parts(str(model.pretrained_model_name_or_path), spec.name, model.vae)
            where = loaded.source.name
            check_prediction(spec, loaded.source.prediction_type, where)
            family = cls(spec, text, loaded, weights, allow_nan=model.allow_nan_weights, highvram=memory.highvram)
        for part, module in family.parts().items():
            if part in weights.unused:
                continue
            check_weights(module.state_dict(), f"{where} ({part})", allow_nan=model.allow_nan_weights)
        set_attention(family.unet, choose_attention(memory, weights.device))
        if weights.device.type == "cuda":
            use_channels_last(family.unet)
        return family

    def parameter_count(self) -> int:
        """Return the number of values in all parts of the model, the VAE included."""
        parts = (self._loaded.unet, self._loaded.text, self._loaded.vae)
        return sum(tensor.numel() for part in parts for tensor in part.values())

    @property
    def source_kind(self) -> str:
        """How the model came: `safetensors`, `ckpt` or `diffusers`."""
        return self._loaded.source.kind

    def encode_images(self, pixels: Tensor, draws: Draws) -> Tensor:
        """Return an unscaled posterior sample [B,4,h,w], float32, for pixels [B,3,H,W] of a training step."""
        size = self.spec.latent_downscale
        shape = (self.spec.latent_channels, pixels.shape[-2] // size, pixels.shape[-1] // size)
        # Only float16 overflows; in the other types nothing is checked, so that a step never waits for the device.
        check = self.vae.dtype == torch.float16
        return self.vae.encode(pixels, draws.normal("posterior", shape), check=check)

    def encode_latents(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Return `mean + std * noise` of the posterior, float32 and unscaled, for a latent cache.

        Batches that overflow in half precision are repeated in float32; rows that are not finite even then are the
        fault of their picture and are returned as they are.
        """
        return self.vae.encode(pixels, noise)

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Return the latents in the scale in which noise is added."""
        return latents * self.spec.latent_scale

    def condition(self, batch: Batch, draws: Draws) -> Condition:
        """Return the text condition of a batch: its cached arrays, or its token ids through the encoder."""
        arrays = batch.text_arrays
        if arrays is None:
            return self.encode_text(batch.token_ids, batch.token_weights)
        hidden = arrays[self.spec.text_array_names[0]]
        if _COUNT in arrays:
            hidden = hidden[:, : int(arrays[_COUNT].amax())]
        return Condition(hidden=hidden.to(self.weights.device))

    def encode_text(self, token_ids: tuple[Tensor, ...], weights: tuple[Tensor, ...] | None = None) -> Condition:
        """Return the condition of token ids ([B,n,L],) and token weights alike or None."""
        return Condition(hidden=self._hidden(token_ids[0], weights, pad_id=self._pad_id))

    def text_arrays(self, token_ids: tuple[Tensor, ...], weights: tuple[Tensor, ...] | None) -> dict[str, Tensor]:
        """Return the hidden states [B,S,D] under the name that a text cache gives them.

        Captions that are not padded in training get their full length here, and their count of tokens [B] with it: no
        state depends on what follows it, so cutting them later is the same as never having had the rest.
        """
        ids, found = token_ids[0], {}
        if self._pad_id is not None:
            found[_COUNT] = (ids != NO_TOKEN).sum((1, 2))
            ids = ids.masked_fill(ids == NO_TOKEN, self._pad_id)
        return {self.spec.text_array_names[0]: self._hidden(ids, weights, pad_id=None), **found}

    def _hidden(self, ids: Tensor, weights: tuple[Tensor, ...] | None, *, pad_id: int | None) -> Tensor:
        encoder = self.text_encoder
        if self._parked:
            encoder.to(self.weights.device)
        device = encoder.device
        factors = None if weights is None else weights[0].to(device, non_blocking=True)
        ids = ids.to(device, non_blocking=True)
        return encode_tokens(encoder, ids, factors, skip=self._skip, pad_id=pad_id)

    def denoise(
        self, noisy: Tensor, t: Tensor, condition: Condition, control: Mapping[str, Any] | None = None
    ) -> Tensor:
        """Predict noise or velocity for scaled noisy latents [B,4,h,w] at timesteps t [B].

        Args:
            noisy: noised latents.
            t: timesteps.
            condition: from `condition` or `encode_text`.
            control: residuals of a ControlNet, by the argument names of diffusers' U-Net.
        """
        hidden = condition.hidden
        if not torch.is_autocast_enabled(noisy.device.type):
            dtype = self.unet.conv_norm_out.weight.dtype  # network modules may take weights away from other layers
            noisy, hidden = noisy.to(dtype), hidden.to(dtype)
        return self.unet(noisy, t, encoder_hidden_states=hidden, return_dict=False, **(control or {}))[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels [B,3,H,W], float32, about in [-1,1], for scaled latents."""
        return self.vae.decode(latents / self.spec.latent_scale)

    def release_vae(self) -> None:
        """Free the memory of the VAE; it is built again when it is needed."""
        self.vae.release()

    def unused_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that never get a gradient: those of text layers that `--clip_skip` leaves out."""
        layers = self.text_encoder.layers
        return [parameter for layer in layers[len(layers) - self._skip :] for parameter in layer.parameters()]

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
        """Write the model for use.

        Parts that did not train are written as they were read, whatever type they have in memory.

        Args:
            target: path without suffix.
            kind: `ckpt`, `safetensors`, `diffusers` or `diffusers_safetensors`; None: the kind of the source.
            precision: type of the written weights; None: as they are.
            metadata: header entries of a safetensors file.
            epoch: epochs done, for `.ckpt`.
            step: updates done, for `.ckpt`.
            zero_terminal_snr: the scheduler of a Diffusers folder says that it was trained so.

        Returns:
            The file or folder that was written.
        """
        from library.checkpoints.save import is_folder_kind, save_checkpoint, save_kind

        kind = kind or save_kind(None, use_safetensors=False, source_kind=self._loaded.source.kind)
        settings = SaveSettings(precision, metadata, epoch, step, zero_terminal_snr, allow_nan=self._allow_nan)
        return save_checkpoint(
            target if is_folder_kind(kind) else target.with_name(f"{target.name}.{kind}"),
            kind,
            self._current_parts(),
            spec=self.spec,
            source=self._loaded.source,
            settings=settings,
        )

    def _current_parts(self) -> ModelParts:
        """Return the weights as they are now; those of frozen parts in the type and place that they were read from."""
        loaded = self._loaded
        unet = self.unet.state_dict() if "unet" in self.weights.trained else loaded.unet
        text = self.text_encoder.state_dict() if "text_encoder" in self.weights.trained else loaded.text
        return ModelParts(unet, loaded.unet_config, text, loaded.text_config, loaded.vae, loaded.vae_config)

    def fingerprinted(self, part: str) -> Mapping[str, Tensor]:
        """Return the tensors that the fingerprint of a part tells apart: of the VAE those of the encoder."""
        source = {"unet": self._loaded.unet, "text_encoder": self._loaded.text, "vae": self._loaded.vae}[part]
        if part != "vae":
            return source
        return {name: tensor for name, tensor in source.items() if name.startswith(("encoder.", "quant_conv."))}


def _build_unet(loaded: LoadedParts, weights: WeightPlan) -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    unet = build_module(
        lambda: from_config(UNet2DConditionModel, loaded.unet_config),
        loaded.unet,
        what="U-Net",
        device=weights.device_of("unet"),
        dtype=weights.dtype_of("unet"),
    )
    name_modules(unet)
    return unet
