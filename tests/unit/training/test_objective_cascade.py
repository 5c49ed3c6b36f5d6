"""Noise, target, condition and weights of Stable Cascade against the published numbers and the formulas written out."""

from __future__ import annotations

import io
import json
import math
from types import SimpleNamespace

import pytest
import torch

from library.contracts import BatchKey, Condition, Noised, StepKey
from library.draws import Draws
from library.errors import UserError
from library.inference.gdf import amplitudes, clean, diffuse, log_snr, noise_condition
from library.training.adaptive_weight import BUCKETS, AdaptiveWeight
from library.training.loss import make_loss
from library.training.objective_cascade import GDFObjective, pyramid_noise
from library.training.options import LossOptions, NoiseOptions
from library.training.options_cascade import LOSS_WEIGHTINGS, CascadeLossOptions
from library.training.step import Autocast, TrainStep

CPU = torch.device("cpu")
SHAPE = (3, 16, 4, 6)


def objective(*, loss=None, pyramid=False, noise=None, **cascade):
    options = NoiseOptions(**(noise or {})), LossOptions(**(loss or {})), CascadeLossOptions(**cascade)
    return GDFObjective(*options, CPU, pyramid=pyramid)


def draws(step=2, rows=SHAPE[0]):
    return Draws(42, StepKey(step, 0), rows, CPU)


def latents():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("t", "level", "a", "b", "condition", "p2"),
    [
        (0.1, 3.5506, 0.98595, 0.16705, 0.1, 0.02791),
        (0.5, -0.0246, 0.70274, 0.71145, 0.5, 0.50616),
        (0.9, -3.7015, 0.15522, 0.98788, 0.9, 0.97591),
        (1.0, -9.2102, 0.0100, 0.99995, 0.99358, 0.9999),
    ],
)
def test_published_numbers(t, level, a, b, condition, p2):
    found = log_snr(torch.tensor([t]))
    assert found.item() == pytest.approx(level, abs=6e-5)
    assert [x.item() for x in amplitudes(found)] == pytest.approx([a, b], abs=6e-6)
    assert noise_condition(found).item() == pytest.approx(condition, abs=6e-6)
    noised = objective().noise(latents(), draws(), torch.full((3,), t))
    assert noised.weight.tolist() == pytest.approx([p2] * 3, abs=6e-6)
    assert noised.t.tolist() == pytest.approx([condition] * 3, abs=6e-6)


def test_shift_and_limits():
    assert log_snr(torch.tensor(0.5), 2.0).item() == pytest.approx(-1.4109, abs=6e-5)
    assert noise_condition(log_snr(torch.tensor(0.5), 2.0)).item() == pytest.approx(0.7056, abs=6e-5)
    ends = log_snr(torch.tensor([0.0, 1.0]), 0.1)
    assert ends[0].item() == pytest.approx(math.log(0.9999 / 0.0001))
    assert log_snr(torch.tensor(1.0), 4.0).item() == pytest.approx(-math.log(0.9999 / 0.0001))
    t = torch.linspace(0.01, 0.99, 50)
    torch.testing.assert_close(noise_condition(log_snr(t)), t, atol=1e-5, rtol=0)
    level = log_snr(t)[:3]
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(clean(diffuse(latents(), noise, level), noise, level), latents(), atol=1e-5, rtol=1e-5)


def test_everything_is_float32_and_noise_is_the_target():
    noised = objective().noise(latents().bfloat16(), draws())
    assert {x.dtype for x in (noised.noisy, noised.t, noised.target, noised.weight)} == {torch.float32}
    assert torch.equal(noised.target, draws().normal("noise", SHAPE[1:]))
    level = log_snr(noised.t)
    torch.testing.assert_close(noised.noisy, diffuse(latents().bfloat16().float(), noised.target, level))
    with torch.autocast("cpu", torch.bfloat16):
        again = objective().noise(latents().bfloat16(), draws())
    assert torch.equal(again.t, noised.t)
    assert again.t.dtype == torch.float32


def test_times_cover_their_range_and_nothing_else():
    everywhere = objective()
    t = torch.cat([everywhere._times(draws(step, 64), None, latents()) for step in range(200)])
    assert 0.001 <= t.min() < 0.003
    assert 0.997 < t.max() <= 1
    assert abs(t.mean() - 0.5) < 0.01
    limited = objective(noise={"min_timestep": 300, "max_timestep": 400})
    t = torch.cat([limited._times(draws(step, 64), None, latents()) for step in range(20)])
    assert 0.3 <= t.min() < 0.305
    assert 0.395 < t.max() <= 0.4
    assert limited.validation_timesteps(4) == (320, 340, 360, 380)
    assert torch.equal(objective().noise(latents(), draws(), 250).t, objective().noise(latents(), draws(), 250).t)
    assert objective().noise(latents(), draws(), 250).t[0].item() == pytest.approx(0.25, abs=1e-5)


EXPECTED = {
    "p2": lambda snr: 1 / (1 + snr),
    "constant": lambda snr: 1.0,
    "snr": lambda snr: snr,
    "snr+1": lambda snr: snr + 1,
    "min-snr": lambda snr: min(snr, 5),
    "min-snr+1": lambda snr: min(snr + 1, 5),
    "truncated": lambda snr: max(snr, 1),
    "sech": lambda snr: 1 / math.cosh(math.log(snr) / 2),
    "debiased": lambda snr: 1 / math.sqrt(min(snr, 1000)),
    "sigmoid": lambda snr: snr / (1 + snr),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_weightings(name):
    for thousandths in (20, 100, 500, 900):
        snr = math.exp(log_snr(torch.tensor(thousandths / 1000)).item())
        noised = objective(loss_weighting=name).noise(latents(), draws(), thousandths)
        assert noised.weight[0].item() == pytest.approx(EXPECTED[name](snr), rel=1e-4)
    assert set(LOSS_WEIGHTINGS) == {*EXPECTED, "adaptive"}


def test_options_of_other_families_weight_as_they_do_there():
    for thousandths in (20, 100, 500, 900):
        snr = math.exp(log_snr(torch.tensor(thousandths / 1000)).item())
        gamma = objective(loss={"min_snr_gamma": 5}).noise(latents(), draws(), thousandths).weight[0].item()
        assert gamma == pytest.approx(min(snr, 5) / snr, rel=1e-4)
        debiased = objective(loss={"debiased_estimation_loss": True}).noise(latents(), draws(), thousandths)
        assert debiased.weight[0].item() == pytest.approx(1 / math.sqrt(min(snr, 1000)), rel=1e-4)
        huber = objective(loss={"loss_type": "huber", "huber_schedule": "exponential", "huber_c": 0.1})
        assert huber.noise(latents(), draws(), thousandths).huber_c[0].item() == pytest.approx(
            0.1 ** (thousandths / 1000), rel=1e-4
        )


def test_noise_options_are_shared():
    plain, offset = objective(), objective(noise={"noise_offset": 0.1})
    base = plain.noise(latents(), draws())
    noised = offset.noise(latents(), draws())
    shift = noised.target - base.target
    torch.testing.assert_close(shift, (0.1 * draws().normal("offset", (16, 1, 1))).expand(SHAPE), atol=1e-6, rtol=0)
    assert torch.equal(noised.t, base.t)
    perturbed = objective(noise={"ip_noise_gamma": 0.1}).noise(latents(), draws())
    assert torch.equal(perturbed.target, base.target)
    assert not torch.equal(perturbed.noisy, base.noisy)


def test_pyramid_noise():
    noise = draws().normal("noise", (4, 64, 32))
    found = pyramid_noise(noise, draws())
    wanted, total = noise.clone(), 1.0
    for level, size in ((1, (32, 16)), (2, (16, 8)), (3, (8, 4)), (4, (4, 2)), (5, (2, 1))):
        coarse = draws().normal(f"pyramid_{level}", (4, *size))
        up = coarse.repeat_interleave(2**level, dim=2).repeat_interleave(2**level, dim=3)
        wanted += 0.75**level * up
        total += 0.75 ** (2 * level)
    torch.testing.assert_close(found, wanted / math.sqrt(total))
    assert pyramid_noise(draws().normal("noise", (4, 5, 7)), draws()).shape == (3, 4, 5, 7)
    many = torch.cat([pyramid_noise(draws(step).normal("noise", (4, 32, 32)), draws(step)) for step in range(60)])
    assert many.std().item() == pytest.approx(1, abs=0.05)
    stage_b = objective(pyramid=True).noise(latents(), draws())
    assert torch.equal(stage_b.target, pyramid_noise(draws().normal("noise", SHAPE[1:]), draws()))


def reference_buckets(losses, samples):
    """One update as the formula has it, bucket by bucket."""
    edges = [-10 + 20 * i / 298 for i in range(299)]
    groups: dict[int, list[float]] = {}
    for level, loss in samples:
        groups.setdefault(sum(edge < level for edge in edges), []).append(loss)
    for bucket, found in groups.items():
        losses[bucket] = 0.99 * losses[bucket] + 0.01 * sum(found) / len(found)


def test_adaptive_weights_follow_the_losses():
    adaptive, losses = AdaptiveWeight(CPU), [1.0] * BUCKETS
    generator = torch.Generator().manual_seed(3)
    for _ in range(30):
        levels = torch.randint(-4, 4, (8,), generator=generator) * 1.7
        values = torch.rand(8, generator=generator) * 3
        for part in (slice(0, 5), slice(5, 8)):
            adaptive.observe(adaptive.buckets(levels[part]), values[part])
        adaptive.after_update(lambda tensor: tensor)
        reference_buckets(losses, list(zip(levels.tolist(), values.tolist(), strict=True)))
    assert adaptive.losses.tolist() == pytest.approx(losses, rel=1e-5)
    buckets = adaptive.buckets(torch.tensor([-6.8, 9.99, 20.0, -20.0]))
    assert buckets.tolist()[2:] == [299, 0]
    assert adaptive.weights(buckets).tolist() == pytest.approx([1 / losses[b] for b in buckets.tolist()], rel=1e-5)


def test_adaptive_weights_add_up_over_ranks():
    alone, ranks = AdaptiveWeight(CPU), [AdaptiveWeight(CPU), AdaptiveWeight(CPU)]
    levels, values = torch.linspace(-5, 5, 8), torch.linspace(0, 3, 8)
    alone.observe(alone.buckets(levels), values)
    for number, rank in enumerate(ranks):
        rank.observe(rank.buckets(levels[number::2]), values[number::2])
    total = sum(rank._seen.clone() for rank in ranks)
    for rank in (alone, *ranks):
        rank.after_update(lambda tensor, rank=rank: tensor if rank is alone else total.clone())
    assert torch.equal(ranks[0].losses, ranks[1].losses)
    torch.testing.assert_close(ranks[0].losses, alone.losses)


def test_adaptive_weights_pass_over_what_is_not_finite():
    adaptive = AdaptiveWeight(CPU)
    adaptive.observe(torch.tensor([3, 3, 4]), torch.tensor([2.0, math.nan, math.inf]))
    adaptive.after_update(lambda tensor: tensor)
    assert adaptive.losses[3].item() == pytest.approx(0.99 + 0.02)
    assert adaptive.losses[4].item() == 1
    adaptive.losses[5] = 0
    assert adaptive.weights(torch.tensor([5])).item() == pytest.approx(1e7)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_log_has_the_loss_before_weighting(adaptive):
    aim = objective(adaptive_loss_weight=adaptive)
    assert aim.scalars() == {}
    for values in ([1.0, 2.0], [6.0]):
        noised = aim.noise(latents()[: len(values)], draws(rows=len(values)))
        aim.observe(noised, torch.tensor(values))
    aim.after_update(lambda tensor: 2 * tensor)
    assert aim.scalars()["raw_loss"].item() == 3, "the mean over all samples of all processes"
    aim.observe(noised, torch.tensor([4.0]))
    aim.after_update(lambda tensor: tensor)
    assert aim.scalars()["raw_loss"].item() == 4
    if not adaptive:
        assert aim.histograms() == {}
        return
    histogram = aim.histograms()["adaptive_loss"]
    assert histogram.counts == aim.adaptive.losses.tolist() and len(histogram.edges) == BUCKETS + 1
    level = log_snr(torch.tensor([0.5]))
    place = aim.adaptive.buckets(level).item()
    assert histogram.edges[place] <= level.item() <= histogram.edges[place + 1]


def test_the_state_goes_through_a_file_and_is_checked():
    one, other = objective(adaptive_loss_weight=True), objective(adaptive_loss_weight=True)
    noised = one.noise(latents(), draws())
    assert torch.equal(noised.weight, torch.ones(3))
    one.observe(noised, torch.tensor([0.1, 0.2, 0.3]))
    one.after_update(lambda tensor: tensor)
    assert not torch.equal(one.noise(latents(), draws()).weight, torch.ones(3))
    buffer = io.BytesIO()
    torch.save(one.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other.noise(latents(), draws()).weight, one.noise(latents(), draws()).weight)
    info = json.loads(json.dumps({"bucket_ranges": [0.0], "bucket_losses": [0.5] * 300}))
    other.load_state_dict(info)
    assert other.noise(latents(), draws()).weight.tolist() == [2, 2, 2]
    for wrong in ({}, {"bucket_losses": [1.0]}, {"bucket_losses": [math.nan] * 300}, {"bucket_losses": "x"}):
        with pytest.raises(UserError, match="adaptive loss weights"):
            other.load_state_dict(wrong)
    assert objective().state_dict() == {}
    objective().load_state_dict({})


def test_two_weightings_at_once_are_refused():
    assert list(CascadeLossOptions(adaptive_loss_weight=True, loss_weighting="snr").check())
    assert not list(CascadeLossOptions(adaptive_loss_weight=True, loss_weighting="adaptive").check())
    assert objective(loss_weighting="adaptive").adaptive is not None


class Toy:
    """A family and a method in one: the least that the training step asks for."""

    def __init__(self) -> None:
        self.layer = torch.nn.Conv2d(16, 16, 1)
        self.told: list[torch.Tensor] = []

    def trainable(self):
        return torch.nn.ModuleDict({"layer": self.layer})

    def scale_latents(self, values):
        return values

    def condition(self, batch, draws):
        return Condition(torch.zeros(1))

    def predict(self, noised, condition, batch):
        self.told.append(noised.t)
        return self.layer(noised.noisy)

    def target(self, noised, condition, batch):
        return noised.target


def batch(step: int, share: float = 1.0):
    key = BatchKey(StepKey(step, 0), 0, 0, True, False, share, ())
    weight = torch.ones(3)
    return SimpleNamespace(key=key, size=3, latents=latents(), pixels=None, loss_weight=weight, mask=None)


@pytest.mark.parametrize("pyramid", [False, True])
def test_the_training_step_takes_it_as_it_is(pyramid):
    torch.manual_seed(0)
    toy, aim = Toy(), objective(adaptive_loss_weight=True, pyramid=pyramid)
    step = TrainStep(toy, toy, aim, make_loss(LossOptions()), seed=1, autocast=Autocast(CPU, torch.bfloat16))
    optimizer = torch.optim.SGD(step.parameters(), lr=0.5)
    seen = []
    for number in range(25):
        loss, per_sample = step(batch(number))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        aim.after_update(lambda tensor: tensor)
        seen.append(per_sample.mean().item())
    assert sum(seen[-5:]) < sum(seen[:5])
    step(batch(30, share=0.0))
    assert not aim.adaptive._seen.any(), "padding must not count"
    assert toy.told[0].dtype == torch.float32
    assert (aim.adaptive.losses != 1).sum() > 10
    per_sample, noised = step.losses(batch(0), draws(), timestep=500)
    assert isinstance(noised, Noised)
    assert noised.t.tolist() == pytest.approx([0.5] * 3, abs=1e-5)
