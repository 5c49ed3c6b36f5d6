"""`--help` and errors in options must not wait for torch, in any script, however it is started."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from library.options_doc import CASCADE_SCRIPTS, PAGES, PICTURE_SCRIPTS, SCRIPTS, tool_modules

ROOT = Path(__file__).parents[2]
PACKAGES = ("finetune", "networks", "tools")
MODULES = [*SCRIPTS, *CASCADE_SCRIPTS, *PICTURE_SCRIPTS, *tool_modules()]
TOOLS = PAGES[-1].option_sets
# The standard library and our own light modules; everything else is third party.
ALLOWED = set(sys.stdlib_module_names) | {
    "library",
    *PACKAGES,
    *SCRIPTS,
    *CASCADE_SCRIPTS,
    *PICTURE_SCRIPTS,
    "sitecustomize",
    "usercustomize",
}
# Packages install these through .pth files before any of our code runs.
HOOKS = ("_distutils_hack", "distutils-precedence", "__editable__", "a1_coverage", "coverage", "_virtualenv")

PROBE = """
import json, os, runpy, sys
how, name, *arguments = sys.argv[1:]
before = set(sys.modules)
sys.argv = [name, *arguments]
try:
    if how == "path":
        sys.path[0] = os.path.dirname(name)
        runpy.run_path(name, run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
except SystemExit as ended:
    code = ended.code
loaded = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
sys.stderr.write("\\n" + json.dumps({"code": code, "loaded": loaded}))
"""


def run(how: str, name: str, folder: Path, *arguments: str) -> tuple[dict, str]:
    """Run a script as `python PATH` or `python -m NAME` does, in `folder`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    ended = subprocess.run(
        [sys.executable, "-c", PROBE, how, name, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    *text, last = ended.stderr.splitlines()
    return json.loads(last), ended.stdout + "\n".join(text)


def assert_light(probe: dict) -> None:
    foreign = [name for name in probe["loaded"] if name not in ALLOWED and not name.startswith(HOOKS)]
    assert not foreign


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--help"], 0, "--pretrained_model_name_or_path"),
        (["--learning_rat=1"], 2, "error: --learning_rat:"),
        (["--optimizer_type=Prodigy", "--lr_scheduler=cosin"], 2, "error: --lr_scheduler"),
    ],
)
def test_loads_only_the_standard_library(arguments, code, text):
    probe, output = run("module", "train_db", ROOT, *arguments)
    assert probe["code"] == code
    assert text in output
    assert_light(probe)


@pytest.mark.parametrize("module", MODULES)
def test_help_of_every_script_from_another_folder(module, tmp_path):
    path = ROOT / f"{module.replace('.', '/')}.py"
    probe, output = run("path", str(path), tmp_path, "--help")
    assert probe["code"] == 0, output
    assert output.startswith(f"usage: {path.name} ")
    assert_light(probe)


@pytest.mark.parametrize("module", tool_modules())
def test_wrong_option_of_every_tool_started_as_a_module(module):
    probe, output = run("module", module, ROOT, "--no_such_option_at_all")
    assert probe["code"] == 2, output
    assert output.strip().startswith("error: --no_such_option_at_all: unknown option.")
    assert_light(probe)


def test_every_option_of_every_tool_is_explained():
    unclear = [
        f"{module}: {option.flag}"
        for module, options_class in TOOLS().items()
        for option in options_class.options().values()
        if not option.notes.get("help", "").endswith(".")
    ]
    assert not unclear


def test_conditions_of_tools_name_known_options():
    for options_class in TOOLS().values():
        options = options_class.options()
        for option in options.values():
            for note in ("needs", "matters_when", "excludes", "implies", "means"):
                assert set(option.notes.get(note, {})) <= set(options), f"{options_class}: {option.flag}"
