"""Sizes, single places and forbidden calls: the rules of docs/architecture.md that a program can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
CODE = sorted(
    path
    for pattern in ("*.py", "library/**/*.py", "networks/*.py", "finetune/*.py", "tools/*.py", "benchmarks/*.py")
    for path in ROOT.glob(pattern)
)
PRODUCT = [path for path in CODE if "benchmarks" not in path.parts]
MOST_LINES, MOST_FUNCTION_LINES, BLOCK = 400, 60, 6


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def test_files_and_functions_stay_readable():
    long = [f"{name(p)}: {n} lines" for p in CODE if (n := len(p.read_text(encoding="utf-8").splitlines())) > MOST_LINES]
    for path in CODE:
        for node in functions(path):
            size = node.end_lineno - node.lineno + 1
            if size > MOST_FUNCTION_LINES:
                long.append(f"{name(path)}:{node.lineno} {node.name}: {size} lines")
    assert not long, "\n".join(long)


def test_entry_scripts_fit_on_a_screen():
    assert [name(path) for path in ROOT.glob("*.py") if len(path.read_text(encoding="utf-8").splitlines()) > 80] == []


def test_no_block_of_code_occurs_twice():
    seen = defaultdict(list)
    for path in PRODUCT:
        lines = [
            (number, line.strip())
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if len(line.strip()) > 8 and not line.strip().startswith(("#", "import ", "from ", '"""'))
        ]
        for index in range(len(lines) - BLOCK + 1):
            block = "\n".join(text for _, text in lines[index : index + BLOCK])
            seen[block].append(f"{name(path)}:{lines[index][0]}")
    twice = {tuple(places) for places in seen.values() if len(places) > 1}
    assert not twice, sorted(twice)


WRITERS = {"library/files.py", "library/new_file.py", "library/lock_file.py", "library/checkpoints/ckpt_writer.py"}
FORBIDDEN = {
    r"\btorch\.load\(": {"library/checkpoints/pickles.py"},
    r"\bsave_file\(|\.save_pretrained\(|\bnp\.savez|\bjson\.dump\(": set(),
    r"\.write_text\(|\.write_bytes\(|\.open\([^)]*[\"'][wxa]b?[\"']": WRITERS | {"library/data/latent_store.py"},
    r"\beval\(|\bexec\(|shell=True|allow_pickle=True|\.extractall\(|\byaml\.load\(": set(),
    r"\brandom\.(random|randint|shuffle|choice|uniform|seed)\(|\bnp\.random\.(rand|randn|seed|shuffle|choice)\(": set(),
    r"\btorch\.(randn|rand|randint|randn_like|rand_like)\((?!.*generator)": set(),
}


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_one_place_for_dangerous_things(pattern):
    allowed = FORBIDDEN[pattern]
    found = [
        f"{name(path)}:{number}: {line.strip()}"
        for path in PRODUCT
        if name(path) not in allowed
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line) and "# allowed:" not in line and not re.search(r"\.eval\(\)", line)
    ]
    assert not found, "\n".join(found)


def test_nothing_names_a_workplace_or_host():
    words = re.compile(r"/work/|/tmp/w\b|localhost:\d|pypi\.org|\.library/", re.I)
    texts = [p for p in ROOT.rglob("*") if p.suffix in (".py", ".md", ".toml", ".cfg", ".yaml", ".yml") and p.is_file()]
    here = Path(__file__)
    found = [
        name(p)
        for p in texts
        if p != here and not {".venv", ".git", ".lowset", "node_modules"} & set(p.parts) and words.search(p.read_text(encoding="utf-8"))
    ]
    assert not found


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_style_and_lint():
    run(sys.executable, "-m", "ruff", "format", "--check", ".")
    run(sys.executable, "-m", "ruff", "check", ".")


def test_types():
    run(sys.executable, "-m", "mypy")


def test_layers():
    run(str(Path(sys.executable).with_name("lint-imports")))
