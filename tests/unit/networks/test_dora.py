"""DoRA: the formula of the paper, and the numbers and files of LyCORIS."""

import pytest
import torch
from small_models import attached, fill, outputs, small_models
from torch import nn
from torch.nn import functional as F

from networks import lora
from networks.dora import DoraAdapter
from networks.targets import Target

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 4, 6)),
    "conv 3x3": (lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1), (2, 6, 5, 5)),
}


def dora_on(layer, **kwargs):
    torch.manual_seed(4)
    layer.requires_grad_(False)
    adapter = DoraAdapter(Target("lora_unet_x", "x", layer), rank=3, alpha=1.5, **kwargs)
    fill(adapter)
    adapter.attach()
    return adapter


@pytest.mark.parametrize("on_output", [True, False])
@pytest.mark.parametrize("multiplier", [1.0, 0.4])
@pytest.mark.parametrize("case", LAYERS)
def test_output_and_gradients_follow_the_paper(case, multiplier, on_output):
    make, shape = LAYERS[case]
    layer = make()
    adapter = dora_on(layer, on_output=on_output)
    adapter.multiplier = multiplier
    x = torch.randn(shape, requires_grad=True)
    down, up = adapter.lora_down.weight, adapter.lora_up.weight
    total = layer.weight + 0.5 * (up.flatten(1) @ down.flatten(1)).view(layer.weight.shape)
    dims = [d for d in range(total.dim()) if d != (0 if on_output else 1)]
    weight = adapter.dora_scale * total / total.detach().pow(2).sum(dims, keepdim=True).sqrt()
    weight = layer.weight + multiplier * (weight - layer.weight)
    if isinstance(layer, nn.Linear):
        wanted = F.linear(x, weight, layer.bias)
    else:
        wanted = F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)
    found = layer(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    tensors = (x, adapter.dora_scale, down, up)
    cotangent = torch.randn_like(wanted)
    grads = torch.autograd.grad(found, tensors, cotangent)
    for got, want in zip(grads, torch.autograd.grad(wanted, tensors, cotangent), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("on_output", [True, False])
@pytest.mark.parametrize("case", LAYERS)
def test_lycoris_computes_the_same_from_the_same_tensors(case, on_output):
    locon = pytest.importorskip("lycoris.modules.locon")
    make, shape = LAYERS[case]
    torch.manual_seed(0)
    layer, theirs = make(), make()
    theirs.load_state_dict(layer.state_dict())
    adapter = dora_on(layer, on_output=on_output)
    other = locon.LoConModule(
        "lora_unet_x", theirs, lora_dim=3, alpha=1.5, weight_decompose=True, wd_on_out=on_output, bypass_mode=False
    )
    fresh = DoraAdapter(Target("lora_unet_x", "x", make()), rank=3, alpha=1.5, on_output=on_output)
    assert fresh.dora_scale.shape == other.dora_scale.shape
    assert {k: v.shape for k, v in other.custom_state_dict().items()} == {
        k: v.shape for k, v in adapter.file_tensors().items()
    }
    with torch.no_grad():
        for name, tensor in adapter.file_tensors().items():
            if name != "alpha":
                target = other.dora_scale if name == "dora_scale" else other.get_submodule(name.split(".")[0]).weight
                target.copy_(tensor)
    other.apply_to()
    other.eval()
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_a_dora_file_makes_a_dora_network(tmp_path):
    models = small_models()
    network = attached(lora, models, dora_wd="True", wd_on_output="False", conv_dim="2")
    wanted = outputs(models)
    network.save_weights(tmp_path / "dora.safetensors", None, {})
    fresh = small_models()
    other, _ = lora.create_network_from_weights(1.0, tmp_path / "dora.safetensors", None, *fresh)
    other.apply_to(*fresh, True, True)
    other.load_weights(tmp_path / "dora.safetensors")
    for got, want in zip(outputs(fresh), wanted, strict=True):
        torch.testing.assert_close(got, want)
    assert any(name.endswith(".dora_scale") for name in other.state_dict())


def test_dropouts_leave_the_length_alone():
    layer = nn.Linear(6, 5)
    x = torch.randn(4, 6)
    plain = layer(x)
    adapter = dora_on(layer, dropouts=lora.Dropouts(module=0.5, rank=0.5, neuron=0.5)).train()
    torch.manual_seed(0)
    results = [layer(x) for _ in range(40)]
    assert any(torch.allclose(result, plain, atol=1e-6) for result in results)
    assert len({float(result.detach().sum()) for result in results}) > 10
    adapter.eval()
    torch.testing.assert_close(layer(x), layer(x))
