"""Steps that are run to learn: without drafts, or with more than pay. Knows counts and costs."""

from __future__ import annotations

from collections import Counter

from octavo.speculative.cost import StepCosts
from octavo.speculative.regime import Regime

# While it is on every so many steps have no drafts, and others one draft more than pays: what is
# never tried is never known.
_PLAIN_EVERY, _EXPLORE_EVERY = 97, 31
# Steps of a kind that are measured before it is judged.
_LEAST_MEASURED = 3
# A probe tries a draft whatever it is believed to bring, should it take less than this many steps.
_CHEAP_TRY = 1.2


class Trials:
    """Of one drafter; ``max_tries``: steps of a kind that measuring it may take."""

    def __init__(self, costs: StepCosts, regime: Regime, *, max_tries: int) -> None:
        self._costs, self._regime = costs, regime
        self._max_tries = max_tries
        self._num_choices = 0
        self._num_tried: Counter[int] = Counter()  # steps, by the size of what was tried

    def is_plain(self, num_requests: int) -> bool:
        """Once for each step that may have drafts: whether it is run without."""
        self._num_choices += 1
        num_plain = self._costs.of(num_requests).num_measured_at(num_requests)
        every = min(_PLAIN_EVERY, 8 + 8 * num_plain)
        return num_plain < _LEAST_MEASURED or self._num_choices % every == 0

    def num_drafts(self, num_requests: int) -> int:
        """Drafts to have in the step whether they pay or not, to learn what they cost."""
        number = 2 + num_requests // 6
        key = number.bit_length()
        costs = self._costs.of(num_requests)
        is_unknown = costs.num_measured_at(num_requests + number) < _LEAST_MEASURED
        if is_unknown and self._num_tried[key] < self._max_tries:
            self._num_tried[key] += 1
            return number
        if self._regime.is_on:
            return int(self._num_choices % _EXPLORE_EVERY == 0)
        is_cheap = costs.seconds(num_requests + 1) < _CHEAP_TRY * costs.seconds(num_requests)
        return int(is_cheap and self._regime.is_beginning)
