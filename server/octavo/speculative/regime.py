"""Whether drafts are tried at all: while they pay, and within a guarantee. Knows gains and seconds;
no drafts, no requests.
"""

from __future__ import annotations

from collections import deque

from octavo.speculative.sources import DraftCounts

# Speculation stays on while it gains more than this (a share of a step), and comes back for more.
_STAY, _COME_BACK = -0.004, 0.015
_GAIN_RATE = 0.05  # of a step in the mean gain
_WARM_STEPS = 24  # with drafts, before the mean decides, unless it is
_HOPELESS = -0.02
# Steps between probes while it is off: twice as many after each that failed.
_FIRST_WAIT, _LAST_WAIT = 48, 2048
_PROBE_STEPS = 6
_EARLY_WAIT = 24  # for each request: steps to a probe that a new one calls for
# The guarantee: over the last minute of steps no more than 3 % is lost. Short of that, off.
_WINDOW, _LEAST_WINDOW, _MAX_LOSS = 60.0, 20.0, 0.02
_FIRST_REST, _LAST_REST = 10.0, 120.0


class Regime:
    """Whether speculation is on: while it pays, with hysteresis, and within the guarantee.

    Time is that of steps, so it stands still while nothing runs.
    """

    def __init__(self, counts: DraftCounts) -> None:
        self._counts = counts
        self.is_on = True
        self.gain = 0.0  # mean share of a step, of those that might have had drafts
        self._num_steps = 0  # of those since it was switched on, or since a probe began
        self._wait = _FIRST_WAIT
        self._num_left = 0  # steps to the next probe; 0 = probing
        self._rest = 0.0  # seconds in which there are no probes
        self._next_rest = _FIRST_REST
        self._seconds: deque[tuple[float, float]] = deque()  # (seconds, lost) of about a second
        self._window = self._lost = 0.0

    @property
    def may_draft(self) -> bool:
        return self.is_on or (self._num_left <= 0 and self._rest <= 0.0)

    @property
    def is_beginning(self) -> bool:
        """Whether this is among the first steps of a probe."""
        return not self.is_on and self._num_steps < _PROBE_STEPS // 2

    def pass_step(self, seconds: float) -> None:
        """Some step was run."""
        self._num_left -= 1
        self._rest -= seconds

    def call(self, num_requests: int) -> None:
        """Of so many requests one has changed: a probe may find more than the last did."""
        self._num_left = min(self._num_left, _EARLY_WAIT * num_requests)

    def expect(self, gain: float) -> None:
        """A step that could have drafts is expected to gain this share of its time, or lose it."""
        self._num_steps += 1
        if not self.is_on:
            self.gain += (gain - self.gain) / self._num_steps
            if self._num_steps >= _PROBE_STEPS:
                self._end_probe()
            return
        self.gain += max(_GAIN_RATE, 1.0 / self._num_steps) * (gain - self.gain)
        is_warm = self._num_steps >= _WARM_STEPS
        if self.gain < (_STAY if is_warm else _HOPELESS) and self._num_steps >= _PROBE_STEPS:
            self._switch_off()

    def _end_probe(self) -> None:
        if self.gain > _COME_BACK:
            self.is_on, self._wait = True, _FIRST_WAIT
        else:
            self._wait = min(2 * self._wait, _LAST_WAIT)
            self._num_left = self._wait
        self._num_steps, self.gain = 0, 0.0

    def _switch_off(self) -> None:
        self.is_on = False
        self._num_steps, self.gain = 0, 0.0
        self._num_left = self._wait
        self._counts.num_switched_off += 1

    def account(self, *, seconds: float, without: float) -> None:
        """A step took so long, drafting included; its tokens would have taken so long without."""
        lost = seconds - without
        if self._seconds and self._seconds[-1][0] < 1.0:
            seconds_before, lost_before = self._seconds.pop()
            self._seconds.append((seconds_before + seconds, lost_before + lost))
        else:
            self._seconds.append((seconds, lost))
        self._window += seconds
        self._lost += lost
        while self._window > _WINDOW and len(self._seconds) > 1:
            oldest, oldest_lost = self._seconds.popleft()
            self._window -= oldest
            self._lost -= oldest_lost
        if self._lost > _MAX_LOSS * max(self._window, _LEAST_WINDOW):
            self._rest_now()

    def _rest_now(self) -> None:
        self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _LAST_REST)
        self._counts.num_guarded += 1
        self._switch_off()
        self._seconds.clear()
        self._window = self._lost = 0.0
