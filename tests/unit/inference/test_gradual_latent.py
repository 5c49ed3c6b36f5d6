"""Latents grow in their steps, to the full size, with noise of the right strength; other samplers are refused."""

import logging

import pytest
import torch

from library.errors import UserError
from library.inference.extensions import Moment, PictureInputs
from library.inference.gradual_latent import GradualLatent, GradualLatents, Unsharp, _GrowingHooks, read_unsharp
from library.inference.prompts import PromptRequest
from library.inference.render import DiffusionRenderer
from library.inference.samplers import make_scheduler

pytestmark = pytest.mark.compat


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# When and how large ------------------------------------------------------------------------------------------------


def test_growth_begins_below_the_timestep_and_pauses_between():
    settings = GradualLatent(timesteps=750, ratio=0.5, ratio_step=0.25, every_n_steps=3)
    steps = [900, 800, 700, 600, 500, 400, 300, 200, 100]
    assert settings.sizes(steps, (64, 96)) == {2: (48, 72), 5: (64, 96)}


def test_sizes_are_multiples_of_eight_until_the_last():
    settings = GradualLatent(timesteps=1000, ratio=0.5, ratio_step=0.25, every_n_steps=1)
    assert settings.size(0.5, (90, 64)) == (40, 32)
    assert settings.sizes([4, 3, 2, 1], (90, 64)) == {0: (64, 48), 1: (90, 64)}
    assert settings.size(0.1, (40, 12)) == (8, 8)


def test_the_full_size_is_always_reached(caplog):
    settings = GradualLatent(timesteps=500, every_n_steps=3)
    with caplog.at_level(logging.WARNING):
        assert settings.sizes([900, 400, 300, 200, 100, 1], (64, 64)) == {1: (40, 40), 4: (64, 64)}
    assert "0.75" in caplog.text
    with pytest.raises(UserError, match="no step below timestep 0"):
        GradualLatent(timesteps=0).sizes([900, 400, 1], (64, 64))


# The step ----------------------------------------------------------------------------------------------------------


def reference(scheduler, index, prediction, latents, size, settings, fresh):
    """The step as it is defined: the direction and what it starts from grow, fresh noise is added."""

    def grow(x):
        return torch.nn.functional.interpolate(x, size=size, mode="bicubic", align_corners=False)

    sigma, after = scheduler.sigmas[index], scheduler.sigmas[index + 1]
    if scheduler.config.prediction_type == "epsilon":
        clean = latents - sigma * prediction
    else:
        clean = prediction * (-sigma / (sigma**2 + 1) ** 0.5) + latents / (sigma**2 + 1)
    direction = (latents - clean) / sigma
    up = (after**2 * (sigma**2 - after**2) / sigma**2) ** 0.5
    change = (after**2 - up**2) ** 0.5 - sigma
    sharpen = settings.unsharp or (lambda x: x)
    if settings.unsharp is None or settings.unsharp.target:
        still = sharpen(grow(latents + direction * change))
    else:
        still = sharpen(grow(latents)) + grow(direction) * change
    return still + fresh * up * settings.s_noise


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("unsharp", [None, Unsharp(3, 0.5, 0.5), Unsharp(5, 1.0, 0.7, target=False)])
@pytest.mark.parametrize("s_noise", [1.0, 0.6])
def test_a_growing_step(kind, unsharp, s_noise):
    settings = GradualLatent(timesteps=1000, s_noise=s_noise, unsharp=unsharp)
    scheduler = make_scheduler("euler_a", kind)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(2)
    t, latents, prediction = scheduler.timesteps[2], noise(2, 4, 8, 8), noise(2, 4, 8, 8, seed=1)
    scheduler.scale_model_input(latents, t)
    hooks = _GrowingHooks(settings, {7: (16, 24)}, (16, 24), scheduler)

    def advance(prediction, latents):
        return scheduler.step(prediction, t, latents, generator=torch.Generator().manual_seed(5), return_dict=False)[0]

    wanted = reference(scheduler, 2, prediction, latents, (16, 24), settings, noise(2, 4, 16, 24, seed=5))
    torch.testing.assert_close(
        hooks.advance(Moment(7, 9, 500), prediction, latents, advance), wanted, rtol=0, atol=3e-5
    )


def test_blurring_is_that_of_a_gaussian():
    """On a ramp a blur changes nothing but the border; on a spike it spreads it as the window says."""
    ramp = torch.arange(9.0).expand(1, 1, 9, 9)
    torch.testing.assert_close(Unsharp(3, 0.5, 1.0)(ramp)[..., 1:-1], ramp[..., 1:-1])
    spike = torch.zeros(1, 1, 5, 5)
    spike[..., 2, 2] = 1
    side = torch.exp(torch.tensor(-2.0))
    middle = 1 / (1 + 2 * side)
    sharp = Unsharp(3, 0.5, 1.0)(spike)
    torch.testing.assert_close(sharp[0, 0, 2, 2], 2 - middle**2)
    torch.testing.assert_close(sharp[0, 0, 2, 1], -(middle**2) * side)


def test_noise_at_the_start_keeps_its_strength():
    settings = GradualLatent(timesteps=1000)
    made = _GrowingHooks(settings, {}, (64, 64), None).start(lambda: noise(2, 4, 64, 64))
    assert made.shape == (2, 4, 32, 32)
    assert abs(made.std() - 1) < 0.03


# In a renderer -----------------------------------------------------------------------------------------------------


def render(family, settings, **more):
    request = PromptRequest(prompt="x", width=256, height=192, steps=6, seed=1, **{"sampler": "euler_a", **more})
    renderer = DiffusionRenderer(family, extensions=[GradualLatents(settings)])
    return renderer.render_latents([request])[0], [seen[0].shape[-2:] for seen in family.seen]


def test_pictures_have_their_full_size_in_the_end(family):
    settings = GradualLatent(timesteps=900, ratio_step=0.25, every_n_steps=2, unsharp=Unsharp(3, 0.5, 0.5))
    latents, sizes = render(family, settings)
    assert latents.shape == (4, 24, 32)
    assert sizes == [(8, 16)] * 2 + [(16, 24)] * 2 + [(24, 32)] * 2


def test_prompts_say_otherwise(family):
    plain, sizes = render(family, GradualLatent())
    assert sizes == [(24, 32)] * 6
    said = {"timesteps": 900, "ratio": 0.75, "ratio_step": 0.5, "unsharp_params": "3,0.5,0.5"}
    family.seen.clear()
    grown, sizes = render(family, GradualLatent(), gradual_latent=said)
    assert sizes == [(16, 24)] * 2 + [(24, 32)] * 4
    assert not torch.equal(grown, plain)


def test_samplers_without_noise_are_refused(family):
    with pytest.raises(UserError, match="works with the sampler euler_a, not with ddim"):
        render(family, GradualLatent(timesteps=900), sampler="ddim")


def test_pictures_from_pictures_are_left_alone(caplog):
    extension = GradualLatents(GradualLatent(timesteps=900))
    request, inputs = PromptRequest(prompt="x", sampler="ddim"), PictureInputs(latents=torch.zeros(4, 8, 8))
    with caplog.at_level(logging.WARNING):
        assert [extension.batch_key(request, inputs) for _ in range(2)] == [None, None]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("text", ["", "3", "2,0.5,0.5", "3,0,1", "3,a,1", "3,1,1,1,1", "3.5,1,1"])
def test_unsharp_parameters_that_make_no_sense(text):
    with pytest.raises(UserError, match="line 2: unsharp parameters"):
        read_unsharp(text, "line 2")


def test_unsharp_parameters():
    assert read_unsharp("3,0.5,0.25,0") == Unsharp(3, 0.5, 0.25, target=False)
    assert read_unsharp("5,1,1") == Unsharp(5, 1.0, 1.0)
    assert read_unsharp("none") is read_unsharp(None) is None


def test_a_prompt_that_sets_what_is_off_is_told(caplog):
    extension = GradualLatents(GradualLatent())
    for _ in range(2):
        extension.batch_key(PromptRequest(prompt="x", where="line 2", gradual_latent={"ratio": 0.5}), PictureInputs())
    assert [record.getMessage() for record in caplog.records] == [
        "line 2: gradual latent is off without --glt or --gradual_latent_timesteps"
    ]


def test_a_window_may_be_larger_than_the_picture():
    sharp = Unsharp(21, 4.0, 1.0)(torch.ones(1, 4, 8, 8))
    torch.testing.assert_close(sharp, torch.ones(1, 4, 8, 8))
