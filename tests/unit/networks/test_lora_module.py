"""What a LoRA computes: against the formulas written out by hand, in every mode that a run can be in."""

import math

import pytest
import torch
from small_models import attached, fill, inputs, outputs, small_models
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from networks import lora, lora_fa
from networks.low_rank import adapted_linear
from networks.targets import Target

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 4, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (3, 6)),
    "conv 1x1": (lambda: nn.Conv2d(6, 5, 1), (2, 6, 4, 4)),
    "conv 3x3": (lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1), (2, 6, 5, 5)),
}


@pytest.fixture
def models():
    return small_models()


def adapter_on(layer, dtype=torch.float32, **kwargs):
    """An adapter with values on a layer, attached."""
    torch.manual_seed(4)
    layer.requires_grad_(False)
    adapter = lora.LoraAdapter(Target("lora_unet_x", "x", layer), rank=3, alpha=1.5, **kwargs).to(dtype)
    fill(adapter)
    adapter.attach()
    return adapter


def by_hand(adapter, layer, x, multiplier=1.0):
    """W x + b + multiplier * alpha / rank * up(down(x))."""
    down, up = adapter.lora_down.weight, adapter.lora_up.weight
    scale = multiplier * 1.5 / 3
    if isinstance(layer, nn.Linear):
        return F.linear(x, layer.weight, layer.bias) + scale * (x @ down.t() @ up.t())
    place = {"stride": layer.stride, "padding": layer.padding}
    return F.conv2d(x, layer.weight, layer.bias, **place) + scale * F.conv2d(F.conv2d(x, down, **place), up)


@pytest.mark.parametrize("case", LAYERS)
def test_output_and_gradients_are_those_of_the_formula(case):
    make, shape = LAYERS[case]
    torch.manual_seed(0)
    layer = make().double()
    adapter = adapter_on(layer, torch.float64)
    adapter.multiplier = 0.7
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    wanted = by_hand(adapter, layer, x, 0.7)
    torch.testing.assert_close(layer(x), wanted)
    tensors = (x, *adapter.parameters())
    cotangent = torch.randn_like(wanted)
    found = torch.autograd.grad(layer(x), tensors, cotangent)
    for got, want in zip(found, torch.autograd.grad(wanted, tensors, cotangent), strict=True):
        torch.testing.assert_close(got, want)


def test_fused_product_passes_gradcheck():
    torch.manual_seed(0)
    x, down, up = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 6), (4, 6), (5, 4)))
    weight, bias = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *t: adapted_linear(t[0], weight, bias, t[1], t[2], 0.7), (x, down, up))


def test_delta_is_what_the_forward_pass_adds():
    for make, shape in LAYERS.values():
        layer = make()
        adapter = adapter_on(layer)
        x = torch.randn(shape)
        adapted = layer(x)
        adapter.detach()
        with torch.no_grad():
            layer.weight += adapter.delta()
        torch.testing.assert_close(layer(x), adapted)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (0, 1.0), (2, 0.5), (8.0, 2.0)])
def test_no_alpha_and_zero_stand_for_the_rank(models, alpha, scale):
    network = lora.create_network(1.0, 4, alpha, None, *models)
    assert {adapter.scale for adapter in network.adapters} == {scale}
    assert {float(adapter.alpha) for adapter in network.adapters} == {4 * scale}


def test_without_rank_and_alpha_the_network_has_rank_4_and_alpha_1(models):
    network = lora.create_network(1.0, None, None, None, *models)
    assert {(adapter.rank, float(adapter.alpha)) for adapter in network.adapters} == {(4, 1.0)}


def test_a_new_network_changes_nothing(models):
    before = outputs(models)
    for extra in ({}, {"conv_dim": "2"}, {"dora_wd": "True"}):
        network = attached(lora, models, filled=False, **extra)
        for got, want in zip(outputs(models), before, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        network.set_enabled(False)


def test_first_values_follow_from_seed_and_name_alone(models):
    def made(seed, **extra):
        torch.manual_seed(seed)
        return lora.create_network(1.0, 4, 1, None, *models, **extra).file_tensors()

    first, again, other, conv = made(7), made(7), made(8), made(7, conv_dim="2")
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor, conv[name])
        if "lora_down" in name:
            assert not torch.equal(tensor, other[name])
            assert float(tensor.abs().max()) <= 1 / math.sqrt(tensor[0].numel())
            assert float(tensor.std()) == pytest.approx((3 * tensor[0].numel()) ** -0.5, rel=0.4)
        elif "lora_up" in name:
            assert not tensor.any()


# Leaving out --------------------------------------------------------------------------------------------------------

DROPOUTS = {"dropout": "0.5", "rank_dropout": "0.4", "module_dropout": "0.3"}


@pytest.mark.parametrize("key", DROPOUTS)
def test_dropouts_only_work_in_training_mode(models, key):
    network = attached(lora, models, conv_dim="2", **{key: DROPOUTS[key]})
    network.eval()
    wanted = outputs(models)
    plain = small_models()
    attached(lora, plain, conv_dim="2").load_state_dict(network.state_dict())
    for got, want in zip(outputs(plain), wanted, strict=True):
        torch.testing.assert_close(got, want)
    network.train()
    torch.manual_seed(0)
    first, second = outputs(models), outputs(models)
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    torch.manual_seed(0)
    assert torch.equal(outputs(models)[1], first[1])
    assert network.uses_global_randomness
    assert not network.may_skip_parameters


@pytest.mark.parametrize("case", ["linear", "conv 3x3"])
def test_rank_dropout_leaves_out_ranks_per_sample_and_scales_the_rest(case):
    make, shape = LAYERS[case]
    adapter = adapter_on(make(), dropouts=lora.Dropouts(rank=0.25))
    low = torch.ones((4000, 7, 3) if len(shape) == 3 else (4000, 3, 2, 2))
    torch.manual_seed(0)
    dropped = adapter.drop(low)
    per_rank = dropped[:, 0] if len(shape) == 3 else dropped[:, :, 0, 0]
    assert per_rank.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    inside = dropped if len(shape) == 3 else dropped.flatten(2).transpose(1, 2)
    assert torch.equal(inside, per_rank[:, None].expand_as(inside))
    assert float((per_rank == 0).float().mean()) == pytest.approx(0.25, abs=0.02)


def test_module_dropout_leaves_the_output_as_it_was():
    layer = nn.Linear(6, 5)
    x = torch.randn(2, 6)
    plain = layer(x)
    adapter = adapter_on(layer, dropouts=lora.Dropouts(module=0.3))
    adapter.eval()
    full = layer(x)
    adapter.train()
    torch.manual_seed(0)
    results = [layer(x) for _ in range(500)]
    skipped = sum(torch.equal(result, plain) for result in results)
    assert skipped / 500 == pytest.approx(0.3, abs=0.06)
    assert all(torch.equal(r, plain) or torch.allclose(r, full, atol=1e-6) for r in results)


def test_neuron_dropout_keeps_the_mean():
    layer = nn.Linear(6, 5)
    adapter = adapter_on(layer, dropouts=lora.Dropouts(neuron=0.5))
    x = torch.randn(1, 6).expand(40000, 6)
    adapter.eval()
    wanted = layer(x[:1])
    adapter.train()
    torch.manual_seed(0)
    torch.testing.assert_close(layer(x).mean(0, keepdim=True), wanted, rtol=0.1, atol=0.05)


def test_checkpointing_draws_the_same_again():
    layer = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    adapters = [adapter_on(part, dropouts=lora.Dropouts(0.3, 0.3, 0.3)) for part in layer]
    x = torch.randn(8, 6, requires_grad=True)

    def gradients(run):
        torch.manual_seed(5)
        result = run()
        return torch.autograd.grad(result.square().sum(), [p for a in adapters for p in a.parameters()])

    direct = gradients(lambda: layer(x))
    again = gradients(lambda: checkpoint(layer, x, use_reentrant=False, preserve_rng_state=True))
    for got, want in zip(again, direct, strict=True):
        assert torch.equal(got, want)


# Other kinds of numbers, compilation --------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{}, {"conv_dim": "2", "dora_wd": "True"}, DROPOUTS], ids=["plain", "dora", "drop"])
def test_mixed_precision_computes_in_half_and_trains_in_full(models, extra):
    network = attached(lora, models, **extra).train()
    network.eval()
    wanted = outputs(models)[1]
    network.train()
    with torch.autocast("cpu", torch.bfloat16):
        network.eval()
        half = outputs(models)[1]
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), wanted, rtol=0.1, atol=0.1)
        network.train()
        outputs(models)[1].float().square().sum().backward()
    grads = [p.grad for a in network.unet_adapters for p in a.parameters()]
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


def test_frozen_weights_may_have_8_bits(models):
    network = attached(lora, models)
    wanted = outputs(models)[1]
    for name, parameter in models[1].named_parameters():
        if "lora" not in name and parameter.dim() > 1:
            parameter.data = parameter.data.to(torch.float8_e4m3fn)
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs(models)[1]
        found.float().sum().backward()
    torch.testing.assert_close(found.float(), wanted, rtol=0.2, atol=0.4)
    assert all(p.grad is not None for adapter in network.unet_adapters for p in adapter.parameters())


def test_no_converted_copy_of_a_frozen_weight_outlives_the_forward_pass():
    """Such copies of all layers together would take more memory than weights of 8 bits save."""
    weight = torch.randn(6, 8).to(torch.float8_e4m3fn)
    x, down, up = torch.randn(4, 8, requires_grad=True), torch.randn(2, 8), torch.randn(6, 2)
    y = adapted_linear(x, weight, None, down, up.requires_grad_(), 0.5)
    assert any(held is weight for held in y.grad_fn.held)
    y.sum().backward()
    exact = torch.ones(4, 6) @ (weight.float() + 0.5 * up.detach() @ down)
    torch.testing.assert_close(x.grad, exact)


def test_half_precision_network_on_a_half_precision_model():
    models = small_models(dtype=torch.bfloat16)
    network = attached(lora, models, conv_dim="2").to(torch.bfloat16)
    result = outputs(models)[1]
    assert result.dtype == torch.bfloat16
    result.sum().backward()
    assert {p.grad.dtype for a in network.unet_adapters for p in a.parameters()} == {torch.bfloat16}


COMPILED = {"plain": ({}, "aot_eager"), "dora": ({"dora_wd": "True"}, "eager"), "drop": (DROPOUTS, "eager")}


@pytest.mark.parametrize("case", COMPILED)
def test_blocks_with_adapters_compile_to_one_graph(models, case):
    extra, backend = COMPILED[case]
    torch._dynamo.reset()
    network = attached(lora, models, conv_dim="2", **extra).train()
    latents = inputs()[1]
    state = models[1].conv_in(latents)
    compiled = torch.compile(models[1].mid_block, backend=backend, fullgraph=True)
    results = []
    for block in (models[1].mid_block, compiled):
        torch.manual_seed(6)
        result = block(state)
        result.square().sum().backward()
        adapters = [a for a in network.unet_adapters if "mid_block" in a.name]
        results.append((result.detach(), [p.grad.clone() for a in adapters for p in a.parameters()]))
        network.zero_grad()
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


# The network's own duties -------------------------------------------------------------------------------------------


def test_norms_are_limited_as_documented(models):
    network = attached(lora, models, alpha=3.0, conv_dim="2")
    limit = sorted(float(adapter.delta().norm()) for adapter in network.adapters)[len(network.adapters) // 2]
    before = {adapter.name: (adapter.delta(), adapter.file_tensors()) for adapter in network.adapters}
    before = {name: (delta, {k: t.clone() for k, t in tensors.items()}) for name, (delta, tensors) in before.items()}
    count, mean, most = network.apply_max_norm_regularization(limit, "cpu")
    norms, changed = [], 0
    for adapter in network.adapters:
        delta, tensors = before[adapter.name]
        norm = max(float(delta.norm()), limit / 2)
        ratio = min(norm, limit) / norm
        changed += ratio != 1
        norms.append(norm * ratio)
        for suffix in ("lora_down.weight", "lora_up.weight"):
            torch.testing.assert_close(adapter.file_tensors()[suffix], tensors[suffix] * ratio**0.5)
    assert 0 < changed < len(norms)
    assert (count, mean, most) == (changed, pytest.approx(sum(norms) / len(norms)), pytest.approx(max(norms)))


@pytest.mark.parametrize("extra", [{}, {"dora_wd": "true"}, {"dora_wd": "true", "wd_on_output": "False"}], ids=str)
def test_merging_is_what_the_forward_pass_does(models, extra):
    network = attached(lora, models, multiplier=0.6, conv_dim="2", **extra)
    wanted = outputs(models)
    network.set_enabled(False)
    merged = small_models()
    other = lora.create_network(0.6, 4, 9.0, None, *merged, conv_dim="2", **extra)
    other.merge_to(*merged, network.file_tensors(), torch.float32, "cpu")
    for got, want in zip(outputs(merged), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_weights_come_back_after_being_merged_for_speed(models):
    before = outputs(models)
    network = attached(lora, models)
    wanted = outputs(models)
    network.backup_weights()
    network.pre_calculation()
    assert "forward" not in vars(models[1].mid_block.attentions[0].to_q)
    for got, want in zip(outputs(models), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    network.restore_weights()
    for got, want in zip(outputs(models), before, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("first_to_go", [0, 1])
def test_networks_add_up_and_come_off_in_any_order(models, first_to_go):
    bare = outputs(models)
    one = attached(lora, models)
    alone = outputs(models)
    two = attached(lora, models, multiplier=0.5, conv_dim="2", dora_wd="True")
    layer = models[1].mid_block.attentions[0].to_q
    x = torch.randn(2, 8)
    both = layer(x)
    nets = [one, two]
    nets[first_to_go].set_enabled(False)
    rest = layer(x)
    nets[1 - first_to_go].set_enabled(False)
    plain = layer(x)
    nets[first_to_go].set_enabled(True)
    other = layer(x)
    torch.testing.assert_close(both - plain, (rest - plain) + (other - plain), rtol=1e-4, atol=1e-5)
    nets[first_to_go].set_enabled(False)
    assert all("forward" not in vars(module) for model in models for module in model.modules())
    for got, want in zip(outputs(models), bare, strict=True):
        assert torch.equal(got, want)
    one.set_enabled(True)
    assert torch.equal(outputs(models)[1], alone[1])


def test_the_multiplier_is_the_strength(models):
    bare = outputs(models)[1]
    network = attached(lora, models)
    full = outputs(models)[1]
    network.set_multiplier(0)
    torch.testing.assert_close(outputs(models)[1], bare)
    network.set_multiplier(1.0)
    assert torch.equal(outputs(models)[1], full)


def test_parts_that_are_not_adapted_keep_their_layers(models):
    torch.manual_seed(0)
    network = lora.create_network(1.0, 4, 1, None, *models)
    network.apply_to(*models, False, True)
    assert all("forward" not in vars(module) for module in models[0].modules())
    assert network.state_dict()
    assert all(name.startswith("lora_unet_") for name in network.state_dict())
    assert set(network.file_tensors()) == set(network.state_dict())


def test_a_conv_network_leaves_no_trace_on_the_next(models):
    plain = len(lora.create_network(1.0, 4, 1, None, *models).unet_adapters)
    conv = len(lora.create_network(1.0, 4, 1, None, *models, conv_dim="4").unet_adapters)
    assert conv > plain
    assert len(lora.create_network(1.0, 4, 1, None, *models).unet_adapters) == plain


# LoRA-FA ------------------------------------------------------------------------------------------------------------


def test_lora_fa_trains_the_second_factor_only(models):
    network = attached(lora_fa, models, filled=False, conv_dim="2")
    groups, names = network.prepare_optimizer_params(1e-4, 1e-3, None)
    assert names == ["textencoder", "unet"]
    trained = [name for name, _ in network.named_parameters()]
    assert trained
    assert all(name.endswith("lora_up.weight") for name in trained)
    outputs(models)[1].sum().backward()
    down = {name: t for name, t in network.state_dict().items() if "lora_down" in name}
    assert all(not t.requires_grad for t in down.values())
    values = torch.cat([t.flatten() for name, t in down.items() if "to_q" in name])
    assert float(values.std()) == pytest.approx(math.sqrt(2 / (8 + 4)), rel=0.2)


def test_lora_fa_files_are_lora_files(models, tmp_path):
    network = attached(lora_fa, models)
    wanted = outputs(models)[1]
    network.save_weights(tmp_path / "fa.safetensors", None, None)
    fresh = small_models()
    other = attached(lora, fresh, filled=False)
    other.load_weights(tmp_path / "fa.safetensors")
    torch.testing.assert_close(outputs(fresh)[1], wanted)
    assert set(other.state_dict()) == set(network.state_dict())
