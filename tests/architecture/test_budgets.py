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
    long = [
        f"{name(p)}: {n} lines" for p in CODE if (n := len(p.read_text(encoding="utf-8").splitlines())) > MOST_LINES
    ]
    for path in CODE:
        for node in functions(path):
            size = node.end_lineno - node.lineno + 1
            if size > MOST_FUNCTION_LINES:
                long.append(f"{name(path)}:{node.lineno} {node.name}: {size} lines")
    assert not long, "\n".join(long)


def test_entry_scripts_fit_on_a_screen():
    assert [name(path) for path in ROOT.glob("*.py") if len(path.read_text(encoding="utf-8").splitlines()) > 80] == []


def headers_and_docs(tree: ast.AST) -> set[int]:
    """Lines of signatures and docstrings: an interface and its implementation share them by nature."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines.update(range(node.lineno, node.body[0].lineno))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.update(range(node.lineno, node.end_lineno + 1))
    return lines


def test_no_block_of_code_occurs_twice():
    seen = defaultdict(list)
    for path in PRODUCT:
        text = path.read_text(encoding="utf-8")
        skipped = headers_and_docs(ast.parse(text))
        lines = [
            (number, line.strip())
            for number, line in enumerate(text.splitlines(), 1)
            if number not in skipped
            and len(line.strip()) > 8
            and not line.strip().startswith(("#", "import ", "from "))
        ]
        for index in range(len(lines) - BLOCK + 1):
            block = "\n".join(text for _, text in lines[index : index + BLOCK])
            seen[block].append(f"{name(path)}:{lines[index][0]}")
    twice = {tuple(places) for places in seen.values() if len(places) > 1}
    assert not twice, sorted(twice)


def calls(path: Path):
    """Yield (line, what is called, keywords, positional constants) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            keywords = {item.arg: getattr(item.value, "value", None) for item in node.keywords}
            constants = [item.value for item in node.args if isinstance(item, ast.Constant)]
            yield node.lineno, ast.unparse(node.func), keywords, constants


def writes(callee: str, keywords: dict, constants: list) -> bool:
    if callee.endswith((".write_text", ".write_bytes")):
        return not callee.startswith("files.")
    modes = [*constants, keywords.get("mode")]
    return callee.split(".")[-1] == "open" and any(isinstance(m, str) and re.fullmatch(r"[wxa]b?\+?", m) for m in modes)


GLOBAL_RANDOM = {f"random.{name}" for name in ("random", "randint", "shuffle", "choice", "uniform", "seed", "sample")}
GLOBAL_RANDOM |= {f"np.random.{name}" for name in ("rand", "randn", "seed", "shuffle", "choice", "permutation")}
TORCH_RANDOM = {
    f"torch.{name}" for name in ("rand", "randn", "randint", "rand_like", "randn_like", "randperm", "bernoulli")
}
RULES = {
    "pickles are opened in one place": (
        lambda callee, keywords, constants: callee == "torch.load",
        {"library/checkpoints/pickles.py"},
    ),
    "nothing writes past library/files.py": (
        writes,
        {
            "library/files.py",
            "library/new_file.py",
            "library/lock_file.py",
            "library/data/mapped_file.py",  # a temporary file that nobody else sees
        },
    ),
    "no library writes by itself": (
        lambda callee, keywords, constants: (
            callee.split(".")[-1] in ("save_file", "save_pretrained", "savez") or callee == "json.dump"
        ),
        set(),
    ),
    "nothing is executed": (
        lambda callee, keywords, constants: (
            callee in ("eval", "exec", "yaml.load")
            or callee.endswith(".extractall")
            or bool(keywords.get("shell") or keywords.get("allow_pickle"))
        ),
        {"library/data/shard_copies.py"},  # commands that the user typed and allowed
    ),
    "nothing draws from a global generator": (
        lambda callee, keywords, constants: (
            callee in GLOBAL_RANDOM or (callee in TORCH_RANDOM and "generator" not in keywords)
        ),
        {"library/draws.py", "networks/chance.py"},  # seeds them; dropouts inside networks
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_one_place_for_dangerous_things(rule):
    breaks, allowed = RULES[rule]
    found = [
        f"{name(path)}:{line}: {callee}"
        for path in PRODUCT
        if name(path) not in allowed
        for line, callee, keywords, constants in calls(path)
        if breaks(callee, keywords, constants)
    ]
    assert not found, "\n".join(found)


def test_nothing_names_a_workplace_or_host():
    words = re.compile(r"/work/|/tmp/w\b|localhost:\d|pypi\.org|\.library/", re.I)
    texts = [p for p in ROOT.rglob("*") if p.suffix in (".py", ".md", ".toml", ".cfg", ".yaml", ".yml") and p.is_file()]
    here = Path(__file__)
    found = [
        name(p)
        for p in texts
        if p != here
        and not {".venv", ".git", ".lowset", "node_modules"} & set(p.parts)
        and words.search(p.read_text(encoding="utf-8"))
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
