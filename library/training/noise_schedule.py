"""The noise schedule that Stable Diffusion is trained with, and per-timestep tables made from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from library.training.options import LossOptions

TRAIN_TIMESTEPS = 1000
_BETA_START, _BETA_END = 0.00085, 0.012
_LARGEST_SNR = 1000.0
"""Where the signal-to-noise ratio is cut off, so that the first timesteps do not dominate a weighting."""


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """Tables over the timesteps, each [1000] on the CPU.

    Attributes:
        betas: Variance added at each timestep, float32.
        alphas_cumprod: Share of the signal's variance left at each timestep, float32; what latents are noised with.
        snr: Signal-to-noise ratio, float64, always of the schedule without zero terminal SNR: loss weightings keep
            their scale when `--zero_terminal_snr` is switched on.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    snr: Tensor


def noise_schedule(*, zero_terminal_snr: bool = False) -> NoiseSchedule:
    """Return the schedule of SD1, SD2 and SDXL: betas whose square roots grow linearly from 0.00085 to 0.012.

    Args:
        zero_terminal_snr: Rescale it so that nothing of the signal is left at the last timestep.
    """
    betas = torch.linspace(_BETA_START**0.5, _BETA_END**0.5, TRAIN_TIMESTEPS, dtype=torch.float32) ** 2
    original = torch.cumprod(1.0 - betas, dim=0)
    signal = original.double()
    snr = signal / (1.0 - signal)
    if not zero_terminal_snr:
        return NoiseSchedule(betas, original, snr)
    betas = zero_terminal_snr_betas(betas)
    return NoiseSchedule(betas, torch.cumprod(1.0 - betas, dim=0), snr)


def zero_terminal_snr_betas(betas: Tensor) -> Tensor:
    """Return `betas` with the signal's amplitude moved to 0 at the last timestep and kept at the first.

    Source: Lin et al., "Common Diffusion Noise Schedules and Sample Steps Are Flawed" (arXiv 2305.08891), section 3.1.
    """
    amplitude = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = amplitude[0].clone(), amplitude[-1].clone()
    signal = ((amplitude - last) * (first / (first - last))) ** 2
    kept = torch.cat([signal[:1], signal[1:] / signal[:-1]])
    return 1.0 - kept


def loss_weights(snr: Tensor, prediction_type: str, loss: LossOptions) -> Tensor:
    """Return the factor of the loss at each timestep, float32 [1000], as the product of the weightings switched on.

    Sources: min-SNR: Hang et al., arXiv 2303.09556; debiased estimation: Yu et al., arXiv 2310.08442.
    """
    predicts_v = prediction_type == "v_prediction"
    capped = snr.clamp(max=_LARGEST_SNR)
    weight = torch.ones_like(snr)
    if loss.min_snr_gamma:
        weight = weight * snr.clamp(max=loss.min_snr_gamma) / (snr + 1 if predicts_v else snr)
    if loss.scale_v_pred_loss_like_noise_pred:
        weight = weight * capped / (capped + 1)
    if loss.v_pred_like_loss:
        weight = weight * (1 + loss.v_pred_like_loss * (capped + 1) / capped)
    if loss.debiased_estimation_loss:
        weight = weight / (capped + 1 if predicts_v else capped.sqrt())
    return weight.float()


def huber_thresholds(alphas_cumprod: Tensor, loss: LossOptions) -> Tensor:
    """Return where the Huber losses turn from quadratic to linear at each timestep, float32 [1000]."""
    signal = alphas_cumprod.double()
    if loss.huber_schedule == "constant":
        thresholds = torch.full_like(signal, loss.huber_c * loss.huber_scale)
    elif loss.huber_schedule == "exponential":
        progress = torch.arange(len(signal), dtype=signal.dtype) / len(signal)
        thresholds = loss.huber_c**progress * loss.huber_scale
    else:
        sigma = ((1.0 - signal) / signal).sqrt()  # infinite where no signal is left: the threshold is huber_c there
        thresholds = (1.0 - loss.huber_c) / (1.0 + sigma) ** 2 + loss.huber_c
    return thresholds.float()
