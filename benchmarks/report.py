"""What every benchmark prints and writes: a small table, the ratio to its own reference, and JSON with the machine."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Describe the machine without naming it."""
    model = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": model, "cores": os.cpu_count(), "memory_gib": round(memory, 1), "python": platform.python_version()}


def cpu_seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Return (CPU seconds of this process, wall seconds) that `work` takes."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def child_cpu_seconds(command: list[str], *, status: int = 0, **environment: str) -> float:
    """Return user plus system seconds of a child process, which shall end with `status`, and its children."""
    import subprocess

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode != status:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def report(name: str, rows: list[Mapping[str, Any]], output: str | None) -> None:
    """Print rows as a table and write them, with the machine, to `output` (default: docs/benchmarks/<name>.json)."""
    columns = list(rows[0])
    texts = [[_text(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in texts)) for i, column in enumerate(columns)]
    for line in [columns, ["-" * width for width in widths], *texts]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    target = Path(output) if output else Path(__file__).parent.parent / "docs" / "benchmarks" / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": name, "date": time.strftime("%Y-%m-%d"), "machine": machine(), "rows": rows}
    target.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"written: {target}", file=sys.stderr)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
