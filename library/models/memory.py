"""What trades memory against time without changing results: checkpointing, compilation, memory formats."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.errors import UserError

logger = logging.getLogger(__name__)

_BACKEND_NAMES = {"tensort": "tensorrt"}
"""Names of `--dynamo_backend` that PyTorch spells differently."""

_RECOMPILE_LIMIT = 64
"""Blocks of all widths share one compiled function; the default of 8 variants would leave most of them uncompiled."""


def has_dropout(*modules: nn.Module) -> bool:
    """Tell whether any of `modules` contains a dropout layer that does something in training mode."""
    return any(
        isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0
        for module in modules
        for layer in module.modules()
    )


def enable_gradient_checkpointing(
    denoiser: nn.Module,
    text_encoders: tuple[nn.Module, ...] = (),
    *,
    preserve_rng_state: bool | None = None,
    offload: bool = False,
) -> None:
    """Recompute the activations of every block in the backward pass.

    Args:
        denoiser: a diffusers model.
        text_encoders: encoders of `library.models.clip_text`.
        preserve_rng_state: draw the same random numbers again when recomputing, which dropout needs and which costs
            time otherwise. None: if the modules contain a dropout that is on. Adapters with a dropout of their own
            pass True.
        offload: keep what the denoiser's blocks start from in main memory until the backward pass.
    """
    if preserve_rng_state is None:
        preserve_rng_state = has_dropout(denoiser, *text_encoders)

    pinned = torch.cuda.is_available()

    def run(block: Any, *inputs: Tensor) -> Any:
        function = block.__call__ if isinstance(block, nn.Module) else block
        with torch.autograd.graph.save_on_cpu(pin_memory=pinned) if offload else nullcontext():
            return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=preserve_rng_state)

    denoiser.enable_gradient_checkpointing(run)  # type: ignore[operator]
    for encoder in text_encoders:
        encoder.enable_gradient_checkpointing(preserve_rng_state=preserve_rng_state)  # type: ignore[operator]


def store_in_float8(module: nn.Module) -> None:
    """Keep the weights of linear layers and convolutions in 8 bits (e4m3fn); autocast brings them back for each use.

    Norms, biases and embeddings stay as they are: they are small, and 3 bits of mantissa would hurt them most.

    Raises:
        UserError: the device of the weights cannot convert such numbers.
    """
    layers: list[Any] = [layer for layer in module.modules() if type(layer) in (nn.Linear, nn.Conv2d)]
    for device in {layer.weight.device for layer in layers}:
        try:
            torch.ones(1, device=device).to(torch.float8_e4m3fn).to(torch.bfloat16)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            what = f"weights of 8 bits cannot be used on this device, {device.type} ({str(error).splitlines()[0]})"
            raise UserError(what, "Leave the option out.", where="--fp8_base") from error
    for layer in layers:
        layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)


def compile_blocks(denoiser: nn.Module, backend: str) -> None:
    """Compile the blocks that a diffusers model repeats, one graph for all picture sizes.

    Call it when adapters are attached and before the model is wrapped. Compilation itself happens at the first step;
    recompilations are logged by PyTorch (`TORCH_LOGS=recompiles`).
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _RECOMPILE_LIMIT)
    denoiser.compile_repeated_blocks(backend=_BACKEND_NAMES.get(backend, backend), dynamic=True)  # type: ignore[operator]


def use_channels_last(denoiser: nn.Module) -> None:
    """Lay convolution weights out channels last, which convolutions in half precision on CUDA want."""
    denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def give_back_memory(device: torch.device, *, keep: bool) -> None:
    """Return GPU memory that nothing uses any more to the system, unless PyTorch may `keep` it for the next phase."""
    if device.type == "cuda" and not keep:
        torch.cuda.empty_cache()


def allow_tf32(enabled: bool) -> None:
    """Let matrix products and convolutions in float32 use TensorFloat-32 on GPUs that have it."""
    torch.backends.cuda.matmul.allow_tf32 = enabled
    torch.backends.cudnn.allow_tf32 = enabled
