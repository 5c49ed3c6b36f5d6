"""The same weights, prompt embeddings, seed and scheduler give the picture that a diffusers pipeline makes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from library.inference.prompts import PromptRequest
from library.inference.samplers import make_scheduler
from tests.parity.toy_pipelines import Family, agree, ours, pipeline_for, published, told

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def families():
    return {kind: Family(kind) for kind in ("epsilon", "v_prediction")}


def theirs(family, requests, *, zero_terminal_snr=False):
    name, kind = requests[0].sampler, family.spec.prediction_type
    scheduler = make_scheduler(name, kind, zero_terminal_snr=True) if zero_terminal_snr else published(name, kind)
    pipeline = pipeline_for("StableDiffusionPipeline", family, scheduler)
    return [
        np.asarray(pipeline(**told(family, request), width=request.width, height=request.height).images[0]).astype(int)
        for request in requests
    ]


def requests_for(sampler, **more):
    more = {"steps": 5, "width": 64, "height": 96, "sampler": sampler, **more}
    return [
        PromptRequest(prompt="a fox in the snow", negative_prompt="blurry", seed=11, **more),
        PromptRequest(prompt="a duck", seed=2**33 + 1, **{**more, "scale": 3.0}),
    ]


@pytest.mark.parametrize(
    "sampler", ["ddim", "euler", "euler_a", "dpmsolver++", "pndm", "heun", "lms", "dpm_2_a", "dpmsingle"]
)
def test_pictures_equal_those_of_the_pipeline(families, sampler):
    requests = requests_for(sampler)
    agree(ours(families["epsilon"], requests), theirs(families["epsilon"], requests))


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmsolver++", "pndm"])
def test_batches_equal_single_pictures_of_the_pipeline(families, sampler):
    requests = requests_for(sampler)
    agree(ours(families["epsilon"], requests, batch_size=2), theirs(families["epsilon"], requests))


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_velocity_and_rescaled_schedule(families, sampler):
    family, requests = families["v_prediction"], requests_for(sampler)
    agree(ours(family, requests), theirs(family, requests))
    rescaled = ours(family, requests, zero_terminal_snr=True)
    agree(rescaled, theirs(family, requests, zero_terminal_snr=True))
    assert abs(rescaled[0] - ours(family, requests)[0]).max() > 1


def test_without_guidance(families):
    requests = requests_for("ddim", scale=1.0)[:1]
    agree(ours(families["epsilon"], requests), theirs(families["epsilon"], requests))


@pytest.mark.parametrize(("kind", "v_prediction"), [("sd1", False), ("sd2", True)])
def test_a_model_folder_gives_the_picture_of_its_own_pipeline(tmp_path, kind, v_prediction):
    """From the text of the prompt to the pixels, with the text encoder and the tokenizer of a folder."""
    from diffusers import StableDiffusionPipeline

    from library.models.family import WeightPlan
    from library.models.options import MemoryOptions, ModelOptions, TextOptions
    from library.models.random_models import make_random_sd
    from library.models.sd import StableDiffusion
    from library.models.specs import stable_diffusion_spec

    folder = make_random_sd(tmp_path / kind, kind, layout="diffusers_safetensors", v_prediction=v_prediction)
    model = ModelOptions(pretrained_model_name_or_path=str(folder), v2=kind == "sd2", v_parameterization=v_prediction)
    family = StableDiffusion.load(
        model, TextOptions(), MemoryOptions(), spec=stable_diffusion_spec(model), weights=WeightPlan()
    )
    request, other = requests_for("ddim", steps=3)
    (mine,) = ours(family, [request])
    assert abs(mine - ours(family, [replace(request, prompt=other.prompt)])[0]).max() > 1, "the text must matter"
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = published("ddim", family.spec.prediction_type)
    made = pipeline(
        request.prompt,
        negative_prompt=request.negative_prompt,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        num_inference_steps=request.steps,
        guidance_scale=request.scale,
        width=request.width,
        height=request.height,
    )
    agree([mine], [np.asarray(made.images[0]).astype(int)])
