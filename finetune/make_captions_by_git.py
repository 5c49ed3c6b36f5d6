"""Write a caption beside every picture of a folder, made by GIT.

python finetune/make_captions_by_git.py --batch_size 8 --remove_words D:/pictures
python finetune/make_captions_by_git.py --local_model models/git-large-textcaps pictures
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.picture_tools import DeviceOptions, PictureOptions  # noqa: E402
from library import cli  # noqa: E402
from library.option_groups import OptionGroup, OptionSet, opt  # noqa: E402


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
    from finetune.caption_models import load_folder
    from finetune.captioning import Captioner, Decoding, caption_pictures
    from finetune.remove_words import without_words

    named = options.git
    options.pictures.pictures()  # before the model is loaded
    model = load_folder(
        named.local_model or named.model_id,
        "--local_model" if named.local_model else "--model_id",
        device=options.device.device_here(),
        dtype=options.device.dtype(),
        hub=named.local_model is None,
    )
    root = Path(options.pictures.train_data_dir)
    captioner = Captioner(model, Decoding(method="greedy", max_length=named.max_length), prompt=None, root=root)
    mend = without_words if named.remove_words else str
    caption_pictures(options.pictures, captioner, title="captioning", mend=mend)


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, make_captions, argv=argv)


if __name__ == "__main__":
    main()
