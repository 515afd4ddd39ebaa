"""Models that draft on simulated devices: their passes are made where they pay."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from octavo.speculative.base import Outlook
from octavo.speculative.batches import GuardedBatch
from octavo.speculative.controller import MAX_REQUESTS, AutoDrafter
from octavo.speculative.proposer import Drafted, GoesOn, Proposal
from octavo.speculative.sources import DraftCounts
from octavo.types import SchedulerOutput
from tests.speculative import simulated as sim


class SimulatedModel:
    """`BatchProposer` whose passes take time, right as often as it says."""

    def __init__(self, seconds: sim.VirtualSeconds, *, chance: float, first: float, more: float):
        self.chance, self.first, self.more = chance, first, more
        self.spread = 0.0  # of the chances of its drafts
        self.backlog = 0  # tokens that a request's first pass reads
        self._seconds = seconds
        self._rng = random.Random(5)
        self._is_read: set[str] = set()
        self.num_calls = self.num_passes = 0

    def begin(self, step: SchedulerOutput) -> None:
        for request_id in step.finished_request_ids:
            self._is_read.discard(request_id)

    def propose(
        self, outlooks: Sequence[Outlook], *, depths: Sequence[int], goes_on: GoesOn
    ) -> Drafted:
        self.num_calls += 1
        began = self._seconds.now
        new = [each for each in outlooks if each.request_id not in self._is_read]
        self._is_read |= {each.request_id for each in outlooks}
        num_read = len(outlooks) + len(new) * self.backlog
        self._seconds.now += self.first * (1 + num_read / 20)
        first = self._seconds.now - began
        drafts: list[tuple[list[int], list[float]]] = [([], []) for _ in outlooks]
        live, num_more = list(range(len(outlooks))), -1
        while live:
            num_more += 1
            for index in live:
                low, high = self.chance - self.spread, self.chance + self.spread
                chance = min(max(self._rng.uniform(low, high), 0.0), 1.0)
                drafts[index][0].append(sim.RIGHT if self._rng.random() < chance else sim.WRONG)
                drafts[index][1].append(chance)
            live = [
                index
                for index in live
                if len(drafts[index][0]) < depths[index]
                and goes_on(outlooks[index].request_id, drafts[index][1])
            ]
            if live:
                self._seconds.now += self.more
        self.num_passes += 1 + num_more
        return Drafted(
            {each.request_id: Proposal(*drafts[i]) for i, each in enumerate(outlooks)},
            first_seconds=first,
            more_seconds=num_more * self.more,
            num_more=num_more,
            num_read=num_read,
        )


def simulation(
    cost: sim.Cost,
    *,
    chance: float,
    first: float = 0.5e-3,
    more: float = 0.4e-3,
    free: float = 0.0,
    share: float = 0.0,
    most_requests: int = MAX_REQUESTS,
    **options: Any,
) -> tuple[sim.Simulation, SimulatedModel]:
    """``free``: chance of drafts that cost nothing, in a ``share`` of steps."""
    made = sim.Simulation(cost, chance=free, **options)
    made.guesser.share = share
    model = SimulatedModel(made.seconds, chance=chance, first=first, more=more)
    made.auto = AutoDrafter(
        made.guesser,
        max_drafts=sim.MAX_DRAFTS,
        model=model,
        most_requests_of_model=most_requests,
        seconds=made.seconds,
    )
    made.drafter = made.auto
    return made, model


def best_gain(cost: sim.Cost, *, chance: float, first: float, more: float) -> float:
    """Of any fixed depth, for one request."""
    gains = [1.0]
    for depth in range(1, sim.MAX_DRAFTS + 1):
        tokens = sum(chance**i for i in range(depth + 1))
        gains.append(tokens * cost(1) / (cost(1 + depth) + first + (depth - 1) * more))
    return max(gains)


@pytest.mark.parametrize("chance", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_depth_is_near_the_best_of_all(chance: float) -> None:
    made, _ = simulation(sim.CPU, chance=chance)
    record = made.run(3000, requests=1)
    best = best_gain(sim.CPU, chance=chance, first=0.5e-3 * 1.05, more=0.4e-3)
    assert record.speedup(1000) > 0.93 * best
    assert made.auto.counts.num_guarded == 0


def test_confidence_decides_where_drafting_ends() -> None:
    """Some drafts are sure and some are not: that beats any fixed depth."""
    made, model = simulation(sim.CPU, chance=0.5)
    model.spread = 0.5
    record = made.run(3000, requests=1)
    fixed = best_gain(sim.CPU, chance=0.5, first=0.5e-3 * 1.05, more=0.4e-3)
    assert record.speedup(1000) > 1.01 * fixed


@pytest.mark.parametrize("requests", [1, 4, 8, 16])
@pytest.mark.parametrize("chance", [0.02, 0.3])
def test_passes_that_do_not_pay_are_not_made(requests: int, chance: float) -> None:
    """A model that takes most of a step, and one that is hardly ever right."""
    slow = {} if chance < 0.1 else {"first": 4e-3, "more": 4e-3}
    made, model = simulation(sim.CPU, chance=chance, **slow)
    record = made.run(4000, requests=requests)
    assert record.speedup() > 0.975 and record.speedup(1000) > 0.98
    assert record.least_speedup(min(60.0, sum(record.seconds) / 1.2)) > 0.97
    assert model.num_passes < 400


@pytest.mark.parametrize(("requests", "is_asked"), [(2, True), (3, False)])
def test_it_is_not_asked_in_larger_steps(requests: int, is_asked: bool) -> None:
    made, model = simulation(sim.CPU, chance=0.9, most_requests=2)
    made.run(200, requests=requests)
    assert bool(model.num_calls) == is_asked


def test_a_model_drafts_where_free_drafts_are_few() -> None:
    """Free drafts are good, in a third of the steps; the model has the others."""
    options = {"chance": 0.6, "free": 0.85, "share": 0.35}
    both = simulation(sim.CPU, **options)[0].run(3000, requests=1).speedup(1000)
    free_alone = simulation(sim.CPU, **{**options, "chance": 0.0})[0].run(3000, requests=1)
    model_alone = simulation(sim.CPU, **{**options, "share": 0.0})[0].run(3000, requests=1)
    assert both > 1.05 * free_alone.speedup(1000)
    assert both > 1.05 * model_alone.speedup(1000)


def test_what_it_reads_once_is_not_held_against_it_for_good() -> None:
    made, model = simulation(sim.CPU, chance=0.75, length=300)
    model.backlog = 60
    record = made.run(3000, requests=1)
    assert record.speedup(500) > 1.25


def test_it_comes_back_when_its_drafts_get_better() -> None:
    made, model = simulation(sim.CPU, chance=0.0)
    made.run(3000, requests=1)
    model.chance = 0.8
    record = made.run(3000, requests=1)
    assert record.speedup(4500) > 1.3


class Failing:
    """`BatchProposer` that fails on some requests, or in all that it does."""

    def __init__(self, *names: str, in_begin: bool = False) -> None:
        self._names, self._in_begin = names, in_begin
        self.took: Any = None

    def begin(self, step: SchedulerOutput) -> None:
        if self._in_begin:
            raise RuntimeError("no memory")

    def propose(
        self, outlooks: Sequence[Outlook], *, depths: Sequence[int], goes_on: GoesOn
    ) -> Drafted:
        if any(each.request_id in self._names for each in outlooks):
            raise RuntimeError("bad luck")
        if self.took is not None:
            self.took()
        return Drafted({each.request_id: Proposal([7], [0.5]) for each in outlooks})


def guarded(proposer: Failing) -> tuple[GuardedBatch, DraftCounts, sim.VirtualSeconds]:
    counts, seconds = DraftCounts(), sim.VirtualSeconds()
    return GuardedBatch(proposer, counts=counts, seconds=seconds), counts, seconds


def step_of(*names: str) -> SchedulerOutput:
    return SchedulerOutput(step=0, new_requests=tuple(map(sim._new_request, names)))


def ask(guard: GuardedBatch, *names: str, room: int = 3) -> set[str]:
    known = sim.Simulation(sim.CPU, chance=0.0)._known
    outlooks = [Outlook(name, known, room) for name in names]
    found = guard.propose(outlooks, depths=[3] * len(names), goes_on=lambda *_: True)
    return set(found.proposals)


def test_a_request_on_which_it_raises_goes_on_without(caplog: pytest.LogCaptureFixture) -> None:
    guard, counts, _ = guarded(Failing("b"))
    guard.begin(step_of("a", "b", "c"))
    for _ in range(3):
        assert ask(guard, "a", "b", "c") == {"a", "c"}
    assert counts.num_requests_failed == 1
    assert len([each for each in caplog.records if "without a model's drafts" in each.message]) == 1
    assert ask(guard, "a", room=0) == set()


def test_one_that_loses_track_is_not_asked_until_other_requests_come() -> None:
    guard, counts, _ = guarded(Failing(in_begin=True))
    guard.begin(step_of("a", "b"))
    assert ask(guard, "a", "b") == set() and counts.num_requests_failed == 2


def test_a_request_for_which_it_is_slow_goes_on_without() -> None:
    proposer = Failing()
    guard, counts, seconds = guarded(proposer)
    guard.begin(step_of("a"))

    def be_slow() -> None:
        seconds.now += 2.5

    proposer.took = be_slow
    asked = [ask(guard, "a") for _ in range(4)]
    assert asked == [{"a"}, {"a"}, {"a"}, set()]
    assert counts.num_requests_slow == 1
