"""Options of quickstart.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from library.errors import Problem
from library.option_groups import OptionGroup, opt


@dataclass(frozen=True, kw_only=True)
class QuickstartOptions(OptionGroup, title="quickstart"):
    """With `--model`, `--images` and `--prompt`: your own training. Without: a small one that shows everything."""

    model: str | None = opt(None, path=True, help="Stable Diffusion 1.x or 2.x: file, Diffusers folder or hub id.")
    images: str | None = opt(None, path=True, help="Folder with your pictures.")
    prompt: str | None = opt(None, help="What they show, with a rare word for it, such as: sks dog")
    method: str = opt(
        "lora",
        choices=("lora", "dreambooth", "textual_inversion"),
        help="lora: a small file beside the model, for cards of 8 to 12 GB. dreambooth: a whole model. "
        "textual_inversion: the meaning of the first word of --prompt, which begins as the last one.",
    )
    output: str = opt("quickstart_output", path=True, help="Folder for everything that is made.")
    steps: int | None = opt(
        None, at_least=1, help="Optimizer updates. Default: 1000 (dreambooth: 400), or 24 for the tiny model."
    )
    resolution: int | None = opt(
        None, at_least=64, help="Training resolution. Default: 512, or 128 for the tiny model."
    )

    def check(self) -> Iterator[Problem]:
        """A training of one's own needs all three."""
        values = {"--model": self.model, "--images": self.images, "--prompt": self.prompt}
        missing = [name for name, value in values.items() if not value]
        if missing and len(missing) < len(values):
            yield Problem(missing[0], "is required too", "Give --model, --images and --prompt together.")
        if self.method == "textual_inversion" and self.prompt and len(self.prompt.split()) < 2:
            yield Problem("--prompt", "must have two words: a new one and what it is", "For example: zduck duck")
        if self.images and not Path(self.images).is_dir():
            yield Problem("--images", f"{self.images} is not a folder")
        elif self.images and not any(path.is_file() for path in Path(self.images).iterdir()):
            yield Problem("--images", f"there is no file in {self.images}", "Give the folder that holds the pictures.")
