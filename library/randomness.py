"""All randomness is a function of names and counters, never a state that someone advances.

`derive(seed, stream, *counters)` is 64 bits of BLAKE2b over a fixed byte encoding, so it is the same on every platform,
for every number of workers and processes, and nothing random has to be saved to continue a run.
"""

from __future__ import annotations

import random
from hashlib import blake2b

_MASK = (1 << 64) - 1


def derive(seed: int, stream: str, *counters: int | str) -> int:
    """Return 64 bits that depend on `seed`, the name of the stream and the counters, and on nothing else."""
    parts = [(seed & _MASK).to_bytes(8, "little"), _text(stream)]
    for counter in counters:
        if isinstance(counter, str):
            parts.append(b"s" + _text(counter))
        else:
            parts.append(b"i" + (int(counter) & _MASK).to_bytes(8, "little"))
    return int.from_bytes(blake2b(b"".join(parts), digest_size=8).digest(), "little")


def uniform(seed: int, stream: str, *counters: int | str) -> float:
    """Return a number in [0, 1) with 53 random bits, derived as in `derive`."""
    return (derive(seed, stream, *counters) >> 11) * 2.0**-53


def python_random(seed: int, stream: str, *counters: int | str) -> random.Random:
    """Return a private generator of Python's `random` seeded by `derive`."""
    return random.Random(derive(seed, stream, *counters))


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return len(data).to_bytes(4, "little") + data
