"""LoRA files of ours, in every layout, do in diffusers and PEFT what they say: W + (alpha / rank) up @ down."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.checkpoints.lora_file import write_lora
from library.checkpoints.lora_names import module_names
from library.models.random_models import make_random_sd, random_parts
from tests.compat.test_saved_folders import LIBRARIES, ROOT, read_child
from tools.convert_lora import ConvertOptions, convert

pytestmark = pytest.mark.compat

CHILD = Path(__file__).with_name("load_lora_files.py")
LAYOUTS = ("kohya", "peft", "diffusers")
RANK, CONV_RANK, ALPHA = 4, 2, 1.0
TEXT_MODEL = "text_model."
PLACES = ("down_blocks.0.", "up_blocks.2.attentions.0", "mid_block.", "upsamplers", "encoder.layers")


def adapted(parts):
    """(name in files, name in `weights_of`, weight) of every layer that gets a LoRA, convolutions too."""
    for part, state in (("unet", parts.unet), ("text_encoder", parts.text)):
        paths = [key.removesuffix(".weight") for key, tensor in state.items() if tensor.dim() > 1]
        chosen = [path for path in paths if any(word in path for word in PLACES)]
        for name, path in module_names(chosen, part).items():
            yield name, f"{part}.{path.removeprefix(TEXT_MODEL)}", state[f"{path}.weight"]


def make_lora(parts, dora):
    """Tensors of a kohya file, and the weights that it leads to."""
    generator = torch.Generator().manual_seed(1)
    tensors, expected = {}, {}
    for name, place, weight in adapted(parts):
        if dora and weight.dim() != 2:
            continue
        rank = RANK if weight.dim() == 2 or weight.shape[2:] == (1, 1) else CONV_RANK
        down = torch.randn(rank, *weight.shape[1:], generator=generator) * 0.1
        up = torch.randn(weight.shape[0], rank, *[1] * (weight.dim() - 2), generator=generator) * 0.1
        merged = weight + ALPHA / rank * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        tensors |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(ALPHA),
        }
        if dora:
            magnitude = torch.rand(weight.shape[0], 1, generator=generator) + 0.5
            tensors[f"{name}.dora_scale"] = magnitude
            merged = magnitude * merged / merged.norm(dim=1, keepdim=True)
        expected[place] = merged
    return tensors, expected


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model, and by case a LoRA file and the weights it should lead to."""
    root = tmp_path_factory.mktemp("loras")
    folder = make_random_sd(root / "model", layout="diffusers_safetensors")
    parts = random_parts()
    files = {}
    for kind in ("lora", "dora"):
        tensors, expected = make_lora(parts, kind == "dora")
        source = write_lora(root / f"{kind}.safetensors", tensors, {"ss_base_model_version": "sd_v1"})
        save_file(
            {name: tensor.contiguous() for name, tensor in expected.items()}, root / f"{kind}-expected.safetensors"
        )
        for layout in LAYOUTS if kind == "lora" else ("peft",):
            case = layout if kind == "lora" else kind
            target = convert(ConvertOptions(src=str(source), dst=str(root / f"{case}.out.safetensors"), to=layout))
            files[case] = str(target), str(root / f"{kind}-expected.safetensors")
    return str(folder), files


@pytest.fixture(scope="module")
def loaded(made):
    """Return a function: libraries -> what a program with these libraries makes of each file."""
    results = {}

    def make(libraries):
        if libraries not in results:
            results[libraries] = read_child(CHILD, *made, libraries=LIBRARIES[libraries])
        return results[libraries]

    return make


@pytest.mark.parametrize("libraries", LIBRARIES)
@pytest.mark.parametrize("case", [*LAYOUTS, "dora"])
def test_fused_weights_are_what_the_file_says(loaded, libraries, case):
    found = loaded(libraries)[case]
    assert found["changed"] == found["expected"] > 50
    assert found["error"] < 1e-6


@pytest.mark.parametrize("libraries", LIBRARIES)
def test_peft_takes_the_tensors_and_the_settings(loaded, libraries):
    found = loaded(libraries)["in peft"]
    assert found["missing"] == found["unexpected"] == []
    assert found["error"] < 1e-6


def test_names_are_the_golden_ones_with_the_oldest_libraries():
    oldest = LIBRARIES["oldest"]
    if not oldest.is_dir():
        pytest.skip(f"the oldest supported libraries are not at {oldest} (SD_LOWSET names their folder)")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/unit/checkpoints/test_lora_names.py"]
    environment = {**os.environ, "PYTHONPATH": str(oldest)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
