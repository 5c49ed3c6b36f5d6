"""Cleaning of one caption or one list of tags by rules; remembers what every rule did."""

from __future__ import annotations

import re
from collections import Counter
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
        words = [re.escape(word) for word in sorted(kept, key=len, reverse=True)]
        self._underscore = re.compile("|".join([*words, "_"]))
        # The same tags occur again and again.
        self._groups_of = cache(self._match_groups)
        self._is_general = cache(self._match_general)

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
            spaced = self._underscore.sub(lambda found: " " if found[0] == "_" else found[0], text)
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
        groups = {number for tag in tags for number in self._groups_of(tag)}
        for number in sorted(groups):
            members = [tag for tag in tags if number in self._groups_of(tag)]
            if len(members) > 1:
                tags = [tag for tag in tags if number not in self._groups_of(tag)]
                self.counts["tags"][f"removed, whose is it: {self._rules.tags.ambiguous[number].name}"] += 1
        return tags

    def _without_general(self, tags: list[str]) -> list[str]:
        """Remove general tags that are the last words of a longer one."""
        if not self._rules.tags.general:
            return tags
        endings = {tag[at + 1 :] for tag in tags for at, letter in enumerate(tag) if letter == " "}
        kept = [tag for tag in tags if tag not in endings or not self._is_general(tag)]
        if len(kept) < len(tags):
            for tag in {*tags} - {*kept}:
                self.counts["tags"][f"removed beside a longer tag: {tag}"] += 1
        return kept
