"""What adapters add to a weight, against the modules of LyCORIS, which defined these files."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from library.checkpoints import lora_math
from library.checkpoints.lora_file import AdapterWeights
from library.checkpoints.lora_kinds import kind_of
from library.errors import UserError

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def layer_of(kind, out=12, inner=8):
    torch.manual_seed(0)
    return {
        "linear": lambda: nn.Linear(inner, out),
        "conv1": lambda: nn.Conv2d(inner, out, 1),
        "conv3": lambda: nn.Conv2d(inner, out, 3, padding=1),
    }[kind]()


def weights_of(tensors):
    suffixes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return AdapterWeights("lora_unet_x", kind_of(suffixes, tensors), dict(tensors))


def adapted(algorithm, layer, seed=1, **settings):
    """A LyCORIS module with random weights on `layer`, and what a file of it holds."""
    modules = pytest.importorskip("lycoris.modules")
    classes = {
        "lora": modules.LoConModule,
        "loha": modules.LohaModule,
        "lokr": modules.LokrModule,
        "oft": modules.DiagOFTModule,
        "boft": modules.ButterflyOFTModule,
        "glora": modules.GLoRAModule,
        "full": modules.FullModule,
        "norm": modules.NormModule,
        "ia3": modules.IA3Module,
    }
    module = classes[algorithm]("lora_unet_x", layer, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name == "dora_scale":
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)
    state = module.custom_state_dict() if hasattr(module, "custom_state_dict") else None
    state = {k: v.detach().clone() for k, v in (module.state_dict() if state is None else state).items()}
    return module, state


def inputs_for(layer):
    shape = (2, 5, layer.in_features) if isinstance(layer, nn.Linear) else (2, layer.in_channels, 6, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def run_with(layer, weight, x):
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    return F.conv2d(x, weight, layer.bias, padding=layer.padding)


KRON = {"lora_dim": 2, "alpha": 1, "factor": 4}
CASES = {
    "linear": ("lora", "linear", {"lora_dim": 4, "alpha": 2}),
    "1x1 convolution": ("lora", "conv1", {"lora_dim": 4, "alpha": 2}),
    "3x3 convolution": ("lora", "conv3", {"lora_dim": 4, "alpha": 3}),
    "convolution with a core": ("lora", "conv3", {"lora_dim": 4, "alpha": 2, "use_tucker": True}),
    "rank-stabilized": ("lora", "linear", {"lora_dim": 4, "alpha": 2, "rs_lora": True}),
    "DoRA by outputs": ("lora", "linear", {"lora_dim": 4, "alpha": 2, "weight_decompose": True}),
    "DoRA by inputs": ("lora", "linear", {"lora_dim": 4, "alpha": 2, "weight_decompose": True, "wd_on_out": False}),
    "DoRA convolution by outputs": ("lora", "conv3", {"lora_dim": 4, "alpha": 2, "weight_decompose": True}),
    "DoRA convolution by inputs": (
        "lora",
        "conv3",
        {"lora_dim": 4, "alpha": 2, "weight_decompose": True, "wd_on_out": False},
    ),
    "loha": ("loha", "linear", {"lora_dim": 3, "alpha": 1}),
    "loha convolution": ("loha", "conv3", {"lora_dim": 3, "alpha": 1}),
    "loha with cores": ("loha", "conv3", {"lora_dim": 3, "alpha": 1, "use_tucker": True}),
    "loha with DoRA": ("loha", "linear", {"lora_dim": 3, "alpha": 1, "weight_decompose": True}),
    "lokr": ("lokr", "linear", {**KRON, "lora_dim": 1}),
    "lokr, both factors whole": ("lokr", "linear", {**KRON, "lora_dim": 100, "full_matrix": True}),
    "lokr, both factors cut": ("lokr", "linear", {"lora_dim": 1, "alpha": 0.5, "factor": 4, "decompose_both": True}),
    "lokr convolution": ("lokr", "conv3", {**KRON, "lora_dim": 1, "factor": 2}),
    "lokr convolution, whole": ("lokr", "conv3", {**KRON, "full_matrix": True}),
    "lokr with a core": ("lokr", "conv3", {**KRON, "lora_dim": 1, "factor": 2, "use_tucker": True}),
    "lokr with DoRA": ("lokr", "linear", {**KRON, "lora_dim": 1, "weight_decompose": True}),
    "oft": ("oft", "linear", {"lora_dim": 4}),
    "oft, constrained": ("oft", "linear", {"lora_dim": 4, "constraint": 0.02}),
    "oft, rescaled": ("oft", "conv3", {"lora_dim": 4, "rescaled": True}),
    "boft": ("boft", "linear", {"lora_dim": 4}),
    "boft, rescaled": ("boft", "conv3", {"lora_dim": 4, "rescaled": True, "constraint": 0.05}),
    "glora": ("glora", "linear", {"lora_dim": 4, "alpha": 2}),
    "glora, 1x1 convolution": ("glora", "conv1", {"lora_dim": 4, "alpha": 2}),
    "full": ("full", "conv3", {}),
    "ia3": ("ia3", "linear", {}),
    "ia3 on inputs": ("ia3", "conv3", {"train_on_input": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_merged_weight_runs_as_the_lycoris_module(case):
    algorithm, kind, settings = CASES[case]
    # BOFT needs outputs that are a power of two times the block.
    layer = layer_of(kind, out=16 if algorithm == "boft" else 12)
    base, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    x = inputs_for(layer)
    module, state = adapted(algorithm, layer, **settings)
    weights = weights_of(state)
    merged = lora_math.apply_delta(base, weights, 1.0)
    added = lora_math.bias_delta(weights)
    with torch.no_grad():
        module.apply_to()
        wanted = layer(x) if algorithm != "full" else None
        module.restore()
        if algorithm == "full":
            wanted = run_with(layer, base + state["diff"], x) + state["diff_b"].reshape(-1, 1, 1)
        layer.weight.copy_(base)
        layer.bias.copy_(bias if added is None else bias + added)
        found = run_with(layer, merged, x)
    assert (merged - base).abs().max() > 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_norm_adapters_change_weight_and_bias():
    layer = nn.GroupNorm(4, 8)
    _, state = adapted("norm", layer)
    weights = weights_of(state)
    torch.testing.assert_close(lora_math.apply_delta(layer.weight.detach(), weights, 0.5), 1 + 0.5 * state["w_norm"])
    torch.testing.assert_close(lora_math.bias_delta(weights), state["b_norm"])


LINEAR_IN_STRENGTH = [case for case, row in CASES.items() if row[0] != "boft"]


@pytest.mark.parametrize("case", LINEAR_IN_STRENGTH)
def test_strength_multiplies_the_change(case):
    algorithm, kind, settings = CASES[case]
    layer = layer_of(kind)
    base = layer.weight.detach().clone()
    weights = weights_of(adapted(algorithm, layer, **settings)[1])
    full = lora_math.apply_delta(base, weights, 1.0) - base
    for strength in (0.0, 0.3, -1.0):
        part = lora_math.apply_delta(base, weights, strength) - base
        torch.testing.assert_close(part, strength * full, rtol=1e-4, atol=1e-5)


def test_boft_stages_are_drawn_to_the_identity():
    layer = layer_of("linear", out=16)
    module, state = adapted("boft", layer, lora_dim=4)
    weights = weights_of(state)
    base = layer.weight.detach()
    wanted = module.get_merged_weight(multiplier=0.4)[0].detach()
    torch.testing.assert_close(lora_math.apply_delta(base, weights, 0.4), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["linear", "convolution with a core", "loha with cores", "lokr", "full"])
def test_delta_weight_needs_no_base(case):
    algorithm, kind, settings = CASES[case]
    layer = layer_of(kind)
    base = layer.weight.detach().clone()
    weights = weights_of(adapted(algorithm, layer, **settings)[1])
    delta = lora_math.delta_weight(weights, tuple(base.shape))
    assert delta.shape == base.shape and delta.dtype == torch.float32
    torch.testing.assert_close(base + delta, lora_math.apply_delta(base, weights, 1.0), rtol=1e-4, atol=1e-5)
    assert lora_math.matrix_shape(weights) == (base.shape[0], base[0].numel())


def plain(up, down, alpha=None):
    tensors = {"lora_up.weight": up, "lora_down.weight": down}
    if alpha is not None:
        tensors["alpha"] = torch.tensor(float(alpha))
    return weights_of(tensors)


def test_factors_of_a_kernel_fit_a_matrix_and_the_other_way_round():
    up, down = torch.randn(6, 2), torch.randn(2, 4)
    wanted = 0.5 * up @ down
    matrix, kernel = plain(up, down, 1), plain(up[:, :, None, None], down[:, :, None, None], 1)
    for weights in (matrix, kernel):
        for base in (torch.zeros(6, 4), torch.zeros(6, 4, 1, 1)):
            merged = lora_math.apply_delta(base, weights, 1.0)
            assert merged.shape == base.shape
            torch.testing.assert_close(merged.reshape(6, 4), wanted)


def test_without_alpha_the_scale_is_one():
    up, down = torch.randn(6, 2), torch.randn(2, 4)
    torch.testing.assert_close(lora_math.delta_weight(plain(up, down), (6, 4)), up @ down)


def test_the_base_is_not_changed_and_half_precision_is_summed_in_float():
    base = torch.full((6, 4), 1.0, dtype=torch.float16)
    weights = plain(torch.full((6, 2), 1e-3, dtype=torch.float16), torch.full((2, 4), 1e-2, dtype=torch.float16))
    merged = lora_math.apply_delta(base, weights, 1.0)
    assert merged.dtype == torch.float32 and bool((base == 1).all())
    torch.testing.assert_close(merged - 1, torch.full((6, 4), 2e-5), rtol=2e-2, atol=0)


@pytest.mark.parametrize("shape", [(6, 5), (5, 4), (4, 6), (24,)])
def test_a_weight_of_another_size_is_refused(shape):
    weights = plain(torch.randn(6, 2), torch.randn(2, 4))
    with pytest.raises(UserError, match="lora_unet_x does not fit"):
        lora_math.apply_delta(torch.zeros(shape), weights, 1.0)


@pytest.mark.parametrize("case", ["oft", "glora", "DoRA by outputs", "ia3"])
def test_kinds_that_need_the_base_say_so(case):
    algorithm, kind, settings = CASES[case]
    weights = weights_of(adapted(algorithm, layer_of(kind), **settings)[1])
    with pytest.raises(UserError, match="without the weight"):
        lora_math.delta_weight(weights, (12, 8))
