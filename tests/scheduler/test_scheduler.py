"""Each rule of the scheduler by itself."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.config import SchedulerConfig
from octavo.kvcache.manager import KVCacheManager
from octavo.scheduler.scheduler import Scheduler
from octavo.types import EngineRequest, FinishReason, ModelOutput, SamplingParams
from tests.scheduler.driver import Driver

# ---- budget, order, chunks ----------------------------------------------------------------------


def test_one_request_from_prompt_to_end() -> None:
    d = Driver()
    d.add("a", 6, max_tokens=3)
    first = d.step()
    (new,) = first.new_requests
    assert (new.num_computed_tokens, new.num_prompt_tokens, len(new.block_ids)) == (0, 6, 2)
    assert new.token_ids == d.requests["a"].prompt_token_ids
    assert first.num_scheduled_tokens == {"a": 6}
    second = d.step()
    assert (second.new_requests, second.num_scheduled_tokens) == ((), {"a": 1})
    third = d.step()
    assert third.num_scheduled_tokens == {"a": 1}
    assert d.last("a").finish_reason is FinishReason.LENGTH
    assert d.tokens["a"] == d.alone("a")
    assert not d.scheduler.has_unfinished


def test_budget_cuts_prompts_and_running_requests_come_first() -> None:
    d = Driver(budget=8)
    d.add("a", 6, max_tokens=9)
    d.add("b", 12, max_tokens=9)
    assert d.step().num_scheduled_tokens == {"a": 6, "b": 2}
    assert d.step().num_scheduled_tokens == {"a": 1, "b": 7}
    assert d.step().num_scheduled_tokens == {"a": 1, "b": 3}
    assert d.step().num_scheduled_tokens == {"a": 1, "b": 1}


def test_a_chunk_takes_blocks_for_its_own_tokens_only() -> None:
    d = Driver(budget=5)
    d.add("a", 12, max_tokens=2)
    assert len(d.step().new_requests[0].block_ids) == 2
    assert d.step().new_block_ids["a"] == (2,)
    assert d.scheduler.stats(0.0).num_wasted_slots == 2


def test_long_prompts_are_chunked_by_the_threshold() -> None:
    d = Driver(long_prefill_token_threshold=5)
    d.add("a", 12, max_tokens=2)
    d.add("b", 3, max_tokens=9)
    steps = [d.step().num_scheduled_tokens for _ in range(3)]
    assert steps == [{"a": 5, "b": 3}, {"a": 5, "b": 1}, {"a": 2, "b": 1}]


def test_max_num_seqs_bounds_the_batch() -> None:
    d = Driver(max_num_seqs=2)
    for name in "abc":
        d.add(name, 3, max_tokens=2)
    assert list(d.step().num_scheduled_tokens) == ["a", "b"]
    d.step()
    third = d.step()
    assert list(third.num_scheduled_tokens) == ["c"]
    assert set(third.finished_request_ids) == {"a", "b"}


def test_priority_admits_the_lowest_number_then_the_earliest() -> None:
    d = Driver(scheduling_policy="priority", max_num_seqs=1)
    d.add("late", 3, priority=1, arrival_time=2.0, max_tokens=1)
    d.add("early", 3, priority=1, arrival_time=1.0, max_tokens=1)
    d.add("urgent", 3, priority=-5, arrival_time=9.0, max_tokens=1)
    order = [next(iter(d.step().num_scheduled_tokens)) for _ in range(3)]
    assert order == ["urgent", "early", "late"]


def test_nobody_overtakes_a_request_that_waits_for_room() -> None:
    d = Driver(num_blocks=8, caching=False)
    d.add("a", 16, max_tokens=4)
    d.add("big", 20, max_tokens=4)
    d.add("small", 1, max_tokens=4)
    for _ in range(4):
        assert list(d.step().num_scheduled_tokens) == ["a"]
    assert list(d.step().num_scheduled_tokens) == ["big", "small"]


def test_room_is_asked_for_the_whole_prompt_beyond_what_chunks_will_take() -> None:
    d = Driver(num_blocks=8, budget=8, long_prefill_token_threshold=4, caching=False)
    d.add("a", 20, max_tokens=2)
    d.add("b", 16, max_tokens=2)
    assert d.step().num_scheduled_tokens == {"a": 4}
    d.run()
    assert sum(stats.preemptions for stats in d.stats) == 0


def test_an_admission_leaves_headroom_for_those_that_run() -> None:
    d = Driver(num_blocks=16, max_model_len=64, budget=512, caching=False)
    d.add("a", 4, max_tokens=5)
    d.add("b", 15 * 4, max_tokens=2)
    assert d.step().num_scheduled_tokens == {"a": 4}
    d.run()
    assert sum(stats.preemptions for stats in d.stats) == 0


# ---- refusals -----------------------------------------------------------------------------------


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers() -> None:
    d = Driver(max_model_len=16)
    with pytest.raises(ValueError, match=r"17 tokens.* max_model_len is 16"):
        d.add("a", 17)
    with pytest.raises(ValueError, match=r"16 tokens.* max_model_len is 16"):
        d.add("a", 16)
    d.add("a", 16, max_tokens=0)


def test_a_request_beyond_the_cache_is_refused_with_both_numbers() -> None:
    d = Driver(num_blocks=3)
    with pytest.raises(ValueError, match=r"13 tokens.* max_tokens=1 .*takes 13 .*holds 12"):
        d.add("a", 13, max_tokens=1)
    with pytest.raises(ValueError, match=r"max_tokens=4 takes 13 .*holds 12"):
        d.add("a", 10, max_tokens=4)
    d.add("a", 10, max_tokens=3)
    d.run()
    assert d.tokens["a"] == d.alone("a")


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 token"):
        Driver().add("a", 0)


def test_an_id_is_free_again_once_its_request_ended() -> None:
    d = Driver()
    d.add("a", 3, max_tokens=2)
    with pytest.raises(ValueError, match="'a' is in use"):
        d.add("a", 3)
    d.schedule()
    d.schedule()
    d.take(d.scheduler.abort(["a"]))
    d.add("a", 5, max_tokens=2, seed=7)
    d.schedule()
    assert d.update() == d.update() == []  # the first a's
    d.update()
    d.run()
    assert d.tokens["a"] == d.alone("a")


# ---- stopping -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "num_tokens", "stop_reason"),
    [
        ({"eos_token_ids": (50,)}, 3, None),
        ({"stop_token_ids": (50,)}, 3, 50),
        ({"eos_token_ids": (50,), "stop_token_ids": (50,)}, 3, None),
        ({"eos_token_ids": (50,), "stop_token_ids": (50,), "ignore_eos": True}, 3, 50),
        ({"eos_token_ids": (50,), "min_tokens": 2}, 3, None),
        ({"eos_token_ids": (50,), "min_tokens": 3}, 5, None),
    ],
)
@pytest.mark.parametrize("max_inflight", [1, 2])
def test_stop_tokens(
    params: dict[str, Any], num_tokens: int, stop_reason: int | None, max_inflight: int
) -> None:
    script = [7, 8, 50, 9, 50, 10, 11, 12]
    d = Driver(max_inflight=max_inflight, executor={"scripts": {"a": script}})
    d.add("a", 5, max_tokens=8, **params)
    d.run()
    assert d.tokens["a"] == script[:num_tokens]
    assert d.last("a").finish_reason is FinishReason.STOP
    assert d.last("a").stop_reason == stop_reason


def test_ignore_eos_goes_on_to_max_tokens() -> None:
    d = Driver(executor={"scripts": {"a": [50] * 4}})
    d.add("a", 5, max_tokens=4, eos_token_ids=(50,), ignore_eos=True)
    d.run()
    assert d.tokens["a"] == [50] * 4
    assert d.last("a").finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("max_inflight", [1, 2, 3])
def test_max_model_len_ends_a_request(max_inflight: int) -> None:
    d = Driver(max_model_len=16, max_inflight=max_inflight)
    d.add("a", 10, max_tokens=100)
    d.run()
    assert len(d.tokens["a"]) == 6
    assert d.last("a").finish_reason is FinishReason.LENGTH
    # The last token is never computed, and nothing is scheduled past it.
    assert sum(stats.num_scheduled_tokens for stats in d.stats) == 15


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_no_tokens_wanted(max_inflight: int) -> None:
    d = Driver(budget=4, max_inflight=max_inflight)
    d.add("a", 10, max_tokens=0, prompt_logprobs=0)
    d.run()
    assert d.tokens["a"] == []
    assert d.last("a").finish_reason is FinishReason.LENGTH
    positions = [item.token_id for out in d.outputs["a"] for item in out.new_prompt_logprobs]
    assert positions == list(d.requests["a"].prompt_token_ids[1:])


# ---- overlap ------------------------------------------------------------------------------------


def test_the_next_step_is_scheduled_before_the_token_is_known() -> None:
    d = Driver()
    d.add("a", 5, max_tokens=3)
    assert [d.schedule().num_scheduled_tokens for _ in range(3)] == [{"a": 5}, {"a": 1}, {"a": 1}]
    assert d.schedule().num_scheduled_tokens == {}
    for _ in range(3):
        d.update()
    assert d.tokens["a"] == d.alone("a")


def test_a_stop_found_a_step_late_is_trimmed() -> None:
    d = Driver(executor={"scripts": {"a": [1, 50, 2]}})
    d.add("a", 5, max_tokens=9, stop_token_ids=(50,))
    for _ in range(3):
        d.schedule()
    d.update()
    d.update()
    assert d.kv.num_available == 32
    assert d.update() == []
    assert d.tokens["a"] == [1, 50]


def test_abort_in_flight_drops_what_comes_late_and_frees_at_once() -> None:
    d = Driver()
    d.add("a", 5, max_tokens=9)
    d.add("b", 5, max_tokens=9)
    d.schedule()
    (ended,) = d.take(d.scheduler.abort(["a", "nobody"], now=101.0))
    assert ended.finish_reason is FinishReason.ABORT
    assert ended.times is not None and ended.times.finished == 101.0
    assert d.kv.num_available == 30
    second = d.schedule()
    assert second.finished_request_ids == ("a",)
    assert list(second.num_scheduled_tokens) == ["b"]
    assert [out.request_id for out in d.update()] == ["b"]


def test_ids_of_the_ended_go_with_the_next_step_that_computes() -> None:
    d = Driver()
    d.add("a", 5, max_tokens=1)
    d.step()
    assert d.schedule().finished_request_ids == ()
    d.add("b", 5, max_tokens=1)
    assert d.step().finished_request_ids == ("a",)


# ---- figures ------------------------------------------------------------------------------------


def test_stats_add_up() -> None:
    d = Driver(num_blocks=8, budget=8)
    d.add("a", 10, max_tokens=3)
    d.step()
    stats = d.scheduler.stats(5.0, host_seconds=0.25)
    assert (stats.num_running, stats.num_waiting, stats.num_scheduled_tokens) == (1, 0, 8)
    assert (stats.prompt_tokens, stats.generation_tokens) == (8, 0)
    assert (stats.num_blocks, stats.num_owned_blocks, stats.num_free_blocks) == (8, 2, 6)
    assert (stats.time, stats.host_seconds) == (5.0, 0.25)
    d.step()
    stats = d.scheduler.stats(6.0)
    assert (stats.prompt_tokens, stats.generation_tokens, stats.num_wasted_slots) == (2, 1, 2)
    d.step()
    d.step()
    stats = d.scheduler.stats(7.0)
    assert (stats.num_running, stats.generation_tokens) == (0, 2)
    assert (stats.num_owned_blocks, stats.num_cached_blocks, stats.num_free_blocks) == (0, 3, 5)


def test_times_of_a_request() -> None:
    d = Driver()
    d.add("a", 3, arrival_time=99.0, max_tokens=2)
    d.clock.advance(1.0)
    d.schedule()
    d.clock.advance(1.0)
    d.update()
    d.schedule()
    d.clock.advance(1.0)
    d.update()
    times = d.last("a").times
    assert times is not None
    assert (times.arrival, times.queued, times.scheduled) == (99.0, 100.0, 101.0)
    assert (times.first_token, times.last_token, times.finished) == (102.0, 103.0, 103.0)


# ---- drafts ---------------------------------------------------------------------------------


def test_blocks_for_a_token_and_for_its_drafts_are_all_told() -> None:
    kv = KVCacheManager(32, block_size=4, check_invariants=True)
    scheduler = Scheduler(
        SchedulerConfig(), kv=kv, max_model_len=64, max_num_batched_tokens=64, max_drafts=9
    )
    scheduler.add(
        EngineRequest(
            request_id="a",
            prompt_token_ids=(1, 2, 3, 4),
            params=SamplingParams(max_tokens=40, ignore_eos=True),
        )
    )
    told: list[int] = []
    for number in range(12):  # tokens that begin a block among them
        step = scheduler.schedule(0.0)
        told += step.new_requests[0].block_ids if number == 0 else step.new_block_ids.get("a", ())
        end = 4 + number + step.max_drafts.get("a", 0)
        assert len(told) == len(set(told)) == -(-end // 4)
        scheduler.update(
            ModelOutput(step=step.step, sampled_token_ids={"a": (7,)}, num_drafts_wanted=9),
            0.0,
        )
    assert max(step.max_drafts.values()) == 9
