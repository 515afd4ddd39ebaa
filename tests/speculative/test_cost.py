"""Cost curves learnt from noisy steps, against the curve that the steps came from."""

from __future__ import annotations

import random

import numpy as np
import pytest

from octavo.speculative.cost import CostCurve, StepCosts
from tests.speculative import simulated as sim

rng = random.Random(4)


def staircase(num_tokens: int) -> float:
    """A GPU's graphs: sizes are rounded up."""
    size = next(size for size in (1, 2, 4, 8, 16, 32, 64) if size >= num_tokens)
    return 1e-3 * (3.0 + 0.1 * size)


@pytest.mark.parametrize("device", [sim.CPU, sim.FLAT, sim.LINEAR, staircase])
def test_finds_the_curve_under_noise(device: sim.Cost) -> None:
    curve = CostCurve()
    for _ in range(4000):
        num_tokens = rng.randint(1, 48)
        noise = rng.gauss(1.0, 0.05) * (6.0 if rng.random() < 0.003 else 1.0)
        curve.observe(num_tokens, device(num_tokens) * noise)
    # Steep edges are blurred.
    for num_tokens in (1, 2, 4, 6, 13, 24, 44) if device is staircase else range(1, 33):
        assert curve.seconds(num_tokens) == pytest.approx(device(num_tokens), rel=0.1)


def test_never_falls() -> None:
    curve = CostCurve()
    for _ in range(500):
        curve.observe(rng.randint(1, 200), 0.01 * rng.uniform(0.7, 1.4))
        found = [curve.seconds(n) for n in range(1, 260)]
        assert found[0] > 0.0
        assert all(a <= b * (1 + 1e-12) for a, b in zip(found, found[1:], strict=False))


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.1, 1.0])
def test_two_sizes_tell_what_larger_ones_take(slope: float) -> None:
    curve = CostCurve()
    for _ in range(20):
        for num_tokens in (16, 24):
            curve.observe(num_tokens, 1e-3 * (5 + slope * num_tokens))
    assert curve.seconds(64) == pytest.approx(1e-3 * (5 + slope * 64), rel=0.1)
    assert curve.seconds(20_000) >= curve.seconds(5000) >= curve.seconds(600)


def test_what_is_not_measured_follows_what_is() -> None:
    """As contexts grow all steps take longer, those of sizes that do not occur as well."""
    curve = CostCurve()
    for i in range(400):
        curve.observe((1, 8)[i % 2], (0.004, 0.006)[i % 2])
    for i in range(400):
        curve.observe(8, 0.006 * (1 + i / 400))
    assert curve.seconds(8) == pytest.approx(0.012, rel=0.1)
    assert 0.0048 < curve.seconds(1) < 0.009


def test_one_hiccup_changes_little() -> None:
    curve = CostCurve()
    for _ in range(50):
        curve.observe(4, 0.005)
    curve.observe(4, 5.0)
    assert curve.seconds(4) < 0.006


def test_steps_of_few_requests_are_not_those_of_many() -> None:
    """One request with seven drafts takes less than eight requests, here by half."""
    costs = StepCosts()
    for _ in range(60):
        costs.observe(1, 8, 0.005)
        costs.observe(8, 8, 0.010)
        costs.observe(1, 1, 0.004)
    assert costs.of(1).seconds(8) == pytest.approx(0.005, rel=0.05)
    assert costs.of(8).seconds(8) == pytest.approx(0.010, rel=0.05)
    assert costs.of(1).seconds(1) == pytest.approx(0.004, rel=0.05)


def test_the_first_steps_of_a_size_do_not_count() -> None:
    costs = StepCosts()
    assert [costs.observe(2, 5, 1.0) for _ in range(2)] == [False, False]
    assert costs.observe(2, 5, 0.003)
    assert costs.of(2).seconds(5) == pytest.approx(0.003)
    assert np.isfinite(costs.of(4000).seconds(4000))
