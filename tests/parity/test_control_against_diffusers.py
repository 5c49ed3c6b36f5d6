"""Pictures guided by ControlNets equal those of diffusers' pipeline with the same weights, guides and noise."""

import numpy as np
import pytest
import torch
from control_nets import control_net, write_control_net
from PIL import Image

from library.inference.control import ControlNet, ControlNets, load_control_nets
from library.inference.extensions import PictureInputs
from library.inference.prompts import PromptRequest
from library.inference.render import DiffusionRenderer, RenderSettings
from library.inference.samplers import make_scheduler
from library.models.family import WeightPlan
from library.models.options import MemoryOptions, ModelOptions, TextOptions
from library.models.sd import StableDiffusion
from library.models.specs import stable_diffusion_spec

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def family(tiny_sd1):
    model = ModelOptions(pretrained_model_name_or_path=str(tiny_sd1))
    return StableDiffusion.load(
        model, TextOptions(), MemoryOptions(), spec=stable_diffusion_spec(model), weights=WeightPlan()
    )


@pytest.fixture(scope="module")
def nets():
    return [control_net(seed=1), control_net(seed=2)]


def guide(seed, width=80, height=72):
    levels = torch.randint(0, 256, (height // 8, width // 8, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(levels.to(torch.uint8).numpy()).resize((width, height))


def requests(count, **more):
    settings = {"steps": 4, "width": 64, "height": 72, "scale": 5.0, **more}
    return [
        PromptRequest(prompt=f"fox {place}", negative_prompt="bad", seed=place, **settings) for place in range(count)
    ]


def theirs(family, request, nets, guides, multipliers, ratios):
    from diffusers import StableDiffusionControlNetPipeline

    pipeline = StableDiffusionControlNetPipeline(
        vae=family.vae.model,
        text_encoder=None,
        tokenizer=None,
        unet=family.unet,
        controlnet=nets,
        scheduler=make_scheduler(request.sampler, "epsilon"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)

    def embeds(text):
        ids = torch.as_tensor(family.tokenizers[0].encode(text)[0])[None]
        return family.encode_text((ids,)).hidden

    with torch.no_grad():
        made = pipeline(
            prompt_embeds=embeds(request.prompt),
            negative_prompt_embeds=embeds(request.negative_prompt),
            image=guides,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            num_inference_steps=request.steps,
            guidance_scale=request.scale,
            width=request.width,
            height=request.height,
            controlnet_conditioning_scale=multipliers,
            control_guidance_end=ratios,
        )
    return np.asarray(made.images[0]).astype(int)


def ours(family, made, guides, extension, batch_size=1):
    renderer = DiffusionRenderer(family, RenderSettings(batch_size=batch_size), extensions=[extension])
    pictures = renderer.render(made, [PictureInputs(guides=tuple(item)) for item in guides])
    return [np.asarray(picture).astype(int) for picture in pictures]


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_one_net(family, nets, sampler):
    made, guides = requests(2, sampler=sampler), [[guide(1)], [guide(2)]]
    mine = ours(family, made, guides, ControlNets([ControlNet(nets[0], 0.7)]), batch_size=2)
    for picture, request, given in zip(mine, made, guides, strict=True):
        yours = theirs(family, request, nets[:1], given, [0.7], [1.0])
        assert abs(picture - yours).max() <= 1
        assert np.ptp(yours) > 20
    plain = DiffusionRenderer(family).render(made[:1])[0]
    assert abs(np.asarray(plain).astype(int) - mine[0]).max() > 5, "the guide must matter"


def test_several_nets_with_their_strengths_and_shares_of_the_steps(family, nets):
    made, given = requests(1)[0], [guide(3), guide(4)]
    extension = ControlNets([ControlNet(nets[0], 0.9, 0.5), ControlNet(nets[1], 0.4, 0.75)])
    (mine,) = ours(family, [made], [given], extension)
    yours = theirs(family, made, nets, given, [0.9, 0.4], [0.5, 0.75])
    assert abs(mine - yours).max() <= 1
    assert abs(mine - theirs(family, made, nets, given, [0.9, 0.4], [1.0, 0.75])).max() > 1


def test_files_and_preparations(family, nets, tmp_path):
    """From the files of the options to the picture: edges are found at the size of the picture."""
    import cv2

    path = write_control_net(nets[0], tmp_path / "net.safetensors", "original")
    loaded = load_control_nets(family, [str(path)], preparations=["canny_50_100"], dtype=torch.float32)
    request, given = requests(1)[0], guide(5)
    (mine,) = ours(family, [request], [[given]], ControlNets(loaded))
    resized = np.asarray(given.resize((request.width, request.height), Image.Resampling.LANCZOS))
    edges = Image.fromarray(cv2.Canny(resized, 50, 100)).convert("RGB")
    assert np.asarray(edges).any()
    assert abs(mine - theirs(family, request, nets[:1], [edges], [1.0], [1.0])).max() <= 1


def test_a_net_that_averages_over_the_picture(family, nets):
    """Its residuals are for the prompts alone, also together with those of another."""
    pooled, made = control_net(seed=3, global_pool_conditions=True), requests(2)
    given = [[guide(7)], [guide(8)]]
    mine = ours(family, made, given, ControlNets([ControlNet(pooled, 0.8)]), batch_size=2)
    for picture, request, item in zip(mine, made, given, strict=True):
        yours = theirs(family, request, [pooled], item, [0.8], [1.0])
        assert abs(picture - yours).max() <= 1
        assert np.ptp(yours) > 20
    both = ControlNets([ControlNet(pooled, 0.8), ControlNet(nets[0])])
    assert abs(ours(family, made[:1], [given[0] * 2], both)[0] - mine[0]).max() > 1


def test_without_guidance_scale(family, nets):
    request, given = requests(1, scale=1.0)[0], [guide(6)]
    (mine,) = ours(family, [request], [given], ControlNets([ControlNet(nets[0])]))
    assert abs(mine - theirs(family, request, nets[:1], given, [1.0], [1.0])).max() <= 1
