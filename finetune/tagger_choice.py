"""From probabilities to the tags of a picture, in the order the user wants."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.tagger_labels import CHARACTER, QUALITY, RATING, Label, spaced

FIRST, LAST = "first", "last"


@dataclass(frozen=True)
class ChoiceRules:
    """Which tags are written, and in which order.

    Attributes:
        threshold: least probability of a tag.
        thresholds: the same for single categories.
        ratings: `FIRST` or `LAST` to write the most probable rating, None for none.
        qualities: the same for the most probable quality.
        by_probability: the most probable tag comes first; otherwise the order is that of the model's list.
        characters_first: tags of characters come before other ones.
        always_first: tags that move to the front one after the other, so the last of them ends up first.
        undesired: tags that are never written, with spaces for underscores.
    """

    threshold: float
    thresholds: Mapping[str, float] = field(default_factory=dict)
    ratings: str | None = None
    qualities: str | None = None
    by_probability: bool = False
    characters_first: bool = False
    always_first: Sequence[str] = ()
    undesired: Collection[str] = ()


class Chooser:
    """Applies rules to the outputs of one model."""

    def __init__(self, labels: Sequence[Label], rules: ChoiceRules) -> None:
        self._labels, self._rules = labels, rules
        categories = np.array([label.category for label in labels])
        # Ratings and qualities are chosen among themselves, whatever their probability.
        never = np.float32(np.inf)
        limits = {**dict.fromkeys(set(categories.tolist()), rules.threshold), **rules.thresholds}
        limits |= {RATING: never, QUALITY: never}
        self._limits = np.array([limits[category] for category in categories.tolist()], np.float32)
        self._members = {name: np.flatnonzero(categories == name) for name in (RATING, QUALITY)}

    def has(self, category: str) -> bool:
        """Tell whether the model knows ratings, or qualities."""
        return len(self._members[category]) > 0

    def tags(self, probabilities: NDArray[Any]) -> list[str]:
        """Return the tags for probabilities [number of labels]."""
        rules = self._rules
        chosen = np.flatnonzero(probabilities >= self._limits)
        if rules.by_probability:
            chosen = chosen[np.argsort(-probabilities[chosen], kind="stable")]
        labels = [self._labels[index] for index in chosen.tolist()]
        if rules.characters_first:
            labels.sort(key=lambda label: label.category != CHARACTER)
        best = [(rules.ratings, RATING), (rules.qualities, QUALITY)]
        first = [label for where, name in best if where == FIRST for label in self._best(name, probabilities)]
        last = [label for where, name in best if where == LAST for label in self._best(name, probabilities)]
        tags = [tag for label in (*first, *labels, *last) for tag in label.tags]
        tags = [tag for tag in dict.fromkeys(tags) if not self._is_undesired(tag)]
        for wanted in rules.always_first:
            for tag in [tag for tag in tags if spaced(tag) == spaced(wanted)]:
                tags.remove(tag)
                tags.insert(0, tag)
        return tags

    def _best(self, category: str, probabilities: NDArray[Any]) -> list[Label]:
        members = self._members[category]
        return [self._labels[int(members[probabilities[members].argmax()])]] if len(members) else []

    def _is_undesired(self, tag: str) -> bool:
        return bool(self._rules.undesired) and spaced(tag) in self._rules.undesired
