"""`--resume_from_huggingface`: a state folder out of a repository. Its files are untrusted like any other's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.training.upload import hub_api, without_token

if TYPE_CHECKING:
    from library.training.options import HubOptions

_HINT = "Write user/repository/path/in/repository[:revision[:repository type]]"


@dataclass(frozen=True, slots=True)
class HubPlace:
    """A folder in a repository of the hub."""

    repo_id: str
    path: str
    revision: str | None = None
    repo_type: str | None = None


def parse_place(resume: str) -> HubPlace:
    """Read ``user/repository/path/in/repository[:revision[:repository type]]``.

    Raises:
        UserError: parts are missing, or the path leaves the repository.
    """
    where = f"--resume {resume}"
    name, *rest = resume.split(":")
    parts = name.strip("/").split("/")
    if len(parts) < 3 or len(rest) > 2 or ".." in parts or "" in parts:
        raise UserError("does not name a folder on Hugging Face", _HINT, where=where)
    revision = rest[0] or None if rest else None
    repo_type = (rest[1] if len(rest) > 1 else "model") if rest else None
    return HubPlace("/".join(parts[:2]), "/".join(parts[2:]), revision, repo_type)


def download_state(resume: str, hub: HubOptions, api: Any = None) -> Path:
    """Download the state folder that `resume` names into the hub's cache and return its local path.

    Raises:
        UserError: it is not there, cannot be reached, or holds names that are not plain files of one folder.
    """
    place = parse_place(resume)
    where = f"--resume {resume}"
    api = api or hub_api(hub)
    common = {"repo_id": place.repo_id, "revision": place.revision, "repo_type": place.repo_type}
    try:
        names = _inside(api.list_repo_files(**common), place.path, where)
        paths = [Path(api.hf_hub_download(filename=name, **common)) for name in names]
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - the boundary to the hub's client
        text = without_token(f"cannot be downloaded ({type(error).__name__}: {error})", hub.huggingface_token)
        raise UserError(text, "Check the name and the network, or --resume a local folder", where=where) from error
    if len({path.parent for path in paths}) != 1:
        raise UserError("its files are not in one folder", where=where)
    return paths[0].parent


def _inside(names: list[str], folder: str, where: str) -> list[str]:
    """Return the names of the files of `folder`, which must be plain ones."""
    found = [name for name in names if name.startswith(f"{folder}/")]
    if not found:
        raise UserError("no file in the repository begins with this path", _HINT, where=where)
    for name in found:
        parts = PurePosixPath(name).parts
        if (
            "\\" in name
            or ".." in parts
            or PurePosixPath(name).is_absolute()
            or str(PurePosixPath(name).parent) != folder
        ):
            raise UserError(f"refused: {name!r} is not a plain file of a state folder", where=where)
        if parts[-1].startswith("custom_checkpoint_"):
            raise UserError(f"refused: {parts[-1]} is a pickle that could run code when loaded", where=where)
    return found
