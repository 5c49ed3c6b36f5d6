"""LoRA training written a second time, plainly: hooks on the models of diffusers and transformers, and AdamW by hand.

Only the random numbers come from the toolkit, since a step cannot be repeated without them. The loss is that of
`tests/integration/reference_step.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as functional
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.randomness import derive
from tests.integration.reference_step import Models, Recipe, loss_of

RANK, ALPHA = 4, 2.0
BLOCK_ENDS = ("to_q", "to_k", "to_v", "to_out.0", "proj", "net.2", "proj_in", "proj_out")
TEXT_ENDS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the network is trained; names of options where there are such."""

    unet_lr: float = 1e-2
    text_encoder_lr: float = 1e-2
    plus: float = 1.0
    multiplier: float = 1.0
    scale_weight_norms: float = 0.0
    neuron_dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    betas: tuple[float, float] = (0.8, 0.9)
    eps: float = 1e-3
    weight_decay: float = 0.1

    @property
    def argv(self) -> str:
        """The options of AdamW. Its epsilon is so large that rounding errors of tiny gradients stay tiny."""
        return (
            f"--optimizer_args betas={self.betas[0]},{self.betas[1]} eps={self.eps} weight_decay={self.weight_decay} "
            f"--unet_lr={self.unet_lr} --text_encoder_lr={self.text_encoder_lr}"
        )


def layers_of(models: Models, *, text: bool) -> dict[str, nn.Module]:
    """The layers that a LoRA without convolutions adapts, by their names in files."""
    found = {}
    for path, layer in models.unet.named_modules():
        if ".attentions." in path and path.endswith(BLOCK_ENDS) and isinstance(layer, nn.Linear | nn.Conv2d):
            found[f"lora_unet_{path}".replace(".", "_")] = layer
    if text:
        for path, layer in models.text.named_modules():
            if ".layers." in path and path.endswith(TEXT_ENDS):
                place = path.removeprefix("text_model.")
                found[f"lora_te_text_model_{place}".replace(".", "_")] = layer
    return found


def write_start(models: Models, target: Path, *, text: bool) -> dict[str, Tensor]:
    """Write a LoRA whose factors are both random, so that both get gradients at once; returns its tensors."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, layer in layers_of(models, text=text).items():
        outs, *ins = layer.weight.shape
        tensors[f"{name}.lora_down.weight"] = torch.randn(RANK, *ins, generator=generator) * math.prod(ins) ** -0.5
        tensors[f"{name}.lora_up.weight"] = torch.randn(outs, RANK, *(1 for _ in ins[1:]), generator=generator) * 0.1
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, target, metadata={"ss_base_model_version": "sd_v1"})
    return tensors


class ReferenceLora:
    """Trains the tensors of a LoRA file on models with hooks."""

    def __init__(self, models: Models, tensors: dict[str, Tensor], training: Training, *, text: bool) -> None:
        self.training = training
        self.multiplier = training.multiplier
        self.values = {
            name: value.clone().requires_grad_() for name, value in tensors.items() if not name.endswith("alpha")
        }
        self.moments = {name: (torch.zeros_like(v), torch.zeros_like(v)) for name, v in self.values.items()}
        self.names = list(layers_of(models, text=text))
        models.unet.requires_grad_(False)
        models.text.requires_grad_(False)
        for name, layer in layers_of(models, text=text).items():
            layer.register_forward_hook(self._hook(name))

    def _hook(self, name):
        down, up = (self.values[f"{name}.lora_{side}.weight"] for side in ("down", "up"))
        training = self.training

        def add(layer, inputs, output):
            (x,) = inputs
            conv = isinstance(layer, nn.Conv2d)
            kept = float(torch.rand(()) >= training.module_dropout) if training.module_dropout else 1.0
            low = functional.conv2d(x, down) if conv else functional.linear(x, down)
            if training.neuron_dropout:
                low = functional.dropout(low, training.neuron_dropout)
            if training.rank_dropout:
                shape = (len(x), RANK, 1, 1) if conv else (len(x), *[1] * (x.dim() - 2), RANK)
                low = low * (torch.rand(shape) > training.rank_dropout) / (1 - training.rank_dropout)
            change = functional.conv2d(low, up) if conv else functional.linear(low, up)
            return output + self.multiplier * ALPHA / RANK * kept * change

        return add

    def update(self, models: Models, recipe: Recipe, batches: list, seed: int, number: int) -> None:
        """One update: gradients of all micro-batches, clipping, AdamW, and the limit of the norms."""
        for batch in batches:
            key = batch.key.step_key
            torch.manual_seed(derive(seed, "net", key.step, key.micro))
            (loss_of(models, recipe, batch, seed) / recipe.gradient_accumulation_steps).backward()
        gradients = {name: value.grad for name, value in self.values.items() if value.grad is not None}
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))
        factor = min(1.0, recipe.max_grad_norm / norm) if recipe.max_grad_norm else 1.0
        with torch.no_grad():
            for name, gradient in gradients.items():
                self._step(name, self.values[name], gradient * factor, number)
                self.values[name].grad = None
            if self.training.scale_weight_norms:
                self._limit(self.training.scale_weight_norms)

    def _step(self, name: str, value: Tensor, gradient: Tensor, number: int) -> None:
        training = self.training
        rate = training.text_encoder_lr if name.startswith("lora_te") else training.unet_lr
        if ".lora_up." in name:
            rate *= training.plus
        first, second = self.moments[name]
        slow, fast = training.betas
        first.mul_(slow).add_(gradient * (1 - slow))
        second.mul_(fast).add_(gradient**2 * (1 - fast))
        mean, spread = first / (1 - slow**number), second / (1 - fast**number)
        value.mul_(1 - rate * training.weight_decay)
        value.sub_(rate * mean / (spread.sqrt() + training.eps))

    def _limit(self, most: float) -> None:
        for name in self.names:
            down, up = (self.values[f"{name}.lora_{side}.weight"] for side in ("down", "up"))
            norm = float((up.flatten(1) @ down.flatten(1)).norm() * ALPHA / RANK)
            if norm > most:
                down.mul_((most / norm) ** 0.5)
                up.mul_((most / norm) ** 0.5)


def largest_error(before: dict[str, Tensor], expected: dict[str, Tensor], saved: Path) -> float:
    """Largest difference of any tensor's way, as a share of the longest way in that part of the model."""
    found = {name: value for name, value in load_file(saved).items() if not name.endswith("alpha")}
    assert found.keys() == expected.keys()
    worst = 0.0
    for part in ("lora_unet", "lora_te"):
        for side in (".lora_down.", ".lora_up."):
            names = [name for name in expected if name.startswith(part) and side in name]
            if names:
                moved = max(float((expected[name] - before[name]).abs().max()) for name in names)
                error = max(float((expected[name] - found[name]).abs().max()) for name in names)
                assert moved > 0
                worst = max(worst, error / moved)
    return worst
