"""Names, shapes and order of the tensors of LoRA networks equal those of the files that every program reads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.compat

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
LOWEST = Path(os.environ.get("SD_LOWSET") or ROOT / ".lowset")
LISTS = {"sd15": "sd15", "sd15_conv": "sd15_conv", "sd21": "sd21", "sd15 lora_fa": "sd15"}


@pytest.fixture(scope="module", params=["newest", "oldest"])
def listed(request, tmp_path_factory):
    """Names and shapes of the networks on full-size models, with the newest or the oldest supported libraries."""
    libraries = LOWEST if request.param == "oldest" else None
    if libraries is not None and not libraries.is_dir():
        pytest.skip(f"the oldest supported libraries are not at {libraries} (SD_LOWSET names their folder)")
    target = tmp_path_factory.mktemp("names") / "names.json"
    script = ROOT / "tests" / "compat" / "list_lora_names.py"
    paths = os.pathsep.join(str(path) for path in (libraries, ROOT) if path is not None)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    command = [sys.executable, str(script), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(target.read_text())


@pytest.mark.parametrize("case", LISTS)
def test_names_and_shapes_are_those_of_the_list(listed, case):
    wanted = json.loads((GOLDEN / f"lora_keys_{LISTS[case]}.json").read_text())
    assert listed[case] == wanted
    assert list(listed[case]) == list(wanted)
