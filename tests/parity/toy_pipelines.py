"""A tiny model behind the interface of a family, and pipelines of diffusers over the same modules."""

import numpy as np
import torch
from torch import nn

from library.contracts import Condition, FamilySpec, TokenizerSpec
from library.inference.render import DiffusionRenderer, RenderSettings
from library.models.tokenizer import ClipTokenizer

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

    def encode_latents(self, pixels, noise):
        posterior = self.autoencoder.encode(pixels, return_dict=False)[0]
        return posterior.mean + posterior.std * noise

    def scale_latents(self, latents):
        return latents * self.spec.latent_scale

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


def published(name, prediction_type):
    """The scheduler as a user of diffusers makes it, with the settings that Stable Diffusion was published with."""
    import diffusers

    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    stable = {"steps_offset": 1, "set_alpha_to_one": False}
    kinds = {
        "ddim": ("DDIMScheduler", {**stable, "clip_sample": False}),
        "pndm": ("PNDMScheduler", {**stable, "skip_prk_steps": True}),
        "euler": ("EulerDiscreteScheduler", {}),
        "euler_a": ("EulerAncestralDiscreteScheduler", {}),
        "dpmsolver++": ("DPMSolverMultistepScheduler", {}),
        "lms": ("LMSDiscreteScheduler", {}),
        "heun": ("HeunDiscreteScheduler", {}),
        "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
        "dpmsingle": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    }
    kind, settings = kinds[name]
    return getattr(diffusers, kind)(**noise, **settings, prediction_type=prediction_type)


def pipeline_for(kind, family, scheduler):
    """A pipeline of diffusers, by the name of its class, over the modules of `family`."""
    import diffusers

    pipeline = getattr(diffusers, kind)(
        vae=family.autoencoder,
        text_encoder=None,
        tokenizer=None,
        unet=family.denoiser,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def told(family, request):
    """What every pipeline is told about a picture."""
    return {
        "prompt_embeds": family.embeds(request.prompt),
        "negative_prompt_embeds": family.embeds(request.negative_prompt),
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        "num_inference_steps": request.steps,
        "guidance_scale": request.scale,
    }


def ours(family, requests, inputs=None, extensions=(), **more):
    renderer = DiffusionRenderer(family, RenderSettings(**more), extensions=extensions)
    return [np.asarray(image).astype(int) for image in renderer.render(requests, inputs)]


def agree(mine, yours):
    for one, two in zip(mine, yours, strict=True):
        assert one.shape == two.shape
        assert np.ptp(two) > 20, "a flat picture would prove nothing"
        assert abs(one - two).max() <= 1
