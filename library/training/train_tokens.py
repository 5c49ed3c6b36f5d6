"""Tokens trained beside a network: which rows of the text encoder's table, what they begin with, their files.

A new word in brackets gets a row of its own behind the vocabulary. Known tokens are found by a regular expression,
which is searched for in the vocabulary's own spelling: `</w>` ends a word, so `^dog</w>` is one token and `dog` many.
What is trained is the difference to what a row was at first; files hold both that and the vectors themselves.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.cascade_lora import WORD_CHANGES, WORD_IDS, check_word_width, word_changes
from library.checkpoints.embedding_file import write_embedding
from library.checkpoints.lora_layouts import BUNDLED
from library.contracts import ParamGroup
from library.file_names import safe_file_name
from library.models.token_choice import ENCODER, OPTION, TrainedToken, find_tokens, mean_row
from library.models.token_rows import ChangedRows, input_embedding, typical_rows
from library.models.tokenizer import ClipTokenizer, tokenizers_for
from library.randomness import derive
from library.training.options_tokens import TokenOptions
from library.training.save_names import EMA_SUFFIX

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.contracts import FamilySpec
    from library.data.dataset import TrainingData
    from library.models.family import ModelFamily
    from library.models.options import TextOptions

logger = logging.getLogger(__name__)

METADATA_KEY = "ss_train_tokens"


def match_tokens(options: TokenOptions) -> tuple[TrainedToken, ...]:
    """Look the tokens of the options up; errors as for `token_choice.find_tokens`."""
    return find_tokens(options.train_tokens, options.train_tokens_limit)


@dataclass(frozen=True, slots=True)
class TokenPlan:
    """What is known of the tokens before a model is loaded.

    Attributes:
        options: as given.
        tokens: the tokens.
        tokenizers: know the new words; one per text encoder.
    """

    options: TokenOptions
    tokens: tuple[TrainedToken, ...]
    tokenizers: tuple[ClipTokenizer, ...]

    @classmethod
    def of(cls, options: TokenOptions, text: TextOptions, spec: FamilySpec) -> TokenPlan | None:
        """Look the tokens up; None where none are trained.

        Raises:
            UserError: as `match_tokens`, or a new word is known already.
        """
        if not options.train_tokens:
            return None
        tokens = match_tokens(options)
        words = {token.text: 1 for token in tokens if token.row is not None}
        known = tokenizers_for(spec, text)
        return cls(
            options, tokens, tuple(tokenizer.with_words(words, where=OPTION, any_case=True) for tokenizer in known)
        )

    def check_data(self, data: TrainingData) -> None:
        """Warn of new words that no caption contains."""
        captions = [text.lower() for text in data.table.captions()] if hasattr(data, "table") else []
        subsets = [subset for spec in data.specs for subset in spec.subsets]
        framed = [f"{subset.caption_prefix or ''} {subset.caption_suffix or ''}".lower() for subset in subsets]
        for token in self.tokens:
            if (
                token.row is not None
                and captions
                and not any(token.text.lower() in text for text in (*captions, *framed))
            ):
                logger.warning("%s: no caption contains %s, so nothing is learnt about it", OPTION, token.text)


class TrainedTokens:
    """Trains the rows of some tokens beside a network; see `library.training.methods.adapter.Companion`."""

    name = "tokens"

    def __init__(self, plan: TokenPlan) -> None:
        self.plan = plan
        self._rows: Any = None

    @property
    def saved_beside(self) -> tuple[str, ...]:
        """Endings of the names of the files that `save_beside` writes: one for each new word."""
        return tuple(self._endings().values())

    def _endings(self) -> dict[str, str]:
        words = [token.text for token in self.plan.tokens if token.row is not None]
        found: dict[str, str] = {}
        for number, word in enumerate(words, start=1):
            ending = f"_{safe_file_name(word[1:-1]) or f'word{number}'}"
            # [dog] and <dog> are two words, some systems take Dog and dog for one name, and averages have names, too.
            taken = ending.lower() in map(str.lower, (EMA_SUFFIX, *found.values()))
            found[word] = f"{ending}_{number}" if taken else ending
        return found

    def attach(self, family: ModelFamily, seed: int) -> ChangedRows:
        """Make the text encoder use the rows, and its tokenizer know the new words; return the rows."""
        embedding = input_embedding(family.text_encoders[0])
        first = first_rows(self.plan, embedding, seed)
        self._rows = ChangedRows(tuple(first), _stacked(list(first.values())).to(embedding.weight.device))
        self._rows.attach(embedding)
        family.tokenizers = self.plan.tokenizers
        return self._rows

    def load(self, bundled: Mapping[str, Tensor], where: str) -> None:
        """Begin with what the words of a LoRA file have come to."""
        found = start_changes(self.plan.tokens, tuple(self._rows.ids), self._rows.first, bundled, where)
        self._rows.load_changes(found)
        if found:
            logger.info("%s: begins with the vectors of %d trained tokens", where, len(found))

    def param_groups(self, rate: float) -> list[ParamGroup]:
        """Return one group with all rows."""
        own = self.plan.options.embedding_lr
        return [ParamGroup("tokens", (self._rows.change,), rate if own is None else own)]

    def file_tensors(self) -> dict[str, Tensor]:
        """Return what a LoRA file holds beside the network: the vectors of new words, and the changes of all rows."""
        import torch

        ids = torch.tensor(self._rows.ids, dtype=torch.int64)
        changes = {WORD_CHANGES: self._rows.change.detach().cpu(), WORD_IDS: ids}
        return {**{f"{BUNDLED}{word}.{ENCODER}": rows for word, rows in self._vectors().items()}, **changes}

    def metadata(self) -> dict[str, str]:
        """Return which rows the tokens are, and where they came from."""
        listed = [{"token": token.text, "pattern": token.pattern, "ids": token.found, "rows": token.rows}
                  for token in self.plan.tokens]  # fmt: skip
        return {METADATA_KEY: json.dumps(listed)}

    def save_beside(self, path: Path, precision: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """Write the vector of each new word into a file of its own beside the saved network `path`."""
        endings = self._endings()
        for word, rows in self._vectors().items():
            target = path.with_name(f"{path.stem}{endings[word]}{path.suffix}")
            architecture = metadata.get("modelspec.architecture", "").partition("/")[0]
            about = {**metadata, "placeholder": word, "modelspec.trigger_phrase": word}
            about["modelspec.architecture"] = f"{architecture}/textual-inversion"
            write_embedding(target, {ENCODER: rows}, about, tensor_name=ENCODER, precision=precision)

    def _vectors(self) -> dict[str, Tensor]:
        values = dict(zip(self._rows.ids, self._rows.values().detach().cpu(), strict=True))
        return {token.text: values[token.row][None] for token in self.plan.tokens if token.row is not None}


def first_rows(plan: TokenPlan, embedding: Any, seed: int) -> dict[int, Tensor]:
    """Return what each trained row begins with, [d] float32 by id; the first item that names a row counts."""
    found: dict[int, Tensor] = {}
    for token in plan.tokens:
        for row in token.rows:
            if row in found:
                continue
            if token.row is None:
                found[row] = embedding.weight.detach()[row].float().cpu()
            elif token.pattern is None and plan.options.train_tokens_init == "random":
                found[row] = typical_rows(embedding, [derive(seed, "init", token.text)])[0]
            else:
                found[row] = mean_row(embedding.weight.detach(), token.found)
    return found


def start_changes(
    tokens: Sequence[TrainedToken], ids: Sequence[int], first: Tensor, bundled: Mapping[str, Tensor], where: str
) -> dict[int, Tensor]:
    """Return what the words of a LoRA file add to rows, [d] by id: changes by number count before vectors of words.

    Raises:
        UserError: the file is damaged, or for another text encoder; `where` names it.
    """
    found: dict[int, Tensor] = {}
    changed = word_changes(bundled, where)
    if changed is not None:
        numbers, changes = changed
        check_word_width(changes, first.shape[1], where)
        found = {number: change for number, change in zip(numbers.tolist(), changes, strict=True) if number in ids}
    for token in tokens:
        vector = bundled.get(f"{BUNDLED}{token.text}.{ENCODER}")
        if token.row is not None and vector is not None and token.row not in found:
            check_word_width(vector, first.shape[1], where)
            found[token.row] = vector[0].float() - first[list(ids).index(token.row)].cpu()
    return found


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.stack(list(rows))
