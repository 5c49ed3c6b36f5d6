"""Networks beside stage C, attached to diffusers' and transformers' models by hooks: LoRA, a new word, ControlNet."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as functional
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.parity.cascade_reference_models import control_residuals

RANK, ALPHA = 4, 2.0


def lora_layers(stage: nn.Module, text: nn.Module | None, only: str = "") -> dict[str, nn.Module]:
    """Linear layers and 1x1 convolutions by their names in files; those of stage C whose path contains `only`."""
    found = {}
    for path, layer in stage.named_modules():
        fits = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))
        if fits and only in path:
            own = path.replace(".attention.", ".attention.attn.").replace(".to_out.0", ".out_proj")
            found[f"lora_unet_{own}".replace(".", "_")] = layer
    for path, layer in [] if text is None else text.named_modules():
        if ".layers." in path and isinstance(layer, nn.Linear):
            found[f"lora_te_{path}".replace(".", "_")] = layer
    return found


def random_lora(layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Factors that are both random, so that both get gradients at once."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, layer in layers.items():
        outs, *ins = layer.weight.shape
        tensors[f"{name}.lora_down.weight"] = torch.randn(RANK, *ins, generator=generator) * math.prod(ins) ** -0.5
        tensors[f"{name}.lora_up.weight"] = torch.randn(outs, RANK, *(1 for _ in ins[1:]), generator=generator) * 0.1
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    return tensors


def attach_lora(layers: Mapping[str, nn.Module], values: Mapping[str, Tensor]) -> None:
    """Add alpha/rank * up(down(x)) to what the layers return."""
    for name, layer in layers.items():
        down, up = (values[f"{name}.lora_{side}.weight"] for side in ("down", "up"))

        def add(layer, inputs, output, down=down, up=up):
            run = functional.conv2d if isinstance(layer, nn.Conv2d) else functional.linear
            return output + ALPHA / RANK * run(run(inputs[0], down), up)

        layer.register_forward_hook(add)


def attach_word(text: nn.Module, change: Tensor, file: Path, start: str) -> None:
    """Token 49408 is the mean of all tokens that begin with `start`, and a change."""
    embedding = text.get_input_embeddings()
    vocabulary = Path(__file__).parents[2] / "library" / "assets" / "clip_vocab" / "vocab.json"
    alike = [number for token, number in json.loads(vocabulary.read_text()).items() if token.startswith(start)]
    first = load_file(file)["text_model.embeddings.token_embedding.weight"][alike].mean(0)
    seen = []

    def hide(_, inputs):
        seen[:] = [inputs[0] == 49408]
        return (inputs[0].clamp(max=49407),)

    embedding.register_forward_pre_hook(hide)
    embedding.register_forward_hook(lambda *call: torch.where(seen[0][..., None], first + change[0], call[-1]))


class ReferenceControlNet:
    """Looks at edges that Canny's detector finds in a small square copy of the pictures."""

    def __init__(self, tensors: Mapping[str, Tensor], blocks: tuple[int, ...], edges_side: int) -> None:
        fixed = ("running_mean", "running_var", "num_batches_tracked")
        self.tensors = dict(tensors)
        self.trained = {name: value for name, value in self.tensors.items() if not name.endswith(fixed)}
        self.blocks, self.side = blocks, edges_side
        self.residuals: dict[int, Tensor] = {}

    def look(self, pixels: Tensor) -> None:
        """Make the residuals for pictures [N,3,H,W] in [0,1]."""
        maps = [self.edges((picture.permute(1, 2, 0) * 255).round().numpy()) for picture in pixels]
        self.residuals = control_residuals(torch.stack(maps), self.tensors, self.blocks)

    def edges(self, picture: np.ndarray) -> Tensor:
        small = cv2.resize(picture.astype(np.float32), (self.side, self.side), interpolation=cv2.INTER_LINEAR)
        found = cv2.Canny(small.astype(np.uint8), 100, 200).astype(np.float32) / 255
        return torch.from_numpy(cv2.resize(found, picture.shape[1::-1], interpolation=cv2.INTER_LINEAR))[None]
