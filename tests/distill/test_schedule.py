"""Learning rates by step, and which samples a step sees."""

from __future__ import annotations

import math

from octavo.distill.schedule import Order, learning_rate


def test_rate_rises_then_falls() -> None:
    rates = [
        learning_rate(step, num_steps=100, peak=2.0, warmup_ratio=0.1, min_ratio=0.05)
        for step in range(100)
    ]
    assert rates[:10] == [2.0 * (i + 1) / 10 for i in range(10)]
    assert rates[10] == 2.0 and all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert math.isclose(rates[-1], 0.1)
    assert learning_rate(0, num_steps=1, peak=1.0, warmup_ratio=0.0, min_ratio=0.0) == 1.0


def test_order_is_one_of_all_samples_and_of_like_lengths() -> None:
    lengths = [(7 * i) % 301 for i in range(1000)]
    order = Order(lengths, 10, seed=4)
    assert order.steps_per_epoch == 100
    batches = order.epoch(0)
    assert sorted(i for batch in batches for i in batch) == list(range(1000))
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches]
    assert sum(spread) / len(spread) < 60  # of random ones: 245
    assert batches == Order(lengths, 10, seed=4).epoch(0)
    assert batches != order.epoch(1) != Order(lengths, 10, seed=5).epoch(1)


def test_a_last_batch_that_is_not_full_is_left_out() -> None:
    order = Order([5] * 25, 10, seed=0)
    assert [len(batch) for batch in order.epoch(0)] == [10, 10] and order.steps_per_epoch == 2
