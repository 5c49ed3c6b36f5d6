"""Small checkpoints with the structure of real ones: every width divided by 32, names from the golden lists."""

import json
from pathlib import Path

import pytest
import torch

from library.contracts import FamilySpec

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
VERSIONS = {"sd1": "sd15", "sd2": "sd21"}
OPTIONAL = ("position_ids", "betas", "alphas_cumprod", "resblocks.23.", "text_projection", "logit_scale")


def small_shape(shape):
    return [d if d < 64 or d in (77, 1000) else d // 32 for d in shape]


def file_tensors_of(family, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, row in json.loads((GOLDEN / f"ckpt_keys_{VERSIONS[family]}.json").read_text()).items():
        if row.get("optional") and not any(part in name for part in OPTIONAL):
            continue
        if row.get("dtype") == "int64":
            tensors[name] = torch.arange(77)[None]
        else:
            tensors[name] = torch.randn(small_shape(row["shape"]), generator=generator)
    return tensors


@pytest.fixture(scope="session")
def small_file():
    """Return a function: family -> tensors of a single-file checkpoint (do not change them)."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = file_tensors_of(family)
        return made[family]

    return make


@pytest.fixture(scope="session")
def spec_of():
    def make(family, prediction_type="epsilon"):
        size = 768 if (family, prediction_type) == ("sd2", "v_prediction") else 512
        return FamilySpec(
            name=family,
            prediction_type=prediction_type,
            tokenizers=(),
            architecture="stable-diffusion-v1" if family == "sd1" else "stable-diffusion-v2-512",
            default_resolution_wh=(size, size),
        )

    return make


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SD_FINETUNE_CACHE", str(tmp_path / "cache-of-this-test"))
