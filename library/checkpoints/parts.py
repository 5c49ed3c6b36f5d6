"""What loading gives and saving takes: state dicts in memory names, their configurations, and where they came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """What a save needs to know of the model that training started from; it never reads the source again.

    Attributes:
        name: as the user gave it.
        path: the file or folder that was read.
        kind: ``safetensors``, ``ckpt`` or ``diffusers``: the default kind of saved models.
        carried: tensors that no part uses (schedule buffers, layer 23 of SD2, position ids), by their names in the
            file; those of a folder have the component in front.
        counters: ``epoch`` and ``global_step`` of a pickled source, which saved ones continue.
        metadata: strings in the header of a safetensors source.
        files: small files of a Diffusers source (scheduler, tokenizer, configurations) by path inside the folder.
        prediction_type: what the source says about itself, or None.
    """

    name: str
    path: Path
    kind: str
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    counters: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    prediction_type: str | None = None


@dataclass(frozen=True, slots=True)
class ModelParts:
    """The three parts of SD1 or SD2: tensors by memory name, and the arguments of the classes that hold them."""

    unet: Mapping[str, Tensor]
    unet_config: Mapping[str, Any]
    text: Mapping[str, Tensor]
    text_config: Mapping[str, Any]
    vae: Mapping[str, Tensor]
    vae_config: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LoadedParts(ModelParts):
    """Parts as they were read; tensors are views of mapped files. Copy what must not change with the file."""

    source: SourceInfo


@dataclass(frozen=True, slots=True)
class SaveSettings:
    """How a checkpoint is written.

    Attributes:
        precision: dtype of all floating point tensors; None keeps the dtypes in memory (and in the source).
        metadata: strings for the header of a single safetensors file; other kinds hold none.
        epoch: epochs trained, stored in ``.ckpt`` files (plus those of the source).
        step: updates trained, alike.
        zero_terminal_snr: the schedule was rescaled; the scheduler of a Diffusers folder says so.
        allow_nan: write NaN and infinity instead of refusing.
        progress: called with numbers of bytes as they are written.
    """

    precision: torch.dtype | None = None
    metadata: Mapping[str, str] | None = None
    epoch: int = 0
    step: int = 0
    zero_terminal_snr: bool = False
    allow_nan: bool = False
    progress: Callable[[int], object] | None = None
