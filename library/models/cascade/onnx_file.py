"""Local ONNX files that filters ask: opened once per process, by onnxruntime on one processor core. Light."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from library.errors import UserError


@lru_cache(maxsize=8)
def open_onnx(path: str) -> Any:
    """Return onnxruntime's session of a file; loader processes run side by side, so each takes one core.

    Raises:
        UserError: onnxruntime is missing, or it cannot read the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        what = "onnxruntime, which runs .onnx files, is not installed"
        raise UserError(what, "Run: pip install onnxruntime", where=path) from error
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - onnxruntime raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"is no ONNX file that onnxruntime can read ({reason})", where=path) from error


def onnx_problem(path: str) -> str:
    """Return why a file is certainly no ONNX file that can be run here, or nothing; it is not opened."""
    from importlib.util import find_spec

    if not Path(path).is_file():
        return f"file {path!r} not found"
    if Path(path).suffix.lower() == ".onnx" and find_spec("onnxruntime") is None:
        return "onnxruntime, which runs .onnx files, is not installed (pip install onnxruntime)"
    return ""


def run_onnx(path: str, *inputs: Any) -> list[Any]:
    """Run a file on arrays, in the order of its inputs, and return all outputs.

    Raises:
        UserError: it cannot be opened, or takes other inputs.
    """
    session = open_onnx(path)
    names = [item.name for item in session.get_inputs()]
    if len(names) != len(inputs):
        raise UserError(f"takes {len(names)} inputs, not {len(inputs)}: it is another kind of model", where=path)
    try:
        found: list[Any] = session.run(None, dict(zip(names, inputs, strict=True)))
    except Exception as error:  # noqa: BLE001 - onnxruntime raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"is another kind of model: it fails ({reason})", where=path) from error
    return found
