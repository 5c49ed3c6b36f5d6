"""A model's name -> a local path: files and folders as they are, hub ids from the local cache or, once, from the network."""

from __future__ import annotations

import difflib
import logging
import re
from pathlib import Path

from library.errors import UserError

_log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"^[\w][\w.-]*/[\w][\w.-]*$")
_COMPONENTS = ("unet", "text_encoder", "vae")


def resolve_model(name: str, option: str = "--pretrained_model_name_or_path") -> Path:
    """Return the file or folder that `name` means; links are followed.

    Raises:
        UserError: no such path, and no hub model of that name in the cache or within reach.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path.resolve()
    if not _HUB_ID.match(name):
        raise UserError("no such file or folder", near_names(path), where=f"{option} {name}")
    return download(name, option)


def near_names(path: Path) -> str:
    """Return a hint with names like that of `path` in its folder."""
    try:
        present = [item.name for item in path.parent.iterdir()]
    except OSError:
        return f"The folder {path.parent} does not exist either"
    close = difflib.get_close_matches(path.name, present, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(close)}?" if close else "Check the path"


def download(name: str, option: str) -> Path:
    """Fetch a Diffusers model from the hub, or find it in the cache."""
    raise UserError("hub download is not there yet", where=f"{option} {name}")
