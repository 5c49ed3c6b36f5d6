"""What the guides for users show must work: command lines parse, options and keys exist, links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from library.config_file import parse_toml
from library.data.options import DatasetOptions, SubsetOptions
from library.inference.prompts import PROMPT_OPTIONS, load_prompts
from library.option_groups import options_of
from library.option_parser import read
from train_db import Options

ROOT = Path(__file__).resolve().parents[2]
GUIDES = [ROOT / "README.md", ROOT / "docs" / "train_db.md", ROOT / "docs" / "README.md", ROOT / "CONTRIBUTING.md"]
FROM_ACCELERATE = {"num_cpu_threads_per_process", "multi_gpu", "num_processes"}
FROM_ELSEWHERE = {"model", "images", "prompt", "help", "logdir"}
"""Options of quickstart.py, of every program, and of TensorBoard."""


def blocks(text, language):
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [content for kind, content in fences if kind == language]


def command_lines():
    for guide in GUIDES:
        for block in blocks(guide.read_text(encoding="utf-8"), "bash"):
            yield from (line for line in block.splitlines() if "train_db.py" in line)


@pytest.mark.parametrize("line", sorted(set(command_lines())))
def test_command_lines_parse(line):
    words = shlex.split(line)
    reading = read(Options, words[words.index("train_db.py") + 1 :])
    assert not reading.problems
    assert not reading.warnings


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_options_that_are_named_exist(guide):
    named = set(re.findall(r"--([A-Za-z][\w]*)", guide.read_text(encoding="utf-8")))
    prompt_options = {option.flag for option in PROMPT_OPTIONS}
    known = set(Options.options()) | {option.flag[2:] for option in Options.options().values()}
    assert named - known - prompt_options - FROM_ACCELERATE - FROM_ELSEWHERE - {"metadata_"} == set()


def test_dataset_files_use_real_keys():
    levels = {
        level: {
            o.notes.get("toml", o.field_name)
            for o in (*options_of(DatasetOptions), *options_of(SubsetOptions))
            if level in o.notes.get("scope", ())
        }
        | ({"conditioning_data_dir"} if level == "subset" else set())
        for level in ("general", "dataset", "subset")
    }
    shown = 0
    for block in blocks((ROOT / "docs" / "train_db.md").read_text(encoding="utf-8"), "toml"):
        table = parse_toml(block, Path("guide"))
        for dataset in table.get("datasets", []):
            shown += 1
            assert set(dataset) - {"subsets"} <= levels["dataset"]
            assert set(table.get("general", {})) <= levels["general"]
            assert all(set(subset) <= levels["subset"] for subset in dataset["subsets"])
    assert shown >= 3


def test_prompt_files_load(tmp_path):
    text = (ROOT / "docs" / "train_db.md").read_text(encoding="utf-8")
    (tmp_path / "p.txt").write_text(next(b for b in blocks(text, "") if "--ss" in b), encoding="utf-8")
    (tmp_path / "p.toml").write_text(next(b for b in blocks(text, "toml") if "[prompt]" in b), encoding="utf-8")
    assert len(load_prompts(tmp_path / "p.txt")) == 2
    assert len(load_prompts(tmp_path / "p.toml")) == 2


def test_configuration_file_uses_real_options():
    text = (ROOT / "docs" / "train_db.md").read_text(encoding="utf-8")
    block = next(b for b in blocks(text, "toml") if "[training]" in b)
    assert {key for table in parse_toml(block, Path("guide")).values() for key in table} <= set(Options.options())


def test_links_lead_somewhere():
    generated = {"docs/options.md"}
    for guide in GUIDES:
        text = guide.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if "://" in target:
                continue
            path = (guide.parent / target).resolve()
            assert path.exists() or path.relative_to(ROOT).as_posix() in generated, (guide.name, target)


def test_sections_that_are_linked_exist():
    for guide in GUIDES:
        text = guide.read_text(encoding="utf-8")
        titles = {
            re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)
        }
        assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= titles


def test_the_first_screen_holds_the_two_commands():
    first_screen = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:20])
    assert "pip install -r requirements.txt && python quickstart.py" in first_screen
    assert "pip install -r requirements-dev.txt && python -m pytest" in first_screen
