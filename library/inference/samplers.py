"""The samplers that a prompt or an option can name, each one row over a scheduler class of diffusers."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from library.errors import UserError

TRAIN_TIMESTEPS = 1000
BETA_START = 0.00085
BETA_END = 0.012

_TERMINAL_ALPHA_BAR = 2.0**-24
"""Stands for the zero of the rescaled schedule, so that samplers that work with sigmas stay finite (4096 at most)."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """One sampler: its name, its aliases, the scheduler class of diffusers and what that class is told.

    `spaced` says that the class takes `timestep_spacing`.
    """

    name: str
    scheduler: str
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    aliases: tuple[str, ...] = ()
    spaced: bool = True


_SD_OFFSET = {"steps_offset": 1, "set_alpha_to_one": False}
"""As the scheduler configuration says that Stable Diffusion was published with."""

SAMPLERS: tuple[Sampler, ...] = (
    Sampler("ddim", "DDIMScheduler", {**_SD_OFFSET, "clip_sample": False}),
    Sampler("pndm", "PNDMScheduler", {**_SD_OFFSET, "skip_prk_steps": True}),
    Sampler("lms", "LMSDiscreteScheduler", aliases=("k_lms",)),
    Sampler("euler", "EulerDiscreteScheduler", aliases=("k_euler",)),
    Sampler("euler_a", "EulerAncestralDiscreteScheduler", aliases=("k_euler_a",)),
    Sampler("heun", "HeunDiscreteScheduler"),
    Sampler("dpm_2", "KDPM2DiscreteScheduler", aliases=("k_dpm_2",)),
    Sampler("dpm_2_a", "KDPM2AncestralDiscreteScheduler", aliases=("k_dpm_2_a",)),
    # The first-generation solver cannot end at sigma 0, which is the default of the class.
    Sampler(
        "dpmsolver", "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
    ),
    Sampler("dpmsolver++", "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    # Without it the class changes its own configuration, with a warning, whenever the number of steps is odd.
    Sampler("dpmsingle", "DPMSolverSinglestepScheduler", {"lower_order_final": True}, spaced=False),
)


def _by_name(rows: tuple[Sampler, ...]) -> Mapping[str, Sampler]:
    table: dict[str, Sampler] = {}
    for row in rows:
        for name in (row.name, *row.aliases):
            if name in table:
                raise ValueError(f"two samplers are called {name}")
            table[name] = row
    return MappingProxyType(table)


_BY_NAME = _by_name(SAMPLERS)

SAMPLER_NAMES: tuple[str, ...] = tuple(_BY_NAME)
"""Every name and alias."""


def make_scheduler(
    name: str, prediction_type: str, *, zero_terminal_snr: bool = False, zero_steps_offset: bool = False
) -> Any:
    """Build the scheduler of sampler `name` (any case) over the noise schedule of training.

    Args:
        name: a name or alias of `SAMPLERS`.
        prediction_type: `epsilon` or `v_prediction`, as the model was trained.
        zero_terminal_snr: use the schedule rescaled to end in pure noise (https://arxiv.org/abs/2305.08891). Models
            that predict v then start at the last timestep; for epsilon nothing can be learned there, so it is left out.
        zero_steps_offset: step through the multiples of 1000 / steps themselves. Samplers published with Stable
            Diffusion (`has_steps_offset`) step through the timesteps after them otherwise.

    Returns:
        A scheduler of diffusers; `set_timesteps` has not been called.

    Raises:
        UserError: unknown name, or a package that this sampler needs is missing.
    """
    row = _row(name)
    settings = {"beta_start": BETA_START, "beta_end": BETA_END, "beta_schedule": "scaled_linear", **row.settings}
    if zero_steps_offset and "steps_offset" in settings:
        settings["steps_offset"] = 0
    if zero_terminal_snr:
        settings["trained_betas"] = zero_terminal_betas()
        if row.spaced:
            settings["timestep_spacing"] = "trailing" if prediction_type == "v_prediction" else "leading"
    scheduler_class = getattr(importlib.import_module("diffusers"), row.scheduler)
    try:
        return scheduler_class(num_train_timesteps=TRAIN_TIMESTEPS, prediction_type=prediction_type, **settings)
    except ImportError as error:
        if row.name != "lms":
            raise
        raise UserError("sampler lms needs the package scipy", "Run: pip install scipy") from error


def has_steps_offset(name: str) -> bool:
    """Tell whether `zero_steps_offset` changes anything for sampler `name`."""
    return "steps_offset" in _row(name).settings


def _row(name: str) -> Sampler:
    row = _BY_NAME.get(name.lower())
    if row is None:
        raise UserError(f"unknown sampler {name!r}", f"Choose one of: {', '.join(SAMPLER_NAMES)}.")
    return row


def zero_terminal_betas() -> list[float]:
    """Return the training betas rescaled so that the last timestep has (almost) no signal left.

    Algorithm 1 of https://arxiv.org/abs/2305.08891: the square root of the cumulative product is shifted to end at 0
    and scaled to start where it started. The last value is 2^-24 instead of 0.
    """
    import numpy as np

    betas = np.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_TIMESTEPS, dtype=np.float64) ** 2
    root = np.sqrt(np.cumprod(1.0 - betas))
    alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    alpha_bar[-1] = _TERMINAL_ALPHA_BAR
    previous = np.concatenate([[1.0], alpha_bar[:-1]])
    return (1.0 - alpha_bar / previous).tolist()
