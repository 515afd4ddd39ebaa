"""Which drafts a step verifies: all up to a number, or those that pay. Knows counts and seconds;
no tokens but those it passes on, no scheduler.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from octavo.speculative.acceptance import Acceptance
from octavo.speculative.base import Outlook
from octavo.speculative.cost import StepCosts
from octavo.speculative.last_minute import LastMinute
from octavo.speculative.proposer import Proposal, Proposer
from octavo.speculative.sources import DraftCounts, GuardedProposer
from octavo.types import SchedulerOutput, WorkerStats

_NO_DRAFTS: Mapping[str, Sequence[int]] = {}
# A step has drafts if they raise its tokens a second by so much, by what is expected.
_MIN_GAIN = 1.02
# Speculation stays on while it gains more than this (a share of a step), and comes back for more.
_STAY, _COME_BACK = -0.004, 0.015
_GAIN_RATE = 0.05  # of a step in the mean gain
_WARM_STEPS = 24  # with drafts, before the mean decides, unless it is
_HOPELESS = -0.02
# Steps between probes while it is off: twice as many after each that failed.
_FIRST_WAIT, _LAST_WAIT = 48, 2048
_PROBE_STEPS = 6
_EARLY_WAIT = 24  # for each request: steps to a probe that a new one calls for
_PROBE_DRAFTS = 4
# While it is on every so many steps have no drafts, and others one draft more than pays: what is
# never tried is never known.
_PLAIN_EVERY, _EXPLORE_EVERY = 97, 31
# Steps of a kind that are measured before it is judged, and tries that this may take.
_LEAST_MEASURED, _TRIES = 3, 8
# A probe tries a draft whatever it is believed to bring, should it take less than this many steps.
_CHEAP_TRY = 1.2
# Steps of more requests have no drafts: they are bound by arithmetic, where a draft costs what a
# token does, and finding that out again and again costs more than it could gain.
MAX_REQUESTS = 8
# Share of a step's time after which no more requests are asked for drafts, and of what it gains.
_MAX_DRAFTING, _GAIN_SPENT = 0.06, 0.25
# The guarantee: over the last minute of steps no more than 3 % is lost. Short of that, off.
_WINDOW, _LEAST_WINDOW, _MAX_LOSS = 60.0, 20.0, 0.02
_FIRST_REST, _LAST_REST = 10.0, 120.0


class _Counting:
    """Tells what its ``counts`` have counted."""

    def __init__(self) -> None:
        self.counts = DraftCounts()
        self._told = DraftCounts()

    def take_stats(self) -> WorkerStats | None:
        if self.counts == self._told:
            return None
        stats = self.counts.since(self._told)
        positions = list(self.counts.accepted_per_position)
        self._told = replace(self.counts, accepted_per_position=positions)
        return stats


class FixedDrafter(_Counting):
    """`Drafter` that always drafts as many tokens as are proposed, up to ``num_drafts``."""

    def __init__(
        self,
        proposer: Proposer,
        *,
        num_drafts: int,
        seconds: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__()
        self._source = GuardedProposer(proposer, counts=self.counts, seconds=seconds)
        self._seconds = seconds
        self._num_drafts = num_drafts

    @property
    def num_wanted(self) -> int:
        return self._num_drafts

    def begin(self, step: SchedulerOutput) -> None:
        self._source.begin(step)

    def draft(self, outlooks: Sequence[Outlook], *, num_tokens: int) -> Mapping[str, Sequence[int]]:
        began = self._seconds()
        drafts = {}
        for outlook in outlooks:
            found = self._source.propose(outlook, max_drafts=self._num_drafts)
            if found.token_ids:
                drafts[outlook.request_id] = found.token_ids
        self.counts.seconds_drafting += self._seconds() - began
        return drafts

    def learn(
        self,
        drafts: Mapping[str, Sequence[int]],
        tokens: Mapping[str, Sequence[int]],
        *,
        num_tokens: int,
        seconds: float,
    ) -> None:
        self._source.extend(tokens)
        self.counts.add(drafts, tokens)


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


class AutoDrafter(_Counting):
    """`Drafter` that drafts what raises tokens a second most, down to nothing at all.

    Drafts are taken in the order of their chance to be accepted while the expected tokens of the
    step over its expected time rise. Steps that read prompts have none: those are bound by
    arithmetic, where a draft costs what a token does.
    """

    def __init__(
        self,
        proposer: Proposer,
        *,
        max_drafts: int,
        seconds: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__()
        self.costs = StepCosts()
        self.acceptance = Acceptance()
        self.regime = Regime(self.counts)
        self._last_minute = LastMinute()
        self._source = GuardedProposer(proposer, counts=self.counts, seconds=seconds)
        self._seconds = seconds
        self._max_drafts = max_drafts
        self._wanted = float(min(max_drafts, _PROBE_DRAFTS))
        self._num_drafting = 0  # steps that chose drafts, or none, so far
        self._num_tried: Counter[int] = Counter()  # steps, by the size of what was tried
        self._first = 0  # request that is asked first
        self._is_plain = True  # whether the step draws tokens and does nothing else
        self._is_crowd = False  # whether the step has more requests than may draft
        self._num_requests = 0  # of the last such step
        self._drafting = 0.0  # seconds spent on this step's drafts
        self._proposals: dict[str, Proposal] = {}  # of drafts in this step

    @property
    def num_wanted(self) -> int:
        if self._is_crowd or not self.regime.may_draft:
            return 0
        return int(self._wanted) if self.regime.is_on else min(self._max_drafts, _PROBE_DRAFTS)

    def begin(self, step: SchedulerOutput) -> None:
        self._source.begin(step)
        for request_id in step.finished_request_ids:
            self.acceptance.forget(request_id)
        for request in step.new_requests:
            self.acceptance.begin(request.request_id)
            self.regime.call(len(step.num_scheduled_tokens))
        room = step.max_drafts
        counts = step.num_scheduled_tokens
        self._is_crowd = len(counts) > MAX_REQUESTS
        self._is_plain = not self._is_crowd and all(
            n == 1 + room.get(name, 0) for name, n in counts.items()
        )
        if self._is_plain:
            if len(counts) * 4 < self._num_requests * 3:
                self.regime.call(1)
            self._num_requests = len(counts)
        self._drafting = 0.0
        self._proposals.clear()

    def draft(self, outlooks: Sequence[Outlook], *, num_tokens: int) -> Mapping[str, Sequence[int]]:
        if not outlooks or not self._is_plain or not self.regime.may_draft:
            return _NO_DRAFTS
        self._num_drafting += 1
        costs = self.costs.of(num_tokens)
        num_plain = costs.num_measured_at(num_tokens)
        every = min(_PLAIN_EVERY, 8 + 8 * num_plain)
        if num_plain < _LEAST_MEASURED or self._num_drafting % every == 0:
            return _NO_DRAFTS
        began = self._seconds()
        plain = costs.seconds(num_tokens)
        share = _MAX_DRAFTING + _GAIN_SPENT * max(self.regime.gain, 0.0)
        proposals = self._propose(outlooks, until=began + max(share * plain, 2e-4))
        num_tried = self._num_to_try(num_tokens) if proposals else 0
        drafts, gain = self._choose(proposals, num_tokens, num_tried)
        self._drafting = self._seconds() - began
        self.counts.seconds_drafting += self._drafting
        if num_tried < 2:  # else it says nothing yet of what would pay
            self.regime.expect(gain - self._drafting / plain)
        longest = max(map(len, drafts.values()), default=0)
        self._wanted = min(float(self._max_drafts), max(longest + 2.0, self._wanted - 0.125))
        return drafts

    def _propose(self, outlooks: Sequence[Outlook], *, until: float) -> list[tuple[str, Proposal]]:
        """Proposals of requests, each step beginning with another, while there is time."""
        self._first += 1
        first = self._first % len(outlooks)
        found = []
        for outlook in (*outlooks[first:], *outlooks[:first]):
            proposal = self._source.propose(outlook, max_drafts=self._max_drafts)
            if proposal.token_ids:
                found.append((outlook.request_id, proposal))
            if self._seconds() > until:
                break
        return found

    def _choose(
        self, proposals: Sequence[tuple[str, Proposal]], num_requests: int, num_tried: int
    ) -> tuple[dict[str, Sequence[int]], float]:
        """(drafts, the share of the step's time that they are expected to gain)."""
        chances = []
        for index, (request_id, (token_ids, probs)) in enumerate(proposals):
            survivals = self.acceptance.survivals(request_id, len(token_ids), probs)
            # Along a request chances fall, and equal ones keep their order: prefixes are chosen.
            chances += [(-chance, i, index) for i, chance in enumerate(survivals)]
        if not chances:
            return {}, 0.0
        chances.sort()
        seconds = self.costs.of(num_requests).seconds
        plain = num_requests / seconds(num_requests)
        best, num_best, gain, tokens = plain * _MIN_GAIN, 0, 0.0, float(num_requests)
        for number, (chance, _, _) in enumerate(chances, 1):
            tokens -= chance
            took = seconds(num_requests + number)
            if tokens > best * took:
                best, num_best, gain = tokens / took, number, tokens / plain / took - 1.0
        if num_tried:
            num_best = min(max(num_best + 1, num_tried), len(chances))
        lengths: dict[int, int] = {}
        for _, i, index in chances[:num_best]:
            lengths[index] = i + 1
        drafts: dict[str, Sequence[int]] = {}
        for index, length in lengths.items():
            request_id, proposal = proposals[index]
            drafts[request_id] = proposal.token_ids[:length]
            self._proposals[request_id] = proposal
        return drafts, gain

    def _num_to_try(self, num_requests: int) -> int:
        """Drafts to have in a step whether they pay or not, to learn what they cost."""
        number = 2 + num_requests // 6
        key = number.bit_length()
        if self._num_tried[key] < _TRIES:
            costs = self.costs.of(num_requests)
            if costs.num_measured_at(num_requests + number) < _LEAST_MEASURED:
                self._num_tried[key] += 1
                return number
        if self.regime.is_on:
            return int(self._num_drafting % _EXPLORE_EVERY == 0)
        seconds = self.costs.of(num_requests).seconds
        is_cheap = seconds(num_requests + 1) < _CHEAP_TRY * seconds(num_requests)
        return int(is_cheap and self.regime.is_beginning)

    def learn(
        self,
        drafts: Mapping[str, Sequence[int]],
        tokens: Mapping[str, Sequence[int]],
        *,
        num_tokens: int,
        seconds: float,
    ) -> None:
        self._source.extend(tokens)
        self.regime.pass_step(seconds + self._drafting)
        num_requests = num_tokens - sum(map(len, drafts.values()))
        saved = 0.0
        if self._is_plain:
            # As it was expected before this step.
            expected = self.costs.of(num_requests).seconds(num_requests)
            self.costs.observe(num_requests, num_tokens, seconds)
            # Steps of a new kind too, which are slow: had it not been for drafts they were not new.
            if drafts or self._drafting:
                without = seconds
                if drafts:
                    without = expected * sum(map(len, tokens.values())) / num_requests
                saved = self._account(seconds + self._drafting, without)
        if self._last_minute.add(seconds + self._drafting, saved):
            self.counts.gain = self._last_minute.gain
        if not drafts:
            return
        self.counts.add(drafts, tokens)
        for request_id, draft in drafts.items():
            if request_id in tokens:
                self.acceptance.learn(
                    request_id,
                    len(draft),
                    self._proposals[request_id].probs,
                    num_accepted=len(tokens[request_id]) - 1,
                )

    def _account(self, took: float, without: float) -> float:
        """Of a step that sought drafts, and would have taken so long else; what that saved."""
        self.counts.seconds_saved += without - took
        self.counts.seconds_without += without
        self.regime.account(seconds=took, without=without)
        return without - took
