"""Which requests a model drafts for, and how deep: as far as that pays. Knows chances and seconds;
no tokens but those it passes on.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence

from octavo.speculative.acceptance import Acceptance
from octavo.speculative.base import Outlook
from octavo.speculative.batches import GuardedBatch
from octavo.speculative.proposer import BatchProposer, Drafted, Proposal
from octavo.speculative.sources import DraftCounts
from octavo.types import SchedulerOutput

# A depth is tried if it raises a step's tokens a second by so much, by what is expected.
_MIN_GAIN = 1.02
# Every so many steps one pass more is made than pays: what is never tried is never known.
_EXPLORE_EVERY = 41
_RATE = 0.1  # share of a new measurement in a cost
_MAX_ERROR = 2.0  # a measurement further off is cut to this many times what was expected
_SURE = 6
_ROWS = (1, 2, 4, 8)  # numbers of requests whose costs are kept apart
# Until measured, of a step's time: a pass that reads, and one more pass.
_PRIOR_FIRST, _PRIOR_MORE = 0.15, 0.12
_CAUGHT_UP = 4  # tokens read for a request that is not behind, beside its drafts


class _Mean:
    """Seconds as last measured, without outliers."""

    __slots__ = ("count", "value")

    def __init__(self) -> None:
        self.value: float = 0.0
        self.count: int = 0

    def add(self, seconds: float) -> None:
        self.count += 1
        if self.count > _SURE:
            seconds = min(max(seconds, self.value / _MAX_ERROR), self.value * _MAX_ERROR)
        self.value += max(_RATE, 1.0 / self.count) * (seconds - self.value)


class PassCosts:
    """Seconds of a model's passes by the number of requests."""

    def __init__(self) -> None:
        self._first = [_Mean() for _ in _ROWS]
        self._more = [_Mean() for _ in _ROWS]

    def observe(self, drafted: Drafted, *, num_requests: int, most_read: int) -> None:
        """``most_read``: tokens above which the first pass was none that will come often."""
        index = _index(num_requests)
        if 0 < drafted.num_read <= most_read:
            self._first[index].add(drafted.first_seconds)
        if drafted.num_more:
            self._more[index].add(drafted.more_seconds / drafted.num_more)

    def first(self, num_requests: int, *, step: float) -> float:
        """Of the pass that gives each a draft, beside a step that takes ``step`` seconds."""
        return _estimate(self._first, num_requests, step * _PRIOR_FIRST)

    def more(self, num_requests: int, *, step: float) -> float:
        """Of each pass behind it."""
        return _estimate(self._more, num_requests, step * _PRIOR_MORE)


def _index(num_requests: int) -> int:
    return min(bisect_left(_ROWS, num_requests), len(_ROWS) - 1)


def _estimate(means: Sequence[_Mean], num_requests: int, prior: float) -> float:
    """As measured at the nearest number, fewer first."""
    index = _index(num_requests)
    for near in (*range(index, -1, -1), *range(index + 1, len(_ROWS))):
        if means[near].count:
            seconds: float = means[near].value
            return seconds
    return prior


class ModelSource:
    """A model's part in an `AutoDrafter`.

    Its drafts cost passes, so their number is settled before they are made, by how often drafts of
    that depth were accepted; and while they are made they end where their own chances, as
    acceptance has borne them out, have become too small for another pass.
    """

    def __init__(
        self,
        proposer: BatchProposer,
        *,
        counts: DraftCounts,
        max_drafts: int,
        seconds: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.by_depth, self.by_chance = Acceptance(), Acceptance()
        self.costs = PassCosts()
        self._guarded = GuardedBatch(proposer, counts=counts, seconds=seconds)
        self._max_drafts = max_drafts
        self._num_asked = 0
        self._depths: dict[str, int] = {}  # of this step's requests, asked for
        self._usual = 0.5  # share of drafts that are accepted if those before them are
        self._passes = 1.0  # of further passes that a depth allows, the share that was made

    def begin(self, step: SchedulerOutput) -> None:
        self._guarded.begin(step)
        for acceptance in (self.by_depth, self.by_chance):
            for request_id in step.finished_request_ids:
                acceptance.forget(request_id)
            for request in step.new_requests:
                acceptance.begin(request.request_id)

    def propose(
        self,
        outlooks: Sequence[Outlook],
        *,
        expected: Mapping[str, float],
        seconds: Callable[[int], float],
        num_requests: int,
    ) -> tuple[Mapping[str, Proposal], float]:
        """Proposals for those of the requests that have no better ones, and the seconds that such
        drafts are expected to take.

        ``expected``: accepted tokens of free drafts that a request has already; ``seconds``: of a
        step by its tokens, of which ``num_requests`` come without drafts.
        """
        survivals = {
            each.request_id: self.by_depth.survivals(
                each.request_id, min(self._max_drafts, each.max_drafts), None
            )
            for each in outlooks
            if each.max_drafts and self._guarded.is_able(each.request_id)
        }
        chosen, depth = self._choose(survivals, expected, seconds, num_requests)
        self._num_asked += 1
        if self._num_asked % _EXPLORE_EVERY == 0:
            depth += 1
            chosen = chosen or [name for name in survivals if name not in expected][:1]
        if not chosen or not depth:
            return {}, 0.0
        asked = [each for each in outlooks if each.request_id in chosen]
        plain = seconds(num_requests)
        more = self.costs.more(len(asked), step=plain)
        # What a pass must bring for each request, in tokens.
        worth = (more / len(asked) + seconds(num_requests + 1) - plain) * num_requests / plain

        def goes_on(request_id: str, probs: Sequence[float]) -> bool:
            chances = self.by_chance.survivals(request_id, len(probs), probs)
            before = chances[-2] if len(chances) > 1 else 1.0
            # The next is as likely as the last, and as all others are.
            likely = (chances[-1] / before + self._usual) / 2
            return chances[-1] * likely > worth

        self._depths = dict.fromkeys(chosen, depth)
        drafted = self._guarded.propose(asked, depths=[depth] * len(asked), goes_on=goes_on)
        most_read = len(asked) * (depth + _CAUGHT_UP)
        self.costs.observe(drafted, num_requests=len(asked), most_read=most_read)
        if depth > 1 and drafted.proposals:
            self._passes += _RATE * (drafted.num_more / (depth - 1) - self._passes)
        took = self.costs.first(len(asked), step=plain) + drafted.num_more * more
        return {name: each for name, each in drafted.proposals.items() if each.token_ids}, took

    def _choose(
        self,
        survivals: Mapping[str, Sequence[float]],
        expected: Mapping[str, float],
        seconds: Callable[[int], float],
        num_requests: int,
    ) -> tuple[list[str], int]:
        """(requests, depth) that raise tokens a second most; no requests if none do."""
        plain = seconds(num_requests)
        free = sum(expected.values())
        rate = best = (num_requests + free) / seconds(num_requests + round(free))
        found: tuple[list[str], int] = [], 0
        for depth in range(1, self._max_drafts + 1):
            # Those for whom the model's drafts, less what they cost, are more than the free ones.
            gains = {
                name: sum(chances[:depth]) - expected.get(name, 0.0)
                for name, chances in survivals.items()
            }
            took = self.costs.first(len(gains), step=plain)
            took += (depth - 1) * self._passes * self.costs.more(len(gains), step=plain)
            price = took / max(len(gains), 1) * rate
            chosen = [name for name, gain in gains.items() if gain > price]
            if not chosen:
                continue
            tokens = num_requests + free + sum(gains[name] for name in chosen)
            new = tokens / (seconds(num_requests + depth * len(chosen)) + took)
            if new > best and new > rate * _MIN_GAIN:
                best, found = new, (chosen, depth)
        return found

    def learn(self, request_id: str, num_drafts: int, proposal: Proposal, accepted: int) -> None:
        """Of a proposal's first drafts, which were verified, so many were accepted."""
        self.by_chance.learn(request_id, num_drafts, proposal.probs, num_accepted=accepted)
        num_tried = min(num_drafts, accepted + 1)
        self._usual += _RATE / 4 * num_tried * (accepted / num_tried - self._usual)
        # One that was not made, or not verified, was not accepted: it has its depth all the same.
        depth = self._depths.get(request_id, num_drafts)
        self.by_depth.learn(request_id, depth, None, num_accepted=accepted)
