"""What becomes of a caption before it is tokenized, in the order that users of sd-scripts know.

A pipeline belongs to one subset. Everything random comes from the generator that is passed in, so a caption is a
function of the sample and of nothing else. All steps take time linear in the length of the text.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence

from library.data.dataset_spec import SubsetSpec
from library.data.filters import choose, parse_captions_getter

_DROPPING = ("caption_dropout_rate", "caption_dropout_every_n_epochs")

Replacement = tuple[str, str | Sequence[str]]

ALTERNATIVE = "\x1e"
"""Between the texts of a caption of which one is chosen at each visit; no caption holds it otherwise."""

# Protected braces are held by characters that `clean_caption` keeps out of captions.
_OPEN, _CLOSE = "\x01", "\x02"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def clean_caption(text: str) -> tuple[str, bool]:
    """Unify line ends and remove control characters (tabs stay); also tell whether there were any to remove."""
    if text.isprintable():
        return text, False
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if _CONTROL.search(text) is None:
        return text, False
    return _CONTROL.sub("", text), True


class CaptionPipeline:
    """Caption steps of one subset."""

    def __init__(
        self, subset: SubsetSpec, max_train_steps: int | None = None, replacements: Sequence[Replacement] = ()
    ) -> None:
        """Prepare the steps.

        Args:
            subset: Caption settings.
            max_train_steps: Length of the run, needed when the token warm-up is a share of it.
            replacements: Textual inversion: (source, text or texts to choose from); an empty source replaces all.
        """
        self._subset = subset
        self._replacements = tuple(replacements)
        warmup = subset.token_warmup_step
        if 0 < warmup < 1:
            if max_train_steps is None:
                raise ValueError("token_warmup_step below 1 needs the number of steps of the run")
            warmup = math.floor(warmup * max_train_steps)
        self._warmup_steps = warmup
        self._weights = _weights_of(subset)
        self._edits_tags = subset.shuffle_caption or warmup > 0 or subset.caption_tag_dropout_rate > 0

    def random_options(self) -> tuple[str, ...]:
        """Return the options that make captions differ from visit to visit; none: `process` may be done once."""
        subset = self._subset
        found = [
            name
            for name in ("caption_dropout_rate", "caption_dropout_every_n_epochs", "shuffle_caption", "enable_wildcard")
            if getattr(subset, name)
        ]
        if len(self._weights) > 1:
            found.append("caption_field")
        if self._warmup_steps > 0:
            found.append("token_warmup_step")
        if subset.caption_tag_dropout_rate > 0:
            found.append("caption_tag_dropout_rate")
        if any(not isinstance(target, str) for _source, target in self._replacements):
            found.append("textual inversion templates")
        return tuple(found)

    def deterministic(self) -> bool:
        """Tell whether a caption is the same at every visit."""
        return not self.random_options()

    def varying_options(self) -> tuple[str, ...]:
        """Return the options that make a caption differ from visit to visit when it is not dropped.

        None: only two texts are ever served, `undropped` and the empty one, whose text encoder outputs can be cached.
        """
        return tuple(name for name in self.random_options() if name not in _DROPPING)

    def undropped(self, text: str) -> str:
        """Return the caption of every visit that does not drop it, where there are no `varying_options`."""
        return self._finished(self._framed(text), random.Random(0), 0)

    def process(self, text: str, rng: random.Random, *, epoch: int, step: int) -> str:
        """Return the caption of one visit.

        Args:
            text: The caption as read, possibly of several lines.
            rng: Generator of this sample.
            epoch: Counted from 1.
            step: Optimizer updates done, from 0.
        """
        if text.count(ALTERNATIVE) == len(self._weights) - 1 > 0:
            text = choose([part or None for part in text.split(ALTERNATIVE)], self._weights, rng) or ""
        text = self._framed(text)
        return "" if self._dropped(rng, epoch) else self._finished(text, rng, step)

    def _framed(self, text: str) -> str:
        subset = self._subset
        if subset.caption_prefix:
            text = f"{subset.caption_prefix} {text}"
        return f"{text} {subset.caption_suffix}" if subset.caption_suffix else text

    def _finished(self, text: str, rng: random.Random, step: int) -> str:
        subset = self._subset
        text = self._choose_line(text, rng)
        if subset.enable_wildcard:
            text = expand_wildcards(text, rng)
        if self._edits_tags:
            text = self._edit_tags(text, rng, step)
        if subset.secondary_separator:
            text = text.replace(subset.secondary_separator, subset.caption_separator)
        return self._replace(text, rng)

    def _dropped(self, rng: random.Random, epoch: int) -> bool:
        subset = self._subset
        if subset.caption_dropout_rate > 0 and rng.random() < subset.caption_dropout_rate:
            return True
        every = subset.caption_dropout_every_n_epochs
        return every > 0 and epoch % every == 0

    def _choose_line(self, text: str, rng: random.Random) -> str:
        if "\n" not in text:
            return text
        if self._subset.enable_wildcard:
            return rng.choice(text.split("\n"))
        return text.partition("\n")[0]

    def _edit_tags(self, text: str, rng: random.Random, step: int) -> str:
        """Warm-up, shuffle and drop of the flexible tags; always joined with a comma and a space."""
        head, flexible, tail = self._split(text)
        if step < self._warmup_steps:
            least = self._subset.token_warmup_min
            count = math.floor(step * (len(flexible) - least) / self._warmup_steps) + least
            flexible = flexible[: max(count, 0)]
        if self._subset.shuffle_caption:
            rng.shuffle(flexible)
        rate = self._subset.caption_tag_dropout_rate
        if rate > 0:
            flexible = [tag for tag in flexible if rng.random() >= rate]
        return ", ".join([*head, *flexible, *tail])

    def _split(self, text: str) -> tuple[list[str], list[str], list[str]]:
        """Return (fixed head, flexible tags, fixed tail)."""
        separator = self._subset.keep_tokens_separator
        if separator and separator in text:
            parts = text.split(separator, 2)
            head, flexible, tail = (self._tags(part) for part in (*parts, "", "")[:3])
            return [t for t in head if t], [t for t in flexible if t], [t for t in tail if t]
        tags = self._tags(text.strip())
        keep = self._subset.keep_tokens
        return tags[:keep], tags[keep:], []

    def _tags(self, text: str) -> list[str]:
        separator = self._subset.caption_separator
        return [tag.strip() for tag in (text.split(separator) if separator else [text])]

    def _replace(self, text: str, rng: random.Random) -> str:
        for source, target in self._replacements:
            new = target if isinstance(target, str) else rng.choice(target)
            text = text.replace(source, new) if source else new
        return text


def _weights_of(subset: SubsetSpec) -> tuple[float, ...]:
    """Return how often each of several texts of a caption is chosen."""
    return parse_captions_getter(list(subset.caption_field)).weights if subset.caption_field else (1.0,)


def readable(text: str) -> str:
    """Return a caption as it is told and counted: its alternatives one after the other."""
    return text.replace(ALTERNATIVE, ", ") if ALTERNATIVE in text else text


def expand_wildcards(text: str, rng: random.Random) -> str:
    """Replace every `{a|b|c}` by one of its parts; `{{` and `}}` become single braces, `{}` stays as it is."""
    if "{" not in text and "}" not in text:
        return text
    text = text.replace("{{", _OPEN).replace("}}", _CLOSE)
    pieces = []
    position = 0
    while True:
        start = text.find("{", position)
        end = text.find("}", start + 1) if start >= 0 else -1
        if end < 0:
            pieces.append(text[position:])
            break
        if end == start + 1:
            pieces.append(text[position:end])
            position = end
            continue
        pieces.append(text[position:start])
        pieces.append(rng.choice(text[start + 1 : end].split("|")))
        position = end + 1
    return "".join(pieces).replace(_OPEN, "{").replace(_CLOSE, "}")
