"""The gain that is exported is that of the last minute of steps, and of no other."""

from __future__ import annotations

import random

import pytest

from octavo.speculative.last_minute import WINDOW, LastMinute
from tests.speculative import simulated as sim


def test_a_minute_is_remembered_and_no_more() -> None:
    rng = random.Random(5)
    minute, steps, num_told = LastMinute(), [], 0
    assert minute.gain == 0.0
    for number in range(9000):
        seconds, saved = rng.uniform(0.001, 0.04), rng.uniform(-0.01, 0.02) * (number < 6000)
        steps.append((seconds, saved))
        is_told = minute.add(seconds, saved)
        num_told += is_told
        if is_told and number % 7 == 0:
            took = kept = 0.0
            for seconds, saved in reversed(steps):
                if took >= WINDOW:
                    break
                took, kept = took + seconds, kept + saved
            # Pieces are a second long.
            assert minute.gain == pytest.approx(kept / max(took, 20.0), abs=6e-3)
    total = sum(seconds for seconds, _ in steps)
    assert total / 1.1 < num_told <= total
    assert minute.gain == pytest.approx(0.0, abs=1e-9)  # all of the last minute saved nothing


def test_steps_longer_than_the_window() -> None:
    minute = LastMinute()
    for _ in range(3):
        assert minute.add(100.0, 5.0)
        assert minute.gain == pytest.approx(0.05)


@pytest.mark.parametrize(("cost", "chance"), [(sim.CPU, 0.8), (sim.CPU, 0.3), (sim.LINEAR, 0.5)])
def test_what_the_controller_tells_is_what_it_gained(cost: sim.Cost, chance: float) -> None:
    simulation = sim.Simulation(cost, chance=chance)
    record = simulation.record
    while sum(record.seconds) < 90.0 and len(record.seconds) < 60000:
        simulation.run(500, requests=2)
    start, took = len(record.seconds), 0.0
    while took < WINDOW and start:
        start -= 1
        took += record.seconds[start]
    gain = simulation.auto.counts.gain
    assert gain == pytest.approx(
        record.speedup(start) - 1.0, abs=0.02 + 0.03 * (record.speedup() - 1)
    )
    assert gain is not None and gain > -0.03
