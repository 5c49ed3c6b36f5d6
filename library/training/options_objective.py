"""Options of the training objective: the noise that images are mixed with, and the loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.errors import Problem
from library.option_groups import OptionGroup, opt

_HUBER = {"loss_type": ("huber", "smooth_l1")}


@dataclass(frozen=True, kw_only=True)
class NoiseOptions(OptionGroup, title="noise"):
    """The noise that images are mixed with, and at which timesteps."""

    noise_offset: float | None = opt(
        None,
        metadata_key="ss_noise_offset",
        help="Shift the noise of each channel by this much, so that very dark and bright images can be learnt.",
    )
    noise_offset_random_strength: bool = opt(
        False,
        matters_when={"noise_offset": ()},
        metadata_key="ss_noise_offset_random_strength",
        help="Choose the strength of the offset between 0 and --noise_offset.",
    )
    adaptive_noise_scale: float | None = opt(
        None,
        needs={"noise_offset": ()},
        metadata_key="ss_adaptive_noise_scale",
        help="Add this times the mean absolute value of the latents to the noise offset.",
    )
    multires_noise_iterations: int | None = opt(
        None,
        at_least=0,
        metadata_key="ss_multires_noise_iterations",
        help="Number of coarser layers of noise that are added (6 to 10 is usual).",
    )
    multires_noise_discount: float = opt(
        0.3,
        matters_when={"multires_noise_iterations": ()},
        metadata_key="ss_multires_noise_discount",
        help="How much weaker each coarser layer is.",
    )
    ip_noise_gamma: float | None = opt(
        None, metadata_key="ss_ip_noise_gamma", help="Strength of the input perturbation (about 0.1)."
    )
    ip_noise_gamma_random_strength: bool = opt(
        False,
        matters_when={"ip_noise_gamma": ()},
        metadata_key="ss_ip_noise_gamma_random_strength",
        help="Choose the strength of the input perturbation between 0 and --ip_noise_gamma.",
    )
    min_timestep: int | None = opt(None, at_least=0, at_most=999, help="First timestep that is trained. Default: 0.")
    max_timestep: int | None = opt(
        None, at_least=1, at_most=1000, help="Timesteps below this are trained. Default: 1000."
    )
    zero_terminal_snr: bool = opt(
        False,
        metadata_key="ss_zero_terminal_snr",
        help="Rescale the noise schedule so that its last step is pure noise (for v-prediction models).",
    )

    def check(self) -> Iterator[Problem]:
        """Refuse an empty range of timesteps."""
        low, high = self.min_timestep or 0, 1000 if self.max_timestep is None else self.max_timestep
        if low >= high:
            yield Problem("--min_timestep", f"{low} is not below --max_timestep {high}")


@dataclass(frozen=True, kw_only=True)
class LossOptions(OptionGroup, title="loss"):
    """How the prediction is compared with its target."""

    loss_type: str = opt(
        "l2",
        choices=("l1", "l2", "huber", "smooth_l1"),
        metadata_key="ss_loss_type",
        help="l2 is the mean squared error; huber and smooth_l1 are less sensitive to outliers.",
    )
    huber_schedule: str = opt(
        "snr",
        choices=("constant", "exponential", "snr"),
        matters_when=_HUBER,
        metadata_key="ss_huber_schedule",
        help="How the parameter of the Huber losses depends on the timestep.",
    )
    huber_c: float = opt(
        0.1,
        more_than=0,
        matters_when=_HUBER,
        metadata_key="ss_huber_c",
        help="Parameter of the Huber losses: where they change from square to linear.",
    )
    huber_scale: float = opt(
        1.0, more_than=0, matters_when=_HUBER, metadata_key="ss_huber_scale", help="Multiplier of --huber_c."
    )
    min_snr_gamma: float | None = opt(
        None,
        at_least=0,
        metadata_key="ss_min_snr_gamma",
        help="Limit of the loss weight of easy timesteps (5 is usual).",
    )
    scale_v_pred_loss_like_noise_pred: bool = opt(
        False, needs={"v_parameterization": ()}, help="Weight the loss of v-prediction like that of noise prediction."
    )
    v_pred_like_loss: float | None = opt(
        None,
        excludes={"v_parameterization": "it adds to the loss of noise prediction what v-prediction already has"},
        help="Add this times a loss weighted like that of v-prediction.",
    )
    debiased_estimation_loss: bool = opt(
        False, metadata_key="ss_debiased_estimation", help="Weight the loss by the debiased estimation of the image."
    )
