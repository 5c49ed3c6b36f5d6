"""Convert a LoRA between the layouts of kohya's scripts, PEFT and diffusers.

python tools/convert_lora.py my_lora.safetensors for_diffusers.safetensors --to peft
python tools/convert_lora.py pytorch_lora_weights.safetensors for_comfyui.safetensors --to kohya

The layout of the source is found out from the file, also that of OneTrainer, ai-toolkit, SimpleTuner and LyCORIS.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli  # noqa: E402
from library.errors import Problem, UserError  # noqa: E402
from library.log import safe_text  # noqa: E402
from library.option_groups import OptionGroup, OptionSet, opt  # noqa: E402
from networks.tool_parts import PRECISIONS, check_output, dtype_of  # noqa: E402

if TYPE_CHECKING:
    from library.checkpoints.lora_export import Exported
    from library.checkpoints.lora_file import LoraFile

_log = logging.getLogger(__name__)

LAYOUTS = ("kohya", "peft", "diffusers")
BASES = ("sd1", "sd2", "sdxl")
_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".bin")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(OptionGroup, title="conversion"):
    """One LoRA in, the same LoRA in another layout out."""

    src: str = opt("", positional=True, path=True, help="LoRA to read: a file, or a folder as PEFT writes it.")
    dst: str = opt("", positional=True, path=True, help="File to write: .safetensors (or .ckpt, .pt, .bin).")
    to: str | None = opt(
        None,
        choices=LAYOUTS,
        help="Layout to write: kohya (for ComfyUI, web UIs and these scripts), peft (unet.*.lora_A.weight), or "
        "diffusers (unet.*.lora.down.weight). diffusers loads all three.",
    )
    base: str | None = opt(
        None, choices=BASES, help="Model that the LoRA was made for; only needed when the file does not tell."
    )
    save_precision: str | None = opt(
        None, choices=PRECISIONS, help="Format of the numbers in the new file. Default: that of the old one."
    )

    def check(self) -> Iterator[Problem]:
        """A layout, and a file to write that is not the one to read."""
        if self.to is None:
            yield Problem("--to", "is required", f"Give one of {', '.join(LAYOUTS)}.")
        if self.dst and (Path(self.dst).is_dir() or Path(self.dst).suffix.lower() not in _SUFFIXES):
            yield Problem(self.dst, "is no name of a LoRA file", f"End it with one of {', '.join(_SUFFIXES)}.")
        yield from check_output("dst", self.dst, (self.src,))


@dataclass(frozen=True, kw_only=True)
class Options(OptionSet):
    """Everything that convert_lora.py accepts."""

    convert: ConvertOptions


def convert(options: ConvertOptions) -> Path:
    """Read, convert and write; return the path of the new file.

    Raises:
        UserError: the source is damaged or no LoRA, it cannot be told what it is for, or the layout cannot hold it.
    """
    from library.checkpoints.lora_export import to_diffusers, to_kohya
    from library.checkpoints.lora_file import read_lora, write_lora

    file = read_lora(options.src, base=options.base)
    if file.may_be_sdxl and options.to == "kohya":
        hint = f"Add --base with one of {', '.join(BASES)}"
        raise UserError("neither names nor sizes tell which model it is for", hint, where=str(file.path))
    made = to_kohya(file) if options.to == "kohya" else to_diffusers(file, str(options.to))
    _report(file, made)
    if not made.tensors:
        raise UserError("none of its modules can be named in the new layout", where=str(file.path))
    written = write_lora(options.dst, made.tensors, made.metadata, precision=dtype_of(options.save_precision))
    done = len(file.modules) - len(made.left_out)
    _log.info("wrote %s: %d modules, %s -> %s", safe_text(written), done, file.layout, options.to)
    return written


def _report(file: LoraFile, made: Exported) -> None:
    """List what does not come along."""
    _list_left_out("tensors that nobody understands", file.unknown)
    _list_left_out("modules that are none of Stable Diffusion's", made.left_out)
    _list_left_out("tensors of bundled embeddings", file.bundled)


def _list_left_out(what: str, names: Iterable[str]) -> None:
    listed = list(names)
    if listed:
        _log.warning("%d %s are left out: %s", len(listed), what, safe_text(", ".join(listed)))


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, lambda opts: convert(opts.convert), argv=argv)


if __name__ == "__main__":
    main()
