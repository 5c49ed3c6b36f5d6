"""The noise schedule of Stable Cascade ("GDF"): all is a function of log SNR, in float32 whatever the model's type.

Cosine schedule: Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (arXiv 2102.09672), equation
17, with time t in [0, 1]. Shift by resolution: Hoogeboom et al., "simple diffusion" (arXiv 2301.11093), section 3.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_S = 0.008
_LEAST, _MOST = 0.0001, 0.9999
_AT_ZERO = math.cos(_S / (1 + _S) * math.pi / 2) ** 2

HIGHEST = math.log(_MOST / (1 - _MOST))
"""Log SNR of the cleanest latents that occur; the noisiest have its negative."""


def log_snr(t: Tensor, shift: float = 1.0) -> Tensor:
    """Return the log SNR at times t in [0, 1].

    Args:
        t: any shape; 1 is pure noise.
        shift: above 1 for more noise at the same time, as larger pictures need it.
    """
    signal = torch.cos((_S + t.float()) / (1 + _S) * (math.pi / 2)) ** 2 / _AT_ZERO
    signal = signal.clamp(_LEAST, _MOST)
    return shifted((signal / (1 - signal)).log(), shift)


def shifted(log_snrs: Tensor, shift: float) -> Tensor:
    """Return log SNRs moved by `shift` and kept within their limits."""
    if shift != 1.0:
        log_snrs = log_snrs + 2 * math.log(1 / shift)
    return log_snrs.clamp(-HIGHEST, HIGHEST)


def amplitudes(log_snrs: Tensor) -> tuple[Tensor, Tensor]:
    """Return a and b of `a x0 + b noise`, whose squares add up to 1."""
    # Both by a sigmoid: 1 - a^2 loses most digits of b where there is hardly any noise.
    return torch.sigmoid(log_snrs).sqrt(), torch.sigmoid(-log_snrs).sqrt()


def noise_condition(log_snrs: Tensor) -> Tensor:
    """Return the time, in [0, 1], at which the schedule without shift has this log SNR: what the network is told."""
    angle = torch.acos((torch.sigmoid(log_snrs.float()) * _AT_ZERO).sqrt())
    return (angle / (math.pi / 2) * (1 + _S) - _S).clamp(0, 1)


def per_picture(values: Tensor) -> Tensor:
    """Return values [B] as [B,1,1,1]."""
    return values.reshape(-1, 1, 1, 1)


def diffuse(latents: Tensor, noise: Tensor, log_snrs: Tensor) -> Tensor:
    """Return latents [B,C,h,w] with noise of the same shape mixed in at log SNRs [B]."""
    a, b = amplitudes(per_picture(log_snrs))
    return a * latents + b * noise


def clean(noisy: Tensor, prediction: Tensor, log_snrs: Tensor) -> Tensor:
    """Return the latents that noisy ones and the predicted noise [B,C,h,w] stand for at log SNRs [B]."""
    a, b = amplitudes(per_picture(log_snrs))
    return (noisy - b * prediction) / a
