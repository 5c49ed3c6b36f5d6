"""What latents become, what is to be predicted and how it is weighted, against the formulas written out."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from library.contracts import StepKey
from library.draws import Draws
from library.errors import UserError
from library.training.noise_schedule import noise_schedule
from library.training.objective import DDPMObjective
from library.training.options import LossOptions, NoiseOptions

CPU = torch.device("cpu")
SHAPE = (3, 4, 12, 20)


def objective(prediction_type="epsilon", *, loss=None, **noise):
    return DDPMObjective(prediction_type, NoiseOptions(**noise), loss or LossOptions(), CPU)


def draws(step=2, rows=SHAPE[0]):
    return Draws(42, StepKey(step, 0), rows, CPU)


def latents():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.3


def alphas():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return torch.cumprod(1 - betas, dim=0)


def column(values):
    return values.view(-1, 1, 1, 1)


def test_epsilon_prediction():
    x0, noised = latents(), objective().noise(latents(), draws())
    a = column(alphas()[noised.t])
    assert torch.equal(noised.target, draws().normal("noise", SHAPE[1:]))
    torch.testing.assert_close(noised.noisy, a.sqrt() * x0 + (1 - a).sqrt() * noised.target)
    assert torch.equal(noised.weight, torch.ones(3))
    assert noised.huber_c is None
    assert noised.noisy.dtype == noised.target.dtype == noised.weight.dtype == torch.float32
    assert noised.t.dtype == torch.int64


def test_v_prediction():
    x0, noised = latents(), objective("v_prediction").noise(latents(), draws())
    a, noise = column(alphas()[noised.t]), draws().normal("noise", SHAPE[1:])
    torch.testing.assert_close(noised.target, a.sqrt() * noise - (1 - a).sqrt() * x0)


def test_half_precision_latents_are_noised_in_float32():
    noised = objective().noise(latents().bfloat16(), draws())
    assert noised.noisy.dtype == torch.float32


def test_timesteps_stay_in_their_range_and_reach_both_ends():
    limited = objective(min_timestep=300, max_timestep=303)
    seen = {t for step in range(30) for t in limited.noise(latents(), draws(step)).t.tolist()}
    assert seen == {300, 301, 302}
    everywhere = objective()
    all_t = torch.cat([everywhere.noise(latents(), draws(step, 3)).t for step in range(1500)])
    assert 0 <= all_t.min() < 5
    assert 995 <= all_t.max() < 1000


@pytest.mark.parametrize("limits", [{"min_timestep": 500, "max_timestep": 500}, {"max_timestep": 1001}])
def test_an_empty_range_of_timesteps_is_refused(limits):
    with pytest.raises(UserError, match="min_timestep"):
        objective(**limits)


@pytest.mark.parametrize("timesteps", [400, torch.tensor([1, 500, 999])])
def test_timesteps_can_be_given(timesteps):
    given = objective().noise(latents(), draws(), timesteps)
    expected = torch.full((3,), 400) if isinstance(timesteps, int) else timesteps
    assert torch.equal(given.t, expected)
    assert torch.equal(given.target, objective().noise(latents(), draws()).target)


def test_validation_timesteps_are_the_inner_points():
    assert objective().validation_timesteps(4) == (200, 400, 600, 800)
    assert objective(min_timestep=100, max_timestep=700).validation_timesteps(3) == (250, 400, 550)


@pytest.mark.parametrize(
    "switched_on",
    [
        {"noise_offset": 0.1},
        {"noise_offset": 0.1, "noise_offset_random_strength": True, "adaptive_noise_scale": 0.5},
        {"multires_noise_iterations": 6},
        {"ip_noise_gamma": 0.1, "ip_noise_gamma_random_strength": True},
        {"zero_terminal_snr": True},
    ],
)
def test_options_change_neither_the_timesteps_nor_the_base_noise(switched_on):
    plain, changed = objective().noise(latents(), draws()), objective(**switched_on).noise(latents(), draws())
    assert torch.equal(plain.t, changed.t)
    assert not torch.equal(plain.noisy, changed.noisy)
    if "noise_offset" in switched_on:  # what was added is the same for all pixels of a channel
        added = changed.target - plain.target
        torch.testing.assert_close(added, added[..., :1, :1].expand(SHAPE), atol=1e-6, rtol=0)


def test_noise_offset_shifts_channels():
    plain, shifted = objective().noise(latents(), draws()), objective(noise_offset=0.2).noise(latents(), draws())
    torch.testing.assert_close(shifted.target, plain.target + 0.2 * draws().normal("offset", (4, 1, 1)))


def test_random_offset_strength_is_one_number_per_batch():
    plain = objective().noise(latents(), draws()).target
    shifted = objective(noise_offset=0.2, noise_offset_random_strength=True).noise(latents(), draws()).target
    strength = (shifted - plain)[..., 0, 0] / draws().normal("offset", (4,))
    torch.testing.assert_close(strength, torch.full((3, 4), 0.2 * draws().scalar("offset_strength")), rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [0.5, -10.0])
def test_adaptive_offset_follows_the_brightness_and_never_turns_negative(scale):
    plain = objective().noise(latents(), draws()).target
    shifted = objective(noise_offset=0.1, adaptive_noise_scale=scale).noise(latents(), draws()).target
    strength = (0.1 + scale * latents().mean(dim=(2, 3), keepdim=True).abs()).clamp(min=0)
    torch.testing.assert_close(shifted, plain + strength * draws().normal("offset", (4, 1, 1)))
    assert (strength == 0).any() == (scale < 0)


def test_multires_noise():
    height, width = SHAPE[2:]
    expected = draws().normal("noise", SHAPE[1:])
    for level in range(6):
        ratio = (2 + 2 * draws().scalar(f"multires_ratio_{level}")) ** level
        size = (max(1, int(height / ratio)), max(1, int(width / ratio)))
        coarse = draws().normal(f"multires_{level}", (4, *size))
        expected = expected + 0.3**level * F.interpolate(coarse, (height, width), mode="bilinear")
        if 1 in size:
            break
    assert level < 5  # small pictures stop early
    expected = expected / expected.std()
    target = objective(multires_noise_iterations=6).noise(latents(), draws()).target
    torch.testing.assert_close(target, expected)
    assert abs(target.std().item() - 1) < 1e-5


def test_multires_discount_and_offset_work_together():
    one = objective(multires_noise_iterations=1, multires_noise_discount=0.9, noise_offset=0.5)
    both = draws().normal("noise", SHAPE[1:]) + 0.5 * draws().normal("offset", (4, 1, 1))
    both = both + draws().normal("multires_0", SHAPE[1:])  # the first level has full resolution and weight 1
    torch.testing.assert_close(one.noise(latents(), draws()).target, both / both.std())


@pytest.mark.parametrize("random_strength", [False, True])
def test_input_perturbation_enters_the_input_but_not_the_target(random_strength):
    plain = objective().noise(latents(), draws())
    perturbed = objective(ip_noise_gamma=0.3, ip_noise_gamma_random_strength=random_strength).noise(latents(), draws())
    strength = 0.3 * (draws().scalar("ip_noise_strength") if random_strength else 1)
    sigma = column((1 - alphas()[plain.t]).sqrt())
    assert torch.equal(perturbed.target, plain.target)
    more = strength * draws().normal("ip_noise", SHAPE[1:])
    torch.testing.assert_close(perturbed.noisy, plain.noisy + sigma * more, atol=1e-5, rtol=1e-5)


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_start():
    rescaled, plain = objective(zero_terminal_snr=True), objective()
    assert rescaled.alphas_cumprod[-1] == 0
    torch.testing.assert_close(rescaled.alphas_cumprod[0], plain.alphas_cumprod[0])
    noised = rescaled.noise(latents(), draws(), 999)
    assert torch.equal(noised.noisy, noised.target)
    root = alphas().sqrt()
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    torch.testing.assert_close(rescaled.alphas_cumprod, expected, atol=1e-6, rtol=1e-4)


SNR = alphas().double() / (1 - alphas().double())
CAPPED = SNR.clamp(max=1000)


@pytest.mark.parametrize(
    ("prediction_type", "options", "expected"),
    [
        ("epsilon", {"min_snr_gamma": 5.0}, SNR.clamp(max=5) / SNR),
        ("v_prediction", {"min_snr_gamma": 5.0}, SNR.clamp(max=5) / (SNR + 1)),
        ("v_prediction", {"scale_v_pred_loss_like_noise_pred": True}, CAPPED / (CAPPED + 1)),
        ("epsilon", {"v_pred_like_loss": 0.5}, 1 + 0.5 * (CAPPED + 1) / CAPPED),
        ("epsilon", {"debiased_estimation_loss": True}, 1 / CAPPED.sqrt()),
        ("v_prediction", {"debiased_estimation_loss": True}, 1 / (CAPPED + 1)),
        (
            "v_prediction",
            {"min_snr_gamma": 1.0, "scale_v_pred_loss_like_noise_pred": True, "debiased_estimation_loss": True},
            SNR.clamp(max=1) / (SNR + 1) * CAPPED / (CAPPED + 1) / (CAPPED + 1),
        ),
    ],
)
@pytest.mark.parametrize("zero_terminal", [False, True])
def test_weights_come_from_the_original_schedule(prediction_type, options, expected, zero_terminal):
    one = objective(prediction_type, loss=LossOptions(**options), zero_terminal_snr=zero_terminal)
    for t in (0, 1, 250, 998, 999):
        weight = one.noise(latents(), draws(), t).weight
        torch.testing.assert_close(weight, torch.full((3,), expected[t].item()))


@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
def test_huber_thresholds(loss_type):
    def threshold(t, schedule, **more):
        loss = LossOptions(loss_type=loss_type, huber_schedule=schedule, huber_c=0.1, **more)
        return objective(loss=loss).noise(latents(), draws(), t).huber_c

    sigma = math.sqrt((1 - alphas()[300].item()) / alphas()[300].item())
    torch.testing.assert_close(threshold(300, "constant", huber_scale=2.0), torch.full((3,), 0.2))
    torch.testing.assert_close(threshold(300, "exponential", huber_scale=2.0), torch.full((3,), 2 * 0.1**0.3))
    torch.testing.assert_close(threshold(300, "snr", huber_scale=2.0), torch.full((3,), 0.9 / (1 + sigma) ** 2 + 0.1))


def test_huber_threshold_is_finite_where_nothing_of_the_signal_is_left():
    one = objective("v_prediction", loss=LossOptions(loss_type="huber"), zero_terminal_snr=True)
    assert one.noise(latents(), draws(), 999).huber_c.tolist() == pytest.approx([0.1] * 3)


def test_nothing_is_drawn_from_global_generators():
    state, python_state = torch.get_rng_state(), random.getstate()
    objective(noise_offset=0.1, multires_noise_iterations=3, ip_noise_gamma=0.1).noise(latents(), draws())
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state


def test_there_is_nothing_to_save():
    one = objective()
    one.load_state_dict(one.state_dict())
    assert one.state_dict() == {}
    assert noise_schedule().betas.shape == (1000,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_noising_never_waits_for_the_gpu():
    device = torch.device("cuda")
    options = NoiseOptions(noise_offset=0.1, adaptive_noise_scale=0.1, multires_noise_iterations=4, ip_noise_gamma=0.1)
    one = DDPMObjective("epsilon", options, LossOptions(loss_type="huber", min_snr_gamma=5.0), device)
    x0 = latents().to(device)
    one.noise(x0, Draws(42, StepKey(0, 0), 3, device))
    torch.cuda.set_sync_debug_mode("error")
    try:
        one.noise(x0, Draws(42, StepKey(1, 0), 3, device))
    finally:
        torch.cuda.set_sync_debug_mode("default")
