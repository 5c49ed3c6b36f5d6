"""Whether the files of a Stable Cascade model are complete and belong together, judged before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.checkpoints import load_cascade
from library.errors import Problem, raise_problems
from library.models.assemble import check_fit
from library.models.cascade import sources
from library.models.cascade.options import CascadeModelOptions, StageCModelOptions
from library.models.cascade.text import make_projected_text_encoder
from library.models.cascade.unet import CascadeUNet
from library.models.cascade.vision import make_image_encoder

if TYPE_CHECKING:
    from library.checkpoints.cascade_configs import CascadeConfig

_TEXT, _IMAGE = "--text_model_checkpoint_path", "--image_model_checkpoint_path"


def check_file_fit(model: CascadeModelOptions) -> None:
    """Compare names and shapes in the files of stage and encoders with what they should be, and with each other.

    Files that are not on this machine are left to the loader.

    Raises:
        UserError: a file lacks tensors, or an encoder makes vectors of another size than the stage reads.
    """
    config = _stage_config(model)
    problems: list[Problem] = []
    complete: list[Callable[[], None]] = []
    if (path := _local(model.text_model_checkpoint_path)) is not None:
        text = load_cascade.load_text(path)
        what = f"text encoder in {path}"
        complete.append(partial(require_complete, make_projected_text_encoder, text.config, text.tensors, what))
        problems += _misfits(model.stage, config, text.config, f"{_TEXT} {path}")
    if isinstance(model, StageCModelOptions) and model.clip_image_cond_rate:
        path = _local(model.image_model_checkpoint_path)
        if path is not None:
            seen = load_cascade.load_vision(path)
            what = f"image encoder in {path}"
            complete.append(partial(require_complete, make_image_encoder, seen.config, seen.tensors, what))
            problems += _differs(config.c_image, seen.config["projection_dim"], "ViT-L/14", f"{_IMAGE} {path}")
    raise_problems(problems)
    for require in complete:
        require()


def open_complete_stage(path: str | Path, stage: str) -> load_cascade.LoadedPart[CascadeConfig]:
    """Open the file or folder of stage `c` or `b`, and refuse one that lacks tensors.

    Raises:
        UserError: it is damaged, another part, or incomplete.
    """
    opened = load_cascade.load_stage(path, stage)
    require_complete(CascadeUNet, opened.config, opened.tensors, f"stage {stage.upper()} in {path}")
    return opened


def _stage_config(model: CascadeModelOptions) -> CascadeConfig:
    path = _local(model.stage_path)
    if path is None:
        return sources.CONFIGS[model.stage, model.model_version or ""]  # type: ignore[index]
    return open_complete_stage(path, model.stage).config


def _local(name: str | None) -> Path | None:
    return Path(name) if name and Path(name).exists() else None


def check_text_fit(
    stage: str, config: CascadeConfig, text: load_cascade.LoadedPart[dict[str, Any]], name: str | None
) -> None:
    """Compare an opened text encoder with what it should be, and with stage `c` or `b`; messages give it a name.

    Raises:
        UserError: it lacks tensors, or makes vectors of another size than the stage reads.
    """
    where = str(text.path) if name is None else f"{_TEXT} {name}"
    raise_problems(list(_misfits(stage, config, text.config, where)))
    require_complete(make_projected_text_encoder, text.config, text.tensors, f"text encoder in {text.path}")


def require_complete(make: Callable[[Any], nn.Module], config: Any, tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse tensors that are not all those of the module that `make` makes, or of other shapes.

    Raises:
        UserError: naming the part by `what`.
    """
    with torch.device("meta"):
        check_fit(make(config), tensors, what)


def _misfits(stage: str, config: CascadeConfig, text: Mapping[str, Any], where: str) -> Iterator[Problem]:
    if stage == "c":
        yield from _differs(config.c_text, text["hidden_size"], "ViT-bigG/14", where)
    if stage == "b" or config.c_text == text["hidden_size"]:
        yield from _differs(config.c_pooled, text["projection_dim"], "ViT-bigG/14", where)


def _differs(wanted: int | None, found: int, usual: str, where: str) -> Iterator[Problem]:
    if wanted != found:
        hint = f"Give the encoder that the stage was trained with, which for the published ones is CLIP {usual}."
        yield Problem(where, f"makes vectors of {found} numbers, and the stage reads {wanted}", hint)
