"""Folders that we save open in the newest and the oldest supported libraries, and show the same picture in both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from library.checkpoints.load import load_parts
from library.checkpoints.parts import SaveSettings
from library.checkpoints.save import save_checkpoint
from library.models.specs import stable_diffusion_family

pytestmark = pytest.mark.compat

CHILD = Path(__file__).with_name("load_saved_folder.py")
ROOT = CHILD.parents[2]
LOWEST = Path(os.environ.get("SD_LOWSET") or ROOT / ".lowset")
LIBRARIES = {"newest": None, "oldest": LOWEST}
CASES = {
    "sd1": ("sd1", False, "diffusers_safetensors"),
    "sd1 bin": ("sd1", False, "diffusers"),
    "sd2 velocity": ("sd2", True, "diffusers_safetensors"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_sd1, tiny_sd2):
    """For every case a folder saved from a single file, and a single file saved from that folder."""
    root = tmp_path_factory.mktemp("saved")
    made = {}
    for case, (family, velocity, kind) in CASES.items():
        parts = load_parts(str(tiny_sd1 if family == "sd1" else tiny_sd2), family)
        spec = stable_diffusion_family(family, v_prediction=velocity)
        settings = SaveSettings(zero_terminal_snr=velocity)
        folder = save_checkpoint(root / case, kind, parts, spec=spec, source=parts.source, settings=settings)
        single = root / f"{case}.safetensors"
        save_checkpoint(single, "safetensors", load_parts(str(folder), family), spec=spec)
        made[case] = str(folder), str(single)
    return made


@pytest.fixture(scope="module")
def opened(saved):
    """Return a function: libraries -> what a program with these libraries finds in each folder."""
    made = {}

    def make(libraries):
        if libraries not in made:
            made[libraries] = read_child(CHILD, saved, libraries=LIBRARIES[libraries])
        return made[libraries]

    return make


def read_child(script, *arguments, libraries):
    """Run a script with a set of libraries and return the JSON of its last line."""
    if libraries is not None and not libraries.is_dir():
        pytest.skip(f"the oldest supported libraries are not at {libraries} (SD_LOWSET names their folder)")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(libraries or "")}
    words = [item if isinstance(item, str) else json.dumps(item) for item in arguments]
    command = [sys.executable, str(script), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("libraries", LIBRARIES)
@pytest.mark.parametrize("case", CASES)
def test_a_saved_folder_opens(opened, case, libraries):
    found = opened(libraries)[case]
    assert found["missing"] == found["unexpected"] == []
    assert found["equal"], "the text encoder has the saved weights"
    family, velocity, _ = CASES[case]
    # "a photo of sks dog!" as the original tokenizers number it; "!" is the padding of SD2, also inside a text.
    pad, mark = (49407, 256) if family == "sd1" else (0, 0)
    assert found["ids"] == [49406, 320, 1125, 539, 48136, 1929, mark, 49407, *[pad] * 4]
    assert found["vocabulary"] == 49408
    assert found["prediction_type"] == ("v_prediction" if velocity else "epsilon")
    assert found["rescaled"] is velocity


@pytest.mark.parametrize("case", CASES)
def test_both_sets_of_libraries_draw_the_same_picture(opened, case):
    newest, oldest = opened("newest")[case], opened("oldest")[case]
    assert newest["picture"] == pytest.approx(oldest["picture"], abs=1e-4)


@pytest.mark.parametrize("libraries", LIBRARIES)
@pytest.mark.parametrize("case", CASES)
def test_a_single_file_draws_the_same_picture_as_its_folder(opened, case, libraries):
    found = opened(libraries)[case]
    assert found["picture of the single file"] == pytest.approx(found["picture"], abs=1e-4)
