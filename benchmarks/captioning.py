"""Captioning: how much of the time the model works, when loader processes decode photographs beside it.

A BLIP of the true structure with random weights captions copies of the photographs in examples/, enlarged to
`--megapixels`, as make_captions.py does. `model busy` is the time inside the model over the whole time, from the start
of the loader processes to the last caption on disk. `pictures per second that loading can serve` is how fast a model
could be without waiting: the same run without a model.

    python benchmarks/captioning.py
    python benchmarks/captioning.py --size base --pictures 24 --workers 1
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report import report  # noqa: E402

SIZES = {
    "tiny": ({"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768}, 2),
    "base": ({"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}, 12),
    "large": ({"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}, 12),
}
PIXELS = 384
WORDS = 30522


def make_photographs(folder: Path, count: int, megapixels: float) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    sources = sorted((ROOT / "examples" / "photos").glob("*/*.jpg"))
    for index in range(count):
        picture = Image.open(sources[index % len(sources)])
        scale = (megapixels * 1e6 / (picture.width * picture.height)) ** 0.5
        size = (round(picture.width * scale), round(picture.height * scale))
        picture.resize(size).save(folder / f"{index:04d}.jpg", quality=92)


def random_blip(size: str, folder: Path) -> Any:
    """Return a BLIP with random weights, as `load_blip` returns one."""
    import torch
    from transformers import BlipConfig, BlipForConditionalGeneration

    from finetune.caption_inputs import ImageRecipe
    from finetune.caption_models import CaptionModel, bert_tokenizer

    torch.manual_seed(0)
    vision, layers = SIZES[size]
    wide = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": layers}
    config = BlipConfig(
        vision_config={**vision, "image_size": PIXELS, "patch_size": 16},
        text_config={**wide, "vocab_size": WORDS + 2, "encoder_hidden_size": vision["hidden_size"]},
    )
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture", "of"]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join([*words, *(f"w{index}" for index in range(WORDS - len(words)))]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = BlipForConditionalGeneration(config).to(device).eval()
    return CaptionModel(model, bert_tokenizer(vocabulary), ImageRecipe(size_wh=(PIXELS, PIXELS)))


def caption(folder: Path, captioner: Any, args: argparse.Namespace, work: Any) -> Any:
    """Do what make_captions.py does, with `work` in the place of the model."""
    from library import files
    from library.data.jobs import PictureJob, find_pictures, run_pictures

    def finish(path: Path, text: str) -> None:
        files.write_text(path.with_suffix(".caption"), f"{text}\n")

    job = PictureJob("captioning", captioner.prepare, work, finish, captioner.gather)
    paths = find_pictures(folder, recursive=False)
    return run_pictures(paths, job, batch_size=args.batch, workers=args.workers)


def no_model(paths: Sequence[Path], inputs: Any) -> list[str]:
    return ["a caption"] * len(paths)


def busy_rows(found: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what a job over pictures measured: how many, how busy the model was, how fast."""
    what = f"pictures of {args.megapixels:g} megapixels, {args.workers} workers"
    busy = found.busy_seconds / found.seconds
    return [
        {"what": what, "value": found.done, "limit": ""},
        {"what": "model busy, share of wall time", "value": busy, "limit": "at least 0.9"},
        {"what": "pictures per second", "value": found.done / found.seconds, "limit": ""},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--megapixels", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--output")
    args = parser.parse_args()
    import torch

    from finetune.captioning import Captioner, Decoding

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pictures"
        make_photographs(folder, args.pictures, args.megapixels)
        model = random_blip(args.size, Path(name))
        decoding = Decoding(method="nucleus", max_length=24, min_length=5)
        captioner = Captioner(model, decoding, prompt=None, root=folder)
        found = caption(folder, captioner, args, captioner.work)
        bare = caption(folder, captioner, args, no_model)
    served = {"what": "pictures per second that loading can serve", "value": bare.done / bare.seconds, "limit": ""}
    rows = [*busy_rows(found, args), served]
    report(f"captioning_{args.size}", rows, args.output)


if __name__ == "__main__":
    main()
