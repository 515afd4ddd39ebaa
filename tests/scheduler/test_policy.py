"""The order of waiting requests and the choice of victims."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.kvcache.manager import BlockTable
from octavo.scheduler.policy import FcfsPolicy, PriorityPolicy, WaitingQueue, make_policy
from octavo.scheduler.request import Request, Status
from octavo.types import EngineRequest, SamplingParams


def make_request(
    order: int, *, priority: int = 0, arrival: float = 0.0, computed: int = 0, registered: int = 0
) -> Request:
    request = Request(
        EngineRequest(
            request_id=f"r{order}",
            prompt_token_ids=(1, 2, 3),
            params=SamplingParams(),
            arrival_time=arrival,
            priority=priority,
        ),
        order=order,
        max_model_len=99,
        table=BlockTable(root=b"", keys=[]),
        parent=None,
        now=0.0,
    )
    request.num_computed = computed
    request.table.num_registered = registered
    return request


def test_fcfs_victim_has_the_least_to_compute_again() -> None:
    policy = FcfsPolicy()
    oldest = make_request(1, computed=1)
    cached = make_request(2, computed=41, registered=10)
    short = make_request(3, computed=3)
    assert policy.victim([oldest, cached, short]) is short
    assert policy.victim([oldest, cached]) is cached
    assert policy.victim([oldest]) is oldest


def test_fcfs_ties_go_against_the_latest() -> None:
    policy = FcfsPolicy()
    requests = [make_request(order, computed=5) for order in (3, 1, 2)]
    assert policy.victim(requests) is requests[0]


def test_priority_victim_is_the_last_in_line() -> None:
    policy = PriorityPolicy()
    good = make_request(3, priority=0, arrival=9.0)
    early, late = (make_request(o, priority=1, arrival=float(o)) for o in (1, 2))
    assert policy.victim([early, good, late]) is late
    assert policy.victim([early, good]) is early


def test_fcfs_puts_the_preempted_first() -> None:
    queue = WaitingQueue(FcfsPolicy().key)
    requests = [make_request(order) for order in (1, 2, 3, 4)]
    requests[3].status = requests[2].status = Status.PREEMPTED
    for request in requests:
        queue.add(request)
    assert [request.order for request in queue] == [3, 4, 1, 2]


@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(0, 9)), max_size=20), st.data())
def test_queue_is_sorted_whatever_comes_and_goes(
    entries: list[tuple[int, float]], data: st.DataObject
) -> None:
    policy = PriorityPolicy()
    queue = WaitingQueue(policy.key)
    kept: list[Request] = []
    for order, (priority, arrival) in enumerate(entries):
        request = make_request(order, priority=priority, arrival=arrival)
        queue.add(request)
        kept.append(request)
        if data.draw(st.booleans()):
            queue.remove(kept.pop(data.draw(st.integers(0, len(kept) - 1))))
    kept.sort(key=policy.key)
    assert list(queue) == kept
    cut = data.draw(st.integers(0, len(kept)))
    queue.drop_first(cut, keep=kept[:cut][::2])
    assert list(queue) == kept[:cut][::2] + kept[cut:]
    assert len(queue) == len(kept[:cut][::2]) + len(kept) - cut


def test_unknown_policy_is_named() -> None:
    with pytest.raises(ValueError, match="'fcfs' or 'priority', got 'lifo'"):
        make_policy("lifo")  # type: ignore[arg-type]
