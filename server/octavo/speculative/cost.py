"""What steps cost by their number of tokens, learnt from steps. Knows counts and seconds alone."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float64]

# Numbers of tokens whose cost is kept; between them it is interpolated.
_KNOTS = np.asarray(
    [*range(1, 9), *(step << power for power in range(11) for step in (10, 12, 14, 16))], np.float64
)
_KNOT_LIST: list[float] = _KNOTS.tolist()
# Until measured: a token more costs a tenth of the first, about what a CPU's steps show.
_PRIOR = (8.0 + _KNOTS) / 9.0
_RATE = 0.1  # share of a new measurement in its knot's cost
_DRIFT = 0.04  # of how far it is off, that all other knots take over: contexts grow, clocks vary
_MAX_ERROR = 1.5  # a measurement further off is cut to this many times what was expected
_SURE = 8  # measurements after which one may be called an error
_NUM_TABLED = 512
# Measurements of which all tell the curve for all; of later ones, every so many.
_OFTEN, _SELDOM = 64, 4
_REBUILD_EVERY = 16
# A number of tokens is run in its slow ways first: as it comes, then while it is recorded.
_NUM_WARM = 2


def _knot_near(num_tokens: int) -> int:
    knot = min(bisect_left(_KNOT_LIST, num_tokens), len(_KNOT_LIST) - 1)
    is_nearer = knot and _KNOT_LIST[knot] - num_tokens > num_tokens - _KNOT_LIST[knot - 1]
    return knot - 1 if is_nearer else knot


class CostCurve:
    """Seconds of a step against its tokens: never falling, and known only near what was measured.

    ``prior``: the curve whose shape it has where nothing was measured.
    """

    def __init__(self, prior: CostCurve | None = None) -> None:
        self._prior = prior
        # Of knots that were measured, over ``_scale``, which is how all of them drift at once.
        self._costs = [1.0] * len(_KNOT_LIST)
        self._scale = 1.0
        self._counts = [0] * len(_KNOT_LIST)
        self._curve: _Floats = _PRIOR
        self._table: list[float] = []
        self._num_new = 0
        self.num_measured = 0

    def observe(self, num_tokens: int, seconds: float) -> None:
        knot = _knot_near(num_tokens)
        cost = seconds
        if self.num_measured:
            expected = self.seconds(num_tokens)
            if self.num_measured >= _SURE:
                seconds = min(max(seconds, expected / _MAX_ERROR), expected * _MAX_ERROR)
            cost = seconds * self.seconds(int(_KNOT_LIST[knot])) / expected
        count = self._counts[knot]
        if count:
            old = self._costs[knot] * self._scale
            self._scale *= (cost / old) ** _DRIFT
            cost = old + max(_RATE, 1.0 / (count + 1)) * (cost - old)
        self._costs[knot] = cost / self._scale
        self._counts[knot] += 1
        self.num_measured += 1
        self._num_new += 1
        if self._num_new >= min(_REBUILD_EVERY, 1 + self.num_measured // 4):
            self._rebuild()

    def seconds(self, num_tokens: int) -> float:
        """Of a step of so many tokens."""
        if num_tokens < _NUM_TABLED:
            if not self._table:
                self._rebuild()
            return self._table[num_tokens]
        most = _KNOT_LIST[-1]
        if num_tokens > most:
            return float(self._curve[-1]) * num_tokens / most
        return float(np.interp(num_tokens, _KNOTS, self._curve))

    def num_measured_at(self, num_tokens: int) -> int:
        """Steps of about so many tokens."""
        return self._counts[_knot_near(num_tokens)]

    def _shape(self) -> _Floats:
        """What is believed of all knots, but for a factor near those that were measured."""
        if self._prior is not None:
            return self._prior._curve
        counts = np.asarray(self._counts)
        sure = np.flatnonzero(counts >= 2)
        if len(sure) < 2 or _KNOTS[sure[-1]] < 1.1 * _KNOTS[sure[0]]:
            return _PRIOR
        # A line, by relative errors: reading weights takes so long, each token's products so long.
        costs = np.asarray(self._costs)[sure] * self._scale
        weights = np.sqrt(np.minimum(counts[sure], 20)) / costs
        columns = np.stack([weights, weights * _KNOTS[sure]], axis=1)
        base, slope = np.linalg.lstsq(columns, weights * costs, rcond=None)[0].tolist()
        return np.asarray(max(base, 0.0) + max(slope, 1e-3 * max(base, 1e-9)) * _KNOTS)

    def _rebuild(self) -> None:
        self._num_new = 0
        curve = self._shape()
        seen = np.flatnonzero(self._counts)
        if len(seen):
            ratios = np.asarray(self._costs)[seen] * self._scale / curve[seen]
            curve = curve * np.interp(_KNOTS, _KNOTS[seen], ratios)
        # The mean of the least curve above and of the greatest below that never fall.
        rising = np.maximum.accumulate(curve)
        falling = np.minimum.accumulate(curve[::-1])[::-1]
        self._curve = (rising + falling) / 2
        self._table = np.interp(np.arange(_NUM_TABLED), _KNOTS, self._curve).tolist()


class StepCosts:
    """A cost curve for each number of requests, as tokens of one cost less than those of many."""

    def __init__(self) -> None:
        self._all = CostCurve()
        self._curves: dict[int, CostCurve] = {}
        self._times_run: Counter[int] = Counter()

    def of(self, num_requests: int) -> CostCurve:
        """Costs of steps in which about so many requests draw tokens, and nothing else happens."""
        knot = bisect_left(_KNOT_LIST, num_requests)
        curve = self._curves.get(knot)
        if curve is None:
            curve = self._curves[knot] = CostCurve(self._all)
        return curve

    def observe(self, num_requests: int, num_tokens: int, seconds: float) -> bool:
        """A step took so long. Whether that is what such steps take: the first are slow."""
        self._times_run[num_tokens] += 1
        if self._times_run[num_tokens] <= _NUM_WARM:
            return False
        curve = self.of(num_requests)
        # What is known of one number of requests needs that of all others for its shape alone.
        if curve.num_measured < _OFTEN or curve.num_measured % _SELDOM == 0:
            self._all.observe(num_tokens, seconds)
        curve.observe(num_tokens, seconds)
        return True
