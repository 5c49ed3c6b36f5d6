"""Convert a LoRA of Stable Cascade between the layouts of its original trainer and of kohya's scripts and ComfyUI.

python networks/convert_stable_cascade_lora.py lora_fernando_10k.safetensors for_comfyui.safetensors
python networks/convert_stable_cascade_lora.py mine.safetensors for_the_notebooks.safetensors --to official

The original layout numbers its matrices, so what they belong to follows from --module_filters of the training (.attn in
the published configuration) and from the size of stage C. Words that were trained along are kept as they are; with the
text encoder and --train_tokens they also become vectors that ComfyUI can use.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli  # noqa: E402
from library.errors import Problem, UserError  # noqa: E402
from library.log import safe_text  # noqa: E402
from library.option_groups import OptionGroup, OptionSet, opt  # noqa: E402
from library.training.options_tokens import TokenOptions  # noqa: E402
from networks.tool_parts import PRECISIONS, check_output, dtype_of  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

    from library.checkpoints.cascade_lora import Entry
    from library.checkpoints.lora_file import LoraFile

_log = logging.getLogger(__name__)

LAYOUTS = ("kohya", "official")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(OptionGroup, title="conversion"):
    """One LoRA in, the same LoRA in the other layout out."""

    src: str = opt("", positional=True, path=True, help="LoRA to read.")
    dst: str = opt("", positional=True, path=True, help="File to write, ending in .safetensors.")
    to: str | None = opt(None, choices=LAYOUTS, help="Layout to write. Default: the one that the source has not.")
    module_filters: tuple[str, ...] = opt(
        (".attn",), help="What the numbers of the original layout stand for: module_filters of its training."
    )
    stage_c_checkpoint_path: str | None = opt(
        None, path=True, help="Stage C that the LoRA is for; only needed for sizes other than 3.6B and 1B."
    )
    text_model_checkpoint_path: str | None = opt(
        None, path=True, help="Text encoder: with it, trained words become vectors that ComfyUI can use, too."
    )
    save_precision: str | None = opt(
        None, choices=PRECISIONS, help="Format of the numbers in the new file. Default: that of the old one."
    )

    def check(self) -> Iterator[Problem]:
        """A file to write that is not the one to read."""
        if self.dst and Path(self.dst).suffix.lower() != ".safetensors":
            yield Problem(self.dst, "is no name of a safetensors file", "End it with .safetensors.")
        yield from check_output("dst", self.dst, (self.src,))


@dataclass(frozen=True, kw_only=True)
class Options(OptionSet, leave_out=("train_tokens_init", "embedding_lr")):
    """Everything that convert_stable_cascade_lora.py accepts."""

    convert: ConvertOptions
    tokens: TokenOptions


def convert(options: Options) -> Path:
    """Read, convert and write; return the path of the new file.

    Raises:
        UserError: the source is damaged, no LoRA of stage C, or the layout cannot hold it.
    """
    from library.checkpoints.cascade_lora_export import known_config, to_official
    from library.checkpoints.lora_export import to_kohya
    from library.checkpoints.lora_file import read_lora, require_base, write_lora

    chosen = options.convert
    file = read_lora(chosen.src, entries=_entries(chosen))
    require_base(file, "stable_cascade")
    to = chosen.to or ("kohya" if file.layout == "official" else "official")
    if to == "official":
        _warn_of_words(file)
        tensors, metadata = to_official(file, chosen.module_filters, known_config(chosen.stage_c_checkpoint_path))
    else:
        made = to_kohya(file)
        tensors, metadata = {**made.tensors, **file.bundled, **_vectors(options, file)}, made.metadata
    if file.unknown:
        _log.warning("%d tensors are left out: %s", len(file.unknown), safe_text(", ".join(file.unknown)))
    written = write_lora(chosen.dst, tensors, metadata, precision=dtype_of(chosen.save_precision))
    _log.info("wrote %s: %d modules, %s -> %s", safe_text(written), len(file.modules), file.layout, to)
    return written


def _entries(chosen: ConvertOptions) -> list[Entry] | None:
    """Return what the numbers of the source stand for if options say so."""
    from library.checkpoints.cascade_configs import CONFIGS
    from library.checkpoints.cascade_lora import fits, is_official, walk
    from library.checkpoints.cascade_lora_export import known_config
    from library.checkpoints.headers import file_kind, read_header

    if Path(chosen.src).is_dir() or file_kind(Path(chosen.src)) != "safetensors":
        return None
    shapes = read_header(Path(chosen.src)).shapes
    own = known_config(chosen.stage_c_checkpoint_path)
    candidates = [own] if own else [config for (stage, _), config in CONFIGS.items() if stage == "c"]
    walks = (walk(config, chosen.module_filters) for config in candidates)
    return next((entries for entries in walks if is_official(shapes) and fits(entries, shapes)), None)


def _warn_of_words(file: LoraFile) -> None:
    """Say so where only vectors of words are there, not what training added to them."""
    from library.checkpoints.cascade_lora import WORD_CHANGES

    if file.bundled and WORD_CHANGES not in file.bundled:
        _log.warning("the words in the file are left out: it does not hold what training added to their rows")


def _vectors(options: Options, file: LoraFile) -> Mapping[str, Tensor]:
    """Return the vectors of new words, where the text encoder and what they began with are known."""
    from library.checkpoints.cascade_lora import check_word_width, word_changes

    changed = word_changes(file.bundled, options.convert.src)
    if changed is None:
        return {}
    text = options.convert.text_model_checkpoint_path
    if not text or not options.tokens.train_tokens:
        hint = "--text_model_checkpoint_path and --train_tokens as in the training would make them usable in ComfyUI"
        _log.warning("the trained words are kept in the original form alone; %s", hint)
        return {}
    from library.checkpoints.key_maps_cascade import TOKEN_EMBEDDING
    from library.checkpoints.load_cascade import load_text
    from library.models.token_choice import find_tokens, new_rows

    tokens = find_tokens(options.tokens.train_tokens, options.tokens.train_tokens_limit)
    table = load_text(text).tensors[TOKEN_EMBEDDING]
    check_word_width(changed[1], table.shape[1], options.convert.src)
    found = new_rows(tokens, table, *changed)
    if not found:
        raise UserError("is for other rows than those of the words in the file", where="--train_tokens")
    return found


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, convert, argv=argv)


if __name__ == "__main__":
    main()
