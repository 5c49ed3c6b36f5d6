"""The commands of the guides to LoRA run, one after the other, on a tiny model and photographs that come along.

They run as written but for their size: one update, small pictures.
"""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest

from library.checkpoints.lora_file import inspect_lora
from tests.conftest import PHOTOS, ROOT
from tests.support import train_network

SMALL = ("--resolution=64", "--min_bucket_reso=64", "--max_bucket_reso=128", "--max_data_loader_n_workers=0")
TRAINING, TOOLS = ROOT / "docs" / "train_network.md", ROOT / "docs" / "lora_tools.md"


def blocks(guide: Path, language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", guide.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [content for kind, content in fences if kind == language]


def commands(guide: Path) -> list[str]:
    return [line for block in blocks(guide, "bash") for line in block.splitlines()]


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
    for block in blocks(TRAINING, "toml"):
        name = "data.toml" if "[[datasets]]" in block else "lora.toml"
        small = block.replace("= 512", "= 64\nmin_bucket_reso = 64")
        (folder / name).write_text(small, encoding="utf-8")
    return folder


def train(line: str) -> int:
    words = shlex.split(line)
    words = words[words.index("train_network.py") + 1 :]
    # A resumed run must have something left to do.
    steps = 2 if any(word.startswith("--resume=") for word in words) else 1
    return train_network(*words, f"--max_train_steps={steps}", *SMALL)


def run_tool(line: str) -> int:
    _, script, *words = shlex.split(line)
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with pytest.raises(SystemExit) as end:
        module.main(words)
    return int(end.value.code or 0)


def test_commands_work_and_diffusers_draws_with_what_they_made(workplace, monkeypatch, capfd):
    """Training, then the tools on what training made, then the lines for diffusers."""
    pytest.importorskip("lycoris")
    monkeypatch.chdir(workplace)
    made = [line for line in commands(TRAINING) if "train_network.py" in line]
    assert len(made) > 15
    for line in made:
        assert train(line) == 0, f"{line}\n{capfd.readouterr().err}"
    assert inspect_lora("trained/with_text.safetensors").has_text_encoder
    used = [line for line in commands(TOOLS) if line.startswith("python ")]
    assert len(used) > 12
    for line in used:
        assert run_tool(line) == 0, f"{line}\n{capfd.readouterr().err}"
    draw()


def draw() -> None:
    pytest.importorskip("peft")
    assert run_tool("python tools/convert_diffusers20_original_sd.py model.safetensors model_folder") == 0
    (code,) = blocks(TRAINING, "python")
    exec(
        compile(code.replace("num_inference_steps=30", "num_inference_steps=1, width=64, height=64"), "guide", "exec"),
        {},
    )
    assert Path("dog.png").exists()
