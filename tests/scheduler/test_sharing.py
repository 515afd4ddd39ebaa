"""Blocks that requests share: prefix hits and forks."""

from __future__ import annotations

import pytest

from octavo.types import BlockCopy
from tests.scheduler.driver import Driver

# ---- prefix cache -------------------------------------------------------------------------------


def test_a_second_prompt_finds_the_first_ones_blocks() -> None:
    d = Driver()
    prompt = list(range(12))
    d.add("a", prompt, max_tokens=2)
    d.run()
    d.add("b", [*prompt, 77], max_tokens=2)
    (new,) = d.step().new_requests
    assert new.num_computed_tokens == 12
    assert d.last("b").num_cached_tokens == 12
    stats = d.scheduler.stats(0.0)
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (13, 12)


def test_a_hit_in_the_same_step() -> None:
    d = Driver()
    prompt = list(range(12))
    d.add("a", prompt, max_tokens=2)
    d.add("b", prompt, max_tokens=2)
    assert d.step().num_scheduled_tokens == {"a": 12, "b": 4}
    d.run()
    assert d.tokens["b"] == d.alone("b")


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    d = Driver()
    d.add("a", 6, max_tokens=7)
    d.run()
    turn = [*d.requests["a"].prompt_token_ids, *d.tokens["a"], 5]
    d.add("b", turn, max_tokens=1)
    assert d.step().new_requests[0].num_computed_tokens == 12


def test_prompt_logprobs_read_no_cache_and_feed_it() -> None:
    d = Driver()
    prompt = list(range(12))
    d.add("a", prompt, max_tokens=1)
    d.run()
    d.add("b", prompt, max_tokens=1, prompt_logprobs=1)
    assert d.step().num_scheduled_tokens == {"b": 12}
    assert d.scheduler.stats(0.0).prefix_cache_queries == 0
    assert [lp.token_id for lp in d.last("b").new_prompt_logprobs] == prompt[1:]


def test_prompt_logprobs_are_delivered_once_despite_preemption() -> None:
    d = Driver(num_blocks=7, budget=6, max_model_len=24)
    d.add("old", 4, max_tokens=12)
    d.add("new", 20, max_tokens=2, prompt_logprobs=0)
    d.step()
    d.step()
    d.scheduler._live.preempt(d.scheduler._live.running["new"])
    assert 0 < sum(len(out.new_prompt_logprobs) for out in d.outputs["new"]) < 19
    d.run()
    positions = [lp.token_id for out in d.outputs["new"] for lp in out.new_prompt_logprobs]
    assert positions == list(d.requests["new"].prompt_token_ids[1:])
    assert d.tokens["new"] == d.alone("new")


def test_resetting_the_cache_spares_running_requests() -> None:
    d = Driver()
    prompt = list(range(12))
    d.add("a", prompt, max_tokens=4)
    d.step()
    d.scheduler.reset_prefix_cache()
    d.add("b", prompt, max_tokens=1)
    assert d.step().num_scheduled_tokens == {"a": 1, "b": 12}
    d.run()
    assert d.tokens["a"] == d.alone("a")


# ---- forks --------------------------------------------------------------------------------------


def test_a_fork_waits_for_the_prompt_then_shares_it() -> None:
    d = Driver(budget=8)
    prompt = list(range(10))
    d.add("a", prompt, max_tokens=4)
    d.add("b", prompt, fork_of="a", max_tokens=4)
    d.add("c", 2, max_tokens=1)
    assert d.step().num_scheduled_tokens == {"a": 8}
    assert d.step().num_scheduled_tokens == {"a": 2, "c": 2}  # b stops nobody
    third = d.step()
    assert third.num_scheduled_tokens == {"a": 1, "b": 1}
    (new,) = third.new_requests
    assert new.num_computed_tokens == 9
    assert new.block_ids[:2] == (0, 1)
    assert third.block_copies == (BlockCopy(src=2, dst=new.block_ids[2]),)
    assert d.last("b").num_cached_tokens == 9
    d.run()
    assert all(d.tokens[name] == d.alone(name) for name in "abc")
    assert len({tuple(d.tokens[name]) for name in "ab"}) == 2


def test_a_fork_of_a_dead_or_unknown_parent_is_an_ordinary_request() -> None:
    d = Driver(caching=False)
    prompt = list(range(10))
    d.add("a", prompt, max_tokens=4)
    d.add("b", prompt, fork_of="a", max_tokens=4)
    d.add("c", prompt, fork_of="nobody", max_tokens=4)
    d.take(d.scheduler.abort(["a"]))
    assert d.step().num_scheduled_tokens == {"b": 10, "c": 10}


def test_a_fork_with_prompt_logprobs_computes_its_prompt() -> None:
    d = Driver()
    prompt = list(range(10))
    d.add("a", prompt, max_tokens=4)
    d.add("b", prompt, fork_of="a", max_tokens=4, prompt_logprobs=0)
    assert d.step().num_scheduled_tokens == {"a": 10, "b": 10}


def test_a_fork_must_have_its_parents_prompt_and_salt() -> None:
    d = Driver()
    d.add("a", [1, 2, 3])
    with pytest.raises(ValueError, match="same prompt and cache_salt"):
        d.add("b", [1, 2, 4], fork_of="a")
    with pytest.raises(ValueError, match="same prompt and cache_salt"):
        d.add("b", [1, 2, 3], fork_of="a", cache_salt="s")
