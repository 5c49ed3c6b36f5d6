"""The Stable Diffusion families as the data side and the option checks see them, before any model is loaded."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

from library.contracts import END_ID, FamilySpec, TokenizerSpec
from library.errors import UserError

if TYPE_CHECKING:
    from library.models.options import ModelOptions

logger = logging.getLogger(__name__)

EPSILON = "epsilon"
V_PREDICTION = "v_prediction"

SD_V1_TOKENIZER = TokenizerSpec("sd_v1", pad_id=END_ID)
SD_V2_TOKENIZER = TokenizerSpec("sd_v2", pad_id=0, pad_text="!")

_TEXTS = "_sd_te_outputs"
"""Apart from `_te_outputs` of SDXL, whose first array has the shape of SD 1.x but other values."""

SD1 = FamilySpec(
    name="sd1",
    prediction_type=EPSILON,
    tokenizers=(SD_V1_TOKENIZER,),
    base_model_version="sd_v1",
    architecture="stable-diffusion-v1",
    text_cache_suffix=_TEXTS,
)
SD1_V = FamilySpec(
    name="sd1",
    prediction_type=V_PREDICTION,
    tokenizers=(SD_V1_TOKENIZER,),
    base_model_version="sd_v1_v",
    architecture="stable-diffusion-v1",
    text_cache_suffix=_TEXTS,
)
SD2 = FamilySpec(
    name="sd2",
    prediction_type=EPSILON,
    tokenizers=(SD_V2_TOKENIZER,),
    base_model_version="sd_v2",
    architecture="stable-diffusion-v2-512",
    text_cache_suffix=_TEXTS,
)
SD2_V = FamilySpec(
    name="sd2",
    prediction_type=V_PREDICTION,
    tokenizers=(SD_V2_TOKENIZER,),
    base_model_version="sd_v2_v",
    architecture="stable-diffusion-v2-768-v",
    text_cache_suffix=_TEXTS,
    default_resolution_wh=(768, 768),
)

_SPECS = {(spec.name, spec.prediction_type): spec for spec in (SD1, SD1_V, SD2, SD2_V)}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_OPTION = "--pretrained_model_name_or_path"


def stable_diffusion_family(name: str, *, v_prediction: bool = False) -> FamilySpec:
    """Return the specification of `sd1` or `sd2` with the given prediction."""
    return _SPECS[name, V_PREDICTION if v_prediction else EPSILON]


def stable_diffusion_spec(model: ModelOptions) -> FamilySpec:
    """Return the family that the options name, after checking it against the header of a local model.

    A name that is no path but looks like `owner/name` is taken for a hub id, which can only be checked when it is
    loaded.

    Raises:
        UserError: no such model, or it is not what the options say; the message names the flag or script to use.
    """
    spec = stable_diffusion_family("sd2" if model.v2 else "sd1", v_prediction=model.v_parameterization)
    name = model.pretrained_model_name_or_path
    if not name:  # a report on the data needs none, and the option checks see to the rest
        return spec
    path = Path(name).expanduser()
    if path.exists():
        from library.checkpoints.detect import inspect
        from library.checkpoints.load import require_family

        info = inspect(path)
        require_family(info, spec.name, replaced=("VAE",) if model.vae else ())
        check_prediction(spec, info.prediction_type, str(path))
        _compare_with_guess(spec, info.prediction_hint, str(path))
        return spec
    from library.checkpoints.hub import near_names

    if not _HUB_ID.fullmatch(name):
        raise UserError("no such file or folder", near_names(path), where=f"{_OPTION} {name}")
    near = near_names(path)
    if near.startswith("Did you mean"):
        logger.info("%s: no such path here, so it is taken for a hub id. %s", name, near)
    return spec


def check_prediction(spec: FamilySpec, prediction_type: str | None, where: str) -> None:
    """Refuse a model that says it predicts something else than `spec`; None says nothing.

    Raises:
        UserError: the flag `--v_parameterization` contradicts the model.
    """
    if prediction_type is None or prediction_type == spec.prediction_type:
        return
    if prediction_type == V_PREDICTION:
        raise UserError("this model predicts velocity (v-prediction)", "Add --v_parameterization.", where=where)
    raise UserError(
        "this model predicts noise (epsilon), not velocity",
        "Remove --v_parameterization. To teach it velocity on purpose, change the prediction_type that its "
        "scheduler_config.json or its metadata states.",
        where=where,
    )


def _compare_with_guess(spec: FamilySpec, guess: str | None, where: str) -> None:
    if guess is not None and guess != spec.prediction_type:
        advice = "--v_parameterization is missing" if guess == V_PREDICTION else "--v_parameterization may be wrong"
        logger.warning("%s: judging by its weights this model predicts %s: %s", where, guess, advice)
