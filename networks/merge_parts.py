"""What the merging tools share: the files that go in, their strengths, and what the result says about itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.lora_blocks import SDXL_LENGTHS, block_weight_function, parse_block_weights
from library.contracts import FamilySpec
from library.errors import Problem, UserError
from library.option_groups import OptionGroup, opt
from networks.tool_parts import PRECISIONS, lora_modelspec, missing_options

if TYPE_CHECKING:
    from torch import Tensor

    from library.checkpoints.lora_file import LoraFile
    from library.checkpoints.lora_merge import Ingredient

_log = logging.getLogger(__name__)

_SDXL = FamilySpec(
    name="sdxl",
    prediction_type="epsilon",
    tokenizers=(),
    architecture="stable-diffusion-xl-v1-base",
    default_resolution_wh=(1024, 1024),
    base_model_version="sdxl_base_v1-0",
)
_V2_KEY, _BASE_KEY = "ss_v2", "ss_base_model_version"


@dataclass(frozen=True, kw_only=True)
class IngredientOptions(OptionGroup, title="files to merge"):
    """The LoRA files that go in, each with its strength, and the file that comes out."""

    models: tuple[str, ...] = opt((), path=True, help="LoRA files, of any layout and kind.")
    ratios: tuple[float, ...] = opt(
        (), help="Strength of each file, in the same order; 1 is as trained, below 0 takes it out. Default: all 1."
    )
    lbws: tuple[str, ...] = opt(
        (),
        help='Weights by block for each file, as JSON lists: "[1,0,...]" with 17 or 26 numbers (Stable Diffusion 1.x '
        "and 2.x) or 12 or 20 (SDXL). The first is for the text encoders.",
    )
    save_to: str | None = opt(None, path=True, help="What to write.")
    precision: str | None = opt(
        None,
        choices=PRECISIONS,
        help="Format of the numbers in the result where --save_precision is not given. Sums are always made in float.",
    )
    save_precision: str | None = opt(
        None, choices=PRECISIONS, help="Format of the numbers in the result. Default: --precision."
    )
    no_metadata: bool = opt(False, help="Leave the description (modelspec) out of the result.")

    def check(self) -> Iterator[Problem]:
        """Files and a name are needed; lists must be as long as the list of files."""
        yield from missing_options(save_to=self.save_to)
        if not self.models:
            yield Problem("--models", "is required", "See --help.")
        for name, values in (("ratios", self.ratios), ("lbws", self.lbws)):
            if values and len(values) != len(self.models):
                what = f"has {len(values)} values for {len(self.models)} files in --models"
                yield Problem(f"--{name}", what, "Give one for each file.")
        for text in self.lbws:
            try:
                parse_block_weights(text)
            except UserError as error:
                yield from error.problems


def read_ingredients(options: IngredientOptions, family: str | None) -> list[Ingredient]:
    """Read the LoRA files and pair them with their strengths; what is in them and cannot be merged is logged.

    Args:
        options: files, ratios, block weights.
        family: of the model they are for, where that is known.

    Raises:
        UserError: a file is damaged, no LoRA, or made for another model than the first or `family`.
    """
    from library.checkpoints.lora_file import read_lora, require_base
    from library.checkpoints.lora_merge import Ingredient

    ratios = options.ratios or (1.0,) * len(options.models)
    found = []
    for index, (path, ratio) in enumerate(zip(options.models, ratios, strict=True)):
        file = read_lora(path)
        if family is not None:
            require_base(file, family, "--models")
        if family == "sdxl" and file.may_be_sdxl:
            file = read_lora(path, base=family)
        family = family or file.base
        weights = parse_block_weights(options.lbws[index]) if options.lbws else None
        found.append(Ingredient(file, ratio, None if weights is None else block_weight_function(weights)))
        _report_rest(file)
    _check_lists(options, family)
    return found


def _check_lists(options: IngredientOptions, family: str | None) -> None:
    import json

    for text in options.lbws:
        length = len(json.loads(text))
        if family is not None and (family == "sdxl") != (length in SDXL_LENGTHS):
            kind = "SDXL" if length in SDXL_LENGTHS else "Stable Diffusion 1.x and 2.x"
            raise UserError(f"lists of {length} are for {kind}, not for these files", where=f"--lbws {text}")


def _report_rest(file: LoraFile) -> None:
    if file.unknown:
        names = ", ".join(file.unknown)
        _log.warning("%s: %d tensors are not understood and left out: %s", file.path.name, len(file.unknown), names)
    if file.bundled:
        names = ", ".join(file.bundled)
        _log.warning("%s: %d embeddings are left out: %s", file.path.name, len(file.bundled), names)


def spec_of(family: str, prediction_type: str | None) -> FamilySpec:
    """Return what metadata say about a model of a family."""
    if family == "sdxl":
        return _SDXL
    from library.models.specs import stable_diffusion_family

    return stable_diffusion_family(family, v_prediction=prediction_type == "v_prediction")


def merged_from(paths: Sequence[str]) -> str:
    """Return the names of what went in, without folders and suffixes."""
    return ", ".join(Path(path).stem for path in paths)


def combined_metadata(
    options: IngredientOptions, ingredients: Sequence[Ingredient], tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    """Return the metadata of a LoRA file made of several: the base model, ranks, and where it came from."""
    files = [ingredient.file for ingredient in ingredients]
    known = {
        key: value for file in reversed(files) for key in (_V2_KEY, _BASE_KEY) if (value := file.metadata.get(key))
    }
    family = next((file.base for file in files if file.base), None)
    velocity = str(known.get(_BASE_KEY, "")).endswith("_v")
    table: dict[str, str] = {}
    spec = None if family not in ("sd1", "sd2", "sdxl") else spec_of(family, "v_prediction" if velocity else None)
    if spec is not None:
        table = {_V2_KEY: str(family == "sd2"), _BASE_KEY: spec.base_model_version}
    ranks = {tensor.shape[0] for key, tensor in tensors.items() if key.endswith(".lora_down.weight")}
    alphas = {float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")}
    table |= {
        **known,
        "ss_network_module": "networks.lora",
        "ss_network_dim": _only(ranks),
        "ss_network_alpha": _only(alphas),
    }
    if spec is not None and not options.no_metadata:
        table |= lora_modelspec(spec, str(options.save_to), merged_from=merged_from(options.models))
    return table


def _only(values: set[int] | set[float]) -> str:
    return str(next(iter(values))) if len(values) == 1 else "Dynamic"
