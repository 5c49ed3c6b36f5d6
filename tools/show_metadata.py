"""Show what a model file says about itself, and what it is: metadata, hashes, layout, base model, modules and ranks.

python tools/show_metadata.py --model my_lora.safetensors

The answer is one JSON table on standard output. Only the header of a safetensors file is read, and nothing is trusted:
what could confuse a terminal is escaped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli  # noqa: E402
from library.errors import Problem, UserError  # noqa: E402
from library.option_groups import OptionGroup, OptionSet, opt  # noqa: E402
from networks.tool_parts import missing_options  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class ShowOptions(OptionGroup, title="showing"):
    """The file to look at."""

    model: str | None = opt(
        None, path=True, help="LoRA, checkpoint or embedding: a file, or a folder as PEFT writes it."
    )

    def check(self) -> Iterator[Problem]:
        """There is something to look at."""
        yield from missing_options(model=self.model)


@dataclass(frozen=True, kw_only=True)
class Options(OptionSet):
    """Everything that show_metadata.py accepts."""

    show: ShowOptions


def show(name: str) -> None:
    """Print the table for the model called `name`.

    Raises:
        UserError: the file is damaged or no model.
    """
    sys.stdout.write(safe_json(describe(name)) + "\n")


def describe(name: str) -> dict[str, Any]:
    """Return what is known about a model file, as values of JSON.

    Raises:
        UserError: the file is damaged or no model.
    """
    from library.checkpoints.detect import inspect
    from library.checkpoints.headers import file_kind, read_header
    from library.checkpoints.lora_file import lora_path

    path = Path(name)
    if path.is_dir() and (path / "model_index.json").is_file():
        raise UserError("a Diffusers folder, which has no metadata", "Name one of its files", where=name)
    path = lora_path(path)
    info = inspect(path)
    metadata: Mapping[str, str] = {}
    if file_kind(path) == "safetensors":
        metadata = read_header(path).metadata
    file: dict[str, Any] = {"name": path.name, "is": info.label, "bytes": path.stat().st_size}
    if info.family == "lora":
        file |= _adapter(path)
    file |= _hashes(path, metadata)
    return {"file": file, "metadata": {key: parsed(text) for key, text in metadata.items()}}


def _adapter(path: Path) -> dict[str, Any]:
    from library.checkpoints.lora_file import inspect_lora

    try:
        lora = inspect_lora(path)
    except UserError as error:  # the rest is worth seeing all the same
        return {"damaged": [problem.what for problem in error.problems]}
    found: dict[str, Any] = {
        "layout": lora.layout,
        "base": lora.base,
        "modules": lora.modules,
        "kinds": dict(lora.kinds),
        "ranks": sorted(lora.ranks),
        "unet": lora.has_unet,
        "text_encoder": lora.has_text_encoder,
    }
    if lora.bundled:
        found["bundled"] = list(lora.bundled)
    if lora.unknown:
        found["unknown"] = list(lora.unknown)
    return found


def _hashes(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the hashes by which model managers know a file, and whether it is as it was when it was saved."""
    from library.checkpoints.hashes import data_sha256, file_sha256, legacy_hash

    found: dict[str, Any] = {"sha256": file_sha256(path), "legacy_hash": legacy_hash(path)}
    stored = metadata.get("sshs_model_hash")
    if stored is not None:
        found["as_saved"] = stored == data_sha256(path)
    return found


def parsed(text: str) -> Any:
    """Return a metadata value that is a JSON table or list as such, anything else as it is."""
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        value = json.loads(text, parse_constant=_no_constant)
        json.dumps(value, indent=2)
    except (ValueError, RecursionError):
        return text
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def safe_json(value: Any) -> str:
    """Return indented JSON in which whatever a terminal does not simply show is escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, lambda opts: show(str(opts.show.model)), argv=argv)


if __name__ == "__main__":
    main()
