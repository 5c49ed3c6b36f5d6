"""The model that draws: found by name, recognised by its contents, loaded for use and not for training."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.errors import UserError
from library.models.options import MemoryOptions, ModelOptions, TextOptions
from library.models.specs import EPSILON, V_PREDICTION, check_prediction, stable_diffusion_family

if TYPE_CHECKING:
    from library.checkpoints.detect import CheckpointInfo
    from library.contracts import FamilySpec
    from library.inference.option_set import GenerationOptions
    from library.inference.options import CheckpointOptions, SpeedOptions
    from library.models.sd import StableDiffusion

logger = logging.getLogger(__name__)

_OPTION = "--ckpt"
_PATTERN = re.compile(r"[*?\[]")
_SHOWN = 5


def find_checkpoint(name: str) -> Path:
    """Return the file or folder that `--ckpt` means: a path, the one match of a pattern, or a model of the hub.

    Raises:
        UserError: nothing is there, or a pattern fits no file or several.
    """
    from library.checkpoints.hub import resolve_model

    if _PATTERN.search(name) and not Path(name).expanduser().exists():
        found = sorted(glob.glob(str(Path(name).expanduser()), recursive=True))  # noqa: PTH207 - any kind of path
        if len(found) != 1:
            listed = ", ".join(found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
            what = f"fits {len(found)} files ({listed})" if found else "fits no file"
            raise UserError(what, "Give a pattern that fits exactly one file.", where=f"{_OPTION} {name}")
        logger.info("%s %s: %s", _OPTION, name, found[0])
        name = found[0]
    return resolve_model(name, _OPTION)


def recognise(path: Path, options: CheckpointOptions) -> FamilySpec:
    """Return what kind of model lies at `path`, by its names and shapes.

    Raises:
        UserError: it is none that can be drawn with, or a flag says otherwise.
    """
    from library.checkpoints.detect import inspect

    info = inspect(path)
    _refuse_others(info, options)
    v_prediction = options.v_parameterization
    declared = info.prediction_type
    if declared is not None:
        if v_prediction:
            check_prediction(stable_diffusion_family(info.family, v_prediction=True), declared, str(path))
        v_prediction = declared == V_PREDICTION
    elif not v_prediction and info.prediction_hint == V_PREDICTION:
        logger.info("%s: judging by its weights it predicts velocity (--v_parameterization)", path)
        v_prediction = True
    spec = stable_diffusion_family(info.family, v_prediction=v_prediction)
    kind = "noise" if spec.prediction_type == EPSILON else "velocity"
    logger.info("%s: %s, predicts %s", path, info.label, kind)
    return spec


def _refuse_others(info: CheckpointInfo, options: CheckpointOptions) -> None:
    where = str(info.path)
    if info.family not in ("sd1", "sd2"):
        hints = {
            "sdxl": "SDXL models come with a later release.",
            "lora": "Give the base model here, and the network with --network_weights.",
            "embedding": "Give the base model here, and the embedding with --textual_inversion_embeddings.",
            "controlnet": "Give the base model here, and the ControlNet with --control_net_models.",
            "vae": "Give the base model here, and the VAE with --vae.",
        }
        hint = hints.get(info.family, "Give a Stable Diffusion 1.x or 2.x model.")
        raise UserError(f"looks like {info.label}", hint, where=where)
    contradicted = (
        "v1" if options.v1 and info.family == "sd2" else "v2" if options.v2 and info.family == "sd1" else None
    )
    if contradicted:
        raise UserError(
            f"looks like {info.label}, not what --{contradicted} says", f"Remove --{contradicted}.", where=where
        )
    missing = [part for part in info.missing if not (part == "VAE" and options.vae)]
    if missing:
        hint = "Give one with --vae." if missing == ["VAE"] else "Give a complete checkpoint."
        raise UserError(f"has no {' and no '.join(missing)}", hint, where=where)
    if info.in_channels not in (None, 4):
        what = f"its U-Net takes {info.in_channels} channels ({info.label}), not 4"
        raise UserError(what, "Give the plain model; --mask_path inpaints with it.", where=where)


def choose_device() -> torch.device:
    """Return the accelerator of this machine, or its CPU."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.device("cpu")


def report_device(device: torch.device, dtype: torch.dtype) -> None:
    """Say when no GPU is used: one that PyTorch does not see would show in the speed only."""
    if device.type != "cpu":
        return
    logger.info("drawing without GPU")
    if dtype == torch.float16:
        logger.warning("--fp16: no GPU is used, and processors are slow in float16")


def precision(options: SpeedOptions) -> torch.dtype:
    """Return the number format to calculate in."""
    if options.fp16:
        return torch.float16
    return torch.bfloat16 if options.bf16 else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> Callable[[], AbstractContextManager[None]]:
    """Return what makes the context in which encoders and denoiser run, as in training with mixed precision."""
    return nullcontext if dtype == torch.float32 else partial(torch.autocast, device.type, dtype=dtype)


def load_family(opts: GenerationOptions, path: Path, spec: FamilySpec, device: torch.device) -> StableDiffusion:
    """Load the model.

    Args:
        opts: of the script.
        path: from `find_checkpoint`.
        spec: from `recognise`.
        device: where it shall run.

    Raises:
        UserError: it cannot be read.
    """
    from library.models.family import WeightPlan
    from library.models.memory import use_channels_last
    from library.models.sd import StableDiffusion

    dtype = precision(opts.speed)
    vae_dtype = torch.float32 if opts.speed.no_half_vae else dtype
    model = ModelOptions(
        pretrained_model_name_or_path=str(path),
        v2=spec.name == "sd2",
        v_parameterization=spec.prediction_type == V_PREDICTION,
        vae=opts.model.vae,
    )
    xformers = opts.speed.xformers or opts.speed.diffusers_xformers
    family = StableDiffusion.load(
        model,
        TextOptions(clip_skip=opts.text.clip_skip),
        MemoryOptions(xformers=xformers, sdpa=opts.speed.sdpa),
        spec=spec,
        weights=WeightPlan(device, trained=(), frozen_dtype=dtype, vae_dtype=vae_dtype),
    )
    if opts.speed.opt_channels_last:
        use_channels_last(family.unet)
    return family
