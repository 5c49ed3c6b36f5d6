import numpy as np
import pytest
import torch
from PIL import Image

from library.errors import UserError
from library.inference.extensions import Extension, PictureInputs
from library.inference.highres import HighresFix
from library.inference.image_to_image import ImageToImage
from library.inference.inpainting import Inpainting
from library.inference.prompts import PromptRequest
from library.inference.render import DiffusionRenderer, RenderSettings


class Noting(Extension):
    """Notes the passes: size, steps, what they start from."""

    def __init__(self):
        self.seen = []

    def begin(self, batch):
        one, given = batch.requests[0], batch.inputs[0]
        kinds = [name for name in ("image", "latents", "mask") if getattr(given, name) is not None]
        self.seen.append((one.width, one.height, one.steps, one.strength, "+".join(kinds), len(given.guides)))
        return super().begin(batch)


def request(prompt="a fox", **more):
    more = {"width": 128, "height": 192, "steps": 6, "seed": 1, "strength": 0.5, **more}
    return PromptRequest(prompt=prompt, **more)


def make(family, fix, requests, inputs=None, batch_size=1, **more):
    noting = Noting()
    extensions = (ImageToImage(), Inpainting(), noting)
    renderer = DiffusionRenderer(family, RenderSettings(batch_size=batch_size), extensions=extensions)
    return fix.render(renderer, requests, inputs, **more), noting.seen


def levels(image):
    return np.asarray(image).astype(int)


def test_two_passes(family):
    made, seen = make(family, HighresFix(scale=0.5, steps=4), [request()], keep_first=True)
    assert seen == [(64, 96, 4, 0.5, "", 0), (128, 192, 6, 0.5, "image", 0)]
    assert (made.first[0].size, made.second[0].size) == ((64, 96), (128, 192))
    (alone,) = DiffusionRenderer(family).render([request(width=64, height=96, steps=4)])
    assert (levels(made.first[0]) == levels(alone)).all()
    assert not make(family, HighresFix(scale=0.5), [request()])[0].first


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_latents_are_enlarged_without_a_picture(family, mode):
    decoded = []
    original = family.decode
    family.decode = lambda latents: (decoded.append(latents.shape[-1]), original(latents))[1]
    made, seen = make(family, HighresFix(scale=0.5, steps=4, latents=mode), [request()])
    assert seen[1] == (128, 192, 6, 0.5, "latents", 0)
    assert decoded == [16]
    assert np.ptp(levels(made.second[0])) > 20


@pytest.mark.parametrize(
    ("scale", "size"), [(0.5, (320, 448)), (0.33, (192, 288)), (0.01, (64, 64)), (1.0, (640, 896))]
)
def test_size_of_the_first_pass(scale, size):
    first = HighresFix(scale=scale).first_request(request(width=640, height=896))
    assert (first.width, first.height, first.steps) == (*size, 28)


@pytest.mark.parametrize("scale", [0.0, -1.0, 1.5])
def test_scales_that_cannot_be(scale):
    with pytest.raises(UserError, match="first pass"):
        HighresFix(scale=scale)


def test_strength_of_the_first_pass_is_its_own(family):
    fix = HighresFix(scale=0.5, steps=4, strength=0.9)
    _, seen = make(family, fix, [request()], [PictureInputs(image=Image.new("RGB", (50, 50), "red"))])
    assert [(one[3], one[4]) for one in seen] == [(0.9, "image"), (0.5, "image")]


@pytest.mark.parametrize("guided", [True, False])
def test_guides_can_be_left_out_of_the_second_pass(family, guided):
    guide = Image.new("RGB", (8, 8))
    _, seen = make(family, HighresFix(scale=0.5, second_guided=guided), [request()], [PictureInputs(guides=(guide,))])
    assert [one[5] for one in seen] == [1, int(guided)]


@pytest.mark.parametrize("mode", [None, "bilinear"])
def test_kept_pixels_stay_those_of_the_original(family, mode):
    original = Image.fromarray(np.random.default_rng(0).integers(0, 256, (192, 128, 3), np.uint8))
    mask = Image.new("L", (128, 192))
    mask.paste(255, (32, 32, 96, 128))
    made, seen = make(
        family, HighresFix(scale=0.5, steps=4, latents=mode), [request()], [PictureInputs(image=original, mask=mask)]
    )
    assert "mask" in seen[1][4]
    kept = np.asarray(mask) == 0
    assert (levels(made.second[0])[kept] == levels(original)[kept]).all()
    assert abs(levels(made.second[0]) - levels(original))[~kept].mean() > 5


@pytest.mark.parametrize("mode", [None, "bilinear"])
def test_pictures_do_not_depend_on_their_batch(family, mode):
    requests = [request(text, seed=seed, sampler="euler_a") for seed, text in enumerate(["a fox", "a duck", "a bear"])]
    fix = HighresFix(scale=0.5, steps=4, latents=mode)
    together, _ = make(family, fix, requests, batch_size=3)
    for one, picture in zip(requests, together.second, strict=True):
        alone, _ = make(family, fix, [one])
        assert abs(levels(alone.second[0]) - levels(picture)).max() <= 2


class Doubling:
    """An upscaler module's product."""

    def __init__(self, latents, factor=2):
        self.latents, self.factor, self.calls = latents, factor, []

    def support_latents(self):
        return self.latents

    def upscale(self, vae, images, latents, dtype, width, height, batch_size, vae_batch_size):
        self.calls.append((images and images[0].size, None if latents is None else tuple(latents.shape), width, height))
        if self.latents:
            return latents.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)
        return [image.resize((image.width * self.factor, image.height * self.factor)) for image in images]


@pytest.mark.parametrize("latents", [True, False])
def test_an_upscaler_enlarges(family, latents):
    upscaler = Doubling(latents)
    made, seen = make(family, HighresFix(scale=0.5, steps=4, upscaler=upscaler), [request()])
    assert seen[1][4] == ("latents" if latents else "image")
    assert upscaler.calls == [(None, (1, 4, 12, 8), 128, 192) if latents else ((64, 96), None, 128, 192)]
    assert made.second[0].size == (128, 192)
    with pytest.raises(UserError, match="192x288"):
        make(family, HighresFix(scale=0.5, steps=4, upscaler=Doubling(latents, 3)), [request()])
    assert torch.is_grad_enabled()
