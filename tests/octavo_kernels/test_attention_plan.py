"""A plan shared by layers, and replayed for other batches, gives the bits of calls without one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from octavo_kernels import num_threads, set_num_threads
from octavo_kernels.paged_attention import (
    AttentionPlan,
    kv_cache_shapes,
    paged_attention,
    plan_attention,
)
from octavo_kernels.recording import Arena, Recording, recording
from octavo_kernels.rotary_kv_write import check_status, rotary_kv_write
from octavo_kernels.testing import same_bits

N, K, H, BLOCK, NUM_BLOCKS = 4, 2, 32, 16, 300
NUM_TOKENS, MAX_REQUESTS, WIDTH = 6, 5, 100


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = num_threads()
    yield
    set_num_threads(before)


class Step:
    """Buffers of one size for batches of NUM_TOKENS tokens, and two layers' caches."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        shapes = kv_cache_shapes(NUM_BLOCKS, block_size=BLOCK, num_kv_heads=K, head_dim=H)
        self.caches = [
            tuple(torch.randn(shape, generator=generator).to(torch.float16) for shape in shapes)
            for _ in range(2)
        ]
        self.q = torch.randn(NUM_TOKENS, N, H, generator=generator)
        self.tables = torch.full((MAX_REQUESTS, WIDTH), -1, dtype=torch.int32)
        self.starts = torch.full((MAX_REQUESTS + 1,), -1, dtype=torch.int32)
        self.lens = torch.full((MAX_REQUESTS,), -1, dtype=torch.int32)
        self.num_requests = torch.zeros(1, dtype=torch.int64)

    def fill(self, lengths: Sequence[tuple[int, int]]) -> None:
        """(query length, tokens present) of each request, in blocks that differ every time."""
        for buffer in (self.tables, self.starts, self.lens):
            buffer.fill_(-1)
        self.num_requests[0] = len(lengths)
        self.starts[0] = 0
        order = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(len(lengths)))
        for row, (query, present) in enumerate(lengths):
            self.starts[row + 1] = self.starts[row] + query
            self.lens[row] = present
            count = -(-present // BLOCK)
            self.tables[row, :count] = order[row * 40 : row * 40 + count].to(torch.int32)

    def plan(self, window: int = 0) -> AttentionPlan:
        return plan_attention(
            self.tables, self.starts, self.lens, num_tokens=NUM_TOKENS, num_heads=N,
            num_kv_heads=K, head_dim=H, block_size=BLOCK, num_blocks=NUM_BLOCKS,
            sliding_window=window, num_requests=self.num_requests,
        )  # fmt: skip

    def layers(self, plan: AttentionPlan, window: int = 0) -> list[Tensor]:
        return [
            paged_attention(
                self.q, k, v, block_tables=self.tables, query_start_loc=self.starts,
                seq_lens=self.lens, scale=0.25, sliding_window=window, plan=plan,
            )
            for k, v in self.caches
        ]  # fmt: skip

    def alone(self, window: int = 0) -> list[Tensor]:
        """The layers' results by calls that plan for themselves."""
        live = int(self.num_requests)
        return [
            paged_attention(
                self.q, k, v, block_tables=self.tables[:live],
                query_start_loc=self.starts[: live + 1], seq_lens=self.lens[:live], scale=0.25,
                sliding_window=window,
            )
            for k, v in self.caches
        ]  # fmt: skip


BATCHES: tuple[list[tuple[int, int]], ...] = (
    [(1, 9), (3, 70), (2, 2)],
    [(6, 1500)],
    [(1, 600), (1, 1), (0, 0), (3, 17), (1, 130)],
    [(5, 5), (1, 513)],
)


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("window", [0, 530])
def test_layers_share_a_plan(threads: int, window: int) -> None:
    set_num_threads(threads)
    for batch in BATCHES:
        step = Step()
        step.fill(batch)
        plan = step.plan(window)
        got = step.layers(plan, window)
        plan.check()
        assert all(map(same_bits, got, step.alone(window))), batch


def recorded(step: Step, window: int) -> tuple[Recording, AttentionPlan, list[Tensor]]:
    with recording(Arena(1 << 24)) as found:
        plan = step.plan(window)
        got = step.layers(plan, window)
    return found, plan, got


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("window", [0, 530])
def test_a_recorded_plan_divides_other_batches(threads: int, window: int) -> None:
    set_num_threads(threads)
    step = Step()
    step.fill(BATCHES[0])
    found, plan, got = recorded(step, window)
    for batch in (*BATCHES, *reversed(BATCHES)):  # split or not, one part or several
        step.fill(batch)
        for tensor in got:
            tensor.fill_(float("nan"))
        found.replay()
        plan.check()
        assert all(map(same_bits, got, step.alone(window))), batch


def test_a_replay_refuses_its_batch_alone() -> None:
    step = Step()
    step.fill(BATCHES[0])
    found, plan, got = recorded(step, 0)
    for change, message in (
        (lambda: step.lens.__setitem__(1, 1601), r"seq_lens\[1\] must .* at most 1600, got 1601"),
        (lambda: step.lens.__setitem__(1, 2), r"seq_lens\[1\] must be at least its query length"),
        (lambda: step.starts.__setitem__(3, 5), "ascend from 0 to 6"),
        (lambda: step.num_requests.fill_(2), "ascend from 0 to 6"),
        (lambda: step.num_requests.fill_(-7), "ascend from 0 to 6"),
        (lambda: step.num_requests.fill_(99), "ascend from 0 to 6"),
        (lambda: step.tables.__setitem__((1, 4), 300), "names block 300, allowed are 0 to 299"),
    ):
        step.fill(BATCHES[0])
        change()
        found.replay()
        with pytest.raises(ValueError, match=message):
            plan.check()
    step.fill(BATCHES[0])
    found.replay()
    plan.check()
    assert all(map(same_bits, got, step.alone()))


def test_a_plan_serves_its_own_tables_and_sizes() -> None:
    step = Step()
    step.fill(BATCHES[0])
    plan = step.plan()
    with pytest.raises(ValueError, match="the plan is for"):
        step.layers(plan, window=3)
    step.tables = step.tables.clone()
    with pytest.raises(ValueError, match="the plan is for"):
        step.layers(plan)
    with pytest.raises(ValueError, match="num_requests must be one int64"):
        step.num_requests = step.num_requests.int()
        step.plan()


@pytest.mark.parametrize(
    ("position", "slot", "message"),
    [(20, 3, "positions must be 0 to 19"), (1, NUM_BLOCKS * BLOCK, "slots must be below 4800")],
)
def test_a_status_is_shared_and_sticky(position: int, slot: int, message: str) -> None:
    step = Step()
    status = torch.zeros(1, dtype=torch.int64)
    positions, slots = (torch.tensor([3, i], dtype=torch.int32) for i in (position, slot))
    cos = torch.ones(20, H // 2)
    k, v = step.caches[0]

    def write(positions: Tensor, slots: Tensor, status: Tensor | None) -> None:
        rotary_kv_write(
            torch.zeros(2, (N + 2 * K) * H), num_heads=N, num_kv_heads=K, head_dim=H,
            positions=positions, cos=cos, sin=cos, slots=slots, k_cache=k, v_cache=v,
            status=status,
        )  # fmt: skip

    fitting = torch.arange(2)
    write(fitting, fitting, status)
    check_status(status, positions=fitting, slots=fitting, cos=cos, k_cache=k)
    write(positions, slots, status)
    write(fitting, fitting, status)
    with pytest.raises(ValueError, match=message):
        check_status(status, positions=positions, slots=slots, cos=cos, k_cache=k)
    with pytest.raises(ValueError, match=message):
        write(positions, slots, None)
