"""How likely drafts of requests are accepted, as measured. Knows outcomes, no tokens and no costs.

What the device looks up the host does not see before the step. So a request's own recent drafts
are the estimate, and what such estimates have been worth, measured over all requests, its chance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_NUM_BINS = 16
_RATE = 0.3  # of a request's last step in its estimates
_DRIFT = 0.02  # of what is believed of all, in a step without drafts: it is tried again some day
_FIRST, _REST = 0.4, 0.7  # believed of a request's first draft, and of one behind an accepted one
_PRIOR_SCALE, _PRIOR_WEIGHT = 0.85, 8.0
_MEMORY = 0.998  # weight of all older drafts of a bin beside one more: of about 500
# Standard deviations added to what was counted: bad luck at first must not end all trying.
_OPTIMISM = 0.5
_MAX_CHANCE = 0.98


class _Bins:
    """Of drafts with an estimate of each size, those that were accepted; old ones fade."""

    def __init__(self) -> None:
        self._tried = np.full(_NUM_BINS, _PRIOR_WEIGHT)
        self._accepted = (np.arange(_NUM_BINS) + 0.5) / _NUM_BINS * _PRIOR_SCALE * _PRIOR_WEIGHT
        self._hoped: Floats | None = None

    def add(self, estimate: float, *, tried: int, accepted: int) -> None:
        at = min(int(estimate * _NUM_BINS), _NUM_BINS - 1)
        fading = _MEMORY**tried
        self._tried[at] = self._tried[at] * fading + tried
        self._accepted[at] = self._accepted[at] * fading + accepted
        self._hoped = None

    def chances(self, estimates: Floats) -> Floats:
        if self._hoped is None:
            share = self._accepted / self._tried
            self._hoped = share + _OPTIMISM * np.sqrt(share * (1.0 - share) / self._tried)
            self._hoped = np.minimum(self._hoped, _MAX_CHANCE)
        at = np.minimum((estimates * _NUM_BINS).astype(np.int64), _NUM_BINS - 1)
        found: Floats = self._hoped[at]
        return found


class Chances:
    """Of live requests' drafts; one that is not known is as good as new."""

    def __init__(self) -> None:
        self._firsts, self._rests = _Bins(), _Bins()
        # Recent shares: of steps whose first draft was accepted, of drafts behind accepted ones.
        self._recent: dict[str, tuple[float, float]] = {}

    def forget(self, request_id: str) -> None:
        self._recent.pop(request_id, None)

    def survivals(self, request_ids: Sequence[str], depth: int) -> Floats:
        """[n, depth] chances that a draft and all before it are accepted, a little hopeful."""
        new = (_FIRST, _REST)
        recent = np.array([self._recent.get(request_id, new) for request_id in request_ids])
        found = np.empty((len(request_ids), depth))
        found[:, 0] = self._firsts.chances(recent[:, 0])
        found[:, 1:] = self._rests.chances(recent[:, 1])[:, None]
        np.multiply.accumulate(found, axis=1, out=found)
        return found

    def learn(self, request_id: str, num_drafts: int, *, num_accepted: int) -> None:
        """Of a request's drafts the first ``num_accepted`` were accepted. Those behind the first
        that was not tell nothing."""
        first, rest = self._recent.get(request_id, (_FIRST, _REST))
        has_any = num_accepted > 0
        self._firsts.add(first, tried=1, accepted=has_any)
        first += _RATE * (has_any - first)
        tried = min(num_accepted, num_drafts - 1)
        if tried:
            self._rests.add(rest, tried=tried, accepted=num_accepted - 1)
            rest += _RATE * ((num_accepted - 1) / tried - rest)
        self._recent[request_id] = first, rest

    def pass_over(self, request_id: str) -> None:
        """It might have had drafts in a step, and had none."""
        known = self._recent.get(request_id)
        if known is not None:
            first, rest = known
            self._recent[request_id] = (
                first + _DRIFT * (_FIRST - first),
                rest + _DRIFT * (_REST - rest),
            )
