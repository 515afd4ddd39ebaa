"""Which drafts a step verifies: all up to a number, or those that pay. Knows counts and seconds;
no tokens but those it passes on, no scheduler.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from octavo.speculative.acceptance import Acceptance
from octavo.speculative.base import Outlook
from octavo.speculative.batches import GuardedBatch
from octavo.speculative.cost import StepCosts
from octavo.speculative.last_minute import LastMinute
from octavo.speculative.model_source import ModelSource
from octavo.speculative.proposer import BatchProposer, Proposal, Proposer
from octavo.speculative.regime import Regime
from octavo.speculative.sources import Counting, GuardedProposer
from octavo.speculative.trials import Trials
from octavo.types import SchedulerOutput

_NO_DRAFTS: Mapping[str, Sequence[int]] = {}
# A step has drafts if they raise its tokens a second by so much, by what is expected.
_MIN_GAIN = 1.02
_PROBE_DRAFTS = 4
_TRIES = 8  # steps of a kind that measuring it may take
# Steps of more requests have no drafts: they are bound by arithmetic, where a draft costs what a
# token does, and finding that out again and again costs more than it could gain.
MAX_REQUESTS = 8
# Share of a step's time after which no more requests are asked for drafts, and of what it gains.
_MAX_DRAFTING, _GAIN_SPENT = 0.06, 0.25
# A step that took longer than so many that were expected was stopped midway (its process was, or
# its machine): drafts are charged with no more.
_MAX_STALL = 8.0


class FixedDrafter(Counting):
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


class FixedModelDrafter(Counting):
    """`Drafter` that always drafts ``num_drafts`` tokens by a model."""

    def __init__(
        self,
        proposer: BatchProposer,
        *,
        num_drafts: int,
        seconds: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__()
        self._source = GuardedBatch(proposer, counts=self.counts, seconds=seconds)
        self._seconds = seconds
        self._num_drafts = num_drafts

    @property
    def num_wanted(self) -> int:
        return self._num_drafts

    def begin(self, step: SchedulerOutput) -> None:
        self._source.begin(step)

    def draft(self, outlooks: Sequence[Outlook], *, num_tokens: int) -> Mapping[str, Sequence[int]]:
        began = self._seconds()
        depths = [self._num_drafts] * len(outlooks)
        drafted = self._source.propose(outlooks, depths=depths, goes_on=_always)
        self.counts.seconds_drafting += self._seconds() - began
        return {name: each.token_ids for name, each in drafted.proposals.items() if each.token_ids}

    def learn(
        self,
        drafts: Mapping[str, Sequence[int]],
        tokens: Mapping[str, Sequence[int]],
        *,
        num_tokens: int,
        seconds: float,
    ) -> None:
        self.counts.add(drafts, tokens)


def _always(request_id: str, probs: Sequence[float]) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class _Candidate:
    """Drafts that a request might get."""

    request_id: str
    proposal: Proposal
    chances: Sequence[float]  # that a draft and all before it are accepted
    is_models: bool = False


class AutoDrafter(Counting):
    """`Drafter` that drafts what raises tokens a second most, down to nothing at all.

    Drafts are taken in the order of their chance to be accepted while the expected tokens of the
    step over its expected time rise. Steps that read prompts have none: those are bound by
    arithmetic, where a draft costs what a token does.

    ``proposer``'s drafts cost next to nothing and are looked at first; ``model``, if there is one,
    is asked where it is expected to do better by more than its passes take, in steps of at most
    ``most_requests_of_model``.
    """

    def __init__(
        self,
        proposer: Proposer,
        *,
        max_drafts: int,
        model: BatchProposer | None = None,
        most_requests_of_model: int = MAX_REQUESTS,
        seconds: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__()
        self.costs = StepCosts()
        self.acceptance = Acceptance()
        self.regime = Regime(self.counts)
        self._last_minute = LastMinute()
        self._source = GuardedProposer(proposer, counts=self.counts, seconds=seconds)
        self._model: ModelSource | None = None
        if model is not None:
            self._model = ModelSource(
                model, counts=self.counts, max_drafts=max_drafts, seconds=seconds
            )
        self._most_requests_of_model = most_requests_of_model
        self._seconds = seconds
        self._max_drafts = max_drafts
        self._wanted = float(min(max_drafts, _PROBE_DRAFTS))
        self._trials = Trials(self.costs, self.regime, max_tries=_TRIES)
        self._first = 0  # request that is asked first
        self._is_plain = True  # whether the step draws tokens and does nothing else
        self._is_crowd = False  # whether the step has more requests than may draft
        self._num_requests = 0  # of the last such step
        self._drafting = 0.0  # seconds spent on this step's drafts
        self._candidates: dict[str, _Candidate] = {}  # that drafts of this step were taken from

    @property
    def num_wanted(self) -> int:
        if self._is_crowd or not self.regime.may_draft:
            return 0
        return int(self._wanted) if self.regime.is_on else min(self._max_drafts, _PROBE_DRAFTS)

    def begin(self, step: SchedulerOutput) -> None:
        self._source.begin(step)
        if self._model is not None:
            self._model.begin(step)
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
        self._candidates.clear()

    def draft(self, outlooks: Sequence[Outlook], *, num_tokens: int) -> Mapping[str, Sequence[int]]:
        if not outlooks or not self._is_plain or not self.regime.may_draft:
            return _NO_DRAFTS
        if self._trials.is_plain(num_tokens):
            return _NO_DRAFTS
        began = self._seconds()
        plain = self.costs.of(num_tokens).seconds(num_tokens)
        share = _MAX_DRAFTING + _GAIN_SPENT * max(self.regime.gain, 0.0)
        found = self._propose(outlooks, until=began + max(share * plain, 2e-4))
        charged = self._seconds() - began
        if self._model is not None and num_tokens <= self._most_requests_of_model:
            # What it reads to catch up for the first time is no part of what drafts will take.
            found, modelled = self._ask_model(self._model, outlooks, found, num_tokens)
            charged += modelled
        num_tried = self._trials.num_drafts(num_tokens) if found else 0
        drafts, gain = self._choose(found, num_tokens, num_tried)
        self._drafting = self._seconds() - began
        self.counts.seconds_drafting += self._drafting
        if num_tried < 2:  # else it says nothing yet of what would pay
            self.regime.expect(gain - charged / plain)
        longest = max(map(len, drafts.values()), default=0)
        self._wanted = min(float(self._max_drafts), max(longest + 2.0, self._wanted - 0.125))
        return drafts

    def _propose(self, outlooks: Sequence[Outlook], *, until: float) -> list[_Candidate]:
        """Proposals of requests, each step beginning with another, while there is time."""
        self._first += 1
        first = self._first % len(outlooks)
        found = []
        for outlook in (*outlooks[first:], *outlooks[:first]):
            proposal = self._source.propose(outlook, max_drafts=self._max_drafts)
            if proposal.token_ids:
                chances = self.acceptance.survivals(
                    outlook.request_id, len(proposal.token_ids), proposal.probs
                )
                found.append(_Candidate(outlook.request_id, proposal, chances))
            if self._seconds() > until:
                break
        return found

    def _ask_model(
        self,
        model: ModelSource,
        outlooks: Sequence[Outlook],
        found: list[_Candidate],
        num_requests: int,
    ) -> tuple[list[_Candidate], float]:
        """(candidates, the seconds that the model's drafts among them take as a rule)."""
        proposals, seconds = model.propose(
            outlooks,
            expected={each.request_id: sum(each.chances) for each in found},
            seconds=self.costs.of(num_requests).seconds,
            num_requests=num_requests,
        )
        kept = [each for each in found if each.request_id not in proposals]
        for request_id, proposal in proposals.items():
            chances = model.by_chance.survivals(request_id, len(proposal.token_ids), proposal.probs)
            kept.append(_Candidate(request_id, proposal, chances, is_models=True))
        return kept, seconds

    def _choose(
        self, found: Sequence[_Candidate], num_requests: int, num_tried: int
    ) -> tuple[dict[str, Sequence[int]], float]:
        """(drafts, the share of the step's time that they are expected to gain)."""
        chances = []
        for index, each in enumerate(found):
            # Along a request chances fall, and equal ones keep their order: prefixes are chosen.
            chances += [(-chance, i, index) for i, chance in enumerate(each.chances)]
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
            each = found[index]
            drafts[each.request_id] = each.proposal.token_ids[:length]
            self._candidates[each.request_id] = each
        return drafts, gain

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
            curve = self.costs.of(num_requests)
            expected, limit = curve.seconds(num_requests), curve.seconds(num_tokens) * _MAX_STALL
            self.costs.observe(num_requests, num_tokens, seconds)
            # Steps of a new kind too, which are slow: had it not been for drafts they were not new.
            if drafts or self._drafting:
                took = min(seconds + self._drafting, limit)
                without = min(seconds, took)
                if drafts:
                    without = expected * sum(map(len, tokens.values())) / num_requests
                saved = self._account(took, without)
        if self._last_minute.add(seconds + self._drafting, saved) or drafts:
            self.counts.gain = self._last_minute.gain
        if not drafts:
            return
        self.counts.add(drafts, tokens)
        for request_id, draft in drafts.items():
            if request_id not in tokens:
                continue
            each, num_accepted = self._candidates[request_id], len(tokens[request_id]) - 1
            if each.is_models and self._model is not None:
                self._model.learn(request_id, len(draft), each.proposal, num_accepted)
            else:
                probs = each.proposal.probs
                self.acceptance.learn(request_id, len(draft), probs, num_accepted=num_accepted)

    def _account(self, took: float, without: float) -> float:
        """Of a step that sought drafts, and would have taken so long else; what that saved."""
        self.counts.seconds_saved += without - took
        self.counts.seconds_without += without
        self.regime.account(seconds=took, without=without)
        return without - took
