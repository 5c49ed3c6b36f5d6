from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from library.inference.extensions import Extension, PictureInputs, StepHooks, add_control
from library.inference.prompts import PromptRequest
from library.inference.render import DiffusionRenderer, RenderSettings


def request(prompt="a fox", **more):
    return PromptRequest(prompt=prompt, **{"width": 64, "height": 64, "steps": 4, "seed": 1, **more})


def render(family, *requests, inputs=None, extensions=(), batch_size=1):
    renderer = DiffusionRenderer(family, RenderSettings(batch_size=batch_size), extensions=extensions)
    return [np.asarray(image).astype(int) for image in renderer.render(requests, inputs)]


def difference(one, two):
    return abs(one - two).max()


class Logging(Extension):
    """Notes what is called, in order."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    @contextmanager
    def begin(self, batch):
        log, name = self.log, self.name

        class Hooks(StepHooks):
            def start(self, make):
                log.append(f"{name} start")
                return make()

            def predict(self, moment, call, predict):
                log.append(f"{name} predict {moment.index}/{moment.total} at {moment.timestep:.0f}")
                return predict(call)

            def control(self, moment, call):
                log.append(f"{name} control")
                return {"down": (torch.ones(1),), "mid": torch.ones(1)}

            def advance(self, moment, prediction, latents, advance):
                log.append(f"{name} advance")
                return advance(prediction, latents)

        log.append(f"{name} begins")
        try:
            yield Hooks()
        finally:
            log.append(f"{name} ends")


def test_extensions_that_do_nothing_change_nothing(family):
    plain = render(family, request(), request("a duck", sampler="euler_a"))
    with_them = render(family, request(), request("a duck", sampler="euler_a"), extensions=[Extension(), Extension()])
    assert all((one == two).all() for one, two in zip(plain, with_them, strict=True))


def test_hooks_are_nested_with_the_first_outermost(family):
    log, given = [], []
    original = family.denoise
    family.denoise = lambda *args: (given.append(args[3]), original(*args))[1]
    render(family, request(steps=2), extensions=[Logging("a", log), Logging("b", log)])
    step = ["{} predict {}/2 at {}", "{} control", "{} advance"]
    expected = ["a begins", "b begins", "a start", "b start"]
    for index, t in enumerate((501, 1)):
        expected += [line.format(name, index, t) for line in step for name in "ab"]
    assert log == [*expected, "b ends", "a ends"]
    assert [(float(control["down"][0]), float(control["mid"])) for control in given] == [(2, 2), (2, 2)]


def test_hooks_are_taken_away_even_after_an_error(family):
    log = []
    family.denoise = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        render(family, request(), extensions=[Logging("a", log)])
    assert log[-1] == "a ends"


def test_an_extension_chooses_text_batch_and_finish(family):
    seen = []

    class Changing(Extension):
        def prompt(self, request, text):
            return text.replace("fox", "duck")

        def batch_key(self, request, inputs):
            return len(inputs.guides)

        def begin(self, batch):
            seen.append([len(inputs.guides) for inputs in batch.inputs])
            return super().begin(batch)

        def finish(self, request, inputs, picture):
            return picture.rotate(180)

    inputs = [PictureInputs(guides=(None,) * count) for count in (0, 1, 0)]
    made = render(family, *[request()] * 3, inputs=inputs, extensions=[Changing()], batch_size=3)
    assert seen == [[0, 0], [1]]
    (duck,) = render(family, request("a duck"))
    assert difference(made[0], duck[::-1, ::-1]) <= 1


def test_further_texts_can_be_encoded(family):
    found = []

    class Reading(Extension):
        def begin(self, batch):
            found.append(batch.encode(["a duck", "fox " * 80]).hidden)
            found.append(batch.encode(["a duck"], 3).hidden)
            return super().begin(batch)

    render(family, request(), extensions=[Reading()])
    assert [tuple(hidden.shape) for hidden in found] == [(2, 154, 8), (1, 231, 8)]


def test_residuals_of_several_extensions_are_added():
    one, two = {"mid": torch.ones(2), "x": 1}, {"mid": torch.ones(2), "down": [torch.ones(1)]}
    assert add_control(None, None) is None
    assert add_control(one, None) is one
    assert add_control(None, two) is two
    both = add_control(one, two)
    assert torch.equal(both["mid"], torch.full((2,), 2.0))
    assert both["x"] == 1
    assert both["down"] is two["down"]


def test_a_negative_prompt_with_its_own_scale(family):
    """Both scales count from the empty prompt."""
    three = request(negative_prompt="blurry", scale=5.0, negative_scale=2.0)
    (made,) = render(family, three)
    assert {len(noisy) for noisy, _, _ in family.seen} == {3}
    noisy, _, condition = family.seen[0]
    empty = render(family, request("", scale=1.0)) and family.seen[-1][2].hidden
    assert torch.equal(condition.hidden[0], empty[0]), "the empty prompt is the first branch"
    for changes in ({"negative_scale": 0.0}, {"negative_scale": None}, {"negative_prompt": ""}, {"scale": 4.0}):
        assert difference(made, render(family, replace(three, **changes))[0]) > 0, changes


def test_scales_of_three_branches_agree_with_two_where_they_mean_the_same(family):
    negative = {"negative_prompt": "blurry"}
    (without,) = render(family, request(scale=5.0))
    (zero,) = render(family, request(scale=5.0, negative_scale=0.0, **negative))
    assert difference(zero, without) <= 1, "e + s (c - e)"
    (plain,) = render(family, request(scale=5.0, **negative))
    (same,) = render(family, request(scale=5.0, negative_scale=4.0, **negative))
    assert difference(same, plain) <= 1, "with negative scale s - 1 the empty prompt cancels: n + s (c - n)"


@pytest.mark.parametrize("sampler", ["euler_a", "dpm_2_a"])
def test_pictures_of_three_branches_do_not_depend_on_their_batch(family, sampler):
    requests = [
        request(prompt, seed=seed, negative_scale=scale, negative_prompt="blurry", sampler=sampler)
        for seed, (prompt, scale) in enumerate([("a fox", 1.0), ("a duck", 3.0), ("a bear", None), ("a fox", -1.0)])
    ]
    together = render(family, *requests, batch_size=3)
    for one, two in zip(requests, together, strict=True):
        assert difference(render(family, one)[0], two) <= 1


def test_pictures_are_decoded_in_groups_of_one_size(family):
    decoded = []
    original = family.decode
    family.decode = lambda latents: (decoded.append(tuple(latents.shape[::3])), original(latents))[1]
    requests = [request(seed=seed, width=64 if seed < 5 else 96) for seed in range(6)]
    settings = RenderSettings(batch_size=2, vae_batch=3)
    images = DiffusionRenderer(family, settings).render(requests)
    assert decoded == [(3, 8), (2, 8), (1, 12)]
    one = DiffusionRenderer(family).render(requests[3:4])[0]
    assert difference(np.asarray(one).astype(int), np.asarray(images[3]).astype(int)) <= 1


def test_zero_steps_offset_moves_the_timesteps(family):
    for offset, expected in ((False, [501, 1]), (True, [500, 0])):
        family.seen.clear()
        DiffusionRenderer(family, RenderSettings(zero_steps_offset=offset)).render([request(steps=2)])
        assert [int(t[0]) for _, t, _ in family.seen] == expected
