"""Pictures that look alike: a hash of 64 bits for each, and a search that does not compare all with all.

The hash is the difference hash: the picture is shrunk to 9x8 grey values, and each bit tells whether a value is larger
than its right neighbour. It survives other sizes, other compression and changes of brightness, and is turned into
another one by cropping, turning and mirroring. Since plain areas hash alike whatever their colour, pictures count as
near duplicates only when small thumbnails are alike too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

THUMBNAIL = 8
"""Side of the thumbnails; a thumbnail is uint8 [8,8,3], flat."""

MOST_DISTANCE = 10
_ALIKE = 12.0
"""Mean difference of thumbnails, of 255, up to which pictures are alike."""

_ROUNDS = 64
_BITS = np.array([bin(number).count("1") for number in range(1 << 16)], np.uint8)


def look_of(pixels: NDArray[np.uint8]) -> tuple[int, bytes]:
    """Return the difference hash (64 bits) and the thumbnail of a picture [H,W,3]."""
    from PIL import Image

    # Reduced by whole factors first: what follows then costs the same for every picture.
    image = Image.fromarray(pixels[:, :, :3])
    factor = min(image.size) // 32
    image = image.reduce(factor) if factor > 1 else image
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
    bits = np.packbits((grey[:, :-1] > grey[:, 1:]).reshape(-1))
    thumbnail = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return int.from_bytes(bits.tobytes(), "big"), np.asarray(thumbnail).tobytes()


@dataclass(frozen=True, slots=True)
class NearGroup:
    """Pictures (by index) that look alike, and the largest number of bits that two found together differ in."""

    members: tuple[int, ...]
    distance: int


def near_groups(hashes: NDArray[np.uint64], thumbnails: NDArray[np.uint8], distance: int) -> list[NearGroup]:
    """Return groups of pictures that look alike, in the order of their first members.

    A picture belongs to a group when it is like one of its members, not necessarily like all.

    Args:
        hashes: from `look_of`, uint64 [N].
        thumbnails: from `look_of`, uint8 [N, 192].
        distance: number of bits in which two hashes may differ, at most `MOST_DISTANCE`.
    """
    nodes = list(_same_looks(hashes, thumbnails)) if len(hashes) else []
    first = np.array([members[0] for members in nodes], np.int64)
    parents = np.arange(len(nodes))
    spread = np.zeros(len(nodes), np.int64)
    for left, right, bits in near_pairs(hashes[first], distance):
        alike = _alike(thumbnails[first[left]], thumbnails[first[right]])
        for one, other, differ in zip(left[alike].tolist(), right[alike].tolist(), bits[alike].tolist(), strict=True):
            root, joined = sorted((_root(parents, one), _root(parents, other)))
            parents[joined] = root
            spread[root] = max(spread[root], spread[joined], differ)
    groups: dict[int, list[int]] = {}
    for node, members in enumerate(nodes):
        groups.setdefault(_root(parents, node), []).extend(members)
    found = [
        NearGroup(tuple(sorted(members)), int(spread[root])) for root, members in groups.items() if len(members) > 1
    ]
    return sorted(found, key=lambda group: group.members)


def near_pairs(
    hashes: NDArray[np.uint64], distance: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Yield pairs of hashes that differ in at most `distance` bits: first, second, bits; a pair may come repeatedly.

    The 64 bits are cut into distance + 1 pieces. Hashes that differ in no more than `distance` bits agree in one piece
    at least, so only hashes with a piece in common are compared.
    """
    edges = np.linspace(0, 64, distance + 2).astype(int).tolist()
    for low, high in zip(edges, edges[1:], strict=False):
        piece = (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(piece, kind="stable")
        piece, ordered = piece[order], hashes[order]
        step, places = 1, np.arange(len(order) - 1)
        # In sorted order, members of a group are neighbours: compare each with the next, the one after it, ...
        while (places := places[piece[places] == piece[places + step]]).size:
            bits = count_bits(ordered[places] ^ ordered[places + step])
            near = bits <= distance
            if near.any():
                yield order[places[near]], order[places[near] + step], bits[near]
            step += 1
            places = places[places + step < len(order)]


def count_bits(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return how many bits of each value are set."""
    halves = np.ascontiguousarray(values).view(np.uint16).reshape(len(values), 4)
    return _BITS[halves].sum(1, dtype=np.int64)


def _same_looks(hashes: NDArray[np.uint64], thumbnails: NDArray[np.uint8]) -> Iterator[list[int]]:
    """Yield pictures of one hash whose thumbnails are alike; plain pictures share a hash without being alike."""
    order = np.argsort(hashes, kind="stable")
    cuts = np.flatnonzero(np.diff(hashes[order])) + 1
    for members in np.split(order, cuts):
        left = members
        for _ in range(_ROUNDS):
            alike = _alike(thumbnails[left[:1]], thumbnails[left])
            yield left[alike].tolist()
            left = left[~alike]
            if not left.size:
                break
        # Of hundreds of different pictures with one hash the rest stay alone.
        yield from ([one] for one in left.tolist())


def _alike(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.bool_]:
    difference = np.abs(one.astype(np.int16) - other.astype(np.int16)).mean(1)
    return np.asarray(difference <= _ALIKE)


def _root(parents: NDArray[np.int64], node: int) -> int:
    while parents[node] != node:
        parents[node] = parents[parents[node]]
        node = int(parents[node])
    return node
