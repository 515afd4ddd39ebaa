"""The loop: overlap, refusals, aborts, and steps that fail as a whole."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from octavo.engine.core import STEP_FAILED
from octavo.engine.fake import fake_token
from octavo.types import (
    DeviceLostError,
    EngineRequest,
    FinishReason,
    ModelOutput,
    SamplingParams,
    SchedulerOutput,
    WorkerStats,
)
from tests.scheduler.driver import Driver


def spy(d: Driver) -> list[str]:
    """The order of the executor's calls from now on."""
    calls: list[str] = []
    executor = d.executor
    submit, collect = executor.submit, executor.collect

    class Spy:
        def submit(self, step: SchedulerOutput) -> None:
            calls.append(f"submit {step.step}")
            submit(step)

        def collect(self) -> ModelOutput:
            output = collect()
            calls.append(f"collect {output.step}")
            return output

        def use_idle_time(self) -> bool:
            return executor.use_idle_time()

        def close(self) -> None:
            calls.append("close")

    d.core._executor = Spy()
    return calls


@pytest.mark.parametrize(
    ("max_inflight", "expected"),
    [
        (1, ["submit 0", "collect 0", "submit 1", "collect 1", "submit 2", "collect 2"]),
        (2, ["submit 0", "submit 1", "collect 0", "submit 2", "collect 1", "collect 2"]),
    ],
)
def test_a_step_is_submitted_before_the_one_before_it_is_collected(
    max_inflight: int, expected: list[str]
) -> None:
    d = Driver(max_inflight=max_inflight)
    d.add("a", 4, max_tokens=3)
    calls = spy(d)
    for _ in range(3):
        d.take(d.core.step().outputs)
    assert calls == expected
    assert not d.core.has_work
    assert d.tokens["a"] == d.alone("a")
    d.core.close()
    assert calls[-1] == "close"


def test_a_request_that_cannot_run_is_refused_in_the_next_outputs() -> None:
    d = Driver(max_model_len=16)
    params = SamplingParams(max_tokens=1)
    d.core.add_request(
        EngineRequest(request_id="a", prompt_token_ids=(1,) * 40, params=params, arrival_time=99.5)
    )
    assert d.core.has_work
    (output,) = d.core.step().outputs
    assert output.finish_reason is FinishReason.ERROR
    assert output.is_bad_request
    assert output.error is not None and "40" in output.error and "16" in output.error
    assert output.times is not None
    assert (output.times.arrival, output.times.queued) == (99.5, 100.0)
    assert not d.core.has_work


def test_a_request_that_makes_no_sense_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    d = Driver()
    d.add("good", 5, max_tokens=2)
    params = SamplingParams(max_tokens=1)
    d.core.add_request(EngineRequest(request_id="a", prompt_token_ids=(1, -1) * 4, params=params))
    outputs = {output.request_id: output for output in d.core.step().outputs}
    assert outputs["a"].finish_reason is FinishReason.ERROR
    assert not outputs["a"].is_bad_request
    assert "request a cannot be queued" in caplog.text
    d.run()
    d.add("a", 5, max_tokens=1)
    d.run()
    assert d.last("a").finish_reason is FinishReason.LENGTH


def test_an_abort_is_told_with_the_next_step_and_frees_at_once() -> None:
    d = Driver(max_inflight=2)
    d.add("a", 4, max_tokens=9)
    d.take(d.core.step().outputs)
    d.core.abort(["a", "unknown"])
    assert d.kv.num_available == 32
    d.take(d.core.step().outputs)
    assert d.last("a").finish_reason is FinishReason.ABORT
    d.run()
    assert d.tokens["a"] == d.alone("a")[:1]


def test_a_failed_step_ends_its_requests_and_no_others(caplog: pytest.LogCaptureFixture) -> None:
    d = Driver(max_inflight=2, max_num_seqs=2, executor={"fail_steps": {2}})
    prompt = list(range(12))
    d.add("a", prompt, max_tokens=9)
    d.add("b", 5, max_tokens=9)
    d.add("c", prompt, max_tokens=9)
    with caplog.at_level(logging.ERROR):
        d.run()
    assert "told to fail" in caplog.text
    for name in "ab":
        assert d.last(name).finish_reason is FinishReason.ERROR
        assert d.last(name).error == STEP_FAILED
        assert not d.last(name).is_bad_request
        assert d.tokens[name] == d.alone(name)[:2]
    assert d.tokens["c"] == d.alone("c")
    assert d.last("c").num_cached_tokens == 0  # nothing a computed is trusted any more


def test_a_request_built_on_a_failed_step_starts_anew() -> None:
    d = Driver(max_inflight=2, budget=12, executor={"fail_steps": {0}})
    prompt = list(range(12))
    d.add("a", prompt, max_tokens=9)
    d.add("b", [*prompt, 5], max_tokens=9)  # admitted in step 1, on blocks of step 0
    d.run()
    assert d.last("a").finish_reason is FinishReason.ERROR
    assert d.tokens["b"] == d.alone("b")


def test_failures_apart_are_survived_and_three_in_a_row_are_not() -> None:
    d = Driver(executor={"fail_steps": {0, 1, 3, 4, 6, 7, 8}})
    for i in range(9):
        d.add(f"r{i}", 4, max_tokens=1)
        if i < 8:
            d.take(d.core.step().outputs)
            failed = d.last(f"r{i}").finish_reason is FinishReason.ERROR
            assert failed == (i in (0, 1, 3, 4, 6, 7))
    with pytest.raises(RuntimeError, match="step 8 was told to fail"):
        d.core.step()


def test_a_step_that_cannot_be_submitted_has_failed() -> None:
    d = Driver(max_inflight=2)
    d.add("a", 4, max_tokens=9)
    executor = d.core._executor

    class Refuses:
        def submit(self, step: SchedulerOutput) -> None:
            if step.step == 1:
                raise OSError("no device")
            executor.submit(step)

        def collect(self) -> ModelOutput:
            return executor.collect()

        def use_idle_time(self) -> bool:
            return executor.use_idle_time()

        def close(self) -> None:
            executor.close()

    d.core._executor = Refuses()
    d.take(d.core.step().outputs)
    assert d.last("a").error == STEP_FAILED
    assert not d.scheduler.has_unfinished
    assert d.kv.num_available == 32


@pytest.mark.parametrize("fails_at", ["submit", "collect"])
def test_a_lost_device_is_raised_at_once(fails_at: str) -> None:
    d = Driver(max_inflight=2)
    d.add("a", 4, max_tokens=9)

    executor = d.core._executor

    class Breaks:
        close, use_idle_time = executor.close, executor.use_idle_time

        def submit(self, step: SchedulerOutput) -> None:
            if fails_at == "submit":
                raise DeviceLostError("the GPU failed; requests in flight: a")
            executor.submit(step)

        def collect(self) -> ModelOutput:
            raise DeviceLostError("the GPU failed; requests in flight: a")

    d.core._executor = Breaks()
    with pytest.raises(DeviceLostError, match="requests in flight: a"):
        d.core.step()


def test_host_seconds_leave_out_the_model() -> None:
    d = Driver(executor={})
    d.executor.clock, d.executor.step_seconds = d.clock, lambda step: 0.5 * step.num_tokens
    d.add("a", 4, max_tokens=2)
    first = d.core.step()
    assert d.clock.now() == 102.0
    assert first.stats is not None
    assert (first.stats.host_seconds, first.stats.time) == (0.0, 102.0)
    (output,) = d.core.step().outputs
    assert output.times is not None
    assert (output.times.scheduled, output.times.first_token) == (100.0, 102.0)
    assert output.times.finished == 102.5


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_a_crowd_gets_what_each_would_get_alone(max_inflight: int) -> None:
    d = Driver(num_blocks=24, max_num_seqs=16, budget=32, max_inflight=max_inflight)
    shared = list(range(9))
    for i in range(60):
        d.add(f"r{i}", [*shared[: i % 10], *range(100 * i, 100 * i + 1 + i % 7)], max_tokens=20)
    d.run()
    assert all(d.tokens[name] == d.alone(name) for name in d.requests)
    assert sum(stats.preemptions for stats in d.stats) > 0
    assert sum(stats.prefix_cache_hits for stats in d.stats) > 0
    assert sum(stats.generation_tokens for stats in d.stats) == 1200
    waste = [stats.num_wasted_slots - 3 * stats.num_running for stats in d.stats]
    assert max(waste) <= 0  # a partial block each at most


def test_fake_tokens_depend_on_seed_and_position_alone() -> None:
    tokens = {(s, p): fake_token(s, p, vocab_size=10**6) for s in range(9) for p in range(9)}
    assert len(set(tokens.values())) == len(tokens)
    assert tokens[3, 4] == fake_token(3, 4, vocab_size=10**6)


def test_what_the_worker_counted_goes_out_with_its_step() -> None:
    d = Driver(max_inflight=2)
    d.add("a", 4, max_tokens=2)
    executor = d.executor
    counted = {0: WorkerStats(eager_steps=1, kernel_compiles=2)}

    class Counts:
        submit, close = executor.submit, executor.close

        def collect(self) -> ModelOutput:
            output = executor.collect()
            return replace(output, worker=counted.get(output.step))

        def use_idle_time(self) -> bool:
            return True

    d.core._executor = Counts()
    told = [d.core.step().stats, d.core.step().stats]
    assert [stats and stats.worker for stats in told] == [counted[0], None]
    assert d.core.use_idle_time()
