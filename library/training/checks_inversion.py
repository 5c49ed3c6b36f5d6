"""What can be refused or doubted about textual inversion before any model is opened."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from library.errors import Problem, UserError
from library.training.checks import must_exist

if TYPE_CHECKING:
    from library.data.dataset import TrainingData
    from library.training.options_inversion import InversionTrainingOptions

_log = logging.getLogger(__name__)

_TOKEN = "--token_string"
_FIXED_RATE = frozenset(("", "adamw", "adamw8bit", "lion", "lion8bit"))
_DROPPING = ("caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate")


def check_inversion(options: InversionTrainingOptions) -> Iterator[Problem]:
    """Yield what stops the training of a word, judged by its options."""
    inversion, data = options.inversion, options.data
    word, count = inversion.token_string, inversion.num_vectors_per_token
    room = options.text.max_token_length or 75
    if count > room:
        what = f"{count} vectors do not fit into captions of {room} tokens"
        yield Problem("--num_vectors_per_token", what, "8 are many already.")
    if inversion.uses_templates and data.dataset_class is not None:
        name = "--use_object_template" if inversion.use_object_template else "--use_style_template"
        yield Problem(name, "cannot change the captions that --dataset_class serves", "Drop one of them.")
    if data.debug_dataset:
        return
    if not word or not word.strip():
        yield Problem(_TOKEN, "is required", "Choose a word that no language has, such as --token_string shs4712.")
    elif not word.isprintable():
        yield Problem(_TOKEN, "has line ends or control characters in it, which captions lose", "Choose a plain word.")
    if not options.optimizer.learning_rate:
        yield Problem("--learning_rate", "is 0, so nothing would be trained", "5e-3 is usual for textual inversion.")
    yield from must_exist("--weights", inversion.weights)


def warn_inversion(options: InversionTrainingOptions) -> Iterator[Problem]:
    """Yield what is probably not meant."""
    if "fused_backward_pass" in options.given:
        yield Problem("--fused_backward_pass", "has no effect: the gradients of a few vectors take no memory")
    rate, kind = options.optimizer.learning_rate, options.optimizer.optimizer_type or ""
    if "learning_rate" not in options.given and kind.lower() in _FIXED_RATE:
        what = f"is {rate:g}, the default made for whole models, which hardly moves a vector"
        yield Problem("--learning_rate", what, "5e-3 is a good start.")


def check_captions(data: TrainingData, word: str) -> None:
    """Refuse data that cannot teach a word, and tell how many images say nothing about it.

    Args:
        data: of the run, without templates in place of captions.
        word: the new word.

    Raises:
        UserError: no caption contains the word, or captions are dropped.
    """
    if data.streamed:
        return  # Captions come with the samples.
    subsets = [subset for spec in data.specs for subset in spec.subsets]
    framed = {one.index: f"{one.caption_prefix or ''} {one.caption_suffix or ''}" for one in subsets}
    table, lacking, other_case = data.table, 0, False
    for row, caption in enumerate(table.captions()):
        text = caption + framed[int(table.subsets[row])]
        if not table.is_reg[row] and word not in text:
            lacking += 1
            other_case = other_case or word.lower() in text.lower()
    images = int((~table.is_reg).sum())
    if lacking == images:
        hint = "Put it into the captions (or the names of the folders), or add --use_object_template."
        if other_case:
            hint = "Some have it with other capital letters, which count."
        raise UserError(f"no caption contains {word!r}, so nothing would be learnt", hint, where=_TOKEN)
    if lacking:
        _log.warning("%d of %d images have captions without %r: they teach it nothing", lacking, images, word)


def dropping_problems(data: TrainingData) -> Iterator[Problem]:
    """Yield which subsets of a dataset configuration drop captions or parts of them."""
    for number, spec in enumerate(data.specs, start=1):
        for subset in spec.subsets:
            for name in _DROPPING:
                if getattr(subset, name):
                    where = f"--dataset_config: dataset {number}: {name}"
                    yield Problem(where, "would drop the word that is trained", "Leave it out for textual inversion.")
