"""TOML files: reading them with messages that help, `--config_file`, and writing one for `--output_config`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.log import safe_text
from library.text_files import read_text

if TYPE_CHECKING:
    from library.option_groups import OptionSet

_SECRET = re.compile(r"token\b|api_?key|password|secret", re.IGNORECASE)
_QUOTED_BACKSLASH = re.compile(r'"[^"]*\\')
_HINTS = (
    (re.compile(r"=\s*(True|False)\b"), "TOML writes true and false in small letters."),
    (re.compile(r"=\s*(None|null|nil)\b"), "TOML has no empty value: leave the line out."),
    (_QUOTED_BACKSLASH, "Write paths in single quotes ('C:\\folder') or with forward slashes."),
    (re.compile(r"=\s*[A-Za-z_./~]"), "Text needs quotes."),
    (re.compile(r"^\s*[^=\[#]+$"), "A line is: key = value."),
)


@dataclass(frozen=True)
class ForeignConfig:
    """Options from a configuration file of another program.

    Attributes:
        values: by the names of our options.
        notes: what the user should know about them.
    """

    values: dict[str, ConfigValue]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConfigValue:
    """A value of a configuration file and where it stands."""

    value: Any
    place: str


def config_path(name: str) -> Path:
    """Return the file that `--config_file name` means: `.toml` may be left out."""
    return Path(name if name.endswith(".toml") else f"{name}.toml")


def load_toml(path: Path, option: str) -> dict[str, Any]:
    """Read a TOML file of at most 16 MB; a byte order mark is ignored.

    Args:
        path: The file.
        option: The option that named it, for messages.

    Raises:
        UserError: If it cannot be read or is not TOML; the message holds file, line, column and the line itself.
    """
    return parse_toml(read_text(path, where=f"{option} {path}"), path)


def parse_toml(text: str, path: Path) -> dict[str, Any]:
    """Parse TOML text; `path` is for messages.

    Raises:
        UserError: If it is not TOML.
    """
    try:
        import tomllib
    except ImportError:  # Python 3.10
        return _parse_with_package(text, path)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"\(at line (\d+), column (\d+)\)", str(error))
        line, column = (int(found[1]), int(found[2])) if found else (text.count("\n") + 1, 0)
        raise _syntax_error(text, path, (line, column), str(error).split(" (at ")[0]) from None
    except RecursionError:
        raise UserError("is nested too deeply", where=str(path)) from None


def _parse_with_package(text: str, path: Path) -> dict[str, Any]:
    import toml

    try:
        return toml.loads(text)
    except toml.TomlDecodeError as error:
        raise _syntax_error(text, path, (error.lineno, error.colno), error.msg) from None
    except (RecursionError, IndexError, KeyError, TypeError, ValueError) as error:  # the package lets these escape
        raise UserError(f"is not valid TOML ({error})", where=str(path)) from None


def _syntax_error(text: str, path: Path, position: tuple[int, int], reason: str) -> UserError:
    number, column = position
    lines = text.splitlines() or [""]
    line = lines[min(number, len(lines)) - 1].strip()
    place = f"{path}, line {number}" + (f", column {column}" if column else "")
    if re.search(r"overwrite|twice|already|duplicate|exists", reason, re.IGNORECASE):
        hint = "Each key and each table may stand there only once."
    else:
        hint = next((hint for pattern, hint in _HINTS if pattern.search(line)), "")
    if _SECRET.search(line):
        line = line.partition("=")[0] + "= (hidden)"
    shown = line if len(line) <= 120 else line[:117] + "..."
    return UserError(f"{reason}: {safe_text(shown)}", hint, where=place)


def find_line(text: str, key: str) -> int | None:
    """Return the number of the first line that sets `key`, for messages."""
    found = re.search(rf"^[ \t]*[\"']?{re.escape(key)}[\"']?[ \t]*=", text, re.MULTILINE)
    return text.count("\n", 0, found.start()) + 1 if found else None


def read_config(name: str) -> dict[str, ConfigValue]:
    """Read the options of a `--config_file`; one level of tables is flattened and their names mean nothing.

    Raises:
        UserError: If the file cannot be read, is not TOML, or holds tables inside tables.
    """
    if Path(name).suffix.lower() in (".yaml", ".yml", ".json") and not config_path(name).exists():
        raise UserError("is not a TOML file", "This script reads options from TOML.", where=f"--config_file {name}")
    path = config_path(name)
    text = read_text(path, where=f"--config_file {path}")
    values: dict[str, ConfigValue] = {}
    for key, value in _flattened(parse_toml(text, path), path):
        line = find_line(text, key)
        values[key] = ConfigValue(value, f"{path}, line {line}" if line else str(path))
    return values


def _flattened(document: dict[str, Any], path: Path) -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for key, value in document.items():
        items.extend(value.items() if isinstance(value, dict) else [(key, value)])
    for key, value in items:
        tables = [value] if isinstance(value, dict) else value if isinstance(value, list) else []
        if any(isinstance(member, dict) for member in tables):
            hint = "Tables may not hold tables here."
            if key in ("datasets", "subsets"):
                hint = "This looks like a description of data sets: name it with --dataset_config."
            raise UserError(f"{key} is a table of tables", hint, where=f"--config_file {path}")
    return items


def config_text(options: OptionSet) -> str:
    """Return the options that differ from their defaults as TOML, without secrets and the options about the file."""
    values = options.values()
    sections: dict[str, list[str]] = {}
    for name, option in type(options).options().items():
        hidden = option.secret or name in ("config_file", "output_config")
        if option.offered and not hidden and values[name] != option.default and values[name] is not None:
            value = values[name]
            if isinstance(value, tuple) and name == "face_crop_aug_range":
                value = ",".join(str(number) for number in value)
            sections.setdefault(option.title, []).append(f"{name} = {toml_value(value)}\n")
    return "\n".join(f"[{title}]\n" + "".join(lines) for title, lines in sections.items())


def toml_value(value: Any) -> str:
    """Return a flag, number, text or list in TOML's spelling."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    # JSON's escapes are a subset of TOML's, which also wants DEL escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def write_config(options: OptionSet, name: str) -> Path:
    """Write `config_text` to the file that `--config_file name` means.

    Raises:
        UserError: If the file exists or cannot be written.
    """
    from library.files import write_text

    path = config_path(name)
    if path.exists():
        raise UserError("already exists", "Choose another name.", where=f"--config_file {path}")
    if not path.absolute().parent.is_dir():
        raise UserError("its folder does not exist", f"Make {path.absolute().parent}", where=f"--config_file {path}")
    write_text(path, config_text(options))
    return path
