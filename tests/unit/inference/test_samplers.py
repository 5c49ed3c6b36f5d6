import warnings

import numpy as np
import pytest
import torch

from library.errors import UserError
from library.inference.samplers import SAMPLER_NAMES, SAMPLERS, Sampler, _by_name, has_steps_offset, make_scheduler

PUBLIC_NAMES = [
    *("ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle"),
    *("k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a"),
]

pytestmark = pytest.mark.compat


def sampled(scheduler, steps, prediction_type):
    """Denoise with a perfect model of a single picture: every sampler must arrive there."""
    picture = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4)
    alpha_bar = scheduler.alphas_cumprod.double()
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(steps)
    latents = torch.randn(1, 1, 4, 4, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(latents, t)
        root = float(np.interp(float(t), np.arange(1000), alpha_bar.sqrt().numpy()))
        noise = (model_input - root * picture) / max(1e-8, (1 - root**2) ** 0.5)
        prediction = noise if prediction_type == "epsilon" else root * noise - (1 - root**2) ** 0.5 * picture
        extra = {"generator": generator} if "ancestral" in type(scheduler).__name__.lower() else {}
        latents = scheduler.step(prediction.float(), t, latents, **extra, return_dict=False)[0]
    return (latents - picture).abs().max().item()


def test_names_are_those_of_the_option():
    from library.training.options_output import SampleOptions

    assert set(SAMPLER_NAMES) == set(PUBLIC_NAMES)
    offered = next(
        option for option in SampleOptions.__dataclass_fields__.values() if option.name == "sample_sampler"
    ).metadata
    assert set(next(value for key, value in _flat(offered) if key == "choices")) == set(PUBLIC_NAMES)


def _flat(notes):
    for key, value in notes.items():
        yield key, value
        if hasattr(value, "items"):
            yield from _flat(value)


@pytest.mark.parametrize("name", PUBLIC_NAMES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_sampler_finds_the_picture(name, prediction_type):
    assert sampled(make_scheduler(name, prediction_type), 12, prediction_type) < 0.12


@pytest.mark.parametrize("name", [row.name for row in SAMPLERS])
def test_every_sampler_finds_the_picture_on_the_rescaled_schedule(name):
    error = sampled(make_scheduler(name, "v_prediction", zero_terminal_snr=True), 20, "v_prediction")
    assert error < 0.12


@pytest.mark.parametrize("name", [row.name for row in SAMPLERS])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_few_steps_work(name, steps):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert np.isfinite(sampled(make_scheduler(name, "epsilon"), steps, "epsilon"))


def test_noise_schedule_is_that_of_training():
    scheduler = make_scheduler("ddim", "epsilon")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    assert torch.allclose(scheduler.alphas_cumprod, torch.cumprod(1 - betas, 0))
    assert scheduler.config.steps_offset == 1
    assert not scheduler.config.clip_sample


def test_rescaled_schedule_agrees_with_diffusers():
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    ours = make_scheduler("ddim", "v_prediction", zero_terminal_snr=True)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    assert torch.allclose(ours.alphas_cumprod, theirs, atol=1e-5)
    ours.set_timesteps(10)
    assert int(ours.timesteps[0]) == 999


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="dpmsolver"):
        make_scheduler("unipc", "epsilon")


def test_two_rows_cannot_share_a_name():
    with pytest.raises(ValueError, match="ddim"):
        _by_name((*SAMPLERS, Sampler("new", "DDIMScheduler", aliases=("ddim",))))


@pytest.mark.parametrize("name", [row.name for row in SAMPLERS])
def test_steps_offset_can_be_zero(name):
    steps = []
    for zero in (False, True):
        scheduler = make_scheduler(name, "epsilon", zero_steps_offset=zero)
        scheduler.set_timesteps(10)
        steps.append(scheduler.timesteps.tolist())
    assert (steps[0] != steps[1]) == has_steps_offset(name)
    assert name != "ddim" or (steps[0][-1], steps[1][-1]) == (1, 0)
