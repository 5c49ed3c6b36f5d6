"""Words that prompts may use beside those of the vocabulary: from embedding files, and from networks that hold some.

A LoRA may have been trained together with words. Of new ones it holds the vectors; of the vocabulary's own tokens it
holds what was added to theirs, which counts as strongly as the rest of the network. Files of Stable Cascade's original
trainer hold only what was added, to new words as well: `--train_tokens` says what those began with.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library.checkpoints.cascade_lora import check_word_width, word_changes
from library.checkpoints.embedding_file import Embedding, read_embedding, read_embeddings
from library.checkpoints.lora_file import inspect_lora, read_lora
from library.checkpoints.lora_layouts import BUNDLED
from library.errors import Problem, UserError, raise_problems
from library.models.token_choice import ENCODER, OPTION, find_tokens, new_rows
from library.models.token_rows import TokenRows, add_words, embedding_widths, input_embedding
from library.models.tokenizer import VOCABULARY_SIZE

if TYPE_CHECKING:
    from library.models.family import ModelFamily

logger = logging.getLogger(__name__)


class TokenChanges(nn.Module):
    """What a network adds to the vectors of tokens of the vocabulary.

    Args:
        ids: of the tokens [n], each once.
        changes: [n,d] at full strength.
    """

    ids: Tensor
    changes: Tensor

    def __init__(self, ids: Tensor, changes: Tensor) -> None:
        super().__init__()
        order = ids.argsort()
        self.register_buffer("ids", ids[order])
        self.register_buffer("changes", changes[order].float())
        self.strength = 1.0

    def forward(self, ids: Tensor, known: Tensor) -> Tensor:
        """Return `known` [...,d], what the table has for the ids [...], with the changes added."""
        own, changes = self.ids.to(ids.device), self.changes.to(known.device)
        places = torch.searchsorted(own, ids).clamp(max=len(own) - 1)
        added = changes[places] * self.strength * (own[places] == ids).unsqueeze(-1)
        return known + added.to(known.dtype)

    def attach(self, embedding: nn.Embedding) -> None:
        """Let an embedding add the changes to what it returns."""
        look_up = embedding.forward

        def forward(input: Tensor) -> Tensor:  # noqa: A002 - the name that callers may use
            return self(input, look_up(input))

        embedding.forward = forward  # type: ignore[method-assign]


@dataclass(frozen=True, slots=True)
class NetworkWords:
    """What a LoRA file holds about words.

    Attributes:
        where: names the file in messages.
        vectors: of new words.
        ids: tokens [n] to whose vectors it adds something, new ones included.
        changes: what it adds [n,d].
    """

    where: str
    vectors: tuple[Embedding, ...] = ()
    ids: Tensor | None = None
    changes: Tensor | None = None


def read_words(paths: Sequence[str]) -> dict[str, Embedding]:
    """Return the embeddings of `--textual_inversion_embeddings` by their paths, before the model is loaded.

    Raises:
        UserError: holds a problem for every file that is no embedding.
    """
    found: dict[str, Embedding] = {}
    problems: list[Problem] = []
    for path in paths:
        try:
            found[path] = read_embedding(path)
        except UserError as error:
            problems += error.problems
    raise_problems(problems)
    return found


def network_words(path: str, where: str) -> NetworkWords:
    """Return what a LoRA file of a known layout holds about words.

    Raises:
        UserError: the file is damaged.
    """
    bundled = inspect_lora(path).bundled
    if not bundled:
        return NetworkWords(where)
    named = any(key.startswith(BUNDLED) for key in bundled)
    vectors = tuple(read_embeddings(path)) if named else ()
    changed = word_changes(read_lora(path).bundled, where)
    # Copies, so that the file is not kept open.
    ids, changes = (None, None) if changed is None else (tensor.clone() for tensor in changed)
    return NetworkWords(where, vectors, ids, changes)


class Vocabulary:
    """Teaches a model the words of a run.

    Args:
        embeddings: by the files that they are from, which name them.
        networks: what each network of the run holds about words.
        began: `--train_tokens`, what new words of the original trainer's files began with.
    """

    def __init__(
        self,
        embeddings: Mapping[str, Embedding],
        networks: Sequence[NetworkWords] = (),
        began: Sequence[str] = (),
    ) -> None:
        self._embeddings = embeddings
        self._networks = tuple(networks)
        self._tokens = find_tokens(began, VOCABULARY_SIZE)
        if began and not any(held.ids is not None for held in self._networks):
            what = "none of the --network_weights holds what training added to words"
            raise UserError(what, "It is for LoRA files of Stable Cascade's original trainer.", where=OPTION)

    def teach(self, family: ModelFamily) -> tuple[list[TokenRows], list[TokenChanges | None]]:
        """Return the vectors of new words, and for each network what it adds to those of known tokens.

        Raises:
            UserError: an embedding is for another model, or its word is known already.
        """
        width = input_embedding(family.text_encoders[0]).embedding_dim
        for held in self._networks:
            if held.changes is not None:
                check_word_width(held.changes, width, held.where)
        # What is spliced in later is asked first, and knows the higher ids.
        changes = [_changes(family, held) for held in self._networks]
        added: list[TokenRows] = []
        taken: dict[str, str] = {}
        for path, embedding in self._embeddings.items():
            word, where = Path(path).stem, f"--textual_inversion_embeddings {path}"
            added += _add(family, word, embedding, where)
            taken[word] = where
        for held in self._networks:
            for embedding in self._new_words(family, held):
                if embedding.name in taken:
                    logger.warning(
                        "%s: its word %s is left out, %s has it", held.where, embedding.name, taken[embedding.name]
                    )
                else:
                    added += _add(family, embedding.name, embedding, held.where, any_case=True)
                    taken[embedding.name] = held.where
        return added, changes

    def _new_words(self, family: ModelFamily, held: NetworkWords) -> Sequence[Embedding]:
        """Return the new words of a network."""
        if held.vectors or held.ids is None or held.changes is None:
            return held.vectors
        new = int((held.ids >= VOCABULARY_SIZE).sum())
        table = input_embedding(family.text_encoders[0]).weight.detach()
        rows = new_rows(self._tokens, table, held.ids, held.changes)
        if len(rows) < new:
            hint = "give --train_tokens as in its training, such as '[fernando]=^dog</w>'"
            logger.warning("%s: it is not known what %d new words in it are; %s", held.where, new - len(rows), hint)
        names = (key.removeprefix(BUNDLED).removesuffix(f".{ENCODER}") for key in rows)
        return [Embedding(name, {ENCODER: row}, "bundle") for name, row in zip(names, rows.values(), strict=True)]


def _add(
    family: ModelFamily, word: str, embedding: Embedding, where: str, *, any_case: bool = False
) -> list[TokenRows]:
    vectors = embedding.rows_for(embedding_widths(family), where)
    rows = add_words(family, {word: vectors}, where=where, may_hide=True, any_case=any_case)
    logger.info("%s: the word %s stands for %d vector%s", where, word, embedding.count, "s"[: embedding.count - 1])
    return [one.requires_grad_(False) for one in rows]


def _changes(family: ModelFamily, held: NetworkWords) -> TokenChanges | None:
    """Attach what a network adds to the vectors of known tokens."""
    if held.ids is None or held.changes is None:
        return None
    known = (held.ids >= 0) & (held.ids < VOCABULARY_SIZE)
    if not bool(known.any()):
        return None
    found = TokenChanges(held.ids[known], held.changes[known])
    found.attach(input_embedding(family.text_encoders[0]))
    logger.info("%s: changes the vectors of %d known tokens", held.where, int(known.sum()))
    return found
