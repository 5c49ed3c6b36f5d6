"""What the tools that merge captions or tags into a metadata file share: options, keys of images, reading, the report.

The file is what training reads with `--in_json`: image key -> `{"caption": ..., "tags": ...}`. Entries and values that
are there already stay, so captions and tags are merged one after the other into the same file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from finetune.picture_tools import PictureOptions
from library.errors import Problem, UserError
from library.option_groups import OptionGroup, OptionSet, opt
from networks.tool_parts import check_output

if TYPE_CHECKING:
    from library.data.folder_listing import FolderFiles

_log = logging.getLogger(__name__)

_EXAMPLES = 3
_AT_ONCE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class MergeOptions(OptionGroup, title="metadata"):
    """The metadata file, and how its entries are named."""

    out_json: str = opt("", positional=True, path=True, help="Metadata file to write: .json, or .jsonl for JSON lines.")
    in_json: str | None = opt(
        None, path=True, help="Metadata file to add to. Default: the file that is written, where it exists."
    )
    full_path: bool = opt(
        False,
        excludes={"relative_path": "an image has one key"},
        help="Name entries by the path of the image, as train_data_dir spells it. Default: file name without suffix.",
    )
    relative_path: bool = opt(
        False, help="Name entries by the path inside train_data_dir with suffix, such as cats/0001.jpg."
    )
    caption_encoding: str = opt("utf-8", help="Encoding of the text files.")

    def check(self) -> Iterator[Problem]:
        """A known encoding, and a file that can be written."""
        import codecs

        try:
            codecs.lookup(self.caption_encoding)
        except LookupError:
            yield Problem("--caption_encoding", f"there is no encoding {self.caption_encoding!r}", "utf-8 is usual.")
        yield from check_metadata_output("out_json", self.out_json)


def check_metadata_output(where: str, path: str) -> Iterator[Problem]:
    """Yield what is wrong with the name of a metadata file that shall be written."""
    if path and Path(path).is_dir():
        yield Problem(f"{where} {path}", "is a folder", "Give the name of a file.")
    elif path and Path(path).suffix.lower() not in (".json", ".jsonl"):
        yield Problem(f"{where} {path}", "is no name of a metadata file", "End it with .json or .jsonl.")
    else:
        yield from check_output(where, path, ())


TEXT_FILES = {"help": "Suffix of the text files that are read (--caption_extention means the same)."}
"""What the scripts change in the declaration of `--caption_extension`, besides its default."""


@dataclass(frozen=True, kw_only=True)
class MergeSet(
    OptionSet,
    leave_out=("skip_existing", "batch_size", "max_data_loader_n_workers"),
    changes={
        "recursive": {
            "needs": {"full_path": (), "relative_path": ()},
            "help": "Look into sub-folders, too; needs keys that tell the folders apart.",
        },
        "debug": {"help": "Print the key and the text of every image."},
    },
):
    """Base of the options of both scripts; `field` is the key of an entry that the text becomes."""

    field: ClassVar[str] = ""

    pictures: PictureOptions
    merge: MergeOptions


def run_merge(options: MergeSet) -> None:
    """Read the text file of every image into the metadata file.

    Raises:
        UserError: there are no images or no texts, or the metadata file to add to is damaged.
        CannotSave: the file could not be written.
    """
    from library.data.metadata_files import read_table, write_table

    source = options.merge.in_json
    if source is None and Path(options.merge.out_json).is_file():
        source = options.merge.out_json
    table = read_table(source) if source is not None else {}
    if source is not None:
        _log.info("%s holds %d entries, which are added to", source, len(table))
    pictures = options.pictures.pictures()
    found = _Texts(pictures, options)
    before = len(table)
    for key, text in found:
        table.setdefault(key, {})[options.field] = text
    found.report()
    write_table(options.merge.out_json, table)
    _log.info(
        "wrote %s: %d entries (%d new), %s of %d images merged",
        options.merge.out_json,
        len(table),
        len(table) - before,
        options.field if options.field.endswith("s") else f"{options.field}s",
        found.done,
    )


class _Texts:
    """Iterates over (key, text) of the images that have a readable text file; remembers the others."""

    def __init__(self, pictures: Sequence[Path], options: MergeSet) -> None:
        self._pictures, self._options = pictures, options
        self._bad: list[Any] = []
        self._missing: list[str] = []
        self.done = 0

    def __iter__(self) -> Iterator[tuple[str, str]]:
        from tqdm import tqdm

        from library.data.folder_listing import FolderFiles
        from networks.tool_parts import show

        with tqdm(total=len(self._pictures), desc=f"merging {self._options.field}", unit="image", leave=False) as bar:
            # Pictures come folder by folder.
            for folder, names in groupby(map(os.path.split, self._pictures), key=itemgetter(0)):
                with FolderFiles(folder or ".") as reader:
                    for _, name in names:
                        bar.update()
                        text = self._text(reader, folder, name)
                        if text is None:
                            continue
                        key = self._key(folder, name)
                        if self._options.pictures.debug:
                            show([f"{key!a}: {text!a}"])
                        yield key, text

    def _text(self, reader: FolderFiles, folder: str, name: str) -> str | None:
        """Return the text of a picture; None when there is none, which is remembered."""
        from library.data.bad_files import BadFile
        from library.data.caption_files import BadCaption, decode_caption
        from library.data.captions import clean_caption

        file = name[: name.rfind(".")] + self._options.pictures.suffix
        path = os.path.join(folder, file)  # noqa: PTH118 - a hundred thousand images
        try:
            text = decode_caption(_content(reader.open(file)), self._options.merge.caption_encoding)
        except FileNotFoundError:
            self._missing.append(path)
        except BadCaption as error:
            self._bad.append(BadFile(path, error.reason, error.hint))
        except OSError as error:
            self._bad.append(BadFile(path, error.strerror or str(error)))
        else:
            self.done += 1
            return clean_caption(text)[0].strip()
        return None

    def _key(self, folder: str, name: str) -> str:
        """Return the name of an image's entry."""
        if self._options.merge.full_path:
            return os.path.join(folder, name)  # noqa: PTH118
        if self._options.merge.relative_path:
            return (Path(folder) / name).relative_to(self._options.pictures.train_data_dir).as_posix()
        return name[: name.rfind(".")]

    def report(self) -> None:
        """Name what is missing and what cannot be read.

        Raises:
            UserError: not one text was found.
        """
        from library.data.jobs import JobReport

        total, field = len(self._pictures), self._options.field
        if len(self._missing) == total:
            what = f"none of {total} images has a {self._options.pictures.suffix} file"
            where = self._options.pictures.train_data_dir
            raise UserError(what, "Is this the right --caption_extension?", where=where)
        if self._missing:
            shown = ", ".join(self._missing[:_EXAMPLES]) + (", ..." if len(self._missing) > _EXAMPLES else "")
            _log.warning("%d of %d images have no %s file: %s", len(self._missing), total, field, shown)
        if self._bad:
            JobReport(f"merging {field}", self.done, 0, self._bad).close()


def _content(descriptor: int) -> bytes:
    """Return the bytes of an open text file, and close it; of a file that is too large to be one, an error."""
    from library.data.caption_files import MAX_BYTES, BadCaption

    try:
        data = os.read(descriptor, _AT_ONCE)
        if len(data) == _AT_ONCE:
            while len(data) <= MAX_BYTES and (more := os.read(descriptor, MAX_BYTES)):
                data += more
    finally:
        os.close(descriptor)
    if len(data) > MAX_BYTES:
        raise BadCaption(f"has more than {MAX_BYTES >> 20} MiB", "Is this a text file?")
    return data
