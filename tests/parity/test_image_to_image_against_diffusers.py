"""Pictures made from pictures equal those of diffusers' img2img and inpainting pipelines on the same modules."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from library.inference.extensions import PictureInputs
from library.inference.image_to_image import ImageToImage
from library.inference.inpainting import Inpainting
from library.inference.prompts import PromptRequest
from library.inference.samplers import make_scheduler
from tests.parity.toy_pipelines import Family, agree, ours, pipeline_for, published, told

pytestmark = pytest.mark.compat

SIZE = (64, 96)


@pytest.fixture(scope="module")
def families():
    return {kind: Family(kind) for kind in ("epsilon", "v_prediction")}


def picture(seed, size=SIZE):
    levels = np.random.default_rng(seed).uniform(0, 255, (6, 4, 3)).astype(np.uint8)
    return Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC)


def mask():
    """White in an area whose border is nowhere on the grid of the latents."""
    levels = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    levels[21:70, 13:50] = 255
    return Image.fromarray(levels)


def requests_for(sampler, **more):
    more = {"steps": 6, "width": SIZE[0], "height": SIZE[1], "sampler": sampler, "strength": 0.6, **more}
    return [
        PromptRequest(prompt="a fox in the snow", negative_prompt="blurry", seed=11, **more),
        PromptRequest(prompt="a duck", seed=2**33 + 1, **{**more, "scale": 3.0}),
    ]


def theirs(family, requests, inputs, scheduler=None):
    masked = inputs[0].mask is not None
    kind = "StableDiffusionInpaintPipeline" if masked else "StableDiffusionImg2ImgPipeline"
    sampler = requests[0].sampler
    pictures = []
    for request, given in zip(requests, inputs, strict=True):
        pipeline = pipeline_for(kind, family, scheduler or published(sampler, family.spec.prediction_type))
        more = {"image": given.image, "strength": request.strength}
        if masked:
            more |= {"mask_image": given.mask, "width": request.width, "height": request.height}
        made = pipeline(**told(family, request), **more).images[0]
        pictures.append(np.asarray(made).astype(int))
    return pictures


def started(family, requests, **more):
    inputs = [PictureInputs(image=picture(place)) for place in range(len(requests))]
    return ours(family, requests, inputs, [ImageToImage(), Inpainting()], **more), inputs


def painted(family, requests, **more):
    inputs = [PictureInputs(image=picture(place), mask=mask()) for place in range(len(requests))]
    return ours(family, requests, inputs, [ImageToImage(), Inpainting(paste=False)], **more), inputs


SAMPLERS = ["ddim", "euler", "euler_a", "dpmsolver++", "pndm", "heun", "lms", "dpm_2_a", "dpmsingle"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_to_image(families, sampler):
    family, requests = families["epsilon"], requests_for(sampler)
    mine, inputs = started(family, requests, batch_size=2, vae_batch=2)
    agree(mine, theirs(family, requests, inputs))


@pytest.mark.parametrize("strength", [0.2, 0.55, 1.0])
def test_image_to_image_at_every_strength(families, strength):
    family, requests = families["epsilon"], requests_for("euler_a", strength=strength)[:1]
    mine, inputs = started(family, requests)
    agree(mine, theirs(family, requests, inputs))


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_image_to_image_with_velocity_and_rescaled_schedule(families, sampler):
    family, requests = families["v_prediction"], requests_for(sampler)[:1]
    mine, inputs = started(family, requests, zero_terminal_snr=True)
    scheduler = make_scheduler(sampler, "v_prediction", zero_terminal_snr=True)
    agree(mine, theirs(family, requests, inputs, scheduler))


@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_a", "dpmsolver++", "heun", "dpm_2_a"])
def test_inpainting(families, sampler):
    family, requests = families["epsilon"], requests_for(sampler)
    mine, inputs = painted(family, requests, batch_size=2)
    agree(mine, theirs(family, requests, inputs))


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting_at_every_strength(families, strength):
    family, requests = families["epsilon"], requests_for("euler_a", strength=strength)
    mine, inputs = painted(family, requests, batch_size=2)
    agree(mine, theirs(family, requests, inputs))


def test_a_picture_of_another_size_is_brought_to_that_of_the_request(families):
    """The pipeline for inpainting does it by the same filter."""
    family, requests = families["epsilon"], requests_for("ddim")[:1]
    inputs = [PictureInputs(image=picture(3, (100, 130)), mask=mask())]
    mine = ours(family, requests, inputs, [Inpainting(paste=False)])
    agree(mine, theirs(family, requests, inputs))


def test_the_picture_matters_and_the_strength_too(families):
    family, (request, _) = families["epsilon"], requests_for("ddim")
    given = PictureInputs(image=picture(0))
    extensions = [ImageToImage(), Inpainting()]
    base, other, stronger = ours(
        family,
        [request, request, replace(request, strength=0.9)],
        [given, PictureInputs(image=picture(1)), given],
        extensions,
        batch_size=3,
    )
    assert abs(base - other).max() > 1
    assert abs(base - stronger).max() > 1
    (untouched,) = ours(family, [request], None, extensions)
    (plain,) = ours(family, [request])
    assert (untouched == plain).all()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("masked", [False, True])
def test_a_model_folder_gives_the_picture_of_its_own_pipeline(tmp_path, masked):
    """With the VAE, the text encoder and the tokenizer of a folder."""
    import diffusers

    from library.models.family import WeightPlan
    from library.models.options import MemoryOptions, ModelOptions, TextOptions
    from library.models.random_models import make_random_sd
    from library.models.sd import StableDiffusion
    from library.models.specs import stable_diffusion_spec

    folder = make_random_sd(tmp_path / "sd1", layout="diffusers_safetensors")
    model = ModelOptions(pretrained_model_name_or_path=str(folder))
    family = StableDiffusion.load(
        model, TextOptions(), MemoryOptions(), spec=stable_diffusion_spec(model), weights=WeightPlan()
    )
    requests = requests_for("euler_a", steps=4)[:1]
    mine, inputs = (painted if masked else started)(family, requests)
    kind = "StableDiffusionInpaintPipeline" if masked else "StableDiffusionImg2ImgPipeline"
    pipeline = getattr(diffusers, kind).from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = published("euler_a", "epsilon")
    (request,), (given,) = requests, inputs
    more = {"mask_image": given.mask, "width": SIZE[0], "height": SIZE[1]} if masked else {}
    made = pipeline(
        request.prompt,
        negative_prompt=request.negative_prompt,
        image=given.image,
        strength=request.strength,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        num_inference_steps=request.steps,
        guidance_scale=request.scale,
        **more,
    )
    agree(mine, [np.asarray(made.images[0]).astype(int)])
