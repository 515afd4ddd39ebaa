"""The controller on simulated devices: what it drafts where, and what it may cost."""

from __future__ import annotations

import math

import numpy as np
import pytest

from octavo.speculative.base import Outlook
from octavo.speculative.controller import MAX_REQUESTS
from octavo.speculative.regime import Regime
from octavo.speculative.sources import DraftCounts
from octavo.types import SchedulerOutput
from tests.speculative import simulated as sim


@pytest.mark.parametrize("requests", [1, 8])
def test_drafts_where_tokens_are_nearly_free(requests: int) -> None:
    simulation = sim.Simulation(sim.FLAT, chance=0.7)
    record = simulation.run(1500, requests=requests)
    assert record.speedup(500) > 2.5
    assert record.drafts(500) > 2
    assert simulation.auto.counts.num_guarded == 0


@pytest.mark.parametrize("requests", [1, 8, 32])
@pytest.mark.parametrize("chance", [0.3, 0.9])
def test_is_off_where_tokens_cost_what_they_bring(requests: int, chance: float) -> None:
    simulation = sim.Simulation(sim.LINEAR, chance=chance)
    record = simulation.run(3000, requests=requests)
    assert record.speedup() > 0.99
    assert record.drafts(1000) < 0.03
    # Room is not asked for but in probes.
    wanted = []
    for _ in range(600):
        simulation.step(requests)
        wanted.append(simulation.auto.num_wanted)
    assert np.mean([number > 0 for number in wanted]) < 0.3


@pytest.mark.parametrize("chance", [0.15, 0.3, 0.5, 0.7, 0.9])
def test_depth_is_near_the_best_of_all(chance: float) -> None:
    """One request: the expected tokens of k drafts over what the step takes."""
    record = sim.Simulation(sim.CPU, chance=chance).run(3000, requests=1)
    expected = [sum(chance**i for i in range(k + 1)) for k in range(sim.MAX_DRAFTS + 1)]
    gains = [tokens * sim.CPU(1) / sim.CPU(1 + k) for k, tokens in enumerate(expected)]
    assert record.speedup(1000) > 0.93 * max(gains)


def test_the_same_drafts_stop_paying_as_requests_come_and_pay_as_they_go() -> None:
    simulation = sim.Simulation(sim.CPU, chance=0.6)
    few = simulation.run(800, requests=1).drafts(400)
    many = simulation.run(1200, requests=32).drafts(1200)
    few_again = simulation.run(1500, requests=1).drafts(2600)
    assert few > 2 and few_again > 2
    assert many < 0.05


def test_comes_back_when_drafts_get_better() -> None:
    simulation = sim.Simulation(sim.CPU, chance=0.0)
    simulation.run(3000, requests=1)
    assert not simulation.auto.regime.is_on
    simulation.guesser.chance = 0.8
    record = simulation.run(3000, requests=1)
    assert record.drafts(4500) > 2
    assert record.speedup(4500) > 1.8


@pytest.mark.parametrize("requests", [1, 4, 16, 64])
@pytest.mark.parametrize("device", ["CPU", "FLAT", "LINEAR"])
@pytest.mark.parametrize("chance", [0.1, 0.9])
def test_no_minute_is_slower_by_more_than_3_percent(
    requests: int, device: str, chance: float
) -> None:
    """Drafts are as good or bad as can be, and the proposer always claims the middle."""
    cost = getattr(sim, device)
    simulation = sim.Simulation(cost, chance=chance, noise=0.05)
    simulation.guesser.claimed = 0.5
    steps = math.ceil(65 / cost(requests))
    record = simulation.run(min(steps, 80_000 // requests, 6000), requests=requests)
    assert record.speedup() > 0.985
    window = min(60.0, sum(record.seconds) / 1.2)
    assert record.least_speedup(window) > 0.97


def test_a_proposer_that_deceives_is_found_out() -> None:
    """Right for long, then wrong for long, again and again, and always sure of itself."""
    simulation = sim.Simulation(sim.LINEAR, chance=0.0)
    simulation.guesser.claimed = 0.99
    for turn in range(20):
        simulation.guesser.chance = 1.0 if turn % 2 else 0.0
        record = simulation.run(400, requests=8)
    assert record.least_speedup(60.0) > 0.97


def test_changes_of_mind_are_rare_where_it_makes_no_difference() -> None:
    """16 requests whose drafts just do not pay, or just do."""
    for chance in (0.55, 0.65, 0.75):
        simulation = sim.Simulation(sim.CPU, chance=chance, noise=0.05)
        record = simulation.run(4000, requests=16)
        assert simulation.auto.counts.num_switched_off <= 12
        assert record.speedup() > 0.985


def test_proposers_without_estimates_are_measured() -> None:
    simulation = sim.Simulation(sim.CPU, chance=0.8)
    simulation.guesser.has_probs = False
    record = simulation.run(2000, requests=1)
    assert record.drafts(1000) > 3 and record.speedup(1000) > 2.0
    simulation = sim.Simulation(sim.CPU, chance=0.05)
    simulation.guesser.has_probs = False
    record = simulation.run(2000, requests=1)
    assert record.drafts(1000) < 0.4 and record.speedup() > 0.99


def test_drafting_time_is_charged() -> None:
    """A proposer that takes most of a step may be right: it does not pay."""
    for took, pays in ((20e-6, True), (3e-3, False)):
        simulation = sim.Simulation(sim.CPU, chance=0.4)
        simulation.guesser.took = took
        record = simulation.run(2500, requests=1)
        assert (record.drafts(1500) > 0.5) == pays
        assert record.speedup(0 if pays else 1000) > (1.2 if pays else 0.985)


def test_room_asked_for_is_near_what_is_used() -> None:
    simulation = sim.Simulation(sim.CPU, chance=0.3)
    record = simulation.run(1500, requests=1)
    assert 2 <= simulation.auto.num_wanted <= 6
    assert 1.0 < record.drafts(500) < 3.0


def test_a_fixed_method_always_drafts() -> None:
    simulation = sim.Simulation(sim.LINEAR, chance=0.5, num_drafts=3)
    record = simulation.run(300, requests=4)
    assert record.drafts(1) > 2.8  # all but what requests near their end have room for
    counts = simulation.drafter.counts
    assert counts.num_accepted_tokens == sum(record.drawn) - sum(record.requests)
    assert counts.num_draft_tokens == sum(record.computed) - sum(record.requests)
    assert sum(counts.accepted_per_position) == counts.num_accepted_tokens
    shares = np.asarray(counts.accepted_per_position) / counts.num_drafts
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.125], atol=0.04)


def test_steps_that_read_prompts_have_no_drafts() -> None:
    simulation = sim.Simulation(sim.FLAT, chance=0.9)
    simulation.run(300, requests=2)
    auto = simulation.auto
    names = list(simulation._live)
    room = dict.fromkeys(names, 4)
    known = np.zeros(4, np.int32)
    outlooks = [Outlook(name, known, 4) for name in names]
    for prompt, has_drafts in (({}, True), ({"new": 64}, False), ({}, True)):
        counts = dict.fromkeys(names, 5) | prompt
        auto.begin(SchedulerOutput(step=0, num_scheduled_tokens=counts, max_drafts=room))
        num_tokens = len(names) + sum(prompt.values())
        drafts = auto.draft(outlooks, num_tokens=num_tokens)
        assert bool(drafts) == has_drafts
        tokens = dict.fromkeys(names, (1,))
        num_tokens += sum(map(len, drafts.values()))
        auto.learn(drafts, tokens, num_tokens=num_tokens, seconds=0.01)


def test_a_step_that_failed_teaches_nothing() -> None:
    simulation = sim.Simulation(sim.FLAT, chance=0.9)
    simulation.run(300, requests=1)
    auto, (name,) = simulation.auto, simulation._live
    step = SchedulerOutput(step=0, num_scheduled_tokens={name: 5}, max_drafts={name: 4})
    auto.begin(step)
    drafts = auto.draft([Outlook(name, np.zeros(4, np.int32), 4)], num_tokens=1)
    before = auto.counts.num_accepted_tokens
    auto.learn(drafts, {}, num_tokens=1 + sum(map(len, drafts.values())), seconds=0.01)
    assert auto.counts.num_accepted_tokens == before
    assert auto.draft([], num_tokens=0) == {}


def test_a_machine_that_stood_still_is_no_fault_of_drafts() -> None:
    simulation = sim.Simulation(sim.CPU, chance=0.9)
    simulation.run(300, requests=1)
    auto, (name,) = simulation.auto, simulation._live
    step = SchedulerOutput(step=0, num_scheduled_tokens={name: 5}, max_drafts={name: 4})
    before = auto.counts.seconds_saved
    for _ in range(3):
        auto.begin(step)
        drafts = auto.draft([Outlook(name, np.zeros(4, np.int32), 4)], num_tokens=1)
        num_tokens = 1 + sum(map(len, drafts.values()))
        auto.learn(drafts, {name: (1,)}, num_tokens=num_tokens, seconds=5.0)
    assert before - auto.counts.seconds_saved < 1.0
    assert auto.counts.num_guarded == 0 and auto.num_wanted > 0


def test_the_guarantee_switches_off_for_longer_each_time() -> None:
    counts = DraftCounts()
    regime = Regime(counts)
    rests: list[float] = []
    for number in range(1, 6):
        while counts.num_guarded < number:
            regime.account(seconds=0.1, without=0.08)
        assert not regime.is_on and not regime.may_draft
        rest = 0.0
        while not regime.may_draft:
            regime.pass_step(0.1)
            rest += 0.1
        rests.append(rest)
        for _ in range(10):
            regime.expect(0.5)
        assert regime.is_on
    assert rests == pytest.approx([10, 20, 40, 80, 120], abs=0.2)
    assert counts.num_switched_off == 5


def test_the_guarantee_counts_what_was_gained_in_the_last_minute_alone() -> None:
    counts = DraftCounts()
    regime = Regime(counts)
    for _ in range(1000):
        regime.account(seconds=0.1, without=0.15)
    for _ in range(300):  # half a minute gains, half loses as much
        regime.account(seconds=0.1, without=0.06)
    assert counts.num_guarded == 0
    for _ in range(200):
        regime.account(seconds=0.1, without=0.06)
    assert counts.num_guarded > 0


def test_a_crowd_has_no_drafts_and_takes_no_room() -> None:
    """However cheap tokens seem."""
    simulation = sim.Simulation(sim.FLAT, chance=0.9)
    record = simulation.run(200, requests=MAX_REQUESTS + 1)
    assert record.drafts() == 0 and simulation.auto.num_wanted == 0
