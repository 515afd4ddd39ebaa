"""Where the last tokens of a request occurred in a text before. Knows token ids alone.

A suffix array cut off at three tokens: places sorted by the tokens before them, backwards, so that
one search gives those that share the last three, two or one; what is longer shows when they are
compared. It costs 16 bytes a token, and new tokens are merged in by the dozen.
"""

from __future__ import annotations

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
        self._keys: _Ints = np.zeros(0, np.int64)
        self._places: _Ints = np.zeros(0, np.int64)

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
            at = np.searchsorted(self._keys, keys, side="right")
            keys, places = np.insert(self._keys, at, keys), np.insert(self._places, at, places)
        self._keys, self._places, self._num_merged = keys, places, end

    def forget(self, num_tokens: int) -> None:
        """Drops so many tokens from the beginning."""
        del self.tokens[:num_tokens]
        self._shift += num_tokens
        self._num_merged = max(0, self._num_merged - num_tokens)
        is_kept = self._places > self._shift
        self._keys, self._places = self._keys[is_kept], self._places[is_kept]

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
        three = two | t3
        bounds = (
            three,
            three + 1,
            two,
            two + (1 << _TOKEN_BITS),
            one,
            one + (1 << 2 * _TOKEN_BITS),
        )
        ends = np.searchsorted(self._keys, np.asarray(bounds, np.int64)).tolist()
        for depth in range(0, 2 * _DEPTH, 2):
            start, end = ends[depth : depth + 2]
            if start < end:
                break
        else:
            return []
        places = self._places[max(start, end - _MAX_SORTED) : end]
        if depth and len(places) > limit:  # where all of the key is shared they lie in order
            places = np.sort(places)
        found: list[int] = (places[-limit:][::-1] - self._shift).tolist()
        return found
