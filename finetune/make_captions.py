"""Write a caption beside every picture of a folder, made by BLIP or another model that describes pictures.

python finetune/make_captions.py --batch_size 8 D:/pictures
python finetune/make_captions.py --local_model models/blip-image-captioning-large --beam_search --num_beams 3 pictures
python finetune/make_captions.py --model_id microsoft/Florence-2-base --prompt "<DETAILED_CAPTION>" pictures
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.picture_tools import DeviceOptions, PictureOptions  # noqa: E402
from library import cli  # noqa: E402
from library.errors import Problem  # noqa: E402
from library.option_groups import OptionGroup, OptionSet, opt  # noqa: E402

if TYPE_CHECKING:
    from finetune.caption_models import CaptionModel

BLIP_LARGE = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/model_large_caption.pth"


@dataclass(frozen=True, kw_only=True)
class ModelOptions(OptionGroup, title="model"):
    """Which model describes the pictures."""

    caption_weights: str = opt(
        BLIP_LARGE,
        path=True,
        help="BLIP: a checkpoint of its authors (file or URL, fetched once), or a folder or hub id of transformers.",
    )
    local_model: str | None = opt(
        None,
        path=True,
        excludes={"model_id": "both name the model"},
        help="Folder of a model as transformers saves it, with tokenizer and processor. Nothing is looked up.",
    )
    model_id: str | None = opt(
        None,
        path=True,
        help="Hub id (or folder) of any model that makes texts from pictures and that transformers itself knows: "
        "BLIP, BLIP-2, GIT, Florence-2, LLaVA and others.",
    )
    tokenizer: str | None = opt(
        None,
        path=True,
        help="vocab.txt of bert-base-uncased, or its folder, for a BLIP checkpoint of its authors. Default: vocab.txt "
        "beside the checkpoint, else from the hub.",
    )
    prompt: str | None = opt(
        None,
        help="What BLIP shall go on with (not part of the caption), or what other models are asked. Default: "
        "'a picture of ' for BLIP, what is usual for others.",
    )

    def check(self) -> Iterator[Problem]:
        """One model."""
        for name, value in (("local_model", self.local_model), ("model_id", self.model_id)):
            if value is not None and self.caption_weights != BLIP_LARGE:
                yield Problem("--caption_weights", f"cannot be combined with --{name}: both name the model")

    def warn(self) -> Iterator[Problem]:
        """A vocabulary belongs to a checkpoint without one."""
        if self.tokenizer is not None and (self.local_model or self.model_id):
            yield Problem("--tokenizer", "has no effect with a folder of transformers, which has its own")


@dataclass(frozen=True, kw_only=True)
class DecodingOptions(OptionGroup, title="captions"):
    """How captions are made."""

    beam_search: bool = opt(False, help="Search for the most likely caption. Default: nucleus sampling.")
    num_beams: int = opt(1, at_least=1, matters_when={"beam_search": ()}, help="Number of beams of --beam_search.")
    top_p: float = opt(0.9, more_than=0, at_most=1, help="Share of probability that nucleus sampling keeps.")
    max_length: int = opt(75, at_least=1, help="Most tokens of a caption.")
    min_length: int = opt(5, at_least=0, help="Fewest tokens of a caption.")
    seed: int = opt(42, help="Of nucleus sampling; the caption of a picture does not depend on its batch.")

    def check(self) -> Iterator[Problem]:
        """Lengths that leave room."""
        if self.min_length > self.max_length:
            yield Problem("--min_length", f"is {self.min_length}, more than --max_length {self.max_length}")

    def warn(self) -> Iterator[Problem]:
        """What belongs to sampling alone."""
        if self.beam_search and self.top_p != 0.9:
            yield Problem("--top_p", "has no effect with --beam_search")


@dataclass(frozen=True, kw_only=True)
class Options(OptionSet):
    """Everything that make_captions.py accepts."""

    pictures: PictureOptions
    model: ModelOptions
    decoding: DecodingOptions
    device: DeviceOptions


def make_captions(options: Options) -> None:
    """Caption the pictures of a folder.

    Raises:
        UserError: the model or the pictures cannot be used.
        StopTraining: a signal arrived, or a caption could not be saved.
    """
    from finetune.captioning import Captioner, Decoding, caption_pictures

    wanted = options.decoding
    decoding = Decoding(
        method="beam" if wanted.beam_search else "nucleus",
        max_length=wanted.max_length,
        min_length=wanted.min_length,
        num_beams=wanted.num_beams,
        top_p=wanted.top_p,
        seed=wanted.seed,
    )
    root = Path(options.pictures.train_data_dir)
    caption_pictures(
        options.pictures,
        lambda: Captioner(_model(options), decoding, prompt=options.model.prompt, root=root),
        title="captioning",
    )


def _model(options: Options) -> CaptionModel:
    from finetune.caption_models import load_blip, load_folder, weights_file

    named = options.model
    device, dtype = options.device.device_here(), options.device.dtype()
    if named.local_model is not None:
        return load_folder(named.local_model, "--local_model", device=device, dtype=dtype, hub=False)
    if named.model_id is not None:
        return load_folder(named.model_id, "--model_id", device=device, dtype=dtype)
    file = weights_file(named.caption_weights)
    if file is not None:
        return load_blip(file, named.tokenizer, device=device, dtype=dtype)
    return load_folder(named.caption_weights, "--caption_weights", device=device, dtype=dtype)


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, make_captions, argv=argv)


if __name__ == "__main__":
    main()
