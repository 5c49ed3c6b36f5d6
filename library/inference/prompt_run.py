"""From prompts to pictures that are planned down to their seeds.

How seeds come about, so that runs can be repeated:

1. A prompt's own seeds (`--d 1,2,3`) are for its pictures one after the other; the last one stands for all that follow.
2. Where a run makes exactly one picture, its seed is that of the run.
3. Else a `random.Random` seeded with that of the run draws `randint(0, 2**32 - 1)` for each picture, in the order of
   the pictures over all rounds. With `iter_same_seed` it draws once at the start of each round instead, for all
   pictures of the round without a seed of their own.

Variants (`dynamic_prompts`) and the order of shuffled prompts are decided by generators of their own, derived from the
run's seed, the round and the place of the prompt: neither changes a seed, nor does one prompt the variants of another.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from library.errors import Problem, UserError, raise_problems
from library.inference.dynamic_prompts import close_braces, expand, is_dynamic
from library.inference.prompt_files import PromptEntry
from library.inference.prompt_options import GENERATION, Place
from library.inference.prompt_sources import PromptSource, Round
from library.inference.prompts import PromptRequest, parse_entry
from library.randomness import python_random

logger = logging.getLogger(__name__)

_LARGEST = 2**32 - 1
_TEXT_KEYS = ("prompt", "negative_prompt", "clip_prompt")
"""Keys of a table that may have variants."""
_BETWEEN = "\0"
"""Parts texts that are expanded together; in prompts it is white space."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPlan:
    """How often prompts are drawn, and with which seeds.

    Attributes:
        seed: of the run; None: a random one.
        n_iter: rounds over all prompts.
        images_per_prompt: pictures of each prompt in each round; one that enumerates variants gives each once instead.
        iter_same_seed: one seed for all pictures of a round.
        shuffle_prompts: another order in each round.
    """

    seed: int | None = None
    n_iter: int = 1
    images_per_prompt: int = 1
    iter_same_seed: bool = False
    shuffle_prompts: bool = False


class PromptRun:
    """The pictures of a run, planned one prompt after the other."""

    def __init__(
        self,
        source: PromptSource,
        plan: PromptPlan,
        defaults: PromptRequest,
        *,
        place: Place = GENERATION,
        on_problem: Callable[[Problem], None] | None = None,
    ) -> None:
        """Nothing is read yet.

        Args:
            source: of the prompts.
            plan: how often they are drawn.
            defaults: what prompts leave open.
            place: decides which options prompts have.
            on_problem: told what is wrong with a prompt, which is left out; default: a line in the log.
        """
        self._source = source
        self._plan = plan
        self._defaults = replace(defaults, seed=None, seeds=())
        self._place = place
        self._on_problem = on_problem or (lambda problem: logger.error("prompt skipped: %s", problem))
        self._noted: set[str] = set()
        self.seed: int = plan.seed if plan.seed is not None else random.SystemRandom().getrandbits(32)
        """Of the run."""
        self.problems: list[Problem] = []
        """All that was wrong with prompts so far, each once."""
        self.pictures_before = 0
        """How many pictures, those of bad prompts included, were planned before the group that came last."""

    def __iter__(self) -> Iterator[PromptRequest]:
        """Yield the pictures of all prompts, each with its seed."""
        for group in self.groups():
            yield from group

    def groups(self) -> Iterator[list[PromptRequest]]:
        """Yield the pictures of each prompt in each round, each with its seed; bad prompts are left out.

        A prompt is read when its group is asked for, and no earlier.
        """
        chance = random.Random(self.seed)
        pictures = planned = 0
        for number in range(self._plan.n_iter):
            now = Round(number, chance, pictures=pictures)
            if self._plan.iter_same_seed:
                now.seed = chance.randint(0, _LARGEST)
            if self._plan.shuffle_prompts:
                now.shuffler = python_random(self.seed, "prompt order", number)
            for index, entry in enumerate(self._source.entries(now)):
                group = self._group(entry, index, now)
                self.pictures_before, planned = planned, planned + (len(group) or self._plan.images_per_prompt)
                if group:
                    pictures += len(group)
                    now.pictures = pictures
                    yield group

    def check(self) -> None:
        """Read the prompts once, where they are known already, so that mistakes are told before a model is loaded.

        Raises:
            UserError: none of them can be used.
        """
        if self._source.count is None:
            return
        tell, found = self._on_problem, list[Problem]()
        self._on_problem = found.append
        now = Round(0, random.Random(self.seed))
        usable = [bool(self._group(entry, index, now)) for index, entry in enumerate(self._source.entries(now))]
        self._on_problem = tell
        if not any(usable):
            raise_problems(found)
        for problem in found:
            tell(problem)

    def _group(self, entry: PromptEntry, index: int, now: Round) -> list[PromptRequest]:
        try:
            variants = self._variants(entry, python_random(self.seed, "prompt variants", now.number, entry.where))
        except UserError as error:
            self._report([replace(problem, where=entry.where) for problem in error.problems])
            return []
        template = replace(self._defaults, index=index, raw_prompt=_raw(entry))
        requests = [request for variant in variants if (request := self._request(variant, template)) is not None]
        only = self._plan.n_iter == self._source.count == len(requests) == 1
        group = [
            replace(request, seed=self._seed_of(request, which, now, only)) for which, request in enumerate(requests)
        ]
        if len(group) > 1 and all(request == group[0] for request in group[1:]):
            self._note(f"{entry.where}: its {len(group)} pictures are alike, they have the same seed")
        unused = max((len(request.seeds) for request in group), default=0) - len(group)
        if group and unused > 0:
            left = "1 seed is" if unused == 1 else f"{unused} seeds are"
            self._note(f"{entry.where}: {left} left over: --images_per_prompt says how many pictures there are")
        return group

    def _variants(self, entry: PromptEntry, rng: random.Random) -> list[PromptEntry]:
        """Return what is to be drawn, each as often as it is to be drawn."""
        count = self._plan.images_per_prompt
        content = entry.content
        names = () if isinstance(content, str) else [key for key in _TEXT_KEYS if isinstance(content.get(key), str)]
        texts = [content] if isinstance(content, str) else [content[key] for key in names]
        closed = [close_braces(text.replace(_BETWEEN, " ")) for text in texts]
        joined = _BETWEEN.join(closed)
        if not self._source.dynamic or not is_dynamic(joined):
            return [entry] * count
        if closed != texts:
            self._note(f"{entry.where}: a brace without its partner is taken as text")
        found: list[PromptEntry] = []
        for one in expand(joined, rng, count):
            changed: str | Mapping[str, Any] = one
            if not isinstance(content, str):
                changed = {**content, **dict(zip(names, one.split(_BETWEEN), strict=True))}
            found.append(PromptEntry(entry.where, changed))
        return found

    def _request(self, entry: PromptEntry, template: PromptRequest) -> PromptRequest | None:
        notes: list[str] = []
        request, problems = parse_entry(entry, template, self._place, notes)
        self._report(problems)
        for note in notes:
            self._note(note)
        return None if problems else request

    def _seed_of(self, request: PromptRequest, which: int, now: Round, only: bool) -> int:
        if request.seeds:
            return request.seeds[min(which, len(request.seeds) - 1)]
        if now.seed is not None:
            return now.seed
        return self.seed if only else now.chance.randint(0, _LARGEST)

    def _report(self, problems: list[Problem]) -> None:
        for problem in problems:
            if problem not in self.problems:
                self.problems.append(problem)
                self._on_problem(problem)

    def _note(self, note: str) -> None:
        if note not in self._noted:
            self._noted.add(note)
            logger.warning("%s", note)


def _raw(entry: PromptEntry) -> str:
    """Return the prompt as it was written."""
    content = entry.content
    return content if isinstance(content, str) else str(content.get("prompt", ""))
