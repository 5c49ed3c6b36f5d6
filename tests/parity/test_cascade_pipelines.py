"""Pictures of Stable Cascade against diffusers' pipelines, on folders that the conversion tool made of our files.

The pipelines know neither shift nor rescaling, tell the networks 1 where the schedule ends at 0.9936, and remove the
last noise altogether; so the latents before the last step are compared, with those switched off.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from library.inference.cascade import CASCADE_DEFAULTS, CascadeRenderer, CascadeSettings
from library.inference.cascade_decoders import StageBDecoder, StageBSettings
from library.inference.cascade_extensions import ImageVariation
from library.inference.cascade_loading import CascadeParts, Placement
from library.inference.diffusion import UNWATCHED, picture_generator
from library.inference.extensions import PictureInputs
from library.inference.gdf import log_snr, noise_condition
from library.inference.options_cascade import CascadeFileOptions
from library.models.random_cascade import make_random_cascade
from tools import convert_stable_cascade as tool

pytestmark = pytest.mark.compat

CPU = torch.device("cpu")
STEPS = 5
CAT = replace(
    CASCADE_DEFAULTS, prompt="a cat", negative_prompt="blurry", width=256, height=384, steps=STEPS, seed=3, shift=1.0
)
CLOSE = {"atol": 2e-3, "rtol": 1e-3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny model as two pipelines of diffusers, which the conversion tool made part by part."""
    root = tmp_path_factory.mktemp("cascade")
    files = make_random_cascade(root / "official")
    components = {"stage_c": "prior", "stage_b": "decoder", "stage_a": "vqgan", "vision": "image_encoder"}
    for part in ("stage_c", "stage_b", "stage_a", "text", "vision"):
        for model in ("stage_c", "stage_b"):
            if part == "text" or (part in ("stage_c", "vision")) == (model == "stage_c"):
                target = root / model / components.get(part, "text_encoder")
                tool.convert(tool.ConvertOptions(src=str(getattr(files, part)), dst=str(target), part=part))
    return root


@pytest.fixture(scope="module")
def parts(folders):
    paths = {f"{name}_checkpoint_path": str(folders / name) for name in ("stage_c", "stage_b")}
    return CascadeParts(CascadeFileOptions(**paths), Placement(CPU, CPU, torch.float32))


@pytest.fixture(scope="module")
def theirs(folders):
    from diffusers import StableCascadeDecoderPipeline, StableCascadePriorPipeline, pipelines
    from diffusers.pipelines.stable_cascade.pipeline_stable_cascade import PaellaVQModel

    if not hasattr(pipelines, "wuerstchen"):
        # Versions that moved stage A's class find it no more in any index, their own included.
        pipelines.wuerstchen = SimpleNamespace(PaellaVQModel=PaellaVQModel)
    prior = StableCascadePriorPipeline.from_pretrained(folders / "stage_c", local_files_only=True)
    decoder = StableCascadeDecoderPipeline.from_pretrained(folders / "stage_b", local_files_only=True)
    for pipeline, unet in ((prior, prior.prior), (decoder, decoder.decoder)):
        pipeline.set_progress_bar_config(disable=True)
        unet.register_forward_pre_hook(_clamp, with_kwargs=True)
    return prior, decoder


def _clamp(module, args, kwargs):
    most = noise_condition(log_snr(torch.tensor(1.0)))
    return args, {**kwargs, "timestep_ratio": kwargs["timestep_ratio"].clamp(max=most)}


@contextmanager
def seen_by(network):
    """Collect the latents that a network of ours is given."""
    inputs = []
    handle = network.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        handle.remove()


def keep(latents):
    def remember(pipeline, step, t, values):
        latents.append(values["latents"])
        return {}

    return remember


@pytest.mark.parametrize("varied", [False, True])
def test_stage_c_is_sampled_like_the_prior(parts, theirs, varied):
    family = parts.stage_c()
    # Of the encoder's own size: both would resize any other, but not to the same bits.
    image = torch.rand(3, 28, 28, generator=torch.Generator().manual_seed(1))
    inputs, extensions, more = None, [], {}
    if varied:
        from PIL import Image

        picture = Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy())
        inputs, extensions = [PictureInputs(image=picture)], [ImageVariation(parts.image_encoder())]
        more = {"images": [picture]}
    renderer = CascadeRenderer(family, None, CascadeSettings(cfg_rho=0.0), extensions=extensions)
    with seen_by(family.unet) as ours:
        renderer.render_latents([CAT], inputs)
    wanted = []
    theirs[0](
        prompt=CAT.prompt,
        negative_prompt=CAT.negative_prompt,
        height=CAT.height,
        width=CAT.width,
        num_inference_steps=STEPS,
        guidance_scale=CAT.scale,
        generator=picture_generator(CAT.seed),
        callback_on_step_end=keep(wanted),
        **more,
    )
    assert ours[-1].shape == (2, 16, 9, 6)
    torch.testing.assert_close(ours[-1][:1], wanted[-2], **CLOSE)


def test_stage_b_and_a_decode_like_the_pipeline(parts, theirs):
    (made,) = CascadeRenderer(parts.stage_c(), None, CascadeSettings(cfg_rho=0.0)).render_latents([CAT])
    stage_b, stage_a = parts.stage_b(), parts.stage_a()
    decoder = StageBDecoder(stage_b, stage_a, StageBSettings(steps=STEPS, scale=3.0, cfg_rho=0.0))
    state = made.generator.get_state()
    with seen_by(stage_b.model) as ours, seen_by(stage_a.model.up_blocks) as decoded:
        picture = decoder.decode([made], UNWATCHED)[0]
    wanted = []
    generator = torch.Generator()
    generator.set_state(state)
    theirs[1](
        made.latents[None],
        prompt=CAT.prompt,
        negative_prompt=CAT.negative_prompt,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        generator=generator,
        callback_on_step_end=keep(wanted),
    )
    assert ours[-1].shape == (2, 4, 96, 64)
    torch.testing.assert_close(ours[-1][:1], wanted[-2], **CLOSE)
    with torch.no_grad():
        pixels = theirs[1].vqgan.decode(decoded[0]).sample.clamp(0, 1)[0].permute(1, 2, 0).numpy()
    assert theirs[1].vqgan.config.scale_factor == 0.43
    assert abs(np.asarray(picture) / 255 - pixels).max() < 0.01
