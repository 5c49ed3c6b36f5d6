"""Cleaning of one caption or one list of tags by rules; remembers what every rule did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache

from finetune.clean_rules import Rules

SEPARATOR = ", "
_MOST_REPEATS = 1000


class Cleaner:
    """Applies rules. `counts` says how many texts each rule changed, by a short description of what it did."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self.counts: dict[str, Counter[str]] = {"caption": Counter(), "tags": Counter()}
        kept = rules.tags.keep_underscores or ()
        # Longer ones first, so that none hides inside another.
        self._kept = sorted(kept, key=len, reverse=True)
        # The same tags occur again and again.
        self._groups_of = cache(self._match_groups)
        self._is_general = cache(self._match_general)
        self._ending = cache(_ending)

    def clean_caption(self, text: str) -> str:
        """Return a caption after all replacements, each repeated until it changes nothing more."""
        count = self.counts["caption"]
        for old, new in self._rules.replace:
            if old not in text:
                continue
            count[f"{old!r} -> {new!r}"] += 1
            # A rule that lengthens the text may never end: it is applied once.
            for _ in range(_MOST_REPEATS if len(new) <= len(old) else 1):
                text = text.replace(old, new)
                if old not in text:
                    break
        return text

    def clean_tags(self, text: str) -> str:
        """Return tags, separated by comma and space, without what the rules remove."""
        rules, count = self._rules.tags, self.counts["tags"]
        if rules.keep_underscores is not None and "_" in text:
            spaced = _spaced(text, self._kept)
            count["underscores -> spaces"] += spaced != text
            text = spaced
        for mark in rules.cut_at:
            head, found, _rest = text.partition(mark)
            count[f"cut at {mark!r}"] += bool(found)
            text = head
        tags = [tag for part in text.split(SEPARATOR) if (tag := part.strip())]
        if any(word in text for word in rules.several_people):
            tags = self._without_ambiguous(tags)
        return SEPARATOR.join(self._without_general(tags))

    def _match_groups(self, tag: str) -> tuple[int, ...]:
        return tuple(number for number, group in enumerate(self._rules.tags.ambiguous) if group.matches(tag))

    def _match_general(self, tag: str) -> bool:
        return any(pattern.fullmatch(tag) for pattern in self._rules.tags.general)

    def _without_ambiguous(self, tags: list[str]) -> list[str]:
        """Remove every group of which two or more tags are left when its turn comes."""
        left = [(tag, groups) for tag in tags if (groups := self._groups_of(tag))]
        removed: set[str] = set()
        for number in sorted({number for _tag, groups in left for number in groups}):
            members = [tag for tag, groups in left if number in groups]
            if len(members) > 1:
                removed.update(members)
                left = [pair for pair in left if number not in pair[1]]
                self.counts["tags"][f"removed, whose is it: {self._rules.tags.ambiguous[number].name}"] += 1
        return [tag for tag in tags if tag not in removed] if removed else tags

    def _without_general(self, tags: list[str]) -> list[str]:
        """Remove general tags that are the last words of a longer one."""
        general = set(filter(self._is_general, tags))
        lengths = {tag.count(" ") + 1 for tag in general}
        removed = {end for words in lengths for tag in tags if (end := self._ending(tag, words)) in general}
        if not removed:
            return tags
        for tag in removed:
            self.counts["tags"][f"removed beside a longer tag: {tag}"] += 1
        return [tag for tag in tags if tag not in removed]


def _spaced(text: str, kept: Sequence[str]) -> str:
    """Return text with spaces for underscores, except inside of the words that are kept."""
    if not kept:
        return text.replace("_", " ")
    return kept[0].join(_spaced(part, kept[1:]) for part in text.split(kept[0]))


def _ending(tag: str, words: int) -> str:
    """Return the last words of a tag, so many; nothing when it has no more than these."""
    parts = tag.rsplit(" ", words)
    return tag[len(parts[0]) + 1 :] if len(parts) > words else ""
