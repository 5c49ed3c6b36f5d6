"""The noise schedule and what is made with it, bit for bit against diffusers' scheduler."""

import pytest
import torch
from diffusers import DDPMScheduler

from library.contracts import StepKey
from library.draws import Draws
from library.training.noise_schedule import noise_schedule
from library.training.objective import DDPMObjective
from library.training.options import LossOptions, NoiseOptions

CPU = torch.device("cpu")


def scheduler(**options):
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        **options,
    )


@pytest.mark.parametrize("zero_terminal", [False, True])
def test_schedule(zero_terminal):
    ours, theirs = noise_schedule(zero_terminal_snr=zero_terminal), scheduler(rescale_betas_zero_snr=zero_terminal)
    assert torch.equal(ours.betas, theirs.betas)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noisy_latents_and_targets(prediction_type):
    objective = DDPMObjective(prediction_type, NoiseOptions(), LossOptions(), CPU)
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noised = objective.noise(latents, Draws(1, StepKey(0, 0), 4, CPU))
    noise, theirs = Draws(1, StepKey(0, 0), 4, CPU).normal("noise", (4, 8, 8)), scheduler()
    assert torch.equal(noised.noisy, theirs.add_noise(latents, noise, noised.t))
    expected = noise if prediction_type == "epsilon" else theirs.get_velocity(latents, noise, noised.t)
    assert torch.equal(noised.target, expected)
