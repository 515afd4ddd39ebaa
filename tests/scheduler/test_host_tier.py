"""Blocks that go to host memory and return, step by step: hits, failures, damage, preemption."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.engine.core import STEP_FAILED
from octavo.types import FinishReason
from tests.scheduler.driver import Driver

PROMPT = list(range(1, 18))  # 4 full blocks and a token


def driver(**config: Any) -> Driver:
    return Driver(**{"num_blocks": 8, "num_host_slots": 40, "max_model_len": 32} | config)


def use(d: Driver, name: str, prompt: int | list[int], **params: Any) -> None:
    d.add(name, prompt, **{"max_tokens": 2} | params)
    d.run()
    assert d.tokens[name] == d.alone(name)


def evict(d: Driver, name: str) -> None:
    use(d, name, 30)


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_an_evicted_prompt_is_found_and_loaded(max_inflight: int) -> None:
    d = driver(max_inflight=max_inflight)
    use(d, "a", PROMPT)
    evict(d, "other")
    d.scheduler.stats(0.0)
    d.add("b", PROMPT, max_tokens=3)
    step = d.step()
    (new,) = step.new_requests
    assert new.num_computed_tokens == 16
    assert [move.block for move in step.loads] == list(new.block_ids[:4])
    assert step.num_scheduled_tokens == {"b": 1}
    assert d.scheduler.stats(0.0).prefix_cache_host_hits == 16
    d.run()
    assert d.tokens["b"] == d.alone("b")
    assert d.last("b").num_cached_tokens == 16


def test_loaded_blocks_are_shared_in_the_same_step() -> None:
    d = driver()
    use(d, "a", PROMPT)
    evict(d, "other")
    d.add("b", PROMPT, max_tokens=2)
    d.add("c", PROMPT, max_tokens=2)
    step = d.step()
    first, second = step.new_requests
    assert len(step.loads) == 4 and first.block_ids[:4] == second.block_ids[:4]
    d.run()
    assert [d.tokens[name] for name in "bc"] == [d.alone(name) for name in "bc"]


def test_a_preempted_request_comes_back_from_the_host() -> None:
    """Two that do not fit together: what the victim had computed is loaded, not computed again."""

    def computed(num_host_slots: int) -> int:
        d = driver(num_blocks=8, num_host_slots=num_host_slots, max_inflight=2)
        d.add("a", 14, max_tokens=18)
        d.add("b", 12, max_tokens=18)
        d.run()
        assert [d.tokens[name] for name in "ab"] == [d.alone(name) for name in "ab"]
        assert sum(stats.preemptions for stats in d.stats) > 0
        assert (sum(stats.loaded_blocks for stats in d.stats) > 0) == (num_host_slots > 0)
        return sum(stats.num_scheduled_tokens for stats in d.stats)

    assert computed(20) < computed(0)


def test_what_a_failed_request_computed_is_not_served_from_the_host() -> None:
    """Its blocks are saved by a step that is planned before the failure is known."""
    d = driver(executor={"fail_requests": {"bad": "told to fail"}})
    d.add("bad", PROMPT, max_tokens=2)
    d.schedule()
    d.scheduler.abort(["bad"])
    d.add("other", 30, max_tokens=2)
    step = d.schedule()
    assert len(step.saves) == 4 and len(d.kv.tier) == 4
    d.update()
    assert len(d.kv.tier) == 0
    d.update()
    d.run()
    d.add("b", PROMPT, max_tokens=2)
    (new,) = d.step().new_requests
    assert new.num_computed_tokens == 0


@pytest.mark.parametrize("newest", [False, True])
def test_what_a_failed_step_was_to_save_is_not_served(newest: bool) -> None:
    d = driver(executor={"fail_steps": {3}})
    use(d, "a", PROMPT)  # steps 0 and 1
    use(d, "one", 1, max_tokens=1)
    d.add("other", 30, max_tokens=2)
    step = d.scheduler.schedule(d.clock.now())
    assert (step.step, len(step.saves)) == (3, 4)
    if not newest:
        d.executor.submit(step)
        with pytest.raises(RuntimeError, match="step 3 was told to fail"):
            d.executor.collect()
    outputs = d.take(d.scheduler.fail_step(STEP_FAILED, now=0.0, newest=newest))
    assert [output.finish_reason for output in outputs] == [FinishReason.ERROR]
    assert len(d.kv.tier) == 0
    d.scheduler.check_invariants()


def test_who_loads_what_a_failed_step_was_to_save_starts_anew() -> None:
    d = driver(executor={"fail_steps": {2}}, num_blocks=10)
    use(d, "a", PROMPT)  # steps 0 and 1
    d.add("other", 31, max_tokens=1)
    failing = d.schedule()
    assert len(failing.saves) == 2
    d.scheduler.abort(["other"])
    d.add("b", PROMPT, max_tokens=2)
    step = d.schedule()
    assert len(step.loads) == 2
    with pytest.raises(RuntimeError, match="step 2 was told to fail"):
        d.executor.collect()
    d.take(d.scheduler.fail_step(STEP_FAILED, now=0.0))
    assert d.update() == []
    d.run()
    assert d.tokens["b"] == d.alone("b")


@pytest.mark.parametrize("max_inflight", [1, 2, 3])
def test_who_builds_on_a_damaged_block_starts_anew(max_inflight: int) -> None:
    d = driver(max_inflight=max_inflight, num_blocks=16)
    use(d, "a", PROMPT)
    evict(d, "other-1")
    evict(d, "other-2")
    d.executor.num_to_damage = 1
    d.add("b", PROMPT, max_tokens=4)
    d.add("c", [*PROMPT[:8], 77, 78], max_tokens=4)
    d.add("fork", PROMPT, max_tokens=4, fork_of="b")
    d.add("alone", 5, max_tokens=4)
    before = len(d.stats)
    d.run()
    assert d.executor.num_damaged == 1
    assert sum(stats.damaged_blocks for stats in d.stats) == 1
    for name in ("b", "c", "fork", "alone"):
        assert d.tokens[name] == d.alone(name)
    # The first block was in the cache all the time; what was loaded behind it was void.
    assert d.last("b").num_cached_tokens == 4
    # Steps: the damaged one, those in flight with it, one for the prompt and one for each token.
    assert len(d.stats) - before <= 1 + max_inflight + 4 + 1


def test_a_request_that_fails_on_damaged_blocks_has_an_excuse() -> None:
    """Garbage may be NaN: the error of a request that is to start anew is not its own."""
    d = driver()
    use(d, "a", PROMPT)
    evict(d, "other")
    failing: dict[str, str] = {"b": "not finite"}
    d.executor.fail_requests = failing
    d.executor.num_to_damage = 1
    d.add("b", PROMPT, max_tokens=3)
    d.step()
    failing.clear()
    d.run()
    assert d.last("b").finish_reason is FinishReason.LENGTH
    assert d.tokens["b"] == d.alone("b")


def test_a_reset_empties_the_host_too() -> None:
    d = driver()
    use(d, "a", PROMPT)
    evict(d, "other")
    assert len(d.kv.tier) > 0
    d.scheduler.reset_prefix_cache()
    d.add("b", PROMPT, max_tokens=1)
    step = d.step()
    assert not step.loads and step.num_scheduled_tokens == {"b": 17}


def test_stats_of_the_tier_add_up() -> None:
    d = driver(num_host_slots=6)
    use(d, "a", PROMPT)
    evict(d, "other")
    use(d, "b", PROMPT)
    last = d.stats[-1]
    assert (last.num_host_slots, last.num_host_blocks) == (6, len(d.kv.tier))
    assert last.host_tier_usage == len(d.kv.tier) / 6
    assert sum(stats.loaded_blocks for stats in d.stats) == 4
    assert sum(stats.saved_blocks for stats in d.stats) >= 4
    assert sum(stats.prefix_cache_host_hits for stats in d.stats) == 16
