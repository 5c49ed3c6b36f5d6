"""What benchmarks/cascade_memory.py counts is what trainings hold, and what is not needed any more is let go."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import pytest
import torch

import stable_cascade_train_c_network as network_script
from benchmarks.cascade_memory import FULL, Mode, measure, size_of
from library.models.cascade.effnet import EffNetEncoder
from library.models.cascade.text import ProjectedTextEncoder
from library.models.random_cascade import TINY_B, TINY_C, TINY_TEXT
from library.training.step import TrainStep
from library.training.stepper import Stepper
from tests.cascade_runs import train_stage_b, train_stage_c
from tests.support import run_tool

LORA = Mode("LoRA", "lora", rank=4)
ADAFACTOR = (
    "--full_bf16 --mixed_precision=bf16 --optimizer_type=Adafactor --max_grad_norm=0 --lr_scheduler=constant "
    "--optimizer_args relative_step=False scale_parameter=False warmup_init=False"
)
RUNS = {
    "stage C": (TINY_C, FULL[1], "--mixed_precision=bf16 --gradient_checkpointing"),
    "stage C, fused": (TINY_C, FULL[3], f"--gradient_checkpointing --fused_backward_pass {ADAFACTOR}"),
    "stage B": (TINY_B, FULL[2], f"--gradient_checkpointing {ADAFACTOR}"),
    "LoRA": (
        TINY_C,
        LORA,
        "--mixed_precision=bf16 --network_module=networks.lora --network_dim=4 --network_train_unet_only",
    ),
}


@pytest.mark.parametrize("mode", [FULL[3], LORA], ids=lambda mode: mode.name)
def test_tensors_without_memory_count_as_real_ones(mode):
    counted, held = (measure(TINY_C, mode, side=128, text=TINY_TEXT, fake=fake) for fake in (True, False))
    assert (counted.weights, counted.gradients, counted.states) == (held.weights, held.gradients, held.states)
    assert counted.peak == pytest.approx(held.peak, rel=1e-3)
    assert held.rest > 0


@pytest.fixture
def held(monkeypatch):
    """Bytes of what trains, its gradients and its optimizer's state, at the end of each update."""
    seen = []
    step = Stepper.step

    def spy(self):
        outcome = step(self)
        optimizer = self.built.optimizer
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        states = [value for state in optimizer.state.values() for value in state.values()]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        kept = [value for value in states if isinstance(value, torch.Tensor) and value.numel() > 1]
        seen.append((size_of(parameters), size_of(gradients), size_of(kept)))
        return outcome

    monkeypatch.setattr(Stepper, "step", spy)
    return seen


@pytest.mark.parametrize("run", RUNS)
def test_a_training_holds_what_is_counted(cascade_command, tmp_path, held, run):
    config, mode, words = RUNS[run]
    stage = config.stage
    command = cascade_command(tmp_path / "out", *words.split(), stage=stage, max_train_steps=2)
    train = {"LoRA": lambda *argv: run_tool(network_script.main, *argv), "stage B": train_stage_b}
    assert train.get(run, train_stage_c)(*command) == 0
    counted = measure(config, mode, side=128, fake=False)
    frozen = size_of(_stage(config).parameters()) if mode is LORA else 0
    weights, gradients, states = held[-1]
    assert gradients == counted.gradients == (0 if mode.fused else weights)
    # What adapters know besides: an alpha for each layer.
    assert weights <= counted.weights - frozen <= weights + 4 * 47
    # Steps are counted once for each tensor or for all together, and Adafactor keeps a norm.
    assert states <= counted.states <= states + 12 * 1000


def _stage(config):
    from library.models.cascade.unet import CascadeUNet

    with torch.device("meta"):
        return CascadeUNet(config).bfloat16()


def test_a_lora_keeps_one_base_and_merges_nothing(cascade_command, tmp_path, monkeypatch):
    """While a forward pass waits for its backward pass, nothing has a weight's shape but the weight."""
    forward, seen = TrainStep.forward, []

    def spy(self, batch):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda x: x):
            result = forward(self, batch)
        base = self._family[0].unet
        matrices = [module.weight for module in base.modules() if isinstance(module, torch.nn.Linear)]
        weights = {weight.data_ptr(): weight.shape for weight in matrices}
        found = {
            tensor.data_ptr(): tensor.shape
            for tensor in [*saved, *(item for item in gc.get_objects() if isinstance(item, torch.Tensor))]
            if tensor.device.type == "cpu" and tensor.dtype != torch.float32
        }
        shapes = set(weights.values()) | {shape[::-1] for shape in weights.values()}
        others = [shape for place, shape in found.items() if place not in weights and shape in shapes]
        seen.append((size_of(base.parameters()), {parameter.dtype for parameter in base.parameters()}, others))
        return result

    monkeypatch.setattr(TrainStep, "forward", spy)
    command = cascade_command(tmp_path / "out", *RUNS["LoRA"][2].split(), max_train_steps=2)
    assert run_tool(network_script.main, *command) == 0
    assert seen[-1] == (size_of(_stage(TINY_C).parameters()), {torch.bfloat16}, [])


def test_encoders_leave_when_everything_is_cached(cascade_command, tmp_path, monkeypatch):
    """EfficientNet is freed before the first update, and the text encoder moved away; neither runs in a step."""
    encoders, events = weakref.WeakSet(), Counter()
    make, encode, move = EffNetEncoder.__init__, ProjectedTextEncoder.forward, ProjectedTextEncoder.to
    forward = TrainStep.forward

    def built(self, *arguments):
        make(self, *arguments)
        encoders.add(self)
        events["built"] += 1

    def step(self, batch):
        gc.collect()
        events["alive in a step"] += len(encoders)
        before = events["text"]
        result = forward(self, batch)
        events["text in a step"] += events["text"] - before
        events["steps"] += 1
        return result

    def ran(self, *arguments, **more):
        events["text"] += 1
        return encode(self, *arguments, **more)

    def moved(self, target):
        events[f"to {target}, {events['steps']} steps done"] += 1
        return move(self, target)

    monkeypatch.setattr(EffNetEncoder, "__init__", built)
    monkeypatch.setattr(TrainStep, "forward", step)
    monkeypatch.setattr(ProjectedTextEncoder, "forward", ran)
    monkeypatch.setattr(ProjectedTextEncoder, "to", moved)
    words = ("--cache_latents", "--cache_text_encoder_outputs")
    assert train_stage_c(*cascade_command(tmp_path / "out", *words, max_train_steps=2)) == 0
    assert events["built"] > 0 and events["text"] > 0 and events["steps"] == 2
    assert events["alive in a step"] == events["text in a step"] == 0
    assert events["to cpu, 0 steps done"] == 1
