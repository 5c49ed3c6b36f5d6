"""Convert Stable Cascade models between official files, checkpoints for ComfyUI, and Diffusers folders.

python tools/convert_stable_cascade.py stage_c.safetensors prior --to diffusers
python tools/convert_stable_cascade.py stable-cascade-prior official_files --to official
python tools/convert_stable_cascade.py stable-cascade/decoder stage_b.safetensors --to official

A source with several parts makes a folder with all of them, or one file or folder of the part that --part names.
A folder with all that a pipeline of diffusers needs becomes one: stage C with a text encoder, or stages B and A with
one. Nothing is calculated, so converting there and back gives the same bits.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli  # noqa: E402
from library.errors import Problem, UserError  # noqa: E402
from library.log import safe_text  # noqa: E402
from library.option_groups import OptionGroup, OptionSet, opt  # noqa: E402
from networks.tool_parts import PRECISIONS, check_output, dtype_of  # noqa: E402

if TYPE_CHECKING:
    from library.checkpoints.load_cascade import LoadedPart

_log = logging.getLogger(__name__)

OFFICIAL, DIFFUSERS = "official", "diffusers"
FILE_NAMES = {
    "stage_c": "stage_c",
    "stage_b": "stage_b",
    "stage_a": "stage_a",
    "effnet": "effnet_encoder",
    "previewer": "previewer",
    "text": "text_model",
    "vision": "image_model",
}
"""Parts and the names of their official files."""
_SUFFIXES = (".safetensors", ".ckpt")
_OTHER_SUFFIXES = (".bin", ".pt", ".pth", ".sft", ".onnx", ".gguf", ".msgpack", ".h5", ".zip", ".tar")
"""Of files that other programs write; a folder of such a name would be a mistake. Names of folders may have dots."""
_STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""Entries of a header about the bytes of the old file."""


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(OptionGroup, title="conversion"):
    """One model in, the same model in the other layout out."""

    src: str = opt("", positional=True, path=True, help="File or folder to read; its layout is found out.")
    dst: str = opt("", positional=True, path=True, help="File (.safetensors or .ckpt) or folder to write.")
    to: str | None = opt(
        None,
        choices=(OFFICIAL, DIFFUSERS),
        help="Layout to write. Default: official where the destination is a file, else diffusers.",
    )
    part: str | None = opt(
        None, choices=tuple(FILE_NAMES), help="The one part to convert. Default: all that there are."
    )
    save_precision: str | None = opt(
        None, choices=PRECISIONS, help="Format of the numbers in the new files. Default: that of the old ones."
    )

    @property
    def is_file(self) -> bool:
        """Whether the destination is one file."""
        return Path(self.dst).suffix.lower() in _SUFFIXES and not Path(self.dst).is_dir()

    @property
    def layout(self) -> str:
        """Layout to write."""
        return self.to or (OFFICIAL if self.is_file else DIFFUSERS)

    def check(self) -> Iterator[Problem]:
        """Something to read, and something else to write."""
        if self.src and not Path(self.src).exists():
            yield Problem(self.src, "no such file or folder", "Check the path.")
        if self.is_file and self.to == DIFFUSERS:
            yield Problem(self.dst, "is the name of a file, but diffusers reads folders", "Leave out its suffix.")
        suffix = Path(self.dst).suffix
        if suffix.lower() in _OTHER_SUFFIXES and not Path(self.dst).is_dir():
            what = f"{suffix} is no suffix of a file that is written"
            yield Problem(self.dst, what, f"Give {' or '.join(_SUFFIXES)}, or a folder.")
        yield from check_output("dst", self.dst, (self.src,))


@dataclass(frozen=True, kw_only=True)
class Options(OptionSet):
    """Everything that convert_stable_cascade.py accepts."""

    convert: ConvertOptions


def convert(options: ConvertOptions) -> list[Path]:
    """Read, convert and write; return the new files or folders.

    Raises:
        UserError: the source is damaged or no Stable Cascade model, or the layout has no place for a part.
    """
    from library.checkpoints.parts import SaveSettings
    from library.checkpoints.save_cascade import COMPONENTS, save_component, save_part

    parts = _wanted(options)
    if options.save_precision == "fp16" and "stage_c" in parts:
        _log.warning("stage C overflows where programs calculate in the float16 of their files; bf16 is as small")
    written = []
    for part in parts:
        loaded = _load(part, options.src)
        precision = dtype_of(options.save_precision)
        if options.layout == DIFFUSERS:
            folder = Path(options.dst) / COMPONENTS[part] if len(parts) > 1 else Path(options.dst)
            path = save_component(folder, part, loaded.tensors, loaded.config, SaveSettings(precision))
        else:
            path = Path(options.dst) if options.is_file else Path(options.dst) / f"{FILE_NAMES[part]}.safetensors"
            settings = SaveSettings(precision, _own_metadata(loaded, single=len(parts) == 1))
            path = save_part(path, part, loaded.tensors, loaded.config, settings)
        _log.info("wrote %s: %s", safe_text(path), part)
        written.append(path)
    if options.layout == DIFFUSERS:
        _complete(Path(options.dst), parts)
    return written


def _complete(folder: Path, parts: Sequence[Any]) -> None:
    """Make a pipeline of the parts in a folder, also where they came one after the other."""
    from library.checkpoints.cascade_pipeline import complete_pipeline
    from library.checkpoints.save_cascade import COMPONENTS

    if len(parts) == 1:
        if folder.absolute().name != COMPONENTS[parts[0]]:
            return
        folder = folder.absolute().parent
    if complete_pipeline(folder):
        _log.info("%s is a pipeline of diffusers", safe_text(folder))
    elif {"stage_c", "stage_b"} <= set(parts):
        _log.warning("diffusers draws with stages C and B by two pipelines: it needs them in folders of their own")


def _wanted(options: ConvertOptions) -> list[Any]:
    """Return the parts to convert."""
    from library.checkpoints.load_cascade import parts_at
    from library.checkpoints.save_cascade import COMPONENTS

    # ControlNets have one layout only.
    found: list[Any] = [part for part in parts_at(options.src) if part in FILE_NAMES]
    if options.part is not None:
        found = [options.part]  # opening it says what else the source is
    elif not found:
        found = ["stage_c"]  # likewise
    if options.layout == DIFFUSERS:
        left = [part for part in found if part not in COMPONENTS]
        found = [part for part in found if part in COMPONENTS]
        if not found:
            raise UserError(f"diffusers has no place for its {left[0]}", "Give --to official.", where=options.src)
        if left:
            _log.warning("left out, since diffusers has no place for them: %s", ", ".join(left))
    if options.is_file and len(found) > 1:
        what = f"holds {len(found)} parts ({', '.join(found)}), which do not go into one file"
        raise UserError(what, "Choose one with --part, or give a folder.", where=options.src)
    return found


def _load(part: str, path: str) -> LoadedPart[Any]:
    from library.checkpoints import load_cascade

    if part in ("stage_c", "stage_b"):
        from library.models.cascade.file_fit import open_complete_stage

        return open_complete_stage(path, part[-1])
    loaders: dict[str, Any] = {
        "stage_a": load_cascade.load_stage_a,
        "effnet": load_cascade.load_effnet,
        "previewer": load_cascade.load_previewer,
        "text": load_cascade.load_text,
        "vision": load_cascade.load_vision,
    }
    return loaders[part](path)


def _own_metadata(loaded: LoadedPart[Any], *, single: bool) -> dict[str, str] | None:
    """Return what a file says of itself; of a file of many parts, none of it is known to be about this one."""
    kept = {name: value for name, value in loaded.metadata.items() if name not in _STALE}
    return kept if single and kept else None


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, lambda opts: convert(opts.convert), argv=argv)


if __name__ == "__main__":
    main()
