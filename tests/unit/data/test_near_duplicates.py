"""Hashes of pictures, and the search for those that look alike."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.data.near_duplicates import count_bits, look_of, near_groups, near_pairs

PHOTOS = sorted((Path(__file__).parents[3] / "examples" / "photos").glob("*/*.jpg"))[:6]


def looks(*pictures):
    found = [look_of(np.asarray(picture.convert("RGB"))) for picture in pictures]
    thumbnails = np.frombuffer(b"".join(thumbnail for _, thumbnail in found), np.uint8)
    return np.array([number for number, _ in found], np.uint64), thumbnails.reshape(len(found), -1)


def test_other_sizes_and_qualities_of_a_photograph_are_found_and_others_are_not(tmp_path):
    photos = [Image.open(path) for path in PHOTOS]
    small = photos[1].resize((photos[1].width // 3, photos[1].height // 3))
    photos[2].save(tmp_path / "poor.jpg", quality=25)
    hashes, thumbnails = looks(*photos, small, Image.open(tmp_path / "poor.jpg"))
    groups = near_groups(hashes, thumbnails, 4)
    assert [group.members for group in groups] == [(1, 6), (2, 7)]
    assert all(group.distance <= 4 for group in groups)


def test_plain_pictures_of_different_colours_are_not_alike():
    red, blue, dark_red = (Image.new("RGB", (64, 64), colour) for colour in ("#e00000", "#0000e0", "#d80000"))
    hashes, thumbnails = looks(red, blue, dark_red)
    assert len(set(hashes.tolist())) == 1
    assert [group.members for group in near_groups(hashes, thumbnails, 0)] == [(0, 2)]


@pytest.mark.parametrize("distance", [0, 1, 4, 10])
def test_search_finds_what_comparing_all_with_all_finds(distance):
    generator = np.random.default_rng(5)
    seeds = generator.integers(0, 1 << 63, 40, dtype=np.uint64)
    flips = np.array([sum(1 << int(bit) for bit in generator.choice(64, 6, replace=False)) for _ in range(120)], object)
    hashes = np.array([int(seeds[i % 40]) ^ (int(flip) & int(flips[i - 1])) for i, flip in enumerate(flips)], np.uint64)
    expected = {
        (one, other)
        for one, other in combinations(range(len(hashes)), 2)
        if bin(int(hashes[one]) ^ int(hashes[other])).count("1") <= distance
    }
    found = set()
    for left, right, bits in near_pairs(hashes, distance):
        assert (bits == count_bits(hashes[left] ^ hashes[right])).all()
        found |= {tuple(sorted(pair)) for pair in zip(left.tolist(), right.tolist(), strict=True)}
    assert found == expected and expected


def test_chains_make_one_group_and_nothing_makes_none():
    hashes = np.array([0, 0b11, 0b1111, 1 << 40 | 0xFFFF000], np.uint64)
    thumbnails = np.zeros((4, 192), np.uint8)
    (group,) = near_groups(hashes, thumbnails, 2)
    assert (group.members, group.distance) == ((0, 1, 2), 2)
    assert near_groups(np.zeros(0, np.uint64), np.zeros((0, 192), np.uint8), 4) == []
