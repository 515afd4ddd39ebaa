"""Keys of n-grams: the same sum whether taken of one place or of many. Knows integers alone.

key(t[1..n]) = sum of t[j] * M**(n - j) mod 2**64, so one of n + 1 is one of n and one product.
Keys may collide; whoever finds one compares tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_FACTOR = 0x9E3779B97F4A7C15  # odd, so that products lose nothing; 2**64 over the golden ratio


def factors(max_length: int) -> tuple[int, ...]:
    """What the token ``j`` before the last is multiplied by, for j < max_length."""
    found = [1]
    while len(found) < max_length:
        found.append(found[-1] * _FACTOR & _MASK)
    return tuple(found)


def keys_between(
    token_ids: Sequence[int], start: int, end: int, multipliers: Sequence[int]
) -> list[int]:
    """Keys of the n-grams that end before each of ``start + 1 .. end``; ``start >= n - 1``."""
    num_back = len(multipliers) - 1
    tokens: npt.NDArray[np.uint64] = np.asarray(token_ids[start - num_back : end], np.uint64)
    keys = np.zeros(end - start, np.uint64)
    for back, factor in enumerate(multipliers):
        first = num_back - back
        keys += tokens[first : first + end - start] * np.uint64(factor)
    found: list[int] = keys.tolist()
    return found
