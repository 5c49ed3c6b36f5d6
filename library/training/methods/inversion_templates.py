"""Sentences that take the place of captions in textual inversion: those that all programs for it use."""

from __future__ import annotations

from itertools import chain

_OBJECT = {
    "a photo of": (
        "a", "a clean", "a dirty", "my", "the cool", "the", "one", "the clean", "a nice", "the nice", "the small",
        "the weird", "the large", "a cool", "a small",
    ),
    "a rendering of": ("a",),
    "a cropped photo of": ("the", "a"),
    "the photo of": ("a",),
    "a dark photo of": ("the",),
    "a close-up photo of": ("a", "the"),
    "a bright photo of": ("the",),
    "a good photo of": ("the", "a"),
    "a rendition of": ("a", "the"),
}  # fmt: skip
"""What a picture is -> the articles and adjectives of the object."""

_PAINTINGS = ("clean", "dirty", "dark", "cool", "bright", "good", "nice", "small", "weird", "large")
# Two of them are twice as likely as the others.
_STYLE = (
    *("a painting", "the painting", "a rendering", "a rendition", "a picture"),
    *("a cropped painting", "a close-up painting") * 2,
    *(f"a {adjective} painting" for adjective in _PAINTINGS),
)


def object_sentences(word: str) -> tuple[str, ...]:
    """Return 27 sentences about an object called `word`."""
    of_each = ([f"{picture} {which} {word}" for which in choices] for picture, choices in _OBJECT.items())
    return tuple(chain.from_iterable(of_each))


def style_sentences(word: str) -> tuple[str, ...]:
    """Return 19 phrases about pictures in the style called `word`."""
    return tuple(f"{picture} in the style of {word}" for picture in _STYLE)
