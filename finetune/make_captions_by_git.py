"""Write a caption beside every picture of a folder, made by GIT.

python finetune/make_captions_by_git.py --batch_size 8 --remove_words D:/pictures
python finetune/make_captions_by_git.py --local_model models/git-large-textcaps pictures
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.picture_tools import DeviceOptions, PictureOptions  # noqa: E402
from library import cli  # noqa: E402
from library.option_groups import OptionGroup, OptionSet, opt  # noqa: E402

if TYPE_CHECKING:
    from finetune.caption_models import CaptionModel


@dataclass(frozen=True, kw_only=True)
class GitOptions(OptionGroup, title="model and captions"):
    """Which model, and what becomes of its words."""

    model_id: str = opt("microsoft/git-large-textcaps", path=True, help="Hub id or folder of the model.")
    local_model: str | None = opt(
        None, path=True, help="Folder of the model, in place of --model_id; nothing is looked up elsewhere."
    )
    max_length: int = opt(50, at_least=2, help="Most tokens of a caption.")
    remove_words: bool = opt(
        False, help="Cut out phrases about lettering, such as `with the word x on it` or `that says x`."
    )


@dataclass(frozen=True, kw_only=True)
class Options(OptionSet):
    """Everything that make_captions_by_git.py accepts."""

    pictures: PictureOptions
    git: GitOptions
    device: DeviceOptions


def make_captions(options: Options) -> None:
    """Caption the pictures of a folder, always with the most likely next word.

    Raises:
        UserError: the model or the pictures cannot be used.
        StopTraining: a signal arrived, or a caption could not be saved.
    """
    from finetune.captioning import Captioner, Decoding, caption_pictures
    from finetune.remove_words import without_words

    decoding = Decoding(method="greedy", max_length=options.git.max_length)
    root = Path(options.pictures.train_data_dir)
    caption_pictures(
        options.pictures,
        lambda: Captioner(_model(options), decoding, prompt=None, root=root),
        title="captioning",
        mend=without_words if options.git.remove_words else str,
    )


def _model(options: Options) -> CaptionModel:
    from finetune.caption_models import load_folder

    device, dtype = options.device.device_here(), options.device.dtype()
    if options.git.local_model is not None:
        return load_folder(options.git.local_model, "--local_model", device=device, dtype=dtype, hub=False)
    return load_folder(options.git.model_id, "--model_id", device=device, dtype=dtype)


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, make_captions, argv=argv)


if __name__ == "__main__":
    main()
