import random

import numpy as np
import pytest
import torch

from library.inference.diffusion import RenderingStopped, Watch
from library.inference.prompt_text import PromptEncoder, weight_tokens
from library.inference.prompts import PromptRequest
from library.inference.render import DiffusionRenderer, RenderSettings
from library.inference.rendering import NotFinite, on_device
from library.inference.samplers import SAMPLERS


def request(prompt="a fox", **more):
    more = {"width": 64, "height": 64, "steps": 4, "seed": 1, **more}
    return PromptRequest(prompt=prompt, **more)


def render(family, *requests, batch_size=1, **more):
    images = DiffusionRenderer(family, RenderSettings(batch_size=batch_size)).render(requests, **more)
    return [np.asarray(image).astype(int) for image in images]


def difference(one, two):
    return abs(one - two).max()


def test_size_and_kind_of_the_pictures(family):
    wide, tall = DiffusionRenderer(family).render([request(width=96), request(height=128)])
    assert (wide.size, tall.size, wide.mode) == ((96, 64), (64, 128), "RGB")


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpm_2_a", "dpmsolver++", "pndm"])
def test_a_picture_does_not_depend_on_its_batch(family, sampler):
    requests = [
        request("a fox", seed=1, sampler=sampler),
        request("a duck", seed=2, sampler=sampler, scale=3.0, negative_prompt="blurry"),
        request("a wide bear", seed=3, sampler=sampler, width=96),
        request("a robot", seed=4, sampler=sampler),
    ]
    alone = [render(family, one)[0] for one in requests]
    together = render(family, *requests, batch_size=4)
    assert max(len(noisy) for noisy, _, _ in family.seen) == 6, "three pictures with guidance in one batch"
    for one, two in zip(alone, together, strict=True):
        assert difference(one, two) <= 1
    assert difference(together[0], together[3]) > 20


@pytest.mark.parametrize("sampler", [row.name for row in SAMPLERS])
def test_rendering_leaves_no_trace_in_global_generators(family, sampler):
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    render(family, request(sampler=sampler))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # noqa: NPY002


def test_seed_prompt_negative_prompt_and_scale_matter(family):
    base, again, *others = render(
        family,
        request(),
        request(),
        request(seed=2),
        request("a duck"),
        request(negative_prompt="blurry"),
        request(scale=2.0),
        request(scale=-2.0),
        request(sampler="euler_a"),
        request(steps=5),
    )
    assert difference(base, again) == 0
    for other in others:
        assert difference(base, other) > 0


@pytest.mark.parametrize(("scale", "rows"), [(7.5, 2), (1.01, 2), (-1.0, 2), (1.0, 1), (0.0, 1), (0.5, 1)])
def test_guidance_needs_a_scale_outside_of_0_to_1(family, scale, rows):
    render(family, request(scale=scale))
    assert {len(noisy) for noisy, _, _ in family.seen} == {rows}


def test_first_noise_is_that_of_a_cpu_generator_with_the_seed(family):
    render(family, request(seed=77, scale=1.0))
    expected = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(77))
    assert torch.equal(family.seen[0][0], expected)


@pytest.mark.parametrize(
    ("words", "negative_words", "chunks"), [(3, 3, 1), (75, 0, 1), (76, 3, 2), (3, 160, 3), (400, 1, 3)]
)
def test_prompt_and_negative_prompt_get_equally_many_chunks(family, words, negative_words, chunks):
    render(family, request("fox " * words, negative_prompt="duck " * negative_words))
    assert family.seen[0][2].hidden.shape == (2, 77 * chunks, 8)


def test_long_prompts_are_encoded_chunk_by_chunk(family):
    encoder = PromptEncoder(family)
    first, second = "fox " * 75, "duck bear"
    joined = encoder.encode([encoder.tokenize(first + second)], 2, torch.device("cpu")).hidden
    for place, text in enumerate((first, second)):
        alone = encoder.encode([encoder.tokenize(text)], 1, torch.device("cpu")).hidden
        assert torch.equal(joined[:, 77 * place : 77 * (place + 1)], alone)


def test_text_beyond_225_tokens_is_reported(family, caplog):
    render(family, request("fox " * 300))
    assert "225 of 300" in caplog.text


def test_brackets_weight_tokens_and_keep_the_mean(family):
    encoder = PromptEncoder(family)

    def hidden(text):
        return encoder.encode([encoder.tokenize(text)], 1, torch.device("cpu")).hidden

    plain, weighted = hidden("a red fox"), hidden("a (red:1.5) fox")
    assert torch.allclose(weighted.mean(), plain.mean(), rtol=1e-4)
    ratio = weighted[0, 2] / plain[0, 2] / (weighted[0, 1] / plain[0, 1])
    assert torch.allclose(ratio, torch.full_like(ratio, 1.5), rtol=1e-4)
    assert torch.equal(hidden("a \\(red\\) fox")[0, 0], plain[0, 0])


def test_only_prompts_with_weights_are_touched():
    hidden = torch.randn(2, 77, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.ones(2, 77)
    assert weight_tokens(hidden, weights) is hidden
    weights[1, 3] = 1.3
    changed = weight_tokens(hidden, weights)
    assert torch.equal(changed[0], hidden[0])
    assert not torch.equal(changed[1], hidden[1])
    assert torch.isfinite(weight_tokens(hidden, torch.zeros(2, 77))).all()


def test_rendering_stops_at_the_next_denoising_step(family):
    asked = []

    def should_stop():
        asked.append(1)
        return len(asked) > 2

    with pytest.raises(RenderingStopped):
        render(family, request(steps=10), watch=Watch(should_stop))
    assert len(family.seen) == 2


def test_progress_is_told(family):
    told = []
    render(family, request(steps=3), watch=Watch(progress=lambda done, total: told.append((done, total))))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_numbers_that_are_none_are_no_picture(family):
    family.decode = lambda latents: torch.full((1, 3, 64, 64), float("nan"))
    with pytest.raises(NotFinite):
        render(family, request())


def test_a_request_without_seed_is_a_mistake_of_the_caller(family):
    with pytest.raises(ValueError, match="seed"):
        render(family, request(seed=None))


def test_gradients_and_modes_stay_as_they_were(family):
    family.denoiser.train()
    family.denoiser.requires_grad_(True)
    render(family, request())
    assert family.denoiser.training
    assert all(parameter.grad is None for parameter in family.denoiser.parameters())


def test_session_frees_the_vae_only_if_it_was_not_loaded_before(family):
    class Vae:
        loaded = False

    family.vae = Vae()
    with DiffusionRenderer(family).session():
        family.vae.loaded = True
    assert family.released == 1
    with DiffusionRenderer(family).session():
        pass
    assert family.released == 1


def test_modules_return_to_their_device_even_after_an_error():
    module = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError), on_device([module], torch.device("meta")):
        assert module.weight.is_meta
        module.to_empty(device="cpu")
        raise RuntimeError
    assert not module.weight.is_meta


def test_autocast_covers_denoiser_and_text(family):
    seen = []
    original = family.denoise
    family.denoise = lambda *args: (seen.append(torch.is_autocast_enabled("cpu")), original(*args))[1]
    renderer = DiffusionRenderer(family, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    renderer.render([request()])
    assert all(seen)
