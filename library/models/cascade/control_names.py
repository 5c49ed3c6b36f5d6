"""Names of ControlNet filters and their parameters as options hold them: light, since `--help` reads them too."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from library.errors import Problem
from library.option_groups import COMMAND_LINE
from library.option_values import BadValue

FILTER, PARAMS = "--controlnet_filter", "--controlnet_filter_params"

OFFICIAL_NAMES = {
    "CannyFilter": "canny",
    "InpaintFilter": "inpaint",
    "IdentityFilter": "identity",
    "SREffnetFilter": "sr_effnet",
    "SRFilter": "sr",
}
"""Names in official configuration files -> ours."""


def is_own(name: str) -> bool:
    """Whether a name stands for a class of the user's own, `module:Class` or `package.module.Class`."""
    return ":" in name or "." in name


def untyped_problems(names: Iterable[str], source: str | None) -> Iterator[Problem]:
    """Yield filters of the user's own that a file names: files are downloaded, and would run code unasked.

    Args:
        names: of filters.
        source: where the option was set, as `OptionSet.given` tells it.
    """
    for name in names if source != COMMAND_LINE else ():
        if is_own(name):
            yield Problem(FILTER, f"{name!r} is code of your own, which files may not name", "Give it by typing it.")


def is_folder_filter(name: str) -> bool:
    """Whether a filter takes ready pictures of a folder."""
    return OFFICIAL_NAMES.get(name, name) == "folder"


def filter_params(value: Any) -> tuple[str, ...]:
    """Read `--controlnet_filter_params`: a list of `name=value`, or a table of a configuration file.

    Raises:
        BadValue: it is something else.
    """
    if isinstance(value, Mapping):
        return tuple(f"{name}={json.dumps(item)}" for name, item in value.items())
    items = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(item, str) for item in items):
        raise BadValue(f"expected name=value, got {value!r}")
    return tuple(items)
