"""How likely drafts are accepted, as measured. Knows estimates and outcomes, no tokens.

A proposer's estimate falls into a bin, whose measured share of accepted drafts replaces it; a
request whose drafts do better or worse than that has a factor of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_NUM_BINS = 16
_MAX_POSITION = 15
# What a bin is believed to be before there is anything to count, and how many drafts that weighs.
_PRIOR_SCALE, _PRIOR_ALONE, _PRIOR_WEIGHT = 0.85, 0.35, 8.0
_MEMORY = 0.998  # weight of all older drafts of a bin beside one more: of about 500
_REQUEST_WEIGHT = 4.0  # expected drafts that the factor 1 of a request weighs
_REQUEST_MEMORY = 0.97
_MAX_PROB = 0.98
# Standard deviations added to what was counted: bad luck at first must not end all trying.
_OPTIMISM = 0.5


class _Share:
    """Of drafts, those that were accepted; old ones fade."""

    __slots__ = ("accepted", "hoped", "tried", "value")

    def __init__(self, value: float) -> None:
        self.accepted, self.tried = value * _PRIOR_WEIGHT, _PRIOR_WEIGHT
        self._weigh()

    def add(self, is_accepted: bool) -> None:
        self.accepted = self.accepted * _MEMORY + is_accepted
        self.tried = self.tried * _MEMORY + 1
        self._weigh()

    def _weigh(self) -> None:
        value = self.value = self.accepted / self.tried
        self.hoped = value + _OPTIMISM * math.sqrt(value * (1.0 - value) / self.tried)


class _Record:
    """A request's accepted drafts, beside those that were to be expected."""

    __slots__ = ("accepted", "expected", "factor")

    def __init__(self) -> None:
        self.accepted = self.expected = _REQUEST_WEIGHT
        self.factor = 1.0

    def add(self, prob: float, is_accepted: bool) -> None:
        self.accepted = _REQUEST_WEIGHT + (self.accepted - _REQUEST_WEIGHT) * _REQUEST_MEMORY
        self.expected = _REQUEST_WEIGHT + (self.expected - _REQUEST_WEIGHT) * _REQUEST_MEMORY
        self.accepted += is_accepted
        self.expected += prob
        self.factor = self.accepted / self.expected


class Acceptance:
    """Measured chances of drafts, for all requests and for each."""

    def __init__(self) -> None:
        self._bins = [
            _Share((i + 0.5) / _NUM_BINS * _PRIOR_SCALE) for i in range(_NUM_BINS)
        ]  # of drafts with an estimate, by it
        self._alone = [_Share(_PRIOR_ALONE) for _ in range(_MAX_POSITION + 1)]  # by position
        self._records: dict[str, _Record] = {}

    def begin(self, request_id: str) -> None:
        """A new request, or one that was preempted."""
        self._records[request_id] = _Record()

    def forget(self, request_id: str) -> None:
        self._records.pop(request_id, None)

    def survivals(
        self, request_id: str, num_drafts: int, probs: Sequence[float] | None
    ) -> list[float]:
        """For each draft the chance that it and all before it are accepted, a little hopeful."""
        record = self._records.get(request_id)
        factor = 1.0 if record is None else record.factor
        found, survival = [], 1.0
        for share in self._shares(num_drafts, probs):
            survival *= min(share.hoped * factor, _MAX_PROB)
            found.append(survival)
        return found

    def learn(
        self, request_id: str, num_drafts: int, probs: Sequence[float] | None, *, num_accepted: int
    ) -> None:
        """Of a request's drafts the first ``num_accepted`` were accepted. Those behind the first
        that was not tell nothing."""
        record = self._records.get(request_id)
        for i, share in enumerate(self._shares(min(num_drafts, num_accepted + 1), probs)):
            is_accepted = i < num_accepted
            if record is not None:
                record.add(share.value, is_accepted)
            share.add(is_accepted)

    def _shares(self, num_drafts: int, probs: Sequence[float] | None) -> list[_Share]:
        if probs is None:
            return [self._alone[min(i, _MAX_POSITION)] for i in range(num_drafts)]
        bins = self._bins
        return [bins[min(int(prob * _NUM_BINS), _NUM_BINS - 1)] for prob in probs[:num_drafts]]
