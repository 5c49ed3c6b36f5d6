"""The commands of the guides to LoRA run, one after the other, on a tiny model and photographs that come along.

They run as written but for their size: one update, small pictures.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from library.checkpoints.lora_file import inspect_lora
from tests import guides
from tests.conftest import PHOTOS
from tests.guides import DOCS, TRAINING

GUIDE, TOOLS = DOCS / "train_network.md", DOCS / "lora_tools.md"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_sd1) -> Path:
    """A folder as the guides take it for granted: a model, pictures, prompts, and the files that they show."""
    folder = tmp_path_factory.mktemp("guides")
    shutil.copy(tiny_sd1, folder / "model.safetensors")
    for name, source in (("5_sks dog", "duck"), ("1_other dogs", "bear")):
        (folder / "photos" / name).mkdir(parents=True)
        for path in sorted((PHOTOS / source).glob("0[01].*")):
            shutil.copy(path, folder / "photos" / name)
    (folder / "prompts.txt").write_text("a photo of sks dog --w 64 --h 64 --s 2", encoding="utf-8")
    guides.write_files(GUIDE, folder)
    return folder


def test_commands_work_and_diffusers_draws_with_what_they_made(workplace, monkeypatch, capfd):
    """Training, then the tools on what training made, then the lines for diffusers."""
    pytest.importorskip("lycoris")
    monkeypatch.chdir(workplace)
    made = [line for line in guides.ours(GUIDE) if "train_network.py" in line]
    assert len(made) > 15
    for line in made:
        # A resumed run must have something left to do.
        steps = 2 if "--resume=" in line else 1
        assert guides.run(line, *TRAINING, f"--max_train_steps={steps}") == 0, f"{line}\n{capfd.readouterr().err}"
    assert inspect_lora("trained/with_text.safetensors").has_text_encoder
    used = [line for line in guides.ours(TOOLS) if line.startswith("python ")]
    assert len(used) > 12
    for line in used:
        assert guides.run(line) == 0, f"{line}\n{capfd.readouterr().err}"
    draw()


def draw() -> None:
    pytest.importorskip("peft")
    assert guides.run("python tools/convert_diffusers20_original_sd.py model.safetensors model_folder") == 0
    (code,) = guides.blocks(GUIDE, "python")
    exec(
        compile(code.replace("num_inference_steps=30", "num_inference_steps=1, width=64, height=64"), "guide", "exec"),
        {},
    )
    assert Path("dog.png").exists()
