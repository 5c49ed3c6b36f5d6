"""docs/stable_cascade.md and examples/stable_cascade do what they say, on tiny models and photographs."""

from __future__ import annotations

import importlib
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library import cascade_yaml
from library.checkpoints import cascade_configs
from library.checkpoints.lora_file import read_lora
from library.models.random_cascade import TINY_C
from library.option_parser import parse
from tests import guides
from tests.conftest import ROOT
from tests.guides import DOCS
from tests.support import tensor_digest

GUIDE = DOCS / "stable_cascade.md"
EXAMPLES = ROOT / "examples" / "stable_cascade"
SCRIPTS = {
    "stage_c": "stable_cascade_train_stage_c",
    "stage_b": "stable_cascade_train_stage_b",
    "lora": "stable_cascade_train_c_network",
    "controlnet": "stable_cascade_train_c_control_net",
    "inference": "stable_cascade_gen_img",
}


@pytest.fixture
def models(tmp_path, tiny_cascade, monkeypatch) -> Path:
    """Models where guide and examples have them; the working folder."""
    monkeypatch.chdir(tmp_path)
    guides.cascade_models(tmp_path / "models", tiny_cascade)
    return tmp_path


@pytest.fixture
def place(models, monkeypatch) -> Path:
    """Photographs where the guide has them."""
    guides.cascade_data(models)
    small = {**cascade_configs.CONFIGS, ("c", "1B"): replace(TINY_C, blocks_down=(1, 2), blocks_up=(2, 1))}
    monkeypatch.setattr("library.models.cascade.sources.CONFIGS", small)
    return models


def picture(folder: str) -> np.ndarray:
    """Return the levels of the only picture in a folder."""
    (path,) = Path(folder).glob("*.png")
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_the_guide_from_photographs_to_pictures(place):
    """All commands in their order: later ones use what earlier ones made."""
    guides.write_files(GUIDE, place)
    lines = [line for line in guides.commands(GUIDE) if line.startswith((guides.LAUNCHED, "python ", "tar "))]
    assert len(lines) > 30
    for line in lines:
        if line.startswith("tar "):
            subprocess.run(line.split(), check=True, timeout=60)
        elif "--num_processes" not in line:
            assert guides.run(line, *guides.cascade_size(line)) == 0, line

    trained, original = Path("trained"), "models/stage_c_bf16.safetensors"
    assert "duck_00" in (trained / "dataset_report.html").read_text(encoding="utf-8")
    assert tensor_digest(trained / "my_stage_c.safetensors") != tensor_digest(original)
    assert (trained / "with_text_text_model.safetensors").exists() and (trained / "zduck_zduck.safetensors").exists()
    assert (Path("output") / "stage_c_run" / "stage_c_run_ema.safetensors").exists()
    assert tensor_digest("stage_c_again.safetensors") == tensor_digest(trained / "my_stage_c.safetensors")
    assert len(list((trained / "sample").glob("*.png"))) == 2
    assert list(Path("photos/1_all").glob("*_sc_latents.npz")) and list(
        Path("photos/1_all").glob("*_sc_te_outputs.npz")
    )
    file = read_lora(Path("output") / "lora_run" / "lora_run.safetensors")
    assert all("_attention_attn_" in name for name in file.modules)
    assert read_lora("lora_official.safetensors").layout == "official"
    assert len(list(Path("pictures/small").glob("*.png"))) == 4
    drawn = [picture(f"pictures/{name}") for name in ("lora", "canny", "gold", "variation")]
    assert all(levels.std() > 1 for levels in drawn)
    assert all((one != other).any() for one, other in zip(drawn, drawn[1:], strict=False))


def test_the_guide_s_table_has_every_key():
    table = GUIDE.read_text(encoding="utf-8").partition("| key | option |")[2].partition("\n\n")[0]
    first = "".join(line.split("|")[1] for line in table.splitlines() if line.count("|") > 2)
    assert set(re.findall(r"`(\w+)`", first)) == cascade_yaml._keys("c").keys()


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.yaml")))
def test_every_key_of_an_example_is_accepted(models, name):
    script = next(script for start, script in SCRIPTS.items() if name.startswith(start))
    for folder in ("data", "cats", "other_cats"):
        (models / folder).mkdir()
    (models / "data" / "dataset.tar").touch()
    found = parse(importlib.import_module(script).Options, [str(EXAMPLES / name)])
    assert not [warning for warning in found.warnings if "key" in str(warning)]
