"""What must fit on a GPU while Stable Cascade trains: the released structures, in each way of training.

One update (forward, backward, optimizer) is made of each structure on tensors that have shapes and no memory, and the
bytes that a real one would hold are counted as they come and go: weights, gradients, optimizer state, and the highest
sum of everything, activations included. So no GPU is needed, and what libraries keep for themselves (some hundred MB)
is not in it. The mixed precision is that of CPUs, which differs from CUDA's in details of norms.

    python benchmarks/cascade_memory.py
    python benchmarks/cascade_memory.py --batch 4
"""

from __future__ import annotations

import argparse
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from benchmarks.report import report  # noqa: E402
from library.checkpoints.cascade_configs import CONFIGS, CascadeConfig  # noqa: E402
from library.checkpoints.cascade_parts import ControlNetConfig, EffNetConfig, default_control_blocks  # noqa: E402
from library.contracts import END_ID  # noqa: E402
from library.models.cascade.control_net import CascadeControlNet  # noqa: E402
from library.models.cascade.effnet import EffNetEncoder  # noqa: E402
from library.models.cascade.text import make_projected_text_encoder  # noqa: E402
from library.models.cascade.unet import CascadeUNet, StageInputs  # noqa: E402
from library.models.memory import enable_gradient_checkpointing  # noqa: E402

GB = 1e9
BIG_G = {
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
    "eos_token_id": END_ID,
}
PIXELS = {"c": 768, "b": 1024}
DOWNSCALE = {"c": 32, "b": 4}


@dataclass(frozen=True)
class Mode:
    """A way of training.

    Attributes:
        name: what the table calls it.
        trained: `stage`, `lora`, `lora and text` or `control`.
        half: everything in bfloat16, weights that train included; what does not train always is.
        adafactor: the optimizer: Adafactor, otherwise AdamW.
        fused: each weight is updated as soon as its gradient is known.
        checkpointing: activations are computed again in the backward pass.
        rank: of a LoRA on every layer.
    """

    name: str
    trained: str = "stage"
    half: bool = False
    adafactor: bool = False
    fused: bool = False
    checkpointing: bool = True
    rank: int = 16


FULL = (
    Mode("float32, AdamW, no checkpointing", checkpointing=False),
    Mode("float32, AdamW"),
    Mode("bfloat16, Adafactor", half=True, adafactor=True),
    Mode("bfloat16, Adafactor, fused backward pass", half=True, adafactor=True, fused=True),
)
BESIDE = (
    Mode("LoRA of rank 16, no checkpointing", "lora", checkpointing=False),
    Mode("LoRA of rank 16", "lora"),
    Mode("LoRA of rank 16, text encoder too", "lora and text"),
    Mode("ControlNet (canny)", "control"),
)


@dataclass(frozen=True)
class Held:
    """Bytes: of all weights, of gradients, of optimizer state, and the most that was held at once."""

    weights: int
    gradients: int
    states: int
    peak: int

    @property
    def rest(self) -> int:
        """Bytes of the peak that are none of the other three: activations, and gradients that come and go."""
        return self.peak - self.weights - self.gradients - self.states


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}

    def add(self, tensors: Iterable[Any]) -> None:
        """Count the storages of tensors that are not counted yet."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._known:
                    size = storage.nbytes()
                    self._known[key] = weakref.ref(storage, lambda _, key=key, size=size: self._gone(key, size))
                    self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        self.now -= size
        self._known.pop(key, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(tree_leaves(result))
        return result


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def parameter_count(module: nn.Module) -> int:
    """Return the number of values of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


class Training:
    """One way of training one structure: its modules, its optimizer, and one update."""

    def __init__(self, config: CascadeConfig, mode: Mode, text: dict[str, Any], *, batch: int, side: int) -> None:
        self.config, self.mode, self.batch, self.side = config, mode, batch, side
        trains_stage = mode.trained == "stage"
        with _default(torch.bfloat16 if mode.half or not trains_stage else torch.float32):
            self.stage = CascadeUNet(config)
        self.stage.train(trains_stage).requires_grad_(trains_stage)
        self.text: Any = None
        self.beside: Any = self.stage
        if mode.trained == "lora and text":
            with _default(torch.bfloat16):
                self.text = make_projected_text_encoder(text).requires_grad_(False)  # noqa: FBT003
        if mode.trained.startswith("lora"):
            self.beside = self._lora()
        if mode.trained == "control":
            blocks = default_control_blocks(config.residual_blocks)
            self.beside = CascadeControlNet(ControlNetConfig("effnet", 1, config.c_hidden[0], blocks, effnet=_CANNY))
        if mode.checkpointing:
            encoders = () if self.text is None else (self.text,)
            enable_gradient_checkpointing(self.stage, encoders, preserve_rng_state=False)
        self.parameters = [parameter for parameter in self.beside.parameters() if parameter.requires_grad]
        self.optimizer = _optimizer(self.parameters, mode)
        self.fused = _fused(self.optimizer) if mode.fused else None

    def _lora(self) -> nn.Module:
        import networks.lora

        network = networks.lora.create_network(1.0, self.mode.rank, 1.0, None, self.text, self.stage)
        network.apply_to(self.text, self.stage, self.text is not None, True)
        network.requires_grad_(True)  # noqa: FBT003
        return network

    def modules(self) -> list[nn.Module]:
        """Return everything that has weights."""
        return [module for module in dict.fromkeys((self.stage, self.text, self.beside)) if module is not None]

    def update(self) -> None:
        """Make forward pass, backward pass and step."""
        config, batch = self.config, self.batch
        side = self.side // DOWNSCALE[config.stage]
        latents = torch.randn(batch, config.channels, side, side)
        with torch.autocast("cpu", torch.bfloat16):
            prediction = self.stage(latents, torch.rand(batch), self._inputs(), control=self._control())
        loss = (prediction.float() - latents).square().mean()
        loss.backward()
        if self.fused is None:
            self.optimizer.step()

    def _inputs(self) -> StageInputs:
        config, batch = self.config, self.batch
        if config.stage == "b":
            small = torch.randn(batch, config.c_effnet or 0, self.side // 42, self.side // 42)
            return StageInputs(torch.randn(batch, config.c_pooled), effnet=small)
        if self.text is None:
            return StageInputs(torch.randn(batch, config.c_pooled), torch.randn(batch, 77, config.c_text or 0))
        states = self.text(torch.full((batch, 77), END_ID))
        return StageInputs(states.pooled, states.hidden)

    def _control(self) -> Any:
        if self.mode.trained != "control":
            return None
        return self.beside(torch.rand(self.batch, 1, self.side, self.side))

    def held(self, live: Live) -> Held:
        """Make an update with all optimizer state in place, and count."""
        weights = {
            id(tensor): tensor for module in self.modules() for tensor in (*module.parameters(), *module.buffers())
        }
        live.add(weights.values())
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        live.peak = live.now
        self.update()
        gradients = size_of(parameter.grad for parameter in self.parameters if parameter.grad is not None)
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        kept = size_of(value for value in states if isinstance(value, Tensor))
        return Held(size_of(weights.values()), gradients, kept, live.peak)


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """Make modules in a type, as those without memory cannot be converted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


_CANNY = replace(EffNetConfig(), c_in=1)


def _optimizer(parameters: list[nn.Parameter], mode: Mode) -> torch.optim.Optimizer:
    if mode.adafactor:
        from transformers.optimization import Adafactor

        return Adafactor(parameters, lr=1e-5, relative_step=False, scale_parameter=False, warmup_init=False)
    return torch.optim.AdamW(parameters, lr=1e-5, fused=True)


def _fused(optimizer: torch.optim.Optimizer) -> Any:
    from library.training.fused_backward import FusedBackward

    row = SimpleNamespace(steps_one_parameter=True, is_adafactor=True, import_path="Adafactor")
    fused = FusedBackward(SimpleNamespace(optimizer=optimizer, row=row), 1.0)  # type: ignore[arg-type]
    fused.attach()
    return fused


def measure(
    config: CascadeConfig,
    mode: Mode,
    *,
    batch: int = 1,
    side: int | None = None,
    text: dict[str, Any] | None = None,
    fake: bool = True,
) -> Held:
    """Count what an update holds; with `fake` false, of real tensors."""
    with FakeTensorMode() if fake else nullcontext(), Live() as live:
        training = Training(config, mode, text or BIG_G, batch=batch, side=side or PIXELS[config.stage])
        return training.held(live)


def rows(batch: int) -> list[dict[str, Any]]:
    """Return the table."""
    made = []
    for (stage, version), config in CONFIGS.items():
        for mode in (*FULL, *BESIDE) if stage == "c" else FULL[1:]:
            held = measure(config, mode, batch=batch)
            further = mode in (FULL[0], FULL[-1], *BESIDE[:2])
            more = measure(config, mode, batch=batch + 1) if further else None
            made.append(
                {
                    "stage": stage.upper(),
                    "version": version,
                    "trains": mode.name,
                    "weights": held.weights / GB,
                    "gradients": held.gradients / GB,
                    "optimizer": held.states / GB,
                    "rest": held.rest / GB,
                    "peak": held.peak / GB,
                    "each further picture": (more.peak - held.peak) / GB if more else None,
                }
            )
            print(made[-1], file=sys.stderr, flush=True)
    return made


def parts() -> list[dict[str, Any]]:
    """Return the numbers of values of everything, and its bytes in both types."""
    with torch.device("meta"):
        modules = {
            f"stage {stage.upper()} {version}": CascadeUNet(config) for (stage, version), config in CONFIGS.items()
        }
        modules |= {"text encoder": make_projected_text_encoder(BIG_G), "EfficientNet": EffNetEncoder(EffNetConfig())}
    return [
        {
            "part": name,
            "values": parameter_count(module),
            "float32": 4 * parameter_count(module) / GB,
            "bfloat16": 2 * parameter_count(module) / GB,
        }
        for name, module in modules.items()
    ]


def main() -> None:
    """Count everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--output")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for row in parts():
        print(row)
    report("cascade_memory", rows(chosen.batch), chosen.output)


if __name__ == "__main__":
    main()
