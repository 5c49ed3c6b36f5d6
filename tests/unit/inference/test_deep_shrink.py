"""Features shrink where and when they are told to, at any size, and nothing of it stays behind."""

from contextlib import contextmanager

import pytest
import torch
from control_nets import control_net
from PIL import Image
from torch.nn import functional

from library.contracts import Condition
from library.errors import UserError
from library.inference.control import ControlNet, ControlNets
from library.inference.deep_shrink import DeepShrink, DeepShrinking
from library.inference.extensions import BatchContext, DenoiserInput, HookChain, Moment, PictureInputs
from library.inference.prompts import PromptRequest
from library.models.random_models import random_parts

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def unet(one_torch_thread):
    from diffusers import UNet2DConditionModel

    parts = random_parts("sd1")
    unet = UNet2DConditionModel(**parts.unet_config)
    unet.load_state_dict(parts.unet)
    return unet.eval()


@contextmanager
def at_work(extension, **more):
    request = more.pop("request", PromptRequest(prompt="x", width=128, height=128))
    settings = {
        "family": None,
        "device": torch.device("cpu"),
        "inputs": (PictureInputs(),),
        "generators": (),
        "scheduler": None,
        "timesteps": torch.arange(2),
        "latent_shape": (4, 16, 16),
        "branches": 1,
        "vae_batch": 1,
        "encode": None,
        **more,
    }
    with extension.begin(BatchContext(requests=(request,), **settings)) as hooks:
        yield hooks


def sizes_and_result(unet, hooks, timestep, hw=(16, 16)):
    """Height of what goes into each downward block, and the prediction."""
    heights = []
    handles = [
        block.resnets[0].register_forward_pre_hook(lambda _, args: heights.append(args[0].shape[2]))
        for block in unet.down_blocks
    ]
    generator = torch.Generator().manual_seed(0)
    noisy, hidden = torch.randn(1, 4, *hw, generator=generator), torch.randn(1, 5, 64, generator=generator)
    call = DenoiserInput(noisy, torch.full((1,), timestep), Condition(hidden))
    moment = Moment(0, 2, float(timestep))

    def predict(call):
        control = hooks.control(moment, call) or {}
        return unet(call.noisy, call.t, call.condition.hidden, return_dict=False, **control)[0]

    with torch.no_grad():
        result = hooks.predict(moment, call, predict)
    for handle in handles:
        handle.remove()
    return heights, result


def test_blocks_see_smaller_features_in_their_steps_only(unet):
    extension = DeepShrinking(DeepShrink(depth_1=1, timesteps_1=700, depth_2=2, timesteps_2=400), unet)
    with at_work(extension) as hooks:
        assert sizes_and_result(unet, hooks, 900)[0] == [16, 4, 2, 1]
        assert sizes_and_result(unet, hooks, 700)[0] == [16, 4, 2, 1]
        assert sizes_and_result(unet, hooks, 500)[0] == [16, 8, 2, 1]
        assert sizes_and_result(unet, hooks, 399)[0] == [16, 8, 4, 2]


def test_nothing_changes_where_nothing_shrinks(unet):
    plain = sizes_and_result(unet, DeepHooks(), 100)[1]
    with at_work(DeepShrinking(DeepShrink(depth_1=1), unet)) as hooks:
        assert torch.equal(sizes_and_result(unet, hooks, 100)[1], plain)
        assert (sizes_and_result(unet, hooks, 900)[1] - plain).abs().max() > 1e-3
    assert torch.equal(sizes_and_result(unet, DeepHooks(), 100)[1], plain)
    assert not any("forward" in vars(block) for block in unet.up_blocks)


class DeepHooks:
    def predict(self, moment, call, predict):
        return predict(call)

    def control(self, moment, call):
        return None


def written_out(unet, noisy, t, hidden, depth, ratio):
    """The U-Net with deep shrink as it was published, block by block."""

    def fit(features, like):
        if features.shape[-2:] == like.shape[-2:]:
            return features
        return functional.interpolate(features, size=like.shape[-2:], mode="bicubic", align_corners=False)

    time = unet.time_embedding(unet.time_proj(t))
    features = unet.conv_in(noisy)
    skips = [features]
    for number, block in enumerate(unet.down_blocks):
        if number == depth:
            features = functional.interpolate(features, scale_factor=ratio, mode="bicubic", align_corners=False)
        features, found = block(features, time, *([hidden] if hasattr(block, "attentions") else []))
        skips += found
    features = unet.mid_block(features, time, hidden)
    for block in unet.up_blocks:
        for number, resnet in enumerate(block.resnets):
            skip = skips.pop()
            features = resnet(torch.cat([fit(features, skip), skip], 1), time)
            if hasattr(block, "attentions"):
                features = block.attentions[number](features, encoder_hidden_states=hidden, return_dict=False)[0]
        odd = any(side % 8 for side in noisy.shape[-2:])
        for upsampler in block.upsamplers or ():
            features = upsampler(features, skips[-1].shape[2:] if odd else None)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(features)))


@torch.no_grad()
@pytest.mark.parametrize("depth", [0, 2, 3])
@pytest.mark.parametrize("hw", [(32, 16), (24, 40), (20, 28)])
def test_features_are_those_of_the_published_method(unet, depth, hw):
    with at_work(DeepShrinking(DeepShrink(depth_1=depth), unet)) as hooks:
        mine = sizes_and_result(unet, hooks, 900, hw)[1]
    generator = torch.Generator().manual_seed(0)
    noisy, hidden = torch.randn(1, 4, *hw, generator=generator), torch.randn(1, 5, 64, generator=generator)
    torch.testing.assert_close(mine, written_out(unet, noisy, torch.full((1,), 900), hidden, depth, 0.5))


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("hw", [(33, 45), (27, 29)])
@pytest.mark.parametrize("ratio", [0.5, 0.3])
def test_any_size_and_depth(unet, depth, hw, ratio):
    with at_work(DeepShrinking(DeepShrink(depth_1=depth, ratio=ratio), unet)) as hooks:
        result = sizes_and_result(unet, hooks, 900, hw)[1]
    assert result.shape == (1, 4, *hw)
    assert result.isfinite().all()


def test_shrinking_by_one_is_no_shrinking(unet):
    plain = sizes_and_result(unet, DeepHooks(), 900)[1]
    with at_work(DeepShrinking(DeepShrink(depth_1=2, ratio=1.0), unet)) as hooks:
        assert torch.equal(sizes_and_result(unet, hooks, 900)[1], plain)


@pytest.mark.parametrize("depth", [0, 2])
def test_together_with_a_control_net(unet, depth):
    net = control_net()
    guide = PictureInputs(guides=(Image.new("RGB", (128, 128), (200, 30, 90)),))
    shrink, control = DeepShrinking(DeepShrink(depth_1=depth), unet, [net]), ControlNets([ControlNet(net)])
    with at_work(shrink) as outer, at_work(control, inputs=(guide,)) as inner:
        guided = sizes_and_result(unet, HookChain(outer, inner), 900)[1]
    with at_work(shrink) as hooks:
        plain = sizes_and_result(unet, hooks, 900)[1]
    assert (guided - plain).abs().max() > 1e-3


def test_prompts_say_otherwise(unet):
    extension = DeepShrinking(DeepShrink(depth_1=1), unet)
    request = PromptRequest(prompt="x", deep_shrink={"depth_1": -1})
    assert extension.batch_key(request, PictureInputs()).depth_1 is None
    with at_work(extension, request=request) as hooks:
        assert sizes_and_result(unet, hooks, 900)[0] == [16, 8, 4, 2]
    other = PromptRequest(prompt="x", deep_shrink={"depth_1": 2.0, "timesteps_1": 300, "ratio": 0.5})
    with at_work(DeepShrinking(DeepShrink(), unet), request=other) as hooks:
        assert sizes_and_result(unet, hooks, 350)[0] == [16, 8, 2, 1]


def test_a_depth_that_the_model_has_not_is_refused(unet):
    with pytest.raises(UserError, match="line 4: deep shrink at depth 4: the U-Net has 4 blocks"):
        DeepShrinking(DeepShrink(), unet).batch_key(
            PromptRequest(prompt="x", where="line 4", deep_shrink={"depth_1": 4}), PictureInputs()
        )


def test_what_has_no_effect_is_told_once(unet, caplog):
    extension = DeepShrinking(DeepShrink(depth_2=2), unet)
    lonely = PromptRequest(prompt="x", where="line 4", deep_shrink={"ratio": 0.4})
    late = PromptRequest(prompt="x", where="line 5", deep_shrink={"depth_1": 1})
    for request in (lonely, late, lonely, late, PromptRequest(prompt="x")):
        extension.batch_key(request, PictureInputs())
    first, second = (record.getMessage() for record in caplog.records)
    assert first == "line 4: deep shrink is off without --dsd1 or --ds_depth_1"
    assert second.startswith("line 5: deep shrink at depth 2 has no effect: it would begin below timestep 650")
    caplog.clear()
    DeepShrinking(DeepShrink(depth_1=1, depth_2=2, timesteps_2=300), unet).batch_key(lonely, PictureInputs())
    assert not caplog.records
