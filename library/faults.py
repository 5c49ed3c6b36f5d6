"""Points where tests make a run fail: nothing happens unless the environment variable `SD_FAULT` is set.

`SD_FAULT` holds `point:action[:hits]`, separated by commas. `point` may end in `@rank`. `hits` says which passages act:
`3` the third (default 1), `2-4` the second to fourth, `2+` all from the second. Actions: `kill9`, `term`, `int`,
`enospc`, `eio`, `eacces` (as `OSError`), `raise`, `nan` (returned to the caller), `sleep:<seconds>`.

    SD_FAULT="save.mid:enospc:3+,step.after@1:kill9:7"
"""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import dataclass, field

VARIABLE = "SD_FAULT"
_ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO, "eacces": errno.EACCES}
_SIGNALS = {"kill9": "SIGKILL", "term": "SIGTERM", "int": "SIGINT"}


@dataclass(slots=True)
class _Fault:
    point: str
    action: str
    first: int
    last: int | None
    rank: str | None
    seconds: float = 0.0

    def due(self, hit: int) -> bool:
        """Whether the passage number `hit` (from 1) acts."""
        here = self.rank is None or self.rank == os.environ.get("RANK", "0")
        return here and hit >= self.first and (self.last is None or hit <= self.last)


@dataclass(slots=True)
class _Plan:
    """The faults of one value of the variable and how often each point was passed in this process."""

    text: str
    pid: int
    faults: list[_Fault]
    hits: dict[str, int] = field(default_factory=dict)


_plan: _Plan | None = None


def fault_point(name: str) -> str | None:
    """Let a test interfere here; costs one look into the environment otherwise.

    Returns:
        "nan" when the caller is asked to spoil its values, else None.

    Raises:
        OSError: for the actions enospc, eio, eacces.
        RuntimeError: for the action raise.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    global _plan
    if _plan is None or _plan.text != text or _plan.pid != os.getpid():
        _plan = _Plan(text, os.getpid(), [_parse(part) for part in text.split(",")])
    hit = _plan.hits[name] = _plan.hits.get(name, 0) + 1
    answer = None
    for fault in _plan.faults:
        if fault.point == name and fault.due(hit):
            answer = _act(fault) or answer
    return answer


def _parse(text: str) -> _Fault:
    """Read one `point:action[:hits]`."""
    fields = text.strip().split(":")
    if len(fields) < 2:
        raise ValueError(f"{VARIABLE}: {text!r} is not point:action[:hits]")
    point, _, rank = fields[0].partition("@")
    action, rest = fields[1], fields[2:]
    seconds = 0.0
    if action == "sleep":
        seconds, rest = float(rest[0]), rest[1:]
    elif action not in {*_ERRORS, *_SIGNALS, "raise", "nan"}:
        raise ValueError(f"{VARIABLE}: unknown action {action!r}")
    hits = rest[0] if rest else "1"
    first, dash, last = hits.rstrip("+").partition("-")
    end = int(last) if dash else int(first)
    return _Fault(point, action, int(first), None if hits.endswith("+") else end, rank or None, seconds)


def _act(fault: _Fault) -> str | None:
    if fault.action in _ERRORS:
        number = _ERRORS[fault.action]
        raise OSError(number, os.strerror(number))
    if fault.action in _SIGNALS:
        os.kill(os.getpid(), getattr(signal, _SIGNALS[fault.action]))
    elif fault.action == "sleep":
        time.sleep(fault.seconds)
    elif fault.action == "raise":
        raise RuntimeError(f"fault injected at {fault.point}")
    return "nan" if fault.action == "nan" else None
