"""Measured chances of drafts against those that they were drawn with."""

from __future__ import annotations

import random

import pytest

from octavo.speculative.acceptance import Acceptance


def accepted(chances: list[float], rng: random.Random) -> int:
    number = 0
    while number < len(chances) and rng.random() < chances[number]:
        number += 1
    return number


def test_estimates_are_replaced_by_what_is_measured() -> None:
    """A proposer that claims 0.9, 0.6 and 0.3 is right 0.6, 0.5 and 0.02 of the time."""
    rng, acceptance = random.Random(0), Acceptance()
    claimed, true = [0.9, 0.6, 0.3], [0.6, 0.5, 0.02]
    for number in range(3000):
        name = f"r{number // 10}"
        if number % 10 == 0:
            acceptance.begin(name)
        acceptance.learn(name, 3, claimed, num_accepted=accepted(true, rng))
    acceptance.begin("new")
    one, two, three = acceptance.survivals("new", 3, claimed)
    assert one == pytest.approx(0.6, abs=0.08)
    assert two / one == pytest.approx(0.5, abs=0.1)
    assert three / two < 0.12


def test_positions_are_measured_where_nothing_is_claimed() -> None:
    rng, acceptance = random.Random(1), Acceptance()
    acceptance.begin("r")
    for _ in range(3000):
        acceptance.learn("r", 3, None, num_accepted=accepted([0.9, 0.5, 0.2], rng))
    acceptance.begin("new")
    one, two, three = acceptance.survivals("new", 3, None)
    assert one == pytest.approx(0.9, abs=0.06)
    assert two / one == pytest.approx(0.5, abs=0.1)
    assert three / two == pytest.approx(0.2, abs=0.1)


def test_requests_differ_and_begin_alike() -> None:
    rng, acceptance = random.Random(2), Acceptance()
    for name in ("good", "bad"):
        acceptance.begin(name)
    for _ in range(300):
        acceptance.learn("good", 2, [0.5, 0.5], num_accepted=accepted([0.8, 0.8], rng))
        acceptance.learn("bad", 2, [0.5, 0.5], num_accepted=accepted([0.1, 0.1], rng))
    acceptance.begin("new")
    good, bad, new = (acceptance.survivals(n, 1, [0.5])[0] for n in ("good", "bad", "new"))
    assert good > 0.65 and bad < 0.25 and bad < new < good
    acceptance.forget("bad")
    assert acceptance.survivals("bad", 1, [0.5])[0] == new


def test_survivals_fall_and_are_chances() -> None:
    acceptance = Acceptance()
    acceptance.begin("r")
    for _ in range(500):
        acceptance.learn("r", 20, [1.0] * 20, num_accepted=20)
    found = acceptance.survivals("r", 20, [1.0] * 20)
    assert all(0.0 < b < a < 1.0 for a, b in zip(found, found[1:], strict=False))
    assert found[-1] > 0.6
    assert acceptance.survivals("r", 30, None)[-1] > 0.0


def test_bad_luck_does_not_end_all_trying() -> None:
    """Ten drafts in a row that fail, of a kind that is right every third time."""
    acceptance = Acceptance()
    acceptance.begin("r")
    for _ in range(10):
        acceptance.learn("r", 1, [0.4], num_accepted=0)
    acceptance.begin("new")
    assert acceptance.survivals("new", 1, [0.4])[0] > 0.15
