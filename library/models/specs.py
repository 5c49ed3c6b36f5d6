"""The Stable Diffusion families as the data side and the option checks see them, before any model is loaded."""

from __future__ import annotations

from library.contracts import FamilySpec, TokenizerSpec

EPSILON = "epsilon"
V_PREDICTION = "v_prediction"

SD_V1_TOKENIZER = TokenizerSpec("sd_v1", pad_id=49407)
SD_V2_TOKENIZER = TokenizerSpec("sd_v2", pad_id=0, pad_text="!")

SD1 = FamilySpec(
    name="sd1",
    prediction_type=EPSILON,
    tokenizers=(SD_V1_TOKENIZER,),
    base_model_version="sd_v1",
    architecture="stable-diffusion-v1",
)
SD1_V = FamilySpec(
    name="sd1",
    prediction_type=V_PREDICTION,
    tokenizers=(SD_V1_TOKENIZER,),
    base_model_version="sd_v1_v",
    architecture="stable-diffusion-v1",
)
SD2 = FamilySpec(
    name="sd2",
    prediction_type=EPSILON,
    tokenizers=(SD_V2_TOKENIZER,),
    base_model_version="sd_v2",
    architecture="stable-diffusion-v2-512",
)
SD2_V = FamilySpec(
    name="sd2",
    prediction_type=V_PREDICTION,
    tokenizers=(SD_V2_TOKENIZER,),
    base_model_version="sd_v2_v",
    architecture="stable-diffusion-v2-768-v",
    default_resolution_wh=(768, 768),
)
