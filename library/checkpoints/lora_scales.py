"""The strength of LoRAs from PEFT and diffusers, which keep alpha in a configuration, not beside the tensors. Light.

The configuration is either `adapter_config.json` beside the weights, for one model, or the entry
`lora_adapter_metadata` of the header, where `unet.` and `text_encoder.` say which model a setting is for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.checkpoints.detect import read_json
from library.checkpoints.key_maps import TEXT_MODEL
from library.checkpoints.lora_names import TEXT, TEXT_1, TEXT_2, UNET
from library.errors import UserError

HEADER_ENTRY = "lora_adapter_metadata"
CONFIG_NAME = "adapter_config.json"
_COMPONENTS = {UNET: ("unet.",), TEXT: ("text_encoder.",), TEXT_1: ("text_encoder.",), TEXT_2: ("text_encoder_2.",)}
_PREFIXES = ("unet.", "text_encoder.", "text_encoder_2.")
_PATTERN_SIGNS = re.compile(r"[][*+?(){}|$^\\]")


@dataclass(frozen=True, slots=True)
class PeftConfigs:
    """Settings of one file.

    Attributes:
        where: names the file for messages.
        settings: as they stand in the configuration, with their prefixes.
    """

    where: str
    settings: Mapping[str, Any]

    def __bool__(self) -> bool:
        """Whether there are any settings."""
        return bool(self.settings)

    def alpha(self, part: str, path: str, rank: int) -> float | None:
        """Return the alpha that gives a module its strength as alpha / rank; None when nothing is said about it.

        Args:
            part: of the model.
            path: of the module, in memory.
            rank: of the module.

        Raises:
            UserError: the configuration holds something else than a number, or a pattern that cannot be followed.
        """
        settings = self._of_part(part)
        value = self._from_pattern(settings.get("alpha_pattern"), path)
        value = settings.get("lora_alpha", settings.get("alpha")) if value is None else value
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value == 0:
            raise UserError(f"lora_alpha is {value!r}, which is no usable number", where=self.where)
        # With rank-stabilized scaling the strength is alpha / sqrt(rank).
        return float(value) * (math.sqrt(rank) if settings.get("use_rslora") is True else 1.0)

    def _of_part(self, part: str) -> dict[str, Any]:
        prefixed = {
            name.removeprefix(prefix): value
            for prefix in _COMPONENTS[part]
            for name, value in self.settings.items()
            if name.startswith(prefix)
        }
        return prefixed or {n: value for n, value in self.settings.items() if not n.startswith(_PREFIXES)}

    def _from_pattern(self, table: Any, path: str) -> Any:
        if not isinstance(table, dict):
            return None
        paths = (path, path.removeprefix(TEXT_MODEL))
        for pattern, value in table.items():
            plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if _PATTERN_SIGNS.search(plain):
                # Anybody's regular expression could keep the matcher busy for years.
                hint = "Convert it with the program that made it, or write the modules' names out"
                raise UserError(f"alpha_pattern {pattern!r} is a regular expression", hint, where=self.where)
            if plain in paths or (not pattern.startswith("^") and path.endswith(f".{plain}")):
                return value
        return None


def read_peft_configs(path: Path, metadata: Mapping[str, str], *, uses_peft_names: bool) -> PeftConfigs:
    """Read the settings of a file: from its header, else from the configuration beside it.

    Args:
        path: the weights.
        metadata: of their header.
        uses_peft_names: whether the tensors are called as PEFT calls them; else another file's configuration could be
            taken for this one's.

    Raises:
        UserError: the settings are no JSON table.
    """
    raw = metadata.get(HEADER_ENTRY)
    beside = path.with_name(CONFIG_NAME)
    if raw:
        where = f"{path} ({HEADER_ENTRY} in its header)"
        try:
            table = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise UserError("not valid JSON", where=where) from error
        if not isinstance(table, dict):
            raise UserError("not a table of settings", where=where)
        return PeftConfigs(where, table)
    if uses_peft_names and beside.is_file():
        return PeftConfigs(str(beside), read_json(beside))
    return PeftConfigs(str(path), {})
