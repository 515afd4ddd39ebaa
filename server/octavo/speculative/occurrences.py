"""Where the last tokens of a request occurred in a text before. Knows token ids alone.

A suffix array cut off at three tokens: places sorted by the tokens before them, backwards, so that
one search gives those that share the last three, two or one; what is longer shows when they are
compared. It costs 16 bytes a token, and new tokens are merged in by the dozen. Arrays of Python are
searched rather than numpy's, whose calls take longer than such a search.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_TOKEN_BITS = 21
_NO_TOKEN = (1 << _TOKEN_BITS) - 1  # also where a text ends and another begins
SEPARATOR = -1  # is cut to _NO_TOKEN in keys
_DEPTH = 3
_FEW = 48  # newest tokens that are looked through rather than sorted in
_MAX_MERGED = 4096  # in one call, so that none is slow
_MAX_SORTED = 512  # places that are looked through for the latest ones

_Ints = npt.NDArray[np.int64]


class Occurrences:
    """A text that grows at its end, and whose beginning can be forgotten.

    A place is a number of tokens: those before it were read, the one at it came next.
    """

    __slots__ = ("_keys", "_num_merged", "_places", "_shift", "tokens")

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens = list(tokens)
        self._num_merged = 0  # places in [1, _num_merged] are sorted in
        self._shift = 0  # what sorted places count too many, of tokens forgotten
        self._keys, self._places = array("q"), array("q")

    @property
    def is_behind(self) -> bool:
        """Whether so much is new that `merge` must be called once more, or several times."""
        return len(self.tokens) - 1 - self._num_merged > _FEW

    def merge(self) -> None:
        """Sorts new places in, or some of them where there are thousands."""
        start = self._num_merged
        end = min(len(self.tokens) - 1, start + _MAX_MERGED)
        if end <= start:
            return
        first = max(0, start + 1 - _DEPTH)
        tokens = np.full(end - start + _DEPTH - 1, _NO_TOKEN, np.int64)
        known = np.asarray(self.tokens[first:end], np.int64) & _NO_TOKEN
        tokens[len(tokens) - len(known) :] = known
        keys = tokens[2:] << 2 * _TOKEN_BITS | tokens[1:-1] << _TOKEN_BITS | tokens[:-2]
        order = np.argsort(keys, kind="stable")
        keys, places = keys[order], order + (start + 1 + self._shift)
        if len(self._keys):
            old = _viewed(self._keys)
            at = np.searchsorted(old, keys, side="right")
            keys, places = np.insert(old, at, keys), np.insert(_viewed(self._places), at, places)
        self._keys, self._places = array("q", keys.tobytes()), array("q", places.tobytes())
        self._num_merged = end

    def forget(self, num_tokens: int) -> None:
        """Drops so many tokens from the beginning."""
        del self.tokens[:num_tokens]
        self._shift += num_tokens
        self._num_merged = max(0, self._num_merged - num_tokens)
        if len(self._keys):
            keys, places = _viewed(self._keys), _viewed(self._places)
            is_kept = places > self._shift
            self._keys = array("q", keys[is_kept].tobytes())
            self._places = array("q", places[is_kept].tobytes())

    def places(self, tokens: Sequence[int], *, limit: int) -> list[int]:
        """Latest places behind the last of ``tokens``, at most ``limit`` of them: all that share
        the last token among the newest, then those that share most."""
        found: list[int] = []
        own, last = self.tokens, tokens[-1]
        for place in range(len(own) - 1, self._num_merged, -1):
            if own[place - 1] == last:
                found.append(place)
                if len(found) == limit:
                    return found
        if len(self._keys):
            found += self._search(tokens, limit - len(found))
        return found

    def _search(self, tokens: Sequence[int], limit: int) -> list[int]:
        t3, t2, t1 = (_NO_TOKEN, _NO_TOKEN, *tokens[-_DEPTH:])[-_DEPTH:]
        one = t1 << 2 * _TOKEN_BITS
        two = one | t2 << _TOKEN_BITS
        keys, start, end = self._keys, 0, 0
        for key, num_free in ((two | t3, 0), (two, 1), (one, 2)):
            start = bisect_left(keys, key)
            end = bisect_left(keys, key + (1 << num_free * _TOKEN_BITS), start)
            if start < end:
                break
        places = self._places[max(start, end - _MAX_SORTED) : end].tolist()
        if num_free and len(places) > limit:  # where all of the key is shared they lie in order
            places.sort()
        shift = self._shift
        return [place - shift for place in places[: -limit - 1 : -1]]


def _viewed(numbers: array[int]) -> _Ints:
    return np.frombuffer(numbers, np.int64)
