"""Preemption: who has to go, what comes back."""

from __future__ import annotations

from octavo.types import FinishReason
from tests.scheduler.driver import Driver


def test_the_victim_loses_least_and_comes_back_first() -> None:
    d = Driver(num_blocks=6, caching=False, max_model_len=24)
    d.add("old", 8, max_tokens=12)
    d.add("short", 3, max_tokens=9)
    d.add("long", 7, max_tokens=9)
    d.add("waiting", 3, max_tokens=2)
    d.step()
    second = d.step()  # old's third block is there, then short and long fill theirs
    assert list(second.num_scheduled_tokens) == ["old", "short", "long"]
    third = d.step()
    assert third.finished_request_ids == ("short",)
    assert list(third.num_scheduled_tokens) == ["old", "long"]
    d.run()
    back = {name: d.last(name).times for name in d.requests}
    assert back["short"] is not None and back["short"].num_preemptions >= 1
    assert back["old"] is not None and back["old"].num_preemptions == 0
    assert all(d.tokens[name] == d.alone(name) for name in d.requests)


def test_a_victim_already_in_the_step_is_taken_out_of_it() -> None:
    d = Driver(num_blocks=4, caching=False, max_model_len=16)
    d.add("old", 6, max_tokens=9)
    d.add("small", 1, max_tokens=9)
    d.add("grows", 4, max_tokens=9)
    d.step()
    step = d.step()
    assert step.finished_request_ids == ("small",)
    assert list(step.num_scheduled_tokens) == ["old", "grows"]
    d.run()
    assert all(d.tokens[name] == d.alone(name) for name in d.requests)


def test_under_priority_the_worst_is_the_victim() -> None:
    d = Driver(num_blocks=4, caching=False, max_model_len=16, scheduling_policy="priority")
    d.add("worst", 7, priority=2, max_tokens=6)
    d.add("best", 7, priority=0, max_tokens=6)
    d.step()
    d.step()
    third = d.step()
    assert third.finished_request_ids == ("worst",)
    assert list(third.num_scheduled_tokens) == ["best"]


def test_a_victim_gets_its_token_in_flight_and_resumes_with_it() -> None:
    d = Driver(num_blocks=4, caching=False, max_model_len=16)
    d.add("old", 7, max_tokens=8)
    d.add("new", 7, max_tokens=8)
    d.schedule()
    d.schedule()
    third = d.schedule()
    assert third.finished_request_ids == ("new",)
    for _ in range(3):
        d.update()
    assert d.tokens["new"] == d.alone("new")[:2]
    while "new" not in (step := d.step()).num_scheduled_tokens:
        pass
    (resumed,) = step.new_requests
    assert resumed.token_ids == d.requests["new"].prompt_token_ids + tuple(d.alone("new")[:2])
    assert resumed.num_prompt_tokens == 7
    d.run()
    assert d.tokens["new"] == d.alone("new")


def test_a_token_in_flight_may_end_a_preempted_request() -> None:
    d = Driver(
        num_blocks=4, caching=False, max_model_len=16, executor={"scripts": {"new": [1, 50]}}
    )
    d.add("old", 7, max_tokens=8)
    d.add("new", 7, max_tokens=8, stop_token_ids=(50,))
    for _ in range(3):
        d.schedule()
    for _ in range(3):
        d.update()
    assert d.last("new").finish_reason is FinishReason.STOP
    d.run()
    assert d.tokens["new"] == [1, 50]
