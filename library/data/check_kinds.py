"""What a check of a data set may find. Light: options name these kinds."""

from __future__ import annotations

KINDS = {
    "unreadable": "pictures that cannot be decoded",
    "missing_picture": "entries of metadata without a picture",
    "same_name": "pictures with the name of another one up to the suffix",
    "duplicate": "groups of pictures that are the same file",
    "near_duplicate": "groups of pictures that look alike",
    "tiny": "pictures with a side that is too short",
    "oversized": "pictures with too many pixels",
    "rotated": "pictures that EXIF tells to turn",
    "no_caption": "pictures without caption",
    "empty_caption": "pictures with an empty caption",
    "bad_caption": "captions that cannot be read",
    "long_caption": "captions over the limit of tokens",
    "orphan_caption": "captions without picture",
}
"""Kinds of findings, in the order in which they are shown, and what they are in words."""
