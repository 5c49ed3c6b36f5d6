"""A model's name -> a local path: files and folders as they are, hub ids from the cache or, once, from the network."""

from __future__ import annotations

import difflib
import errno
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from library.checkpoints.folders import SMALL_FILES, choose_weights, shard_names
from library.errors import UserError
from library.new_file import DISK_FULL

_log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"^[\w][\w.-]*/[\w][\w.-]*$")
_COMPONENTS = ("unet", "text_encoder", "vae")
_TIMEOUT = 10.0
_DISK_ERRORS = DISK_FULL | {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}


def resolve_model(name: str, option: str = "--pretrained_model_name_or_path") -> Path:
    """Return the file or folder that `name` means; links are followed.

    Raises:
        UserError: no such path, and no hub model of that name in the cache or within reach.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path.resolve()
    if not is_hub_id(name):
        raise UserError("no such file or folder", near_names(path), where=f"{option} {name}")
    return from_hub(name, option, near=near_names(path))


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a repository of the hub, `owner/name`."""
    return _HUB_ID.match(name) is not None and ".." not in name


def near_names(path: Path) -> str:
    """Return a hint with names like that of `path` in its folder."""
    try:
        present = [item.name for item in path.parent.iterdir()]
    except OSError:
        return f"The folder {path.parent} does not exist either"
    close = difflib.get_close_matches(path.name, present, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(close)}?" if close else "Check the path"


def wanted_files(names: Iterable[str]) -> list[str]:
    """Return which files of a hub repository make up a model or a VAE: weights of one kind each, small files."""
    names = list(names)
    if "model_index.json" not in names:
        prefix = "" if "config.json" in names else "vae/"
        return _component_files(names, prefix)
    wanted = [name for name in SMALL_FILES if name in names]
    for component in _COMPONENTS:
        wanted += [name for name in _component_files(names, f"{component}/") if name not in wanted]
    return wanted


def _component_files(names: Sequence[str], prefix: str) -> list[str]:
    own = [name[len(prefix) :] for name in names if name.startswith(prefix) and "/" not in name[len(prefix) :]]
    chosen = choose_weights(own)
    if chosen is None or "config.json" not in own:
        return []
    return [f"{prefix}config.json", f"{prefix}{chosen}"]


def _is_complete(folder: Path) -> bool:
    names = [item.relative_to(folder).as_posix() for item in folder.rglob("*") if item.is_file()]
    wanted = wanted_files(names)
    if "model_index.json" in names and not all(_component_files(names, f"{part}/") for part in _COMPONENTS):
        return False
    indexes = [folder / name for name in wanted if name.endswith(".json") and ".index." in name]
    return bool(wanted) and all((index.parent / shard).is_file() for index in indexes for shard in _shards(index))


def _shards(index: Path) -> list[str]:
    return sorted(set(shard_names(index).values()))


def _network_errors() -> tuple[type[BaseException], ...]:
    """Return what the hub client raises: its own errors and those of the HTTP library that it uses."""
    from huggingface_hub import errors

    found: list[type[BaseException]] = [OSError, ValueError, errors.HfHubHTTPError]
    try:
        import httpx

        found.append(httpx.HTTPError)
    except ImportError:
        pass
    return tuple(found)


def from_hub(
    name: str,
    option: str,
    *,
    near: str = "",
    wanted: Callable[[Iterable[str]], list[str]] = wanted_files,
    is_complete: Callable[[Path], bool] = _is_complete,
) -> Path:
    """Return the folder of a hub repository in the local cache, fetched when it is not complete there.

    Args:
        name: of the repository, such as ``owner/model``.
        option: that named it, for messages.
        near: hint with local names that are like it.
        wanted: chooses among the names of all files those that are needed; none means that it is no such model.
        is_complete: tells whether a folder of the cache holds all that is needed.

    Raises:
        UserError: it is neither in the cache nor within reach, or is no such model.
    """
    where = f"{option} {name}"
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError("no such file or folder", near, where=where) from error
    errors = _network_errors()
    try:
        cached = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
        if is_complete(cached):
            return cached
    except errors:
        pass
    _log.info("%s is no local path; looking for it on the hub", name)
    try:
        return _download(name, wanted)
    except errors as error:
        raise _unreachable(error, where, near) from error


def _download(name: str, choose: Callable[[Iterable[str]], list[str]]) -> Path:
    """Fetch a model: one request for its list of files, then each file (interrupted downloads go on)."""
    from huggingface_hub import HfApi, hf_hub_download

    listing = HfApi().model_info(name, timeout=_TIMEOUT)
    names = [item.rfilename for item in listing.siblings or []]
    wanted = choose(names)
    if not wanted:
        kind = "not a Diffusers model: no model_index.json and no VAE"
        raise UserError(kind if choose is wanted_files else "lacks the files of such a model", where=name)
    folder = Path()
    for filename in wanted:
        local = Path(hf_hub_download(name, filename, revision=listing.sha, etag_timeout=_TIMEOUT))
        folder = local.parents[filename.count("/")]
        if filename.endswith(".json") and ".index." in filename:
            for shard in _shards(local):
                inside = str(Path(filename).parent / shard)
                hf_hub_download(name, inside, revision=listing.sha, etag_timeout=_TIMEOUT)
    return folder


def fetch_files(
    name: str, filenames: Iterable[str], folder: Path, *, option: str, hint: str, again: bool = False
) -> None:
    """Download single files of a hub repository into `folder`, below which they keep their names.

    Args:
        name: of the repository, `owner/name`.
        filenames: inside the repository.
        folder: is made when it is missing.
        option: that named the repository, for messages.
        hint: what the user can do where there is no network.
        again: download files that are there already, too.

    Raises:
        UserError: a file is not there or cannot be had.
    """
    where = f"{option} {name}"
    if not is_hub_id(name):
        raise UserError("is no name of a hub repository", "It has the form owner/name.", where=where)
    try:
        from huggingface_hub import HfApi, hf_hub_download
    except ImportError as error:
        raise UserError("huggingface_hub, which downloads models, is not installed", hint, where=where) from error
    try:
        # Without a network this request fails at once; the downloads would try again and again.
        revision = HfApi().model_info(name, timeout=_TIMEOUT).sha
        fetch = partial(hf_hub_download, revision=revision, local_dir=folder, etag_timeout=_TIMEOUT)
        for filename in filenames:
            fetch(name, filename, force_download=again)
    except _network_errors() as error:
        raise UserError(f"cannot be downloaded: {_hub_reason(error)}", hint, where=where) from error


def _hub_reason(error: BaseException) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no repository of that name (or it is private)"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return "a file is not in the repository"
    if isinstance(error, errors.OfflineModeIsEnabled) or isinstance(error.__cause__, errors.OfflineModeIsEnabled):
        return "offline mode is on"
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    return "the hub cannot be reached"


def _unreachable(error: BaseException, where: str, near: str) -> UserError:
    from huggingface_hub import errors

    what = "local path not found, so it was taken for a hub model"
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(f"{what}, and the hub has none of that name (or it is private)", near, where=where)
    offline = isinstance(error, errors.OfflineModeIsEnabled)
    reason = "offline mode is on" if offline else "the hub cannot be reached"
    command = f"hf download {where.split(' ')[-1]}"
    near = near if near.endswith(("?", ".")) or not near else f"{near}."
    hint = f"{near} Download it where there is a network ({command}), or give a local file or folder".strip()
    return UserError(f"{what}, which is not in the local cache, and {reason}", hint, where=where)
