"""How many drafts each request of a step has: all there is room for, or those that pay. Knows
counts and seconds; the drafts themselves are the device's.

It is asked when a step is launched, while others run whose results are not known yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from octavo.speculative.cost import StepCosts
from octavo.speculative.last_minute import LastMinute
from octavo.speculative.regime import Regime
from octavo.speculative.sources import Counting
from octavo.speculative.trials import Trials
from octavo.types import SchedulerOutput, WorkerStats
from octavo.worker.gpu.chances import Chances
from octavo.worker.gpu.lookup import PromptLookup

_NOTHING: Mapping[str, int] = {}
# A step has drafts if they raise its tokens a second by so much, by what is expected.
_MIN_GAIN = 1.02
_TRIES = 12  # steps of a kind that measuring it may take


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a step yielded."""

    num_requests: int
    num_tokens: int  # computed, drafts included
    is_plain: bool  # all that it did was to draw tokens
    tokens: Mapping[str, Sequence[int]]  # of each request that drew: one, and its accepted drafts
    seconds: float
    is_typical: bool  # whether such steps will take about as long
    # Request -> its drafts, and how many of them had been looked up rather than made up.
    drafts: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def num_verified(self) -> Mapping[str, int]:
        """Drafts of requests that drew, as they are told to people: those that were looked up, and
        made up ones only where one was accepted."""
        return {
            request_id: number
            for request_id, (number, found) in self.drafts.items()
            if request_id in self.tokens and (found or len(self.tokens[request_id]) > 1)
        }


class DraftPlanner(Protocol):
    """Decides how many drafts; one for each engine."""

    @property
    def num_wanted(self) -> int:
        """Drafts for each request that the scheduler should have room for in the next steps."""

    def choose(self, step: SchedulerOutput) -> Mapping[str, int]:
        """Drafts of some of the requests that this step, about to be launched, has room for."""

    def learn(self, outcome: Outcome) -> None:
        """For each step, in order."""

    def add_stats(self, stats: WorkerStats) -> WorkerStats:
        """With what was counted of drafts since the last call."""


@dataclass(frozen=True, slots=True)
class Speculation:
    """Who makes drafts, on the device, and who decides how many."""

    lookup: PromptLookup
    planner: DraftPlanner


class _Counting(Counting):
    def count(self, outcome: Outcome) -> None:
        drafts = {name: range(number) for name, number in outcome.num_verified.items()}
        self.counts.add(drafts, outcome.tokens)

    def add_stats(self, stats: WorkerStats) -> WorkerStats:
        new = self.take_stats()
        if new is None:
            return stats
        return replace(
            new,
            graph_steps=stats.graph_steps,
            eager_steps=stats.eager_steps,
            graphs_captured=stats.graphs_captured,
            kernel_compiles=stats.kernel_compiles,
        )


class FixedPlanner(_Counting):
    """`DraftPlanner` that has ``num_drafts`` of every request, fewer where a step draws no more."""

    def __init__(self, num_drafts: int, *, max_samples: int) -> None:
        super().__init__()
        self.num_wanted = num_drafts
        self._max_samples = max_samples

    def choose(self, step: SchedulerOutput) -> Mapping[str, int]:
        rooms = step.max_drafts
        if not rooms:
            return _NOTHING
        left = self._max_samples - len(step.num_scheduled_tokens)
        most = min(self.num_wanted, left // len(rooms))
        return {name: min(room, most) for name, room in rooms.items()} if most > 0 else _NOTHING

    def learn(self, outcome: Outcome) -> None:
        if outcome.drafts:
            self.count(outcome)


class AutoPlanner(_Counting):
    """`DraftPlanner` that has the drafts which raise tokens a second most, down to none at all.

    Drafts are taken in the order of their chances, as many as fill a size of step that tokens a
    second are highest at. Steps that read prompts have none: those are bound by arithmetic, where a
    draft costs what a token does. ``step_sizes``: tokens of steps that are run as they are, without
    padding, ascending.
    """

    def __init__(self, max_drafts: int, *, max_samples: int, step_sizes: Sequence[int]) -> None:
        super().__init__()
        self.costs = StepCosts()
        self.chances = Chances()
        self.regime = Regime(self.counts)
        self._last_minute = LastMinute()
        self._max_drafts = max_drafts
        self._max_samples = max_samples
        self._sizes = [size for size in step_sizes if size < max_samples] + [max_samples]
        self._num_requests = 0  # of the last step
        self._trials = Trials(self.costs, self.regime, max_tries=_TRIES)

    @property
    def num_wanted(self) -> int:
        is_crowd = 2 * self._num_requests > self._max_samples
        return 0 if is_crowd or not self.regime.may_draft else self._max_drafts

    def choose(self, step: SchedulerOutput) -> Mapping[str, int]:
        counts, rooms = step.num_scheduled_tokens, step.max_drafts
        for request_id in step.finished_request_ids:
            self.chances.forget(request_id)
        for _ in step.new_requests:
            self.regime.call(len(counts))
        if len(counts) * 4 < self._num_requests * 3:
            self.regime.call(1)
        self._num_requests = num_requests = len(counts)
        is_plain = all(count == 1 + rooms.get(name, 0) for name, count in counts.items())
        if not rooms or not is_plain or not self.regime.may_draft:
            return _NOTHING
        if self._trials.is_plain(num_requests):
            return _NOTHING
        return self._best(rooms, num_requests)

    def _best(self, rooms: Mapping[str, int], num_requests: int) -> Mapping[str, int]:
        names, room = list(rooms), np.fromiter(rooms.values(), np.int64, len(rooms))
        depth = int(room.max())
        chances = self.chances.survivals(names, depth)
        chances[np.arange(depth)[None, :] >= room[:, None]] = 0.0
        # Along a request chances fall, and equal ones keep their order: prefixes are chosen.
        order = np.argsort(-chances, axis=None, kind="stable")
        most = min(int(np.count_nonzero(chances)), self._max_samples - num_requests)
        tokens = num_requests + np.cumsum(chances.ravel()[order])
        seconds = self.costs.of(num_requests).seconds
        plain = num_requests / seconds(num_requests)
        best, number, gain = plain * _MIN_GAIN, 0, 0.0
        for size in self._sizes:
            drafts = min(size - num_requests, most)
            if drafts < 1:
                continue
            rate = float(tokens[drafts - 1]) / seconds(num_requests + drafts)
            if rate > best:
                best, number, gain = rate, drafts, rate / plain - 1.0
            if drafts == most:
                break
        tried = self._trials.num_drafts(num_requests)
        if tried:
            number = min(max(number + 1, tried), most)
        if tried < 2:  # else it says nothing yet of what would pay
            self.regime.expect(gain)
        each = np.bincount(order[:number] // depth, minlength=len(names)).tolist()
        for name, drafts in zip(names, each, strict=True):
            if not drafts:
                self.chances.pass_over(name)
        return {name: drafts for name, drafts in zip(names, each, strict=True) if drafts}

    def learn(self, outcome: Outcome) -> None:
        self.regime.pass_step(outcome.seconds)
        number, saved = outcome.num_requests, 0.0
        if outcome.is_plain and number:
            # As it was expected before this step.
            expected = self.costs.of(number).seconds(number)
            if outcome.is_typical:
                self.costs.observe(number, outcome.num_tokens, outcome.seconds)
            if outcome.drafts:
                without = expected * sum(map(len, outcome.tokens.values())) / number
                saved = without - outcome.seconds
                self.counts.seconds_saved += saved
                self.counts.seconds_without += without
                self.regime.account(seconds=outcome.seconds, without=without)
        if self._last_minute.add(outcome.seconds, saved) or outcome.drafts:
            self.counts.gain = self._last_minute.gain
        if outcome.drafts:
            self.count(outcome)
            for request_id, (drafts, _) in outcome.drafts.items():
                got = outcome.tokens.get(request_id)
                if got:
                    self.chances.learn(request_id, drafts, num_accepted=len(got) - 1)
