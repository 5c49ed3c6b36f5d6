"""Programs that srun starts as several processes: what other launchers tell in variables is told by SLURM's.

PyTorch and accelerate look for RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Those that are not set are
derived here, so that `srun python script.py` does what `torchrun script.py` does on every node.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping

_FIRST_PORT, _PORTS = 20000, 20000
_GROUP = re.compile(r"([^,\[]+)(?:\[([^\]]*)\])?([^,\[]*)")
_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def adopt_slurm() -> None:
    """Set the variables that a launcher sets, where srun started several processes and no launcher did."""
    for name, value in variables(os.environ).items():
        os.environ.setdefault(name, value)


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what srun's variables come to; nothing for a single process, and nothing beside another launcher.

    Variables of the job are not enough: a batch script has them too, and is one process whatever its job may have.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return {}
    try:
        count, rank = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment["SLURM_PROCID"])
        local = int(environment["SLURM_LOCALID"])
    except (KeyError, ValueError):
        return {}
    if count < 2:
        return {}
    found = {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(local)}
    tasks = list(_tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", "")))
    node = environment.get("SLURM_NODEID", "0")
    if node.isdecimal() and int(node) < len(tasks):
        found["LOCAL_WORLD_SIZE"] = str(tasks[int(node)])
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    found["MASTER_ADDR"] = _first_node(nodes) or environment.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    found["MASTER_PORT"] = str(_port(environment))
    return found


def _port(environment: Mapping[str, str]) -> int:
    """Return a port that all processes of a step, and hardly those of another one, come to."""
    job, step = (environment.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    numbers = [int(text) if text.isdecimal() else 0 for text in (job, step)]
    return _FIRST_PORT + (numbers[0] * 7 + numbers[1]) % _PORTS


def _first_node(nodes: str) -> str:
    """Return the first name of a list such as `gpu[03-07,12],login1`."""
    group = _GROUP.match(nodes)
    if group is None:
        return ""
    numbers = (group[2] or "").partition(",")[0].partition("-")[0]
    return f"{group[1]}{numbers}{group[3]}".strip()


def _tasks_per_node(text: str) -> Iterator[int]:
    """Yield the numbers of a list such as `8(x2),4`: 8, 8, 4."""
    for part in text.split(","):
        found = _TASKS.fullmatch(part.strip())
        if found is not None:
            yield from [int(found[1])] * int(found[2] or 1)
