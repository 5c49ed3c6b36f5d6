"""List the tokens whose text features a LoRA changes most, which tells what words it was trained on.

Every token of the vocabulary goes through the text encoder by itself, with and without the LoRA.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli  # noqa: E402
from library.errors import Problem, UserError  # noqa: E402
from library.log import safe_text  # noqa: E402
from library.option_groups import OptionGroup, OptionSet, opt  # noqa: E402
from networks.tool_parts import device_of, missing_options, show  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

    from library.checkpoints.lora_file import LoraFile
    from library.models.clip_text import TextEncoder

_log = logging.getLogger(__name__)

_SHOWN = 100


@dataclass(frozen=True, kw_only=True)
class InterrogateOptions(OptionGroup, title="interrogation"):
    """A LoRA and the model it is for."""

    v2: bool = opt(False, help="The model is a Stable Diffusion 2.x model.")
    sd_model: str | None = opt(None, path=True, help="Model that the LoRA is for: file, Diffusers folder or hub id.")
    model: str | None = opt(None, path=True, help="LoRA file to interrogate.")
    batch_size: int = opt(256, at_least=1, help="Tokens at a time; it changes the speed alone.")
    clip_skip: int | None = opt(None, at_least=1, help="Take the features of the layer this far from the end.")
    device: str | None = opt(None, help="Where to compute, such as cuda. Default: cpu.")

    def check(self) -> Iterator[Problem]:
        """Names are needed."""
        yield from missing_options(sd_model=self.sd_model, model=self.model)


@dataclass(frozen=True, kw_only=True)
class Options(OptionSet):
    """Everything that lora_interrogator.py accepts."""

    interrogate: InterrogateOptions


def token_changes(
    before: TextEncoder, after: TextEncoder, *, skip: int, batch_size: int, tokens: int | None = None
) -> Tensor:
    """Return the mean absolute difference of two encoders' features of each token [tokens], on the CPU.

    A token stands after the start token; what would follow it cannot be seen by it, so nothing does.
    """
    import torch
    from tqdm import tqdm

    from library.contracts import START_ID
    from library.models.tokenizer import VOCABULARY_SIZE

    count = VOCABULARY_SIZE if tokens is None else tokens
    changes = torch.empty(count)
    with torch.inference_mode(), tqdm(total=count, desc="tokens", leave=False) as bar:
        for first in range(0, count, batch_size):
            ids = torch.arange(first, min(first + batch_size, count), device=before.device)
            pair = torch.stack([torch.full_like(ids, START_ID), ids], dim=1)
            features = [encoder(pair, skip)[:, 1].float() for encoder in (before, after)]
            changes[first : first + len(ids)] = (features[0] - features[1]).abs().mean(1).cpu()
            bar.update(len(ids))
    return changes


def interrogate(options: InterrogateOptions) -> list[tuple[int, str, float]]:
    """Show the tokens that change most; return (id, text, change) of each, largest first.

    Raises:
        UserError: a file cannot be read, the LoRA is for another model, or has nothing for the text encoder.
    """
    from library.checkpoints.lora_file import inspect_lora, read_lora, require_base

    family = "sd2" if options.v2 else "sd1"
    info = inspect_lora(str(options.model))
    require_base(info, family, "--model")
    if not info.has_text_encoder:
        raise UserError("has nothing for the text encoder, so words change nothing", where=str(info.path))
    device = device_of(options.device)
    before, after = _encoders(options, read_lora(info.path), family, device)
    from library.models.clip_text import check_clip_skip

    skip = check_clip_skip(options.clip_skip, before)
    changes = token_changes(before, after, skip=skip, batch_size=options.batch_size)
    if not changes.isfinite().all():
        what = "gives NaN or infinity: its text encoder is damaged"
        raise UserError(what, "Fetch or save the model again", where=f"--sd_model {options.sd_model}")
    order = changes.argsort(descending=True, stable=True)[:_SHOWN].tolist()
    texts = _token_texts()
    found = [(token, texts[token], float(changes[token])) for token in order]
    rows = enumerate(found)
    show([f"top {len(found)}:"])
    show(f"[{place:3d}]: {token:5d} {safe_text(text):<20s}: {change:.5f}" for place, (token, text, change) in rows)
    return found


def _encoders(
    options: InterrogateOptions, file: LoraFile, family: str, device: torch.device
) -> tuple[TextEncoder, TextEncoder]:
    """Return the text encoder of the model, and the same with the LoRA merged into it."""
    import torch

    from library.checkpoints.load import load_parts
    from library.models.clip_text import build_text_encoder

    parts = load_parts(str(options.sd_model), family)
    build: dict[str, Any] = {"device": device, "dtype": torch.float32}
    before = build_text_encoder(parts.text_config, parts.text, **build)
    return before, build_text_encoder(parts.text_config, _merged(parts.text, file), **build)


def _merged(text: Mapping[str, Tensor], file: LoraFile) -> dict[str, Tensor]:
    from library.checkpoints.lora_math import apply_delta
    from library.checkpoints.lora_names import TEXT, module_names

    paths = {name.rpartition(".")[0]: tensor.dim() for name, tensor in text.items() if name.endswith(".weight")}
    places = module_names([path for path, dim in paths.items() if dim == 2], TEXT)
    merged = dict(text)
    for name, path in places.items():
        if name in file.modules:
            key = f"{path}.weight"
            merged[key] = apply_delta(text[key], file.modules[name], 1.0)
    lost = [name for name in file.modules if name.startswith("lora_te") and name not in places]
    if lost:
        _log.warning("%d modules fit no layer of this text encoder: %s", len(lost), ", ".join(lost[:5]))
    if not any(name in file.modules for name in places):
        raise UserError("none of its text encoder modules fits this model", where=str(file.path))
    return merged


def _token_texts() -> list[str]:
    """Return every token of the vocabulary as text, in the order of ids."""
    from tokenizers import decoders

    from library.models.tokenizer import vocabulary

    decoder = decoders.ByteLevel()
    tokens = sorted(vocabulary().items(), key=lambda item: item[1])
    return [decoder.decode([token.removesuffix("</w>")]) for token, _ in tokens]


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, lambda opts: interrogate(opts.interrogate), argv=argv)


if __name__ == "__main__":
    main()
