"""Further rows of a token embedding: the vectors of new words, beside a table of old ones that stays as it is.

Textual inversion (Gal et al., "An Image is Worth One Word", 2022, equation 2) looks for the vectors of a word that make
a frozen model draw what the word means. Only those vectors are parameters here. The table of the encoder is neither
enlarged nor copied, so nothing has to be put back after an update, and an optimizer holds values for new rows alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.draws import normal_rows
from library.errors import UserError

if TYPE_CHECKING:
    from library.models.family import ModelFamily


class TokenRows(nn.Module):
    """Vectors of the ids from `first_id` on, spliced into what a token embedding returns.

    The rows are float32 whatever the type of the table; they are rounded to it where they meet. Every row gets a
    gradient in every backward pass through the encoder, zeros when its token does not occur.

    Args:
        rows: [n,d] initial values.
        first_id: id of the first row; smaller ids are those of the table.
    """

    def __init__(self, rows: Tensor, first_id: int) -> None:
        super().__init__()
        self.first_id = first_id
        self.rows = nn.Parameter(rows.detach().float().clone())

    def forward(self, ids: Tensor, known: Tensor) -> Tensor:
        """Return `known` [...,d], what the table has for the ids [...], with the new vectors put in."""
        # An encoder that was moved to another device leaves its rows behind, where the optimizer knows them.
        new = nn.functional.embedding((ids - self.first_id).clamp(min=0), self.rows.to(known.device))
        return torch.where((ids >= self.first_id).unsqueeze(-1), new.to(known.dtype), known)

    def attach(self, embedding: nn.Module) -> None:
        """Let an embedding know these rows, besides its own and those that were attached to it before."""
        look_up = embedding.forward

        def forward(input: Tensor) -> Tensor:  # noqa: A002 - the name that callers may use
            return self(input, look_up(input.clamp(max=self.first_id - 1)))

        embedding.forward = forward


class ChangedRows(nn.Module):
    """Vectors of any ids, known or new, spliced into what a token embedding returns: what they were, and a change.

    Only the change is a parameter, float32 and zero at first, so weight decay draws a vector back to where it began.
    Every row gets a gradient in every backward pass through the encoder.

    Args:
        ids: of the rows, each once; those behind the table are new.
        first: [n,d] what the rows are without the change.
    """

    first: Tensor
    places: Tensor

    def __init__(self, ids: Sequence[int], first: Tensor) -> None:
        super().__init__()
        self.ids = tuple(ids)
        self.change = nn.Parameter(torch.zeros_like(first, dtype=torch.float32))
        places = torch.full((max(self.ids, default=0) + 1,), -1, device=first.device)
        places[list(self.ids)] = torch.arange(len(self.ids), device=first.device)
        # Found anew in the model whenever a run begins, so they are no part of its state.
        self.register_buffer("first", first.detach().float().clone(), persistent=False)
        self.register_buffer("places", places, persistent=False)

    def values(self) -> Tensor:
        """Return the vectors [n,d] as they are now."""
        return self.first + self.change

    @torch.no_grad()
    def load_changes(self, changes: Mapping[int, Tensor]) -> None:
        """Set the changes [d] of some rows, by id."""
        for number, change in changes.items():
            self.change[self.ids.index(number)] = change.to(self.change)

    def forward(self, ids: Tensor, known: Tensor) -> Tensor:
        """Return `known` [...,d], what the table has for the ids [...], with the vectors of these rows put in."""
        places = self.places[ids.clamp(max=len(self.places) - 1)]
        places = torch.where(ids < len(self.places), places, -1)
        new = nn.functional.embedding(places.clamp(min=0), self.values())
        return torch.where((places >= 0).unsqueeze(-1), new.to(known.dtype), known)

    def attach(self, embedding: nn.Module) -> None:
        """Let an embedding use these rows in place of its own, and beside them."""
        look_up, size = embedding.forward, len(embedding.get_parameter("weight"))

        def forward(input: Tensor) -> Tensor:  # noqa: A002 - the name that callers may use
            return self(input, look_up(input.clamp(max=size - 1)))

        embedding.forward = forward


def input_embedding(encoder: Any) -> nn.Embedding:
    """Return the token embedding of a text encoder."""
    return encoder.get_input_embeddings()


def embedding_widths(family: ModelFamily) -> tuple[int, ...]:
    """Return the width of a token's vector for each text encoder."""
    return tuple(input_embedding(encoder).embedding_dim for encoder in family.text_encoders)


def add_words(
    family: ModelFamily,
    words: Mapping[str, Sequence[Tensor]],
    *,
    where: str = "--token_string",
    may_hide: bool = False,
    any_case: bool = False,
) -> tuple[TokenRows, ...]:
    """Make a model know new words: its tokenizers find them, and its text encoders have vectors for them.

    Args:
        family: its `tokenizers` are replaced, its text encoders get the rows.
        words: word to its vectors, [n,d] for each text encoder; see `ClipTokenizer.with_words` for how it is used.
        where: what gave the words, for messages.
        may_hide: a word may hide one that the vocabulary has, as embedding files do that are called like a word.
        any_case: capital letters in the words do not count.

    Returns:
        The new rows, one module per text encoder, of all words in their order. They need a gradient; whoever only draws
        pictures may switch that off.

    Raises:
        UserError: a word is known already, or its vectors do not fit the encoders.
    """
    widths = embedding_widths(family)
    for word, vectors in words.items():
        _check_fit(word, vectors, widths, where)
    added, tokenizers = [], []
    for number, (encoder, tokenizer) in enumerate(zip(family.text_encoders, family.tokenizers, strict=True)):
        embedding = input_embedding(encoder)
        counts = {word: len(vectors[number]) for word, vectors in words.items()}
        tokenizers.append(tokenizer.with_words(counts, where=where, may_hide=may_hide, any_case=any_case))
        together = torch.cat([vectors[number].float() for vectors in words.values()])
        added.append((TokenRows(together.to(embedding.weight.device), tokenizer.size), embedding))
    for rows, embedding in added:
        rows.attach(embedding)
    family.tokenizers = tuple(tokenizers)
    return tuple(rows for rows, _ in added)


def _check_fit(word: str, vectors: Sequence[Tensor], widths: Sequence[int], where: str) -> None:
    found = [tensor.shape[-1] for tensor in vectors]
    if found != list(widths):
        what = f"the vectors of {word!r} have {_listed(found)} values, but this model's have {_listed(widths)}"
        raise UserError(what, "They were trained for another kind of model.", where=where)
    if len({len(tensor) for tensor in vectors}) != 1:
        raise UserError(f"{word!r} has not as many vectors for each text encoder", where=where)


def _listed(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers))


def typical_rows(embedding: nn.Embedding, seeds: Sequence[int]) -> Tensor:
    """Return random vectors [n,d] float32 such as words have: drawn with the mean and the spread of the whole table.

    Args:
        embedding: the table.
        seeds: one for each vector.
    """
    table = embedding.weight.detach().float()
    noise = normal_rows(seeds, (table.shape[1],), torch.device("cpu"))
    return table.mean(0).cpu() + table.std(0).cpu() * noise
