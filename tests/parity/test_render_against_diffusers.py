"""The same weights, prompt embeddings, seed and scheduler give the picture that a diffusers pipeline makes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from library.contracts import Condition, FamilySpec, TokenizerSpec
from library.inference.prompts import PromptRequest
from library.inference.render import DiffusionRenderer
from library.inference.samplers import make_scheduler
from library.models.tokenizer import ClipTokenizer

pytestmark = pytest.mark.compat

WIDTH = 16


class Family:
    """Tiny modules of diffusers and an embedding for a text encoder, behind the interface of a model family."""

    def __init__(self, prediction_type="epsilon"):
        from diffusers import AutoencoderKL, UNet2DConditionModel

        torch.manual_seed(0)
        self.spec = FamilySpec("toy", prediction_type, (TokenizerSpec("clip_l", 49407),))
        self.tokenizers = (ClipTokenizer(self.spec.tokenizers[0]),)
        self.denoiser = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
        ).eval()
        self.autoencoder = AutoencoderKL(
            block_out_channels=(32, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            sample_size=64,
        ).eval()
        self.embedding = nn.Embedding(49408, WIDTH)
        self.text_encoders = (self.embedding,)

    def encode_text(self, token_ids, weights=None):
        return Condition(hidden=self.embedding(token_ids[0]).flatten(1, 2))

    def denoise(self, noisy, t, condition, control=None):
        return self.denoiser(noisy, t, encoder_hidden_states=condition.hidden, return_dict=False)[0]

    def decode(self, latents):
        return self.autoencoder.decode(latents / self.spec.latent_scale, return_dict=False)[0]

    def release_vae(self):
        pass

    def embeds(self, text):
        ids = torch.as_tensor(self.tokenizers[0].encode(text)[0])
        with torch.no_grad():
            return self.embedding(ids)


@pytest.fixture(scope="module")
def families():
    return {kind: Family(kind) for kind in ("epsilon", "v_prediction")}


def published(name, prediction_type):
    """The scheduler as a user of diffusers makes it, with the settings that Stable Diffusion was published with."""
    import diffusers

    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    stable = {"steps_offset": 1, "set_alpha_to_one": False}
    kinds = {
        "ddim": ("DDIMScheduler", {**stable, "clip_sample": False}),
        "pndm": ("PNDMScheduler", {**stable, "skip_prk_steps": True}),
        "euler_a": ("EulerAncestralDiscreteScheduler", {}),
        "dpmsolver++": ("DPMSolverMultistepScheduler", {}),
        "lms": ("LMSDiscreteScheduler", {}),
        "heun": ("HeunDiscreteScheduler", {}),
        "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
        "dpmsingle": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    }
    kind, settings = kinds[name]
    return getattr(diffusers, kind)(**noise, **settings, prediction_type=prediction_type)


def theirs(family, requests, *, zero_terminal_snr=False):
    from diffusers import StableDiffusionPipeline

    name, kind = requests[0].sampler, family.spec.prediction_type
    pipeline = StableDiffusionPipeline(
        vae=family.autoencoder,
        text_encoder=None,
        tokenizer=None,
        unet=family.denoiser,
        scheduler=make_scheduler(name, kind, zero_terminal_snr=True) if zero_terminal_snr else published(name, kind),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return [
        np.asarray(
            pipeline(
                prompt_embeds=family.embeds(request.prompt),
                negative_prompt_embeds=family.embeds(request.negative_prompt),
                generator=torch.Generator("cpu").manual_seed(request.seed),
                num_inference_steps=request.steps,
                guidance_scale=request.scale,
                width=request.width,
                height=request.height,
            ).images[0]
        ).astype(int)
        for request in requests
    ]


def requests_for(sampler, **more):
    more = {"steps": 5, "width": 64, "height": 96, "sampler": sampler, **more}
    return [
        PromptRequest(prompt="a fox in the snow", negative_prompt="blurry", seed=11, **more),
        PromptRequest(prompt="a duck", seed=2**33 + 1, **{**more, "scale": 3.0}),
    ]


def ours(family, requests, **more):
    return [np.asarray(image).astype(int) for image in DiffusionRenderer(family, **more).render(requests)]


def agree(mine, yours):
    for one, two in zip(mine, yours, strict=True):
        assert one.shape == two.shape
        assert np.ptp(two) > 20, "a flat picture would prove nothing"
        assert abs(one - two).max() <= 1


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmsolver++", "pndm", "heun", "lms", "dpm_2_a", "dpmsingle"])
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
