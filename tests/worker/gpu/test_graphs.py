"""Which graph a step gets, what is captured when, and what a capture does to the buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from octavo.config import SchedulerConfig
from octavo.types import WorkerStats
from octavo.worker.gpu.buffers import BatchWords, StepBuffers, StepSizes
from octavo.worker.gpu.graphs import ForwardKey, GraphKey, GraphSizes, SamplingKey, StepGraphs
from octavo.worker.gpu.runtime import HostRuntime

_SIZES = StepSizes(
    max_num_seqs=8,
    max_num_tokens=32,
    max_model_len=64,
    block_size=16,
    num_blocks=4,
    hidden_size=8,
    vocab_size=16,
    dtype=torch.float32,
)


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class _Work:
    """Counts what is done per key; a piece of work takes a second."""

    def __init__(self, clock: _Clock) -> None:
        self.done: list[GraphKey] = []
        self._clock = clock

    def of(self, key: GraphKey) -> Callable[[], None]:
        def work() -> None:
            self.done.append(key)
            self._clock.now += 1

        return work


def _graphs(sizes: GraphSizes) -> tuple[StepGraphs, _Work, _Clock, StepBuffers]:
    clock = _Clock()
    buffers = StepBuffers.create(
        _SIZES, num_words=BatchWords.num_words(8), device=torch.device("cpu")
    )
    graphs = StepGraphs(HostRuntime(), sizes=sizes, buffers=buffers, now=clock)
    work = _Work(clock)
    graphs.bind(work.of)
    return graphs, work, clock, buffers


def test_steps_of_drafts_have_their_own_sizes() -> None:
    sizes = GraphSizes.of([1, 2, 4, 8, 12, 16, 20, 24, 32], 8, 32, max_drafts=4)
    assert sizes.decode == (1, 2, 4, 8) and sizes.sampling == (1, 2, 4, 8, 12, 16, 20, 24, 32)
    assert sizes.drafting == (2, 4, 5, 8, 12, 16, 24, 32)
    assert sizes.depths == (1, 4)
    assert GraphSizes.of([1], 8, 32, max_drafts=7).depths == (1, 3, 7)
    assert GraphSizes.of([1], 8, 32, max_drafts=8).depths == (1, 3, 8)
    assert GraphSizes.of([1], 8, 32, max_drafts=1).depths == (1,)
    assert GraphSizes.of([1, 2], 8, 32).depths == GraphSizes.of([1, 2], 8, 32).drafting == ()
    keys = [key for key in sizes.late_keys() if key.num_drafts]
    assert len(keys) == 8 + 6 and ForwardKey(5, True, num_drafts=4) in keys
    assert all(key.max_query_len == 1 + key.num_drafts for key in keys)
    wide = SchedulerConfig(
        max_num_seqs=256, speculative_config='{"method": "ngram", "num_speculative_tokens": 3}'
    )
    found = GraphSizes.configured(wide, max_num_tokens=8192)
    assert found.sampling[-1] == found.drafting[-1] == 512 and found.decode[-1] == 256
    assert found.max_drafts == 3


def test_graphs_of_drafts_are_captured_when_they_are_asked_for() -> None:
    sizes = GraphSizes(decode=(1, 4), sampling=(1,), max_drafts=4, drafting=(2, 5, 8, 16))
    graphs, work, _, _ = _graphs(sizes)
    while graphs.capture_one():
        pass
    assert all(not isinstance(key, ForwardKey) or not key.num_drafts for key in work.done)

    def key(num_tokens: int, num_drafts: int) -> ForwardKey | None:
        return graphs.forward_key(
            num_tokens=num_tokens, num_requests=1, is_decode=False, num_drafts=num_drafts
        )

    assert key(5, 4) is None and key(3, 2) is None and graphs.num_missing == 1  # 5 tokens, both
    assert key(8, 1) is None and graphs.num_missing == 2
    while graphs.capture_one():
        pass
    assert key(5, 4) == key(5, 3) == key(3, 2) == ForwardKey(5, True, num_drafts=4)
    assert key(8, 1) == key(7, 1) == ForwardKey(8, True, num_drafts=1)
    assert key(6, 4) is None  # 8 tokens of five
    assert key(17, 4) is None  # larger than any


def _decode(graphs: StepGraphs, num_tokens: int) -> ForwardKey | None:
    return graphs.forward_key(num_tokens=num_tokens, num_requests=num_tokens, is_decode=True)


def test_default_sizes_are_fine_where_steps_are_small() -> None:
    sizes = GraphSizes.default(max_num_seqs=256, max_num_tokens=8192)
    assert sizes.decode == (1, 2, 4, *range(8, 64, 8), *range(64, 257, 16))
    assert sizes.sampling == sizes.decode
    assert sizes.mixed == (*range(8, 64, 8), *range(64, 256, 16), *range(256, 513, 32))
    assert len(sizes.keys()) == len(set(sizes.keys())) == 2 * len(sizes.decode) + len(sizes.mixed)


def test_a_full_batch_has_a_graph_of_its_own_size() -> None:
    sizes = GraphSizes.default(max_num_seqs=100, max_num_tokens=300)
    assert sizes.decode[-2:] == (96, 100)
    assert sizes.mixed[-1] == 288
    assert GraphSizes.default(max_num_seqs=100, max_num_tokens=300, largest=50).decode[-1] == 50


def test_sizes_asked_for_are_cut_to_what_steps_can_have() -> None:
    sizes = GraphSizes.of([4, 1000, 1, 16, 4], 8, 32)
    assert sizes == GraphSizes(decode=(1, 4, 8), mixed=(16,), sampling=(1, 4, 8))
    assert GraphSizes.of([1, 2], 8, 32) == GraphSizes(decode=(1, 2), sampling=(1, 2))


def test_sizes_are_what_the_user_wants() -> None:
    def sizes(**options: Any) -> GraphSizes:
        config = SchedulerConfig(max_num_seqs=16, **options)
        return GraphSizes.configured(config, max_num_tokens=64)

    assert sizes() == GraphSizes.default(max_num_seqs=16, max_num_tokens=64)
    assert sizes(enforce_eager=True) == GraphSizes()
    assert sizes(cudagraph_capture_sizes=(2, 4)).decode == (2, 4)
    assert sizes(max_cudagraph_capture_size=4).decode == (1, 2, 4)


def test_without_sizes_everything_runs_as_it_comes() -> None:
    graphs, work, _, _ = _graphs(GraphSizes())
    assert _decode(graphs, 1) is None
    assert graphs.sampling_key(1) is None
    assert not graphs.after_launch()
    assert not graphs.capture_one()
    assert not work.done


def test_a_batch_is_padded_to_the_nearest_captured_graph() -> None:
    graphs, work, _, _ = _graphs(GraphSizes(decode=(1, 4, 8, 32), mixed=(8,), sampling=(2, 8)))
    assert _decode(graphs, 3) is None
    while graphs.capture_one():
        pass
    assert graphs.num_missing == 0
    assert _decode(graphs, 3) == ForwardKey(4, True)
    assert _decode(graphs, 32) == ForwardKey(32, True)
    assert _decode(graphs, 33) is None
    key = graphs.forward_key(num_tokens=7, num_requests=2, is_decode=False)
    assert key == ForwardKey(8, False)
    assert key.max_query_len == 8
    assert (key.num_requests(4), key.num_requests(100)) == (4, 8)
    assert graphs.sampling_key(1) == SamplingKey(2)
    work.done.clear()
    graphs.replay(key)
    assert work.done == [key]
    assert graphs.take_stats() == WorkerStats(graph_steps=3, eager_steps=2, graphs_captured=7)
    assert graphs.take_stats() == WorkerStats()
    assert _decode(graphs, 3) is not None
    graphs.mark_ready()
    assert graphs.take_stats() == WorkerStats()


def test_a_graph_far_too_large_is_not_used() -> None:
    graphs, _, _, _ = _graphs(GraphSizes(decode=(1, 4, 8, 32)))
    _decode(graphs, 32)  # asked for last, so captured first
    assert graphs.capture_one()
    assert _decode(graphs, 20) == ForwardKey(32, True)
    assert _decode(graphs, 2) is None
    _decode(graphs, 8)
    assert graphs.capture_one()
    assert _decode(graphs, 3) == ForwardKey(8, True)  # twice 4


def test_what_steps_asked_for_last_is_captured_first() -> None:
    graphs, work, _, _ = _graphs(GraphSizes(decode=(1, 4, 8), sampling=(1, 8), mixed=(16,)))
    _decode(graphs, 6)
    graphs.sampling_key(5)
    graphs.forward_key(num_tokens=12, num_requests=2, is_decode=False)
    _decode(graphs, 6)
    while graphs.capture_one():
        pass
    # Each once outside the capture; a graph of the host's runtime is not run by its capture.
    assert work.done == [
        ForwardKey(8, True),
        ForwardKey(16, False),
        SamplingKey(8),
        SamplingKey(1),
        ForwardKey(1, True),
        ForwardKey(4, True),
    ]


def test_captures_between_steps_take_a_share_of_the_host() -> None:
    graphs, work, clock, _ = _graphs(GraphSizes(decode=(1, 2, 4, 8)))
    assert graphs.after_launch()
    assert not graphs.after_launch()
    clock.now += 1.5  # more than the second it took: enough for what a step asks for
    assert not graphs.after_launch()
    assert _decode(graphs, 7) is None
    assert graphs.after_launch()
    assert work.done == [ForwardKey(1, True), ForwardKey(8, True)]
    clock.now += 8
    assert not graphs.after_launch()
    clock.now += 1
    assert graphs.after_launch()
    assert graphs.capture_one()  # when idle at once
    assert graphs.num_missing == 0
    clock.now += 100
    assert not graphs.after_launch()


def test_a_capture_runs_on_a_batch_of_padding() -> None:
    graphs, _, _, buffers = _graphs(GraphSizes(decode=(2,)))
    buffers.words.fill_(5)
    seen: list[BatchWords] = []
    graphs.bind(lambda key: lambda: seen.append(buffers.batch))
    assert graphs.capture_one()
    (batch,) = seen
    assert (batch.rows == -1).all()
    assert (batch.sample_rows == -1).all()
    for zeros in (batch.query_start_loc, batch.seq_lens, batch.sample_tokens):
        assert not zeros.any()


def test_compiles_are_counted_from_ready_on(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [5]
    monkeypatch.setattr("octavo.worker.gpu.graphs.num_compiled", lambda: made[0])
    graphs, _, _, _ = _graphs(GraphSizes())
    made[0] = 7
    graphs.mark_ready()
    assert graphs.take_stats() == WorkerStats()
    made[0] = 10
    assert graphs.take_stats() == WorkerStats(kernel_compiles=3)
    assert graphs.take_stats() == WorkerStats()


def test_more_requests_than_tokens_is_a_mistake() -> None:
    graphs, _, _, _ = _graphs(GraphSizes(decode=(2,)))
    with pytest.raises(AssertionError):
        graphs.forward_key(num_tokens=1, num_requests=2, is_decode=True)


def test_no_capture_follows_one_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's allocator then takes the capture for one that still goes on."""
    sizes = GraphSizes(decode=(1, 2, 4, 8), mixed=(), sampling=(1,))
    graphs, work, clock, _ = _graphs(sizes)
    assert graphs.capture_one()
    num_done = graphs.take_stats().graphs_captured

    def fail(*_: object) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(HostRuntime, "capture", fail)
    with pytest.raises(RuntimeError, match="during capture"):
        graphs.capture_one()
    clock.now += 100
    for size in (1, 2, 4, 8):
        graphs.forward_key(
            num_tokens=size, num_requests=size, is_decode=True, shares_prefixes=size > 1
        )
    tried = len(work.done)
    assert num_done == 1 and graphs.num_missing == 0
    assert not graphs.capture_one() and not graphs.after_launch()
    assert len(work.done) == tried
