"""The schedule and sampler of Stable Cascade against diffusers' scheduler, step by step and as a whole."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMWuerstchenScheduler

from library.inference import cascade_sampling
from library.inference.cascade_sampling import (
    STAGE_B,
    STAGE_C,
    SamplingPlan,
    guide,
    noised_start,
    sample_latents,
    start_noise,
    step,
)
from library.inference.diffusion import RenderingStopped, Watch, picture_generator
from library.inference.gdf import amplitudes, diffuse, log_snr, noise_condition

SHAPE = (16, 4, 6)
CPU = torch.device("cpu")


def generators(*seeds: int):
    return [picture_generator(seed) for seed in seeds]


def numbers(seed: int, rows: int = 2) -> torch.Tensor:
    return torch.randn((rows, *SHAPE), generator=torch.Generator().manual_seed(seed))


def test_noised_latents_are_the_schedulers():
    scheduler = DDPMWuerstchenScheduler()
    t = torch.tensor([0.01, 0.3, 0.77, 1.0])
    found = diffuse(numbers(0, 4), numbers(1, 4), log_snr(t))
    torch.testing.assert_close(found, scheduler.add_noise(numbers(0, 4), numbers(1, 4), t), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_every_step_but_the_last_is_the_schedulers(steps):
    scheduler = DDPMWuerstchenScheduler()
    scheduler.set_timesteps(steps)
    times = SamplingPlan(steps=steps).times()
    torch.testing.assert_close(times, scheduler.timesteps)
    levels = log_snr(times)
    for index in range(steps - 1):
        x, prediction = numbers(index), numbers(100 + index)
        ours = step("ddpm", x, prediction, levels[index : index + 2], generators(7, 8))
        theirs = torch.cat(
            [
                scheduler.step(
                    prediction[row : row + 1],
                    scheduler.timesteps[index].reshape(1),
                    x[row : row + 1],
                    generator=generators(7 + row)[0],
                ).prev_sample
                for row in range(2)
            ]
        )
        # At the noisiest step x0 is the difference of large numbers.
        torch.testing.assert_close(ours, theirs, atol=2e-5 if index == 0 else 2e-6, rtol=1e-5)


def test_the_last_step_leaves_the_least_noise():
    levels = log_snr(torch.tensor([0.05, 0.0]))
    x0, noise = numbers(0), numbers(1)
    a, b = amplitudes(levels[1])
    found = step("ddim", diffuse(x0, noise, levels[:1].expand(2)), noise, levels, generators(1, 2))
    torch.testing.assert_close(found, a * x0 + b * noise, atol=1e-5, rtol=1e-5)
    assert b.item() == pytest.approx(0.01, rel=1e-3)


def oracle(x0: torch.Tensor):
    """A denoiser that knows the pictures: it predicts the noise that is in what it is given."""

    def denoise(latents, condition):
        level = log_snr(condition)
        a, b = (value.reshape(-1, 1, 1, 1) for value in amplitudes(level))
        return (latents - a * x0.repeat(len(latents) // len(x0), 1, 1, 1)) / b

    return denoise


@pytest.mark.parametrize("sampler", cascade_sampling.SAMPLERS)
@pytest.mark.parametrize("plan", [STAGE_C, STAGE_B, SamplingPlan(cfg=(6.0, 1.0), cfg_t_start=0.9, cfg_t_stop=0.2)])
def test_a_perfect_denoiser_gives_the_picture(sampler, plan):
    x0 = numbers(5)
    settings = {name: getattr(plan, name) for name in SamplingPlan.__dataclass_fields__}
    chosen = SamplingPlan(**{**settings, "sampler": sampler})
    noise = start_noise(generators(1, 2), SHAPE, CPU)
    found = sample_latents(oracle(x0), chosen, generators(1, 2), noise)
    left = amplitudes(log_snr(torch.tensor(0.0), plan.shift))[1].item()
    assert left == pytest.approx(0.01 * plan.shift, rel=0.01)
    assert (found - x0).abs().max() < 5 * left


def network(latents, condition):
    torch.manual_seed(3)
    layer = torch.nn.Conv2d(16, 16, 3, padding=1).requires_grad_(False)
    signs = torch.ones(len(latents))
    signs[len(latents) // 2 :] = 0.5
    return torch.tanh(layer(latents)) * (1 + condition.reshape(-1, 1, 1, 1)) * signs.reshape(-1, 1, 1, 1)


def test_a_picture_does_not_depend_on_its_batch():
    plan = SamplingPlan(steps=4)

    def made(*seeds):
        gens = generators(*seeds)
        start = start_noise(gens, SHAPE, CPU)
        return sample_latents(network, plan, gens, start)

    together = made(4, 5, 6)
    for row, seed in enumerate((4, 5, 6)):
        torch.testing.assert_close(together[row : row + 1], made(seed), atol=1e-5, rtol=1e-5)


def test_a_whole_run_equals_the_loop_of_the_pipeline():
    """Without shift and rescaling, what diffusers' prior pipeline does; its last step alone removes all noise."""
    plan = SamplingPlan(steps=6, cfg=4.0, cfg_rho=0.0, shift=1.0)
    scheduler = DDPMWuerstchenScheduler()
    scheduler.set_timesteps(plan.steps)
    generator = picture_generator(9)
    latents = torch.randn((1, *SHAPE), generator=generator)
    for t in scheduler.timesteps[:-2]:
        # Ours is told 0.9936 for t = 1, where diffusers says 1; the level of noise is the same.
        ratio = noise_condition(log_snr(t)).expand(2)
        towards, away = network(torch.cat([latents] * 2), ratio).chunk(2)
        prediction = torch.lerp(away, towards, 4.0)
        latents = scheduler.step(prediction, t.reshape(1), latents, generator=generator).prev_sample
    found = []
    gens = generators(9)
    watch = Watch(should_stop=lambda: len(found) == plan.steps)

    def remember(x, condition):
        found.append(x[:1].clone())
        return network(x, condition)

    with pytest.raises(RenderingStopped):
        sample_latents(remember, plan, gens, start_noise(gens, SHAPE, CPU), watch=watch)
    torch.testing.assert_close(found[-1], latents, atol=1e-4, rtol=1e-4)


def test_guidance():
    towards, away = numbers(1), 0.3 * numbers(2)
    both = torch.cat([towards, away])
    plain = away + 4 * (towards - away)
    torch.testing.assert_close(guide(both, 4.0, 0.0), plain)
    rescaled = guide(both, 4.0, 0.7)
    for row in range(2):
        ratio = towards[row].std() / plain[row].std()
        torch.testing.assert_close(rescaled[row], 0.7 * plain[row] * ratio + 0.3 * plain[row])
    assert SamplingPlan(cfg=(6.0, 2.0)).guidance_at(0.75) == 5.0
    assert not SamplingPlan(cfg=1.0).guided
    assert not SamplingPlan(cfg=None).guided
    limited = SamplingPlan(cfg=3.0, cfg_t_start=0.8, cfg_t_stop=0.3)
    assert [limited.guidance_at(t) for t in (0.9, 0.8, 0.3, 0.2)] == [None, 3.0, 3.0, None]
    sizes = []
    sample_latents(
        lambda x, condition: sizes.append(len(x)) or x,
        SamplingPlan(steps=5, cfg=3.0, cfg_t_start=0.8, cfg_t_stop=0.3),
        generators(1, 2),
        numbers(0),
    )
    assert sizes == [2, 4, 4, 4, 2]


def test_starting_from_a_picture():
    plan = SamplingPlan(t_start=0.4, shift=2.0)
    x0 = numbers(3)
    start = noised_start(x0, plan, generators(1, 2))
    noise = start_noise(generators(1, 2), SHAPE, CPU)
    torch.testing.assert_close(start, diffuse(x0, noise, log_snr(torch.tensor([0.4, 0.4]), 2.0)))
    assert plan.times()[0].item() == pytest.approx(0.4)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"sampler": "x"}, {"t_start": 0.0}, {"t_start": 1.1}, {"t_end": 1.0}])
def test_impossible_plans(wrong):
    with pytest.raises(ValueError, match="impossible"):
        SamplingPlan(**wrong)
