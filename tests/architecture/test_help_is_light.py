"""`--help` and errors in options must not wait for torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The standard library and our own light modules; everything else is third party.
ALLOWED = set(sys.stdlib_module_names) | {"library", "train_db", "sitecustomize", "usercustomize"}
# Packages install these through .pth files before any of our code runs.
HOOKS = ("_distutils_hack", "distutils-precedence", "__editable__", "a1_coverage", "coverage", "_virtualenv")

PROBE = """
import json, sys, time
before = set(sys.modules)
try:
    import runpy
    sys.argv = ["train_db.py", *sys.argv[1:]]
    runpy.run_path("train_db.py", run_name="__main__")
except SystemExit as ended:
    code = ended.code
loaded = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
sys.stderr.write("\\n" + json.dumps({"code": code, "loaded": loaded, "cpu": time.process_time()}))
"""


def run(*arguments: str) -> tuple[dict, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    *text, last = ended.stderr.splitlines()
    return json.loads(last), ended.stdout + "\n".join(text)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--help"], 0, "--pretrained_model_name_or_path"),
        (["--learning_rat=1"], 2, "error: --learning_rat:"),
        (["--optimizer_type=Prodigy", "--lr_scheduler=cosin"], 2, "error: --lr_scheduler"),
    ],
)
def test_loads_only_the_standard_library(arguments, code, text):
    probe, output = run(*arguments)
    assert probe["code"] == code
    assert text in output
    foreign = [name for name in probe["loaded"] if name not in ALLOWED and not name.startswith(HOOKS)]
    assert not foreign
    # The aim is 0.3 s; this bound only catches a heavy import that slipped through on a slow machine.
    assert probe["cpu"] < 1.5
