"""Textual inversion: the vectors of a new word are trained, and nothing else of the model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from library.checkpoints.embedding_file import ENCODERS, TENSOR_NAME, Embedding, read_embedding, write_embedding
from library.contracts import ParamGroup
from library.data.dataset import TrainingData
from library.errors import UserError, raise_problems
from library.models.token_rows import add_words, embedding_widths, input_embedding, typical_rows
from library.models.tokenizer import ClipTokenizer, tokenizers_for
from library.randomness import derive
from library.training.checks_inversion import check_captions, dropping_problems
from library.training.methods.base import PlainMethod
from library.training.methods.inversion_templates import object_sentences, style_sentences
from library.training.model_saves import model_metadata

if TYPE_CHECKING:
    from torch import Tensor

    from library.contracts import Batch, Condition, FamilySpec
    from library.data.captions import Replacement
    from library.draws import Draws
    from library.models.family import ModelFamily
    from library.training.model_saves import Describe, RunFacts
    from library.training.options_inversion import InversionTrainingOptions
    from library.training.run import Run

logger = logging.getLogger(__name__)

_TOKEN = "--token_string"


@dataclass(frozen=True, slots=True)
class InversionPlan:
    """What is known of the new word before a model is loaded.

    Attributes:
        opts: of the script.
        word: the new word; empty where only a report on the data is wanted.
        tokenizers: know the word; one per text encoder.
        known: tokenizers that do not know it yet.
        start: vectors that training begins with, from a file.
    """

    opts: InversionTrainingOptions
    word: str
    tokenizers: tuple[ClipTokenizer, ...]
    known: tuple[ClipTokenizer, ...]
    start: Embedding | None = None

    @classmethod
    def of(cls, opts: InversionTrainingOptions, spec: FamilySpec) -> InversionPlan:
        """Check the word, the words that it begins with, and the file that it begins with.

        Raises:
            UserError: the word is known already, there is nothing in `--init_word`, or the file cannot be used.
        """
        inversion = opts.inversion
        word = inversion.token_string or ""
        known = tokenizers_for(spec, opts.text)
        count = inversion.num_vectors_per_token
        words = {word: count} if word else {}
        tokenizers = tuple(tokenizer.with_words(words, where=_TOKEN) for tokenizer in known)
        if word and known[0].is_word(word):
            logger.warning("%s: the vocabulary has the word %r, which is hidden by the new one", _TOKEN, word)
        plan = cls(opts, word, tokenizers, known, None if opts.data.debug_dataset else _start(inversion.weights, count))
        if inversion.init_word is not None and plan.start is None:
            plan._check_init_word()
        return plan

    @property
    def replacements(self) -> tuple[Replacement, ...]:
        """What takes the place of captions."""
        inversion = self.opts.inversion
        if not inversion.uses_templates:
            return ()
        return (("", (object_sentences if inversion.use_object_template else style_sentences)(self.word)),)

    def check_data(self, data: TrainingData) -> None:
        """Refuse data that cannot teach the word.

        Raises:
            UserError: no caption contains the word, or captions are dropped.
        """
        if not isinstance(data, TrainingData):
            return  # a class of the user's own, whose captions nobody knows before they are served
        raise_problems(dropping_problems(data))
        if not self.opts.inversion.uses_templates:
            check_captions(data, self.word)

    def first_rows(self, family: ModelFamily, seed: int) -> tuple[Tensor, ...]:
        """Return what the vectors begin with, [n,d] float32 for each text encoder.

        Without file and word they are random and of the usual size: a function of the seed, the word and the number of
        the vector.
        """
        if self.start is not None:
            return self.start.rows_for(embedding_widths(family), f"--weights {self.start.path}")
        count, found = self.opts.inversion.num_vectors_per_token, []
        for number, (encoder, tokenizer) in enumerate(zip(family.text_encoders, self.known, strict=True)):
            table = input_embedding(encoder)
            if self.opts.inversion.init_word is None:
                seeds = [derive(seed, "init", self.word, number, row) for row in range(count)]
                found.append(typical_rows(table, seeds))
            else:
                ids = tokenizer.token_ids(self.opts.inversion.init_word)
                found.append(table.weight.detach()[[ids[row % len(ids)] for row in range(count)]].float())
        if self.opts.inversion.init_word is None:
            logger.info("no --init_word: the vectors of %r begin at random", self.word)
        return tuple(found)

    def _check_init_word(self) -> None:
        where, count = f"--init_word {self.opts.inversion.init_word}", self.opts.inversion.num_vectors_per_token
        for tokenizer in self.known:
            ids = tokenizer.token_ids(self.opts.inversion.init_word or "")
            if not ids:
                raise UserError("there is no word in it", "Give one, such as --init_word dog.", where="--init_word")
            if len(ids) > count:
                left = f"the first {count} of them begin" if count > 1 else "the first of them begins"
                logger.warning("%s: has %d tokens, of which only %s a vector", where, len(ids), left)
            elif len(ids) < count:
                what = "1 token" if len(ids) == 1 else f"{len(ids)} tokens"
                logger.warning("%s: has %s for %d vectors, so several begin alike", where, what, count)


def _start(weights: str | None, count: int) -> Embedding | None:
    """Read the file that training begins with."""
    if not weights:
        return None
    where = f"--weights {weights}"
    embedding = read_embedding(weights)
    if embedding.count != count:
        hint = f"Give --num_vectors_per_token={embedding.count}."
        raise UserError(f"holds {embedding.count} vectors, not {count}", hint, where=where)
    return embedding


class TextualInversion(PlainMethod):
    """Trains the vectors of a word; see `library.training.methods.base.Method`."""

    light = True

    def __init__(self, run: Run, family: ModelFamily, plan: InversionPlan) -> None:
        """Give the model the word, so that everything that asks its tokenizers knows it."""
        self.family, self.plan, self.opts = family, plan, plan.opts
        self.rows = add_words(family, {plan.word: plan.first_rows(family, run.seed)})
        if plan.opts.precision.fp8_base:
            family.store_in_float8(tuple(family.parts()))

    def attach(self) -> None:
        """Freeze the model, and switch checkpointing on."""
        for part in self.family.parts().values():
            part.requires_grad_(False).eval()
        if self.opts.memory.gradient_checkpointing:
            self.family.enable_gradient_checkpointing()

    def parts(self) -> dict[str, nn.Module]:
        """Return the vectors, for each text encoder."""
        return {f"text_encoder{number or ''}": rows for number, rows in zip((0, 2), self.rows, strict=False)}

    def trainable(self) -> nn.ModuleDict:
        """Return the vectors."""
        return nn.ModuleDict(self.parts())

    def param_groups(self) -> list[ParamGroup]:
        """Return one group with the vectors of all text encoders."""
        return [ParamGroup("", tuple(rows.rows for rows in self.rows), self.opts.optimizer.learning_rate)]

    def train_mode(self) -> None:
        """Nothing to do: vectors have no modes, and the model stays in evaluation mode."""

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Nothing to do, as for `train_mode`."""
        yield

    def condition(self, batch: Batch, draws: Draws) -> Condition:
        """Encode the captions; gradients reach the vectors through the frozen encoders."""
        return self.family.condition(batch, draws)

    @property
    def kind(self) -> str:
        """Format of saved embeddings."""
        return self.opts.save.save_model_as or "pt"

    def parameter_count(self) -> int:
        """Return the number of values in the vectors."""
        return sum(rows.rows.numel() for rows in self.rows)

    def describe(self, facts: RunFacts) -> Describe:
        """Return what makes the metadata of the embeddings of a run."""
        return model_metadata(facts, "textual-inversion")

    def save(
        self, target: Path, kind: str, precision: torch.dtype | None, metadata: dict[str, str], *, epoch: int, step: int
    ) -> Path:
        """Write the vectors for use and return the path; `target` has no suffix."""
        name = self.plan.word if self.opts.inversion.save_tensor_name == "token" else TENSOR_NAME
        rows = {encoder: rows.rows.detach() for encoder, rows in zip(ENCODERS, self.rows, strict=False)}
        path = target.with_name(f"{target.name}.{kind}")
        return write_embedding(path, rows, metadata, tensor_name=name, precision=precision)
