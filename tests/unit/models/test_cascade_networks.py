"""What Stable Cascade networks promise besides their numbers: precision, dropout, fresh weights, memory, control."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from library.checkpoints.cascade_configs import CONFIGS
from library.checkpoints.cascade_parts import ControlNetConfig, EffNetConfig, PreviewerConfig, check_control_blocks
from library.errors import UserError
from library.models.assemble import build_module
from library.models.cascade import unet
from library.models.cascade.control_net import add_controls, new_control_net
from library.models.cascade.effnet import EffNetEncoder
from library.models.cascade.previewer import Previewer
from library.models.cascade.unet import CascadeUNet, embed_ratio, new_stage
from library.models.memory import enable_gradient_checkpointing, has_dropout, use_channels_last
from library.models.random_cascade import TINY_A, TINY_B, TINY_C, TINY_CONTROL, TINY_EFFNET, random_part
from tests.cascade_models import SMALL_B, SMALL_C, inputs_b, inputs_c, noise, randomize, small_stage

CPU = torch.device("cpu")
CASES = {"c": (SMALL_C, inputs_c), "b": (SMALL_B, inputs_b)}


@pytest.fixture(params=CASES)
def case(request):
    config, inputs = CASES[request.param]
    return small_stage(config), inputs()


# Time --------------------------------------------------------------------------------------------------------------


def test_time_embedding_is_the_formula_in_float32():
    found = embed_ratio(torch.tensor([0.0, 0.371]), 64)
    rates = torch.exp(-torch.arange(32, dtype=torch.float64) * torch.log(torch.tensor(10000.0).double()) / 31)
    expected = torch.cat([torch.sin(3710 * rates), torch.cos(3710 * rates)])
    assert found.dtype == torch.float32
    assert torch.equal(found[0], torch.cat([torch.zeros(32), torch.ones(32)]))
    torch.testing.assert_close(found[1].double(), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("form", ["weights", "autocast"])
@torch.no_grad()
def test_time_enters_in_float32_under_bfloat16(form, monkeypatch):
    seen = []
    original = embed_ratio

    def spy(ratio, width):
        seen.append((ratio, original(ratio, width)))
        return seen[-1][1]

    monkeypatch.setattr(unet, "embed_ratio", spy)
    network = small_stage(SMALL_C)
    x, ratio, condition = inputs_c()
    network(x, ratio, condition)
    exact = seen[0][1]
    with torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
        (network if form == "autocast" else network.to(torch.bfloat16))(x.bfloat16(), ratio, condition)
    assert all(value.dtype == torch.float32 for pair in seen for value in pair)
    assert torch.equal(seen[3][1], exact)


def test_a_rounded_time_is_refused():
    network = small_stage(SMALL_C)
    x, ratio, condition = inputs_c()
    with pytest.raises(TypeError, match="float32"):
        network(x, ratio.bfloat16(), condition)


# Dropout -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_evaluation_repeats_itself_and_training_drops_out(case):
    network, given = case
    still = network(*given)
    assert torch.equal(network(*given), still)
    network.train()
    assert has_dropout(network)
    torch.manual_seed(0)
    assert not torch.allclose(network(*given), still, atol=1e-3)
    network.set_dropout(0.0)
    assert torch.equal(network(*given), still)
    assert not has_dropout(network)
    network.set_dropout(None)
    assert not torch.allclose(network(*given), still, atol=1e-3)


def test_levels_without_dropout_stay_without():
    network = CascadeUNet(SMALL_B)
    network.set_dropout(0.3)
    assert {block.channelwise[3].p for block in network.down_blocks[0] if hasattr(block, "channelwise")} == {0.0}
    assert network.down_blocks[2][0].channelwise[3].p == network.down_blocks[2][2].attention.attn.dropout == 0.3
    assert network.up_blocks[0][0].channelwise[3].p == 0.3
    assert network.up_blocks[3][0].channelwise[3].p == 0.0


# Fresh weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", CASES)
def test_a_fresh_network_predicts_zero_and_learns(stage):
    config, inputs = CASES[stage]
    network = new_stage(config, 3, device=CPU, dtype=torch.float32)
    x, ratio, condition = inputs()
    prediction = network(x, ratio, condition)
    assert not prediction.any()
    (prediction - 1).square().mean().backward()
    assert network.clf[1].weight.grad.abs().max() > 0


def test_fresh_weights_follow_the_official_distributions():
    network = new_stage(SMALL_C, 3, device=CPU, dtype=torch.float32)
    state = network.state_dict()
    spread = {name: float(tensor.std()) for name, tensor in state.items() if tensor.numel() > 1}
    xavier = (2 / (64 + 64)) ** 0.5
    assert spread["clip_txt_pooled_mapper.weight"] == pytest.approx(0.02, rel=0.1)
    assert spread["embedding.1.weight"] == pytest.approx(0.02 * (2 / 80) ** 0.5, rel=0.1)
    assert spread["down_blocks.0.2.attention.attn.out_proj.weight"] == pytest.approx(xavier, rel=0.1)
    assert spread["down_blocks.0.2.attention.attn.to_q.weight"] == pytest.approx(xavier / 2**0.5, rel=0.1)
    assert spread["down_blocks.0.0.channelwise.4.weight"] == pytest.approx((2 / 320) ** 0.5 / 3**0.5, rel=0.1)
    assert spread["down_blocks.0.0.channelwise.0.weight"] == pytest.approx((2 / 320) ** 0.5, rel=0.1)
    zero = [name for name, tensor in state.items() if not tensor.any()]
    assert {name for name in state if ".mapper" in name or "clf" in name or name.endswith("bias")} <= set(zero)
    assert {name for name in state if name.endswith((".gamma", ".beta"))} <= set(zero)
    assert not any("channelwise.0.weight" in name or "depthwise.weight" in name for name in zero)


def test_fresh_weights_follow_from_the_seed():
    first, again, other = (new_stage(SMALL_B, seed, device=CPU, dtype=torch.float32).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["up_blocks.0.0.depthwise.weight"], other["up_blocks.0.0.depthwise.weight"])


# Memory and speed --------------------------------------------------------------------------------------------------


def gradients(network, given, seed=0):
    network.zero_grad()
    torch.manual_seed(seed)
    network(*given).square().mean().backward()
    return [parameter.grad for parameter in network.parameters()]


@pytest.mark.parametrize("dropout", [False, True])
def test_checkpointing_gives_equal_gradients(case, dropout):
    network, given = case
    network.train(dropout)
    plain = gradients(network, given)
    enable_gradient_checkpointing(network)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        network(*given)
    assert all(torch.equal(one, other) for one, other in zip(plain, gradients(network, given), strict=True))
    network.disable_gradient_checkpointing()
    everything = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: everything.append(t.numel()) or t, lambda t: t):
        network(*given)
    assert sum(kept) < sum(everything) / 3


def test_blocks_compile_without_graph_breaks():
    network = randomize(CascadeUNet(replace(SMALL_C, blocks_down=(1, 1), blocks_up=(1, 1)))).eval()
    given = inputs_c()
    expected = gradients(network, given)
    torch._dynamo.reset()
    network.compile_repeated_blocks(backend="eager", dynamic=True)
    found = gradients(network, given)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)
    torch._dynamo.reset()


@torch.no_grad()
def test_maps_stay_channels_last_through_all_blocks(case):
    network, given = case
    strides = []
    for block in network.all_blocks():
        block.register_forward_hook(
            lambda _, inputs, output: strides.append(output.is_contiguous(memory_format=torch.channels_last))
        )
    expected = network(*given)
    assert all(strides)
    use_channels_last(network)
    torch.testing.assert_close(network(*given), expected)


@torch.no_grad()
def test_bfloat16_weights_predict_in_their_own_type(case):
    network, (x, ratio, condition) = case
    expected = network(x, ratio, condition)
    found = network.to(torch.bfloat16)(x, ratio, condition)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() / expected.norm() < 2e-2


# Small parts -------------------------------------------------------------------------------------------------------


def test_the_encoder_never_trains_and_measures_pictures_as_the_files_say():
    encoder = EffNetEncoder(TINY_EFFNET)
    encoder.load_state_dict(random_part("effnet").tensors)
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    with torch.no_grad():
        latents = encoder(noise(1, 3, 250, 330).sigmoid())
    assert latents.shape == (1, 16, 8, 11)


def test_every_size_of_picture_and_latent():
    assert Previewer(PreviewerConfig(features=16)).eval()(noise(1, 16, 3, 5)).shape == (1, 3, 24, 40)
    pixels = Previewer(PreviewerConfig(features=16)).eval()(noise(1, 16, 3, 5) * 100)
    assert 0 <= pixels.min() <= pixels.max() <= 1


def test_tiny_parts_have_the_sizes_of_the_documentation():
    assert sum(p.numel() for p in CascadeUNet(TINY_C).parameters()) == 121_488
    assert sum(p.numel() for p in CascadeUNet(TINY_B).parameters()) == 147_888
    assert TINY_A.features == 16


# ControlNets -------------------------------------------------------------------------------------------------------

CONTROLS = {
    "effnet": TINY_CONTROL,
    "simple": ControlNetConfig("simple", 5, 64, (0, 5), features=5),
    "large": ControlNetConfig("large", 16, 64, (0, 3), features=20, wide=(24, 12), depth=2),
}


def backbone():
    return {name: tensor for name, tensor in random_part("effnet").tensors.items() if name.startswith("backbone.")}


@pytest.mark.parametrize("mode", CONTROLS)
def test_a_new_control_net_changes_nothing_until_it_is_trained(mode):
    config = replace(CONTROLS[mode], c_out=64)
    control = new_control_net(config, 0, backbone() if mode == "effnet" else None, device=CPU)
    residuals = control(noise(3, config.c_in, 96, 64))
    assert set(residuals) == set(config.blocks)
    network = small_stage(SMALL_C)
    x, ratio, condition = inputs_c()
    assert torch.equal(network(x, ratio, condition, control=residuals), network(x, ratio, condition))
    network(x, ratio, condition, control=residuals).square().mean().backward()
    last = [projection[2].weight.grad for projection in control.projections]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in last)
    randomize(control)
    steered = network(x, ratio, condition, control=control(noise(3, config.c_in, 96, 64)))
    assert not torch.allclose(steered, network(x, ratio, condition), atol=1e-3)


def test_the_first_convolution_takes_what_fits_and_has_no_padding():
    given = backbone()
    first = given["backbone.0.0.weight"]
    for c_in in (1, 4):
        config = replace(TINY_CONTROL, c_in=c_in, effnet=replace(TINY_EFFNET, c_in=c_in))
        control = new_control_net(config, 0, given, device=CPU)
        weight = control.backbone[0][0].weight
        assert torch.equal(weight[:, : min(3, c_in)], first[:, : min(3, c_in)])
        assert not weight[:, 3:].any()
        assert control.backbone[0][0].padding == (0, 0)
    assert EffNetEncoder(EffNetConfig()).backbone[0][0].padding == (1, 1)


def test_a_control_net_on_efficientnet_needs_trained_weights():
    with pytest.raises(UserError, match="--controlnet_backbone_path"):
        new_control_net(TINY_CONTROL, 0, device=CPU)


def test_several_control_nets_add_up():
    one, two = {0: torch.ones(1), 3: torch.ones(1)}, {3: torch.ones(1)}
    assert {k: float(v) for k, v in add_controls([one, two], [0.5, 2.0]).items()} == {0: 0.5, 3: 2.5}
    assert {k: float(v) for k, v in add_controls([one, two]).items()} == {0: 1.0, 3: 2.0}


@pytest.mark.parametrize(
    ("blocks", "words"), [([0, 64], "0 to 63, not 64"), ([-1], "not -1"), ([3, 3], "twice"), ([], "no block number")]
)
def test_wrong_control_blocks_are_refused(blocks, words):
    with pytest.raises(UserError, match=words) as caught:
        check_control_blocks(blocks, CONFIGS["c", "3.6B"].residual_blocks)
    assert "0 4 8 12 51 55 59 63" in str(caught.value)


def test_batch_statistics_of_a_training_control_net_stay():
    control = new_control_net(TINY_CONTROL, 0, backbone(), device=CPU).train()
    before = {name: buffer.clone() for name, buffer in control.named_buffers()}
    control(noise(2, 1, 64, 64))
    assert all(torch.equal(buffer, before[name]) for name, buffer in control.named_buffers())


def test_thirds_of_one_tensor_change_one_by_one():
    """Files keep queries, keys and values in one tensor; an update of one is none of the others for autograd."""
    packed = torch.zeros(6, 2)
    tensors = {f"{number}.weight": packed[2 * number : 2 * number + 2] for number in range(3)}
    make = partial(build_module, lambda: nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3))), tensors)
    layers = make(what="layers", device=torch.device("cpu"), dtype=torch.float32)
    before = layers[1].weight._version
    with torch.no_grad():
        layers[0].weight.add_(1)
    assert layers[1].weight._version == before
    assert layers[1].weight.data_ptr() == packed[2:].data_ptr()
