from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from library.errors import UserError
from library.inference.extensions import PictureInputs
from library.inference.image_to_image import ImageToImage, read_picture, size_from, strength_of
from library.inference.inpainting import Inpainting
from library.inference.prompts import PromptRequest
from library.inference.render import DiffusionRenderer, RenderSettings
from library.inference.samplers import SAMPLER_NAMES, SAMPLERS, make_scheduler

EXTENSIONS = (ImageToImage(), Inpainting())


def request(prompt="a fox", **more):
    more = {"width": 64, "height": 96, "steps": 5, "seed": 1, "strength": 0.6, **more}
    return PromptRequest(prompt=prompt, where="prompts.txt line 3", **more)


def picture(seed=0, size=(64, 96)):
    levels = np.random.default_rng(seed).uniform(0, 255, (6, 4, 3)).astype(np.uint8)
    return Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC)


def mask(level=255):
    levels = np.zeros((96, 64), np.uint8)
    levels[21:70, 13:50] = level
    return Image.fromarray(levels)


def render(family, requests, inputs, *, extensions=EXTENSIONS, **settings):
    renderer = DiffusionRenderer(family, RenderSettings(**settings), extensions=extensions)
    return [np.asarray(image).astype(int) for image in renderer.render(requests, inputs)]


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
@pytest.mark.parametrize("masked", [False, True])
def test_every_sampler_starts_from_pictures(family, sampler, masked):
    given = PictureInputs(image=picture(), mask=mask() if masked else None)
    for strength in (0.2, 1.0):
        before = torch.get_rng_state()
        (made,) = render(family, [request(sampler=sampler, strength=strength)], [given])
        assert np.ptp(made) > 20
        assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("sampler", [row.name for row in SAMPLERS])
def test_every_sampler_starts_from_pictures_on_the_rescaled_schedule(family, sampler):
    family.spec = replace(family.spec, prediction_type="v_prediction")
    for strength in (0.5, 1.0):
        inputs = [PictureInputs(image=picture()), PictureInputs(image=picture(), mask=mask())]
        for made in render(family, [request(sampler=sampler, strength=strength)] * 2, inputs, zero_terminal_snr=True):
            assert np.ptp(made) > 20


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpm_2_a"])
@pytest.mark.parametrize("masked", [False, True])
def test_pictures_do_not_depend_on_their_batch(family, sampler, masked):
    requests = [request(text, seed=seed, sampler=sampler) for seed, text in enumerate(["a fox", "a duck", "a bear"])]
    inputs = [PictureInputs(image=picture(seed), mask=mask() if masked else None) for seed in range(3)]
    together = render(family, requests, inputs, batch_size=3, vae_batch=2)
    assert len(family.seen[0][0]) == 6
    for one, given, made in zip(requests, inputs, together, strict=True):
        assert abs(render(family, [one], [given])[0] - made).max() <= 1


def test_kinds_of_pictures_are_not_mixed_in_a_batch(family):
    requests = [request(), request(), request(), request(strength=0.9)]
    inputs = [
        PictureInputs(),
        PictureInputs(image=picture()),
        PictureInputs(image=picture(), mask=mask()),
        PictureInputs(image=picture()),
    ]
    render(family, requests, inputs, batch_size=4)
    assert [len(noisy) for noisy, _, _ in family.seen] == [2] * (5 + 3 + 3 + 4)


def test_latents_are_taken_as_they_are(family):
    render(family, [request(seed=3)], [PictureInputs(latents=torch.full((4, 12, 8), 0.3))])
    start, t, _ = family.seen[0]
    signal = make_scheduler("ddim", "epsilon").alphas_cumprod[t[0]]
    noise = torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(start[:1], signal.sqrt() * 0.3 + (1 - signal).sqrt() * noise)


def test_kept_pixels_are_those_of_the_original(family):
    original = picture()
    (made,) = render(family, [request()], [PictureInputs(image=original, mask=mask())])
    kept = np.asarray(mask()) == 0
    assert (made[kept] == np.asarray(original)[kept]).all()
    assert abs(made - np.asarray(original))[~kept].mean() > 5


def test_grey_is_a_share_of_both(family):
    outcomes = [
        render(family, [request()], [PictureInputs(image=picture(), mask=mask(level))])[0] for level in (80, 255)
    ]
    original = np.asarray(picture()).astype(int)
    little, much = (abs(made - original)[21:70, 13:50].mean() for made in outcomes)
    assert 0 < little < 0.7 * much


def test_files_are_read_upright(tmp_path):
    levels = np.zeros((40, 70, 3), np.uint8)
    levels[:20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    Image.fromarray(levels).save(tmp_path / "turned.jpg", exif=exif)
    upright = read_picture(tmp_path / "turned.jpg")
    assert upright.size == (40, 70)
    grey = upright.convert("L")
    assert grey.getpixel((35, 35)) > 200
    assert grey.getpixel((5, 35)) < 50
    assert size_from(upright, "turned.jpg") == (32, 64)


def test_unusable_files_are_named(tmp_path):
    with pytest.raises(UserError, match="none.png: No such file"):
        read_picture(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UserError, match="text.png"):
        read_picture(tmp_path / "text.png")
    with pytest.raises(UserError, match="small.png: is 31x200, too small"):
        size_from(Image.new("RGB", (31, 200)), "small.png")


@pytest.mark.parametrize(
    ("strength", "message"), [(1.2, "not from 0 to 1"), (-0.1, "not from 0 to 1"), (0.1, "leaves none"), (0.0, "none")]
)
def test_strengths_that_cannot_be(family, strength, message):
    with pytest.raises(UserError, match=f"prompts.txt line 3: .*{message}"):
        render(family, [request(), request(strength=strength)], [PictureInputs(image=picture())] * 2)
    assert not family.seen, "nothing is made before all are checked"


def test_strength_has_a_default():
    assert strength_of(request(strength=None)) == 0.8


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (PictureInputs(mask=mask()), "needs a picture"),
        (PictureInputs(image=picture(), mask=Image.new("L", (64, 96))), "is black"),
    ],
)
def test_masks_that_cannot_be(family, inputs, message):
    with pytest.raises(UserError, match=message):
        render(family, [request()], [inputs])
