"""Failed requests and steps: who fails with them, and what is not found afterwards."""

from __future__ import annotations

import pytest

from octavo.types import FinishReason, ModelOutput
from tests.scheduler.driver import Driver


def test_a_failed_request_fails_alone_and_leaves_nothing_to_find() -> None:
    d = Driver(executor={"fail_requests": {"a": "non-finite logits"}})
    prompt = list(range(12))
    d.add("a", prompt, max_tokens=4)
    d.add("b", prompt, max_tokens=4)  # hits a's blocks in the very step in which a fails
    d.add("c", 6, max_tokens=4)
    d.schedule()
    d.schedule()
    d.update()
    assert d.last("a").finish_reason is FinishReason.ERROR
    assert d.last("a").error == "non-finite logits"
    assert d.tokens["b"] == []
    d.update()
    d.run()
    for name in "bc":
        assert d.tokens[name] == d.alone(name)
    assert d.last("b").times is not None


def test_an_aborted_request_that_fails_taints_its_dependents_too() -> None:
    d = Driver(executor={"fail_requests": {"a": "bad"}})
    prompt = list(range(12))
    d.add("a", prompt, max_tokens=4)
    d.add("b", prompt, max_tokens=4)
    d.schedule()
    d.take(d.scheduler.abort(["a"]))
    d.update()
    d.run()
    assert d.tokens["b"] == d.alone("b")


def test_forks_of_a_failed_parent_start_anew() -> None:
    d = Driver(executor={"fail_requests": {}})
    prompt = [1, 2]
    d.add("a", prompt, max_tokens=4)
    d.add("b", prompt, fork_of="a", max_tokens=4)
    d.schedule()
    assert d.schedule().block_copies
    d.executor.fail_requests = {"a": "bad"}
    d.update()
    d.update()
    d.run()
    assert d.tokens["b"] == d.alone("b")


def test_results_must_be_those_of_the_oldest_step() -> None:
    d = Driver()
    d.add("a", 3)
    d.schedule()
    with pytest.raises(AssertionError, match="results of step 5"):
        d.scheduler.update(ModelOutput(step=5), 0.0)


def test_a_block_whose_last_token_is_in_flight_is_not_found_if_that_step_fails() -> None:
    d = Driver(executor={"scripts": {"a": [7, 50]}})
    d.add("a", [1, 2], max_tokens=9, stop_token_ids=(50,))
    for _ in range(3):
        d.schedule()
    d.update()
    d.update()
    assert d.last("a").finish_reason is FinishReason.STOP
    assert d.scheduler.fail_step("lost", now=0.0) == []
    d.executor.collect()
    d.add("b", [1, 2, 7, 50, 3], max_tokens=1)
    assert d.step().new_requests[0].num_computed_tokens == 0


def test_a_fork_of_a_fork_of_a_failed_parent_starts_anew() -> None:
    d = Driver(max_model_len=32)
    prompt = [1, 2]
    d.add("a", prompt, max_tokens=4)
    d.add("b", prompt, fork_of="a", max_tokens=4)
    d.add("c", prompt, fork_of="b", max_tokens=4)
    steps = [d.schedule() for _ in range(3)]
    assert [len(step.block_copies) for step in steps] == [0, 1, 1]  # c copies a step after b
    d.executor.fail_requests = {"a": "bad"}
    for _ in range(3):
        d.update()
    d.run()
    for name in "bc":
        assert d.tokens[name] == d.alone(name)
