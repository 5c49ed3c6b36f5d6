"""What the tools that write a text beside every picture share: their options, which pictures, and where texts go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import Problem
from library.option_groups import OptionGroup, opt
from networks.tool_parts import PRECISIONS, device_of, dtype_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class PictureOptions(OptionGroup, title="pictures"):
    """Pictures of a folder and the texts beside them."""

    train_data_dir: str = opt("", positional=True, path=True, help="Folder with the pictures.")
    recursive: bool = opt(False, help="Look into sub-folders, too.")
    caption_extension: str = opt(
        ".caption", help="Suffix of the text files that are written (--caption_extention means the same)."
    )
    skip_existing: bool = opt(
        False, help="Leave pictures out that have their text file already: goes on where a run was stopped."
    )
    batch_size: int = opt(1, at_least=1, help="Most pictures that the model looks at together.")
    max_data_loader_n_workers: int | None = opt(
        None,
        at_least=0,
        help="Processes that load pictures, at most one for each core. Default: none, they are loaded in a thread.",
    )
    debug: bool = opt(False, help="Print the text of every picture.")

    def check(self) -> Iterator[Problem]:
        """A suffix that makes the name of another file, and not of the picture itself or of one elsewhere."""
        from library.data.folder_tree import IMAGE_SUFFIXES

        suffix = self.suffix
        if len(suffix) < 2 or "/" in suffix or "\\" in suffix:
            yield Problem(
                f"--caption_extension {self.caption_extension}", "is no suffix", "Give .caption, for example."
            )
        elif suffix.lower() in IMAGE_SUFFIXES:
            yield Problem(f"--caption_extension {suffix}", "is the suffix of pictures", "Give .caption, for example.")

    @property
    def suffix(self) -> str:
        """The suffix of the text files with its dot."""
        return self.caption_extension if self.caption_extension.startswith(".") else f".{self.caption_extension}"

    def pictures(self) -> list[Path]:
        """Return the pictures, sorted.

        Raises:
            UserError: there are none.
        """
        from library.data.jobs import find_pictures

        return find_pictures(Path(self.train_data_dir), recursive=self.recursive)

    def text_file(self, picture: Path) -> Path:
        """Return the text file of a picture."""
        return picture.with_suffix(self.suffix)

    def done(self) -> Callable[[Path], bool] | None:
        """Return what tells whether a picture is to be left out; None when none is."""
        return (lambda path: self.text_file(path).is_file()) if self.skip_existing else None


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(OptionGroup, title="device"):
    """Where the model works, and with which numbers."""

    device: str | None = opt(None, help="cpu, cuda or cuda:1, for example. Default: cuda when there is one, else cpu.")
    precision: str | None = opt(
        None,
        choices=PRECISIONS,
        help="Numbers of the model. Default: float; models other than BLIP and GIT stay as stored when on a GPU.",
    )

    def device_here(self) -> torch.device:
        """Return the device.

        Raises:
            UserError: there is no such device here.
        """
        import torch

        return device_of(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def dtype(self) -> torch.dtype | None:
        """Return the type of numbers that was asked for, None for the default."""
        return dtype_of(self.precision)
