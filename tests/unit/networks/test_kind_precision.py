"""Every kind of network under autocast, over weights in 8 bits, in half precision, and compiled."""

import pytest
import torch
from kind_helpers import layer_and_input, randomize, target_of
from torch import nn

from networks.adapter_base import Dropouts
from networks.dylora import DyloraAdapter
from networks.loha import LohaAdapter
from networks.lokr import Form, LokrAdapter
from networks.oft import OftAdapter

COMMON = {"alpha": 1.0, "dropouts": Dropouts(rank=0.2, module=0.1)}
KINDS = {
    "loha": lambda target: LohaAdapter(target, rank=1, **COMMON),
    "large loha": lambda target: LohaAdapter(target, rank=9, **COMMON),
    "tucker loha": lambda target: LohaAdapter(target, rank=2, tucker=True, **COMMON),
    "lokr": lambda target: LokrAdapter(target, Form.for_layer(target.layer, 1, -1, tucker=False), rank=1, **COMMON),
    "whole lokr": lambda target: LokrAdapter(
        target, Form.for_layer(target.layer, 99, 4, tucker=False), rank=9, **COMMON
    ),
    "tucker lokr": lambda target: LokrAdapter(
        target, Form.for_layer(target.layer, 1, 2, tucker=True), rank=1, **COMMON
    ),
    "oft": lambda target: OftAdapter(target, rank=4, alpha=0.1),
    "dylora": lambda target: DyloraAdapter(target, rank=4, unit=2, alpha=1.0),
}
pytestmark = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=["linear", "3x3"])
def layer_input(request):
    return layer_and_input(request.param)


def attach(kind, layer):
    adapter = randomize(KINDS[kind](target_of(layer)), 0.1)
    adapter.attach()
    return adapter.eval()


@torch.no_grad()
def relative_error(value, exact):
    return float((value.float() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("training", [False, True])
def test_autocast(kind, layer_input, training):
    layer, x = layer_input
    adapter = attach(kind, layer)
    exact = layer(x)
    adapter.train(training)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert training or relative_error(y, exact) < 0.02
    y.float().sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in adapter.parameters() if parameter.grad is not None)]
    assert len(gradients) > 1
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)


def test_weights_in_eight_bits(kind, layer_input):
    layer, x = layer_input
    small = layer.weight.to(torch.float8_e4m3fn)
    layer.weight.copy_(small.float())
    adapter = attach(kind, layer)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = layer(x)
    layer.weight.data = small
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x), wanted)
    assert adapter.merged(layer.weight, 0.5).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_in_half_precision(kind, layer_input, dtype):
    layer, x = layer_input
    adapter = attach(kind, layer)
    exact = layer(x)
    layer.bfloat16()
    adapter.to(dtype)
    y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert relative_error(y, exact) < 0.05


def test_a_compiled_layer(kind, layer_input):
    layer, x = layer_input
    adapter = attach(kind, layer)
    # What DyLoRA leaves out is a matter of shapes: it is compiled for use, not for training.
    adapter.train(kind != "dylora")
    model = nn.Sequential(layer)
    results = []
    torch._dynamo.reset()
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        adapter.zero_grad()
        y = run(x)
        y.sum().backward()
        results.append([y, *(parameter.grad for parameter in adapter.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)
