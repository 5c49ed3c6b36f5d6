"""Captioners write the same with the newest and the oldest supported transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.caption_models import make_blip, make_git, make_original_blip, make_pictures

pytestmark = pytest.mark.compat

ROOT = Path(__file__).resolve().parents[2]
LOWEST = Path(os.environ.get("SD_LOWSET") or ROOT / ".lowset")
CHILD = "import json, sys; from tests.compat.test_captioners import caption; caption(*json.loads(sys.argv[1]))"


def caption(blip: str, original: str, git: str, folders: list[str]) -> None:
    """Run the captioners in three ways, each in a folder of its own."""
    from finetune import make_captions, make_captions_by_git
    from library.cli import run_script

    common = ["--max_length=20", "--batch_size=2"]
    beams = ["--caption_weights", original, "--beam_search", "--num_beams=2"]
    ways = [
        (make_captions, ["--local_model", blip]),
        (make_captions, beams),
        (make_captions_by_git, ["--model_id", git]),
    ]
    for (script, options), folder in zip(ways, folders, strict=True):
        assert run_script(script.Options, script.make_captions, [*options, *common, folder]) == 0


def texts(folders: list[Path]) -> list[str]:
    return [path.read_text(encoding="utf-8") for folder in folders for path in sorted(folder.glob("*.caption"))]


def test_old_and_new_libraries_agree(tmp_path, one_torch_thread):
    if not LOWEST.is_dir():
        pytest.skip(f"the oldest supported libraries are not at {LOWEST} (SD_LOWSET names their folder)")
    blip = make_blip(tmp_path / "blip")
    models = [str(blip), str(make_original_blip(tmp_path / "original", blip)), str(make_git(tmp_path / "git"))]
    new, old = ([make_pictures(tmp_path / which / str(index), 3) for index in range(3)] for which in ("new", "old"))
    caption(*models, [str(folder) for folder in new])
    arguments = json.dumps([*models, [str(folder) for folder in old]])
    environment = {**os.environ, "PYTHONPATH": str(LOWEST)}
    command = [sys.executable, "-c", CHILD, arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(texts(new)) == 9
    assert texts(new) == texts(old)
