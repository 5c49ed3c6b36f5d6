"""Runs frozen text encoders once over all captions, so that no step needs them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from library.data.mapped_file import MappedFile
from library.data.text_caches import TextLayout
from library.data.text_store import TextJob, TextMemory, TextPlan, TextRows, TextStore, plan_texts
from library.errors import UserError
from library.models.assemble import hash_tensors
from library.new_file import format_bytes
from library.training.cache_worker import CacheWorker

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from library.data.cache_names import CacheRules
    from library.data.dataset import TrainingData
    from library.models.family import ModelFamily
    from library.training.processes import Processes

logger = logging.getLogger(__name__)

AUTOMATIC_BYTES = 1 << 30
"""Captions whose outputs need at most this much are cached in memory without being asked for."""


def cache_texts(run: Processes, family: ModelFamily, data: TrainingData) -> TextPlan | None:
    """Encode all captions of the data and serve them from then on. A collective call.

    Args:
        run: processes, device and options.
        family: the model; its text encoders must not train.
        data: with captions that do not vary, its validation part included.

    Returns:
        What there was to do, or None when captions are not served from the cache: encoders must run in every step.

    Raises:
        UserError: a caption cannot be encoded, or there is no room for what was asked for.
        StopTraining: a signal arrived; finished files count at the next start.
    """
    cache, asked = data.cache, data.cache.cache_text_encoder_outputs
    parts = [part for part in (data, data.validation) if part is not None]
    rules = data.cache_rules(family.spec.text_cache_suffix)
    rows = TextRows([part.catalogue for part in parts], rules)
    encoder = _CaptionEncoder(run, family, data)
    layout = TextLayout.of(encoder.arrays([encoder.tokens("")])[0])
    to_disk = cache.cache_text_encoder_outputs_to_disk
    plan, origin = run.broadcast(_look(run, family, rows, layout, rules, to_disk=to_disk) if run.is_main else None)
    if not asked and plan.memory_bytes > AUTOMATIC_BYTES:
        logger.info(
            "the text encoder runs in every step: the outputs for %d captions need %s, more than the %s that are "
            "cached without being asked for",
            len(plan.numbers) - 1,
            format_bytes(plan.memory_bytes),
            format_bytes(AUTOMATIC_BYTES),
        )
        return None
    memory = _shared_memory(run, plan, layout, asked=asked)
    if memory is None:
        return None
    logger.info("text encoder outputs: %s; the text encoder does not run in the steps", plan.describe())
    store = encoder.store = TextStore(rows, plan, memory, layout, origin)
    worker = CacheWorker(run, what="caching text encoder outputs", prepare=encoder.prepare, encode=encoder.encode)
    worker.fill(plan, cache.text_encoder_batch_size or max(spec.batch_size for spec in data.specs))
    for part, source in zip(parts, store.sources(trusting=cache.skip_cache_check), strict=True):
        part.use_texts(source)
    return plan


def _look(
    run: Processes, family: ModelFamily, rows: TextRows, layout: TextLayout, rules: CacheRules, *, to_disk: bool
) -> tuple[TextPlan, dict[str, Any]]:
    """Return what must be encoded, and what files record of their origin besides the caption."""
    if not to_disk:
        return plan_texts(rows, layout, {}, rules, to_disk=False), {}
    if rules.skip_check:
        logger.warning("--skip_cache_check: files of text encoder outputs are used without looking into them")
    origin = {
        "family": family.spec.name,
        # The weights in memory, not those of the file: others may have been merged into them.
        "text_encoder": "+".join(hash_tensors(encoder.state_dict()) for encoder in family.text_encoders),
        **run.opts.text.cache_origin(),
    }
    return plan_texts(rows, layout, origin, rules, to_disk=True), origin


def _shared_memory(run: Processes, plan: TextPlan, layout: TextLayout, *, asked: bool) -> TextMemory | None:
    """Return the memory that all ranks of this node share; None when some node has no room and nobody asked for it."""
    memory, problem = None, None
    if run.is_local_main:
        try:
            memory = TextMemory.create(plan, layout)
        except UserError as error:
            if asked:
                raise
            problem = str(error)
    told = run.ranks.gather((memory.path if memory else None, problem))
    problems = [text for _, text in told if text]
    if problems:
        logger.warning("the text encoder runs in every step: %s", problems[0])
        return None
    path = told[run.rank - run.local_rank][0]
    return memory or TextMemory(MappedFile(path), plan.numbers, layout)


@dataclass(frozen=True, slots=True)
class _Caption:
    """A caption to encode: ids and weights as the step would get them, and where the outputs go."""

    ids: tuple[Any, ...]
    weights: tuple[Any, ...]
    job: TextJob | None = None


class _CaptionEncoder:
    """Encodes captions as the step does: same tokens, same types."""

    store: TextStore

    def __init__(self, run: Processes, family: ModelFamily, data: TrainingData) -> None:
        self.run, self.family = run, family
        self.tokenizers = data.catalogue.tokenizers
        halves = (torch.float16, torch.bfloat16) if family.spec.text_cache_half else (torch.float16,)
        # numpy knows no bfloat16: outputs of such encoders are widened where they may leave the range of float16.
        self.dtype = np.float16 if run.frozen_dtype in halves else np.float32

    def tokens(self, text: str, job: TextJob | None = None) -> _Caption:
        """Return the tokens of a caption."""
        encoded = [tokenizer.encode(text) for tokenizer in self.tokenizers]
        return _Caption(tuple(ids for ids, _ in encoded), tuple(weights for _, weights in encoded), job)

    def prepare(self, job: TextJob) -> _Caption:
        """Return the tokens of the caption of a job."""
        return self.tokens(self.store.rows.text(job.rows[0]), job)

    @torch.no_grad()
    def arrays(self, captions: Sequence[_Caption]) -> list[dict[str, NDArray[Any]]]:
        """Return the arrays of each caption."""
        ids = tuple(torch.from_numpy(np.stack(column)) for column in zip(*(c.ids for c in captions), strict=True))
        weights = None
        if all(factors is not None for factors in captions[0].weights):
            columns = zip(*(caption.weights for caption in captions), strict=True)
            weights = tuple(torch.from_numpy(np.stack(column)) for column in columns)
        with self.run.autocast():
            made = self.family.text_arrays(ids, weights)
        stored = {name: self._stored(tensor) for name, tensor in made.items()}
        return [{name: array[index] for name, array in stored.items()} for index in range(len(captions))]

    def _stored(self, tensor: torch.Tensor) -> NDArray[Any]:
        if tensor.is_floating_point():
            return tensor.float().cpu().numpy().astype(self.dtype, copy=False)
        return tensor.cpu().numpy()

    def encode(self, captions: Sequence[_Caption]) -> list[Callable[[], None]]:
        """Encode captions; return what stores each of them."""
        arrays = self.arrays(captions)
        return [
            partial(self.store.store, caption.job, mine)
            for caption, mine in zip(captions, arrays, strict=True)
            if caption.job is not None
        ]
