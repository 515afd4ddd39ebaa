"""Attention over a paged cache on a GPU: a row's bits in every setting, the plan, bad input."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo_kernels import device
from octavo_kernels.paged_attention import gpu, gpu_plan, numerics
from octavo_kernels.paged_attention.gpu_plan import AttentionPlan, make_plan
from octavo_kernels.testing import assert_canaries, gpu_device, guarded_empty, same_bits

DEVICE = gpu_device()


@pytest.fixture
def short_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partitions of two tiles, so that short requests have several."""
    monkeypatch.setattr(numerics, "PARTITION", 256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """One request's queries [S, N, H], keys and values [S, K, H]: what every step is cut from."""

    q: Tensor
    k: Tensor
    v: Tensor

    @staticmethod
    def make(length: int, *, N: int, K: int, H: int, seed: int, dtype: torch.dtype) -> History:
        generator = torch.Generator().manual_seed(seed)

        def normal(heads: int) -> Tensor:
            return torch.randn(length, heads, H, generator=generator).to(dtype)

        return History(q=normal(N), k=normal(K), v=normal(K))


def attend(
    steps: list[tuple[History, int, int]],
    *,
    block: int = 16,
    seed: int = 0,
    cache_dtype: torch.dtype | None = None,
    **options: Any,
) -> list[Tensor]:
    """Outputs of one step; each request computes tokens [first, last) of its history."""
    _, num_kv_heads, head_dim = steps[0][0].k.shape
    dtype = steps[0][0].k.dtype
    per_request = max(-(-last // block) for _, _, last in steps)
    num_blocks = per_request * len(steps) + 1
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed))
    tables = order[1:].reshape(len(steps), per_request).to(torch.int32)
    caches = []
    for name in ("k", "v"):
        cache = torch.full((num_blocks, num_kv_heads, block, head_dim), float("nan"), dtype=dtype)
        for row, (history, _, last) in enumerate(steps):
            for at in range(0, last, block):
                part = getattr(history, name)[at : min(at + block, last)]
                cache[tables[row, at // block], :, : len(part)] = part.transpose(0, 1)
        caches.append(cache.to(cache_dtype or dtype).to(DEVICE))
    for row, (_, _, last) in enumerate(steps):
        tables[row, -(-last // block) :] = -1
    counts = [last - first for _, first, last in steps]
    starts = torch.tensor([0, *counts]).cumsum(0)
    out = gpu.paged_attention(
        torch.cat([history.q[first:last] for history, first, last in steps]).to(DEVICE),
        caches[0],
        caches[1],
        block_tables=tables.to(DEVICE),
        query_start_loc=starts.to(DEVICE, torch.int32),
        seq_lens=torch.tensor([last for _, _, last in steps], dtype=torch.int32).to(DEVICE),
        scale=head_dim**-0.5,
        **options,
    )
    return list(out.split(counts))


def only_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_plan, "DECODE_ROWS", 0)


@pytest.mark.usefixtures("short_partitions")
@pytest.mark.parametrize(("window", "cache_dtype"), [(0, None), (150, None), (0, gpu.FP8)])
def test_decode_and_prefill_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, window: int, cache_dtype: torch.dtype | None
) -> None:
    history = History.make(300, N=2, K=1, H=32, seed=1, dtype=torch.bfloat16)
    sizes: dict[str, Any] = {"sliding_window": window, "cache_dtype": cache_dtype}
    decoded = attend([(history, 297, 300)], **sizes)
    only_prefill(monkeypatch)
    assert same_bits(attend([(history, 297, 300)], **sizes)[0], decoded[0])
    assert same_bits(attend([(history, 0, 300)], **sizes)[0][297:], decoded[0])


@pytest.mark.gpu
@pytest.mark.parametrize("H", [64, 96, 128, 256])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16, gpu.FP8])
def test_decode_and_prefill_give_the_same_bits_at_size(H: int, cache_dtype: torch.dtype) -> None:
    dtype = torch.float16 if cache_dtype == torch.float16 else torch.bfloat16
    history = History.make(2600, N=8, K=2, H=H, seed=5, dtype=dtype)
    for window in (0, 1500):
        sizes: dict[str, Any] = {"sliding_window": window, "cache_dtype": cache_dtype}
        prompt = attend([(history, 0, 2600)], **sizes)[0]
        for first in (2599, 2584):  # 1 token and 16: the most that are decoded
            assert same_bits(attend([(history, first, 2600)], **sizes)[0], prompt[first:]), window


@pytest.mark.usefixtures("short_partitions")
def test_a_row_has_the_same_bits_in_every_batch_chunk_and_block_size() -> None:
    one, other = (History.make(n, N=3, K=1, H=48, seed=n, dtype=torch.float16) for n in (270, 40))
    alone = attend([(one, 268, 270)])[0]
    for block in (64, 128):
        got = attend([(one, 268, 270)], block=block, seed=block)[0]
        assert same_bits(got, alone)
    batch = attend([(other, 39, 40), (other, 0, 40), (one, 269, 270), (other, 38, 40)])
    assert same_bits(batch[2], alone[1:])
    assert same_bits(batch[0], batch[3][1:])
    assert same_bits(batch[0], batch[1][39:])


@pytest.mark.usefixtures("short_partitions")
def test_launch_choices_decide_no_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    history = History.make(600, N=4, K=2, H=32, seed=3, dtype=torch.bfloat16)
    step = [(history, 599, 600), (history, 99, 100)]
    sinks = torch.randn(4).to(DEVICE)
    want = attend(step, sinks=sinks)
    for per_sm, fused, keep_q in ((1, 0, 0), (3, 0, 1), (3, 1, 0)):
        choice = {"per_sm": per_sm, "stages": 2, "fused": fused, "keep_q": keep_q}
        for module in (gpu, gpu_plan):
            monkeypatch.setattr(module, "decode_choice", lambda *_, choice=choice: choice)
        got = attend(step, sinks=sinks)
        assert all(map(same_bits, got, want)), choice
    monkeypatch.setattr(gpu_plan, "_MAX_PARTIAL_ROWS", 5)  # no room: prefilled
    assert all(map(same_bits, attend(step, sinks=sinks), want))


def test_arrivals_are_zero_again_for_the_next_layer() -> None:
    history = History.make(1100, N=1, K=1, H=16, seed=4, dtype=torch.bfloat16)
    plans = []

    def keep(*args: Any, **sizes: Any) -> AttentionPlan:
        plans.append(make_plan(*args, **sizes))
        return plans[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "make_plan", keep)
        first = attend([(history, 1099, 1100)])[0]
    assert plans[0].is_split and not plans[0].arrivals.any()
    plans[0].partials.fill_(float("nan"))
    assert same_bits(attend([(history, 1099, 1100)], plan=plans[0])[0], first)


def tensors(pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    starts = torch.tensor([0] + [query for query, _ in pairs]).cumsum(0)
    seq_lens = torch.tensor([present for _, present in pairs], dtype=torch.int32)
    return starts.to(DEVICE, torch.int32), seq_lens.to(DEVICE)


def plan_for(pairs: list[tuple[int, int]], **sizes: Any) -> AttentionPlan:
    given = {
        "num_tokens": sum(query for query, _ in pairs),
        "max_query_len": max([query for query, _ in pairs], default=0),
        "max_seq_len": max([present for _, present in pairs], default=0),
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 64,
        "cache_dtype": torch.bfloat16,
    }
    return make_plan(*tensors(pairs), **(given | sizes))


def units(plan: AttentionPlan) -> list[list[tuple[int, int, int, int]]]:
    """(request, kv head, partition, tiles) that each program computes, as `decode` walks them."""
    tile = numerics.tile_size(plan.head_dim)
    per = plan.partition // tile
    rows = plan.requests[: int(plan.num_decoded)].tolist()
    starts = plan.programs.tolist()
    found = []
    for (row, head, part, before), (_, _, _, after) in zip(starts, starts[1:], strict=False):
        mine, left = [], after - before
        while left > 0:
            request, _, query_len, seq_len, _, own, end, _ = rows[row]
            part = own if part < 0 else part
            oldest = max(0, seq_len - query_len - plan.sliding_window + 1)
            lowest = min(oldest, seq_len - 1) // tile if plan.sliding_window else 0
            tiles = min(-(-seq_len // tile), (part + 1) * per) - max(lowest, part * per)
            mine.append((request, head, part, max(tiles, 1)))
            left -= max(tiles, 1)
            part += 1
            if part == end:
                head, part = head + 1, -1
            if head == plan.num_kv_heads:
                row, head = row + 1, 0
        assert left == 0
        found.append(mine)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_programs_share_all_units_evenly(seed: int) -> None:
    chance = random.Random(seed)
    pairs = []
    for _ in range(chance.choice([1, 3, 70])):
        query = chance.choice([0, 1, 1, 1, 2, 5, 30])
        pairs.append((query, query + chance.choice([0, 3, 500, 1024, 5000])))
    window = chance.choice([0, 0, 700])
    plan = plan_for(pairs, sliding_window=window)
    decoded = [(r, q, n) for r, (q, n) in enumerate(pairs) if 0 < q * 3 <= 64]
    want = []
    for request, query, present in decoded:
        first = max(0, present - query - window + 1) // 1024 if window else 0
        parts = range(first, max(-(-present // 1024), first + 1))
        want += [(request, head, part) for head in range(2) for part in parts]
    programs = units(plan)
    assert [unit[:3] for mine in programs for unit in mine] == want
    costs = [sum(unit[3] + 1 for unit in mine) for mine in programs]
    assert max(costs, default=0) <= sum(costs) / max(len(costs), 1) + 9
    listed = plan.requests[: len(decoded)].tolist()
    assert [(row[0], row[2], row[3]) for row in listed] == decoded
    begins = [row[7] for row in listed if row[6] - row[4] > 1]
    sizes = [(row[6] - row[4]) * row[2] * 6 for row in listed if row[6] - row[4] > 1]
    assert begins == [sum(sizes[:i]) for i in range(len(sizes))]
    assert sum(sizes) <= plan.partials.shape[0] or not sizes


@pytest.mark.parametrize("seed", range(4))
def test_tiles_cover_the_prefilled_requests_longest_first(seed: int) -> None:
    chance = random.Random(seed)
    queries = [chance.choice([0, 1, 22, 43, 128, 300, 999]) for _ in range(chance.choice([2, 70]))]
    pairs = [(query, query + chance.choice([0, 0, 77, 900])) for query in queries]
    plan = plan_for(pairs)
    got = plan.tiles[: int(plan.num_tiles)].tolist()
    want = [
        (-(present - query + min(first + plan.block_q, query)), request, first)
        for request, (query, present) in enumerate(pairs)
        if query * 3 > 64
        for first in range(0, query, plan.block_q)
    ]
    assert got == [[request, first] for _, request, first in sorted(want)]


def test_requests_without_room_for_partials_are_prefilled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_plan, "_MAX_PARTIAL_ROWS", 40)
    plan = plan_for([(1, 5000), (1, 2000), (2, 100), (1, 3000)])
    assert plan.requests[: int(plan.num_decoded), 0].tolist() == [0, 2]
    assert plan.tiles[: int(plan.num_tiles), 0].tolist() == [3, 1]
    assert plan_for([(1, 100)] * 3).tiles.shape[0] == 0
    assert plan_for([(1, 1000)] * 3, max_seq_len=4096).tiles.shape[0] > 0
    assert plan_for([(1, 1000)] * 3, max_seq_len=4096, max_partitions=6).tiles.shape[0] == 0


def test_a_gpu_of_little_shared_memory_decodes_by_two_stages() -> None:
    for head_dim in (64, 96, 128, 256):
        with device.pretending((8, 9)):
            choice = gpu_plan.decode_choice.__wrapped__(head_dim, torch.bfloat16)
            most = device.shared_bytes()
        # One tile of K and one of V on their way, and the queries.
        width = gpu_plan.padded(head_dim)
        tiles = (choice["stages"] - 1) * 2 * numerics.tile_size(head_dim)
        assert 2 * width * (tiles + gpu_plan.DECODE_ROWS) <= most == 99 * 1024


def test_shared_partitions_are_left_to_another_kernel() -> None:
    shared = torch.tensor([2, 9, 0], dtype=torch.int32, device=DEVICE)
    plan = plan_for([(1, 5000), (1, 2049), (1, 10)], shared_partitions=shared)
    assert plan.requests[:, 4:7].tolist() == [[0, 2, 5], [0, 2, 3], [0, 0, 1]]
    parts = [unit[:3] for mine in units(plan) for unit in mine]
    assert parts[:3] == [(0, 0, 2), (0, 0, 3), (0, 0, 4)] and parts[6] == (1, 0, 2)


def test_wrong_numbers_stay_in_bounds() -> None:
    starts = torch.tensor([5, 90, 3, 700, 2], dtype=torch.int32, device=DEVICE)
    seq_lens = torch.tensor([-4, 1 << 30, 6, 2000], dtype=torch.int32, device=DEVICE)
    plan = make_plan(
        starts, seq_lens, num_tokens=8, max_query_len=8, max_seq_len=64, num_heads=2,
        num_kv_heads=1, head_dim=16, cache_dtype=torch.float32,
    )  # fmt: skip
    rows = plan.requests[: int(plan.num_decoded)]
    assert bool((rows[:, 1] + rows[:, 2] <= 8).all()) and bool((rows[:, 3] <= 64).all())
    cache = torch.randn(4, 1, 16, 16, device=DEVICE)
    tables = torch.full((4, 4), 99, dtype=torch.int32, device=DEVICE)
    out = gpu.paged_attention(
        torch.randn(8, 2, 16, device=DEVICE), cache, cache, block_tables=tables,
        query_start_loc=starts, seq_lens=seq_lens, scale=1.0, plan=plan,
    )  # fmt: skip
    assert out.shape == (8, 32)


@pytest.mark.parametrize("num_heads", [2, 32])  # decoded, prefilled
def test_wrong_starts_write_nothing_outside(num_heads: int) -> None:
    starts = torch.tensor([5, 90], dtype=torch.int32, device=DEVICE)
    seq_lens = torch.tensor([1 << 30], dtype=torch.int32, device=DEVICE)
    cache = torch.randn(4, 1, 16, 64, device=DEVICE).to(torch.bfloat16)
    tables = torch.full((1, 4), 99, dtype=torch.int32, device=DEVICE)
    q, _ = guarded_empty((8, num_heads, 64), torch.bfloat16, DEVICE)
    out, store = guarded_empty((8, num_heads, 64), torch.bfloat16, DEVICE)
    gpu.paged_attention(
        q, cache, cache, block_tables=tables, query_start_loc=starts, seq_lens=seq_lens,
        scale=1.0, out=out,
    )  # fmt: skip
    assert_canaries(store, "out")


def call(**changes: Any) -> None:
    cache = torch.zeros(3, 2, 16, 32, device=DEVICE)
    starts, seq_lens = tensors([(1, 5), (2, 2)])
    given = {
        "q": torch.zeros(3, 4, 32, device=DEVICE),
        "k_cache": cache,
        "v_cache": cache,
        "block_tables": torch.zeros(2, 1, dtype=torch.int32, device=DEVICE),
        "query_start_loc": starts,
        "seq_lens": seq_lens,
        "scale": 1.0,
    }
    gpu.paged_attention(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(3, 4, 24)}, "head_dim must be a multiple of 16"),
        ({"q": torch.zeros(3, 3, 32)}, "query heads must be a multiple of 2, got 3"),
        ({"q": torch.zeros(3, 4, 32, dtype=torch.float64)}, "q must be one of"),
        ({"q": torch.zeros(3, 4, 64, device=DEVICE)[:, :, :32]}, "q must have dense heads"),
        ({"v_cache": torch.zeros(3, 2, 32, 16)}, r"caches must be \(3, 2, 16, 32\)"),
        ({"k_cache": torch.zeros(3, 2, 24, 32)}, "block_size must be one of"),
        ({"q": torch.zeros(3, 4, 32).half()}, "caches of q torch.float16 must be one of"),
        ({"block_tables": torch.zeros(2, 1)}, "block_tables must be int32"),
        ({"block_tables": torch.zeros(3, 1, dtype=torch.int32)}, "3 block tables need as many"),
        ({"query_start_loc": torch.zeros(2, dtype=torch.int32)}, "must agree"),
        ({"seq_lens": torch.zeros(2)}, "seq_lens must be contiguous int32"),
        ({"sliding_window": -1}, "must be at least 0"),
        ({"soft_cap": -1.0}, "soft_cap must be at least 0"),
        ({"sinks": torch.zeros(2)}, "sinks must be contiguous float32 of 4 heads"),
        ({"rel_bias": torch.zeros(4, 4)}, "2 \\* span - 1 columns"),
        ({"k_scale": torch.ones(2)}, "need a torch.float8_e4m3fn cache"),
        ({"out": torch.zeros(3, 64)}, r"out must be contiguous torch.float32 \[3, 128\]"),
        ({"plan": "other"}, "the plan is for"),
    ],
)
def test_bad_input_is_refused(changes: dict[str, Any], message: str) -> None:
    if changes.get("plan") == "other":
        changes = {"plan": plan_for([(1, 5), (2, 2)])}
    moved = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=message):
        call(**moved)


COMPILE = """
import torch
from octavo_kernels.launch import collecting, compiling_for, resources
from octavo_kernels.paged_attention import gpu

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

with collecting() as found:
    cache = empty(8, 2, 16, 64)
    gpu.paged_attention(
        empty(4, 8, 64), cache, cache, block_tables=empty(4, 200, dtype=torch.int32),
        query_start_loc=empty(5, dtype=torch.int32), seq_lens=empty(4, dtype=torch.int32),
        scale=1.0, max_query_len=1,
    )
assert [launch.name for launch in found] == ["divide", "decode"], found
with compiling_for(90):
    compiled = [launch.compile() for launch in found]
assert all(resources(one).stack == 0 for one in compiled)
assert resources(compiled[1]).wgmma > 0
assert "cp.async.cg" in compiled[1].asm["ptx"], "the loop is not pipelined"
# A product whose registers are touched too early is waited for instruction by instruction.
waits = compiled[1].asm["ttgir"].count("warp_group_dot_wait")
assert waits == compiled[1].asm["ttgir"].count("ttng.warp_group_dot "), "no wait in the loop"
"""


def test_decode_compiles_for_hopper_pipelined_and_without_spills() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
