"""The noise that latents are mixed with in training, with what the options add to it; the same for every family."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as functional
from torch import Tensor

if TYPE_CHECKING:
    from library.draws import Draws
    from library.training.options import NoiseOptions


class TrainingNoise:
    """Draws noise by names, so switching an option on does not change the noise without it."""

    def __init__(self, options: NoiseOptions) -> None:
        self._options = options

    def draw(self, latents: Tensor, draws: Draws) -> Tensor:
        """Return what the model shall recognise as noise: normal, with low frequencies added by options."""
        noise = draws.normal("noise", latents.shape[1:])
        if self._options.noise_offset:
            noise = noise + self._offset_strength(latents, draws) * draws.normal("offset", (latents.shape[1], 1, 1))
        if self._options.multires_noise_iterations:
            noise = self._multires(noise, draws)
        return noise

    def _offset_strength(self, latents: Tensor, draws: Draws) -> Tensor | float:
        """Return the strength of the channels' offsets: one number, or [B,C,1,1] where it follows the picture."""
        strength = float(self._options.noise_offset or 0)
        if self._options.noise_offset_random_strength:
            strength *= draws.scalar("offset_strength")
        if not self._options.adaptive_noise_scale:
            return strength
        brightness = latents.mean(dim=(2, 3), keepdim=True).abs()
        return (strength + self._options.adaptive_noise_scale * brightness).clamp(min=0)

    def _multires(self, noise: Tensor, draws: Draws) -> Tensor:
        """Add noise of ever lower resolution, then bring all to unit deviation over the whole micro-batch."""
        channels, height, width = noise.shape[1:]
        discount = self._options.multires_noise_discount
        for level in range(self._options.multires_noise_iterations or 0):
            shrink = (2 + 2 * draws.scalar(f"multires_ratio_{level}")) ** level
            size = (max(1, int(height / shrink)), max(1, int(width / shrink)))
            coarse = draws.normal(f"multires_{level}", (channels, *size))
            noise = noise + discount**level * functional.interpolate(coarse, (height, width), mode="bilinear")
            if 1 in size:
                break
        return noise / noise.std()

    def perturbed(self, noise: Tensor, draws: Draws) -> Tensor:
        """Return the noise that enters the input: with more of it than the target knows, if asked for.

        Source: Ning et al., "Input Perturbation Reduces Exposure Bias in Diffusion Models" (arXiv 2301.11706).
        """
        strength = self._options.ip_noise_gamma
        if not strength:
            return noise
        if self._options.ip_noise_gamma_random_strength:
            strength *= draws.scalar("ip_noise_strength")
        return noise + strength * draws.normal("ip_noise", noise.shape[1:])
