"""Where a tagger's files are: in a folder of the user, in the folder of earlier downloads, or on the hub."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from library.checkpoints.hub import fetch_files, near_names
from library.errors import UserError

_log = logging.getLogger(__name__)

_OFFLINE_HINT = "Download {files} where there is a network, and give their folder as --local_model."
_SUB_FOLDER = re.compile(r"[\w][\w.-]*")
_KERAS = ("saved_model.pb", "keras_metadata.pb")


@dataclass(frozen=True)
class TaggerFormat:
    """How a family of taggers keeps and feeds its models.

    Attributes:
        name: for messages.
        model: name of the model's file.
        tags: name of the file that says what the outputs mean.
        channels_first: images go in as [batch, channel, row, column]; otherwise as [batch, row, column, channel].
        scaled: pixels go in as -1..1; otherwise as 0..255.
        logits: outputs go through a sigmoid to become probabilities, and tags are sorted by them.
    """

    name: str
    model: str
    tags: str
    channels_first: bool = False
    scaled: bool = False
    logits: bool = False


DEFAULT = TaggerFormat("default", "model.onnx", "selected_tags.csv")
SUB_FOLDER = TaggerFormat(
    "sub-folder", "model_optimized.onnx", "tag_mapping.json", channels_first=True, scaled=True, logits=True
)
FORMATS = (DEFAULT, SUB_FOLDER)


@dataclass(frozen=True)
class TaggerFiles:
    """A tagger on this machine."""

    model: Path
    tags: Path
    format: TaggerFormat


def local_files(name: str) -> TaggerFiles:
    """Return the files in a folder, or those that belong to a model file.

    Raises:
        UserError: there is no tagger.
    """
    path, where = Path(name).expanduser(), f"--local_model {name}"
    if not path.exists():
        raise UserError("no such file or folder", near_names(path), where=where)
    for kind in FORMATS:
        folder, model = (path, path / kind.model) if path.is_dir() else (path.parent, path)
        if model.is_file() and (folder / kind.tags).is_file():
            return TaggerFiles(model, folder / kind.tags, kind)
    pairs = " or ".join(f"{kind.model} with {kind.tags}" for kind in FORMATS)
    if path.is_file():
        lists = " or ".join(kind.tags for kind in FORMATS)
        raise UserError(f"there is no {lists} beside the model", "It says what the outputs mean.", where=where)
    if any((path / keras).exists() for keras in _KERAS):
        raise UserError("is a Keras model, and only ONNX models run here", f"Get {pairs}.", where=where)
    raise UserError("is no tagger", f"The folder must hold {pairs}.", where=where)


def repository_files(repo_id: str, model_dir: str, *, force_download: bool) -> TaggerFiles:
    """Return the files of a hub repository, `owner/name` or `owner/name/folder`, after a download if need be.

    Files lie in `<model_dir>/<owner>_<name>`, those of a folder below it. What is there is not downloaded again, unless
    `force_download` says so.

    Raises:
        UserError: the name is none of a repository, or the files cannot be had.
    """
    parts = repo_id.split("/")
    where = f"--repo_id {repo_id}"
    if len(parts) not in (2, 3) or not all(_SUB_FOLDER.fullmatch(part) and ".." not in part for part in parts):
        raise UserError("is no name of a hub repository", "Write owner/name or owner/name/folder.", where=where)
    kind = DEFAULT if len(parts) == 2 else SUB_FOLDER
    folder = Path(model_dir) / "_".join(parts[:2])
    inside = folder.joinpath(*parts[2:])
    found = TaggerFiles(inside / kind.model, inside / kind.tags, kind)
    wanted = [path for path in (found.model, found.tags) if force_download or not path.is_file()]
    if wanted:
        _log.info("downloading %s of %s into %s", " and ".join(path.name for path in wanted), repo_id, folder)
        names = [path.relative_to(folder).as_posix() for path in wanted]
        hint = _OFFLINE_HINT.format(files=" and ".join((kind.model, kind.tags)))
        fetch_files("/".join(parts[:2]), names, folder, option="--repo_id", hint=hint, again=force_download)
    return found
