"""What the guides for users show must work: command lines parse, options and keys exist, links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from library.config_file import parse_toml
from library.data.options import DatasetOptions, SubsetOptions
from library.inference.prompt_options import GENERATION
from library.inference.prompts import PROMPT_OPTIONS, load_prompts
from library.option_groups import options_of
from library.option_parser import read
from library.options_doc import PAGES
from library.quickstart_options import QuickstartOptions
from tests import guides
from tests.conftest import ROOT
from tests.guides import DOCS
from train_db import Options

GUIDES = [
    ROOT / "README.md",
    DOCS / "README.md",
    DOCS / "train_db.md",
    DOCS / "fine_tune.md",
    DOCS / "train_network.md",
    DOCS / "train_textual_inversion.md",
    DOCS / "lora_tools.md",
    DOCS / "data_tools.md",
    DOCS / "gen_img.md",
    DOCS / "captioning.md",
    DOCS / "tagging_and_metadata.md",
    DOCS / "stable_cascade.md",
    ROOT / "CONTRIBUTING.md",
]
TRAINED, CASCADE, PICTURES, TOOLS = (page.option_sets() for page in PAGES)
TRAINED |= CASCADE
SCRIPTS = TRAINED | PICTURES
FROM_ACCELERATE = {"num_cpu_threads_per_process", "multi_gpu", "num_processes", "nproc_per_node"}
FROM_ELSEWHERE = {"help", "logdir", "local", "exclude", "sort", "caption_extention"}
"""Options of every program, of TensorBoard, of `hf download` (--local-dir, --exclude) and tar, and an old spelling."""


def command_lines():
    for guide in GUIDES:
        for line in guides.commands(guide):
            yield from ((script, line) for script in SCRIPTS if f"{script}.py" in line.split())


@pytest.mark.parametrize(("script", "line"), sorted(set(command_lines())))
def test_command_lines_parse(script, line, tmp_path, monkeypatch):
    """They read; files of networks need not be there, which is another test's business."""
    monkeypatch.chdir(tmp_path)
    for name in ("train_network.md", "fine_tune.md", "stable_cascade.md"):
        guides.write_files(DOCS / name, tmp_path)
    words = shlex.split(line)
    reading = read(SCRIPTS[script], words[words.index(f"{script}.py") + 1 :])
    assert not [problem for problem in reading.problems if "weights" not in problem.where]
    assert not reading.warnings


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_options_that_are_named_exist(guide):
    named = set(re.findall(r"--([A-Za-z][\w]*)", guide.read_text(encoding="utf-8")))
    prompt_options = {option.flag for option in (*PROMPT_OPTIONS, *GENERATION.options)}
    sets = [*SCRIPTS.values(), *TOOLS.values()]
    known = {name for options in sets for name in options.options()} | {
        option.flag[2:] for options in sets for option in options.options().values()
    }
    known |= {option.field_name for option in options_of(QuickstartOptions)}
    assert named - known - prompt_options - FROM_ACCELERATE - FROM_ELSEWHERE - {"metadata_"} == set()


def test_dataset_files_use_real_keys():
    levels = {
        level: {
            o.notes.get("toml", o.field_name)
            for o in (*options_of(DatasetOptions), *options_of(SubsetOptions))
            if level in o.notes.get("scope", ())
        }
        | ({"conditioning_data_dir", "metadata_file"} if level == "subset" else set())
        for level in ("general", "dataset", "subset")
    }
    shown = 0
    pages = [DOCS / name for name in ("train_db.md", "fine_tune.md", "train_network.md", "train_textual_inversion.md")]
    for block in (block for page in pages for block in guides.blocks(page, "toml")):
        table = parse_toml(block, Path("guide"))
        for dataset in table.get("datasets", []):
            shown += 1
            assert set(dataset) - {"subsets"} <= levels["dataset"]
            assert set(table.get("general", {})) <= levels["general"]
            assert all(set(subset) <= levels["subset"] for subset in dataset["subsets"])
    assert shown >= 4


def test_prompt_files_load(tmp_path):
    guide = DOCS / "train_db.md"
    plain, tables = guides.blocks(guide, ""), guides.blocks(guide, "toml")
    (tmp_path / "p.txt").write_text(next(b for b in plain if "--ss" in b), encoding="utf-8")
    (tmp_path / "p.toml").write_text(next(b for b in tables if "[prompt]" in b), encoding="utf-8")
    assert len(load_prompts(tmp_path / "p.txt")) == 2
    assert len(load_prompts(tmp_path / "p.toml")) == 2


def test_configuration_file_uses_real_options():
    block = next(b for b in guides.blocks(DOCS / "train_db.md", "toml") if "[training]" in b)
    assert {key for table in parse_toml(block, Path("guide")).values() for key in table} <= set(Options.options())


def anchors(page):
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_links_lead_somewhere(guide):
    """To files that exist and, where a section is named, to one of its page."""
    for target, section in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", guide.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path = (guide.parent / target).resolve() if target else guide
        assert path.exists(), target
        assert not section or section in anchors(path), (target, section)


def test_the_first_screen_holds_the_two_commands():
    first_screen = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:20])
    assert "pip install -r requirements.txt && python quickstart.py" in first_screen
    assert "pip install -r requirements-dev.txt && python -m pytest" in first_screen
