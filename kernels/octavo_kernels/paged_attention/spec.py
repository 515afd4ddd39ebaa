"""What tests and benchmarks need to know of paged_attention; runs nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from octavo_kernels.op import Case, OpSpec, Tol
from octavo_kernels.paged_attention import (
    kv_cache_shapes,
    paged_attention,
    paged_attention_reference,
)


def _lengths(case: Case) -> list[tuple[int, int]]:
    """(query length, tokens present) of each request: "4/20 0/0" reads as two requests."""
    pairs = [pair.split("/") for pair in str(case.batch).split()]
    return [(int(query), int(present)) for query, present in pairs]


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    lengths = _lengths(case)
    per_request = max([-(-present // case.block) for _, present in lengths], default=0)
    num_blocks = len(lengths) * per_request + 2
    shapes = kv_cache_shapes(
        num_blocks, block_size=case.block, num_kv_heads=case.K, head_dim=case.H
    )
    order = torch.randperm(num_blocks, generator=generator)[: len(lengths) * per_request]
    tables = order.reshape(len(lengths), per_request).to(torch.int32)
    caches = [torch.randn(*s, generator=generator) for s in shapes]
    free = torch.ones(num_blocks, case.block, dtype=torch.bool)
    for row, (_, present) in enumerate(lengths):
        for block, left in zip(tables[row], range(present, 0, -case.block), strict=False):
            free[block, : min(left, case.block)] = False
        # entries past a request's last block are never followed
        tables[row, -(-present // case.block) :] = -1
    # What no request wrote may hold anything.
    caches[0].transpose(2, 3).transpose(1, 2)[free] = float("nan")
    caches[1].transpose(1, 2)[free] = float("nan")
    starts = torch.tensor([0] + [query for query, _ in lengths]).cumsum(0)
    return {
        "q": torch.randn(int(starts[-1]), case.N, case.H, generator=generator).to(device),
        "k_cache": caches[0].to(device, dtype),
        "v_cache": caches[1].to(device, dtype),
        "block_tables": tables.to(device),
        "query_start_loc": starts.to(device, torch.int32),
        "seq_lens": torch.tensor([p for _, p in lengths], dtype=torch.int32).to(device),
        "scale": case.H**-0.5,
        "sliding_window": case.window,
    }


def _case(
    name: str, batch: str, *, N: int, K: int, H: int, block: int = 16, window: int = 0
) -> Case:
    return Case(name, batch=batch, N=N, K=K, H=H, block=block, window=window)


def _pairs(case: Case) -> int:
    """(query, key) pairs that are seen."""
    total = 0
    for query, present in _lengths(case):
        for position in range(present - query, present):
            total += min(position + 1, case.window) if case.window else position + 1
    return total


def _bytes(case: Case, itemsize: int) -> float:
    keys = sum(min(p, q + case.window) if case.window else p for q, p in _lengths(case))
    tokens = sum(query for query, _ in _lengths(case))
    return float(2 * keys * case.K * case.H * itemsize + 8 * tokens * case.N * case.H)


def _sdpa(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, scale: float, **tables: Any
) -> Tensor | None:
    """torch's attention for whole prompts in blocks of one length, gathered ahead; else nothing."""
    starts, seq_lens = tables["query_start_loc"], tables["seq_lens"]
    outs = []
    for row, table in enumerate(tables["block_tables"].long()):
        count = int(seq_lens[row])
        k = k_cache[table].permute(1, 0, 3, 2).reshape(k_cache.shape[1], -1, q.shape[2])
        v = v_cache[table].permute(1, 0, 2, 3).reshape(k_cache.shape[1], -1, q.shape[2])
        part = q[int(starts[row]) : int(starts[row + 1])].transpose(0, 1)
        out = torch.nn.functional.scaled_dot_product_attention(
            part[None].to(k.dtype),
            k[None, :, :count],
            v[None, :, :count],
            is_causal=part.shape[1] == count,
            scale=scale,
            enable_gqa=True,
        )
        outs.append(out[0].transpose(0, 1).flatten(1))
    return torch.cat(outs)


_SMOL = {"N": 9, "K": 3, "H": 64}

SPEC = OpSpec(
    name="paged_attention",
    op=paged_attention,
    reference=paged_attention_reference,
    cases=(
        _case("no_request", "", N=2, K=1, H=16),
        _case("empty_requests", "0/0 0/5 0/0", N=2, K=1, H=16),
        _case("one_token", "1/1", N=2, K=2, H=16),
        _case("full_block", "16/16 1/16 1/17 17/17", N=4, K=2, H=32),
        _case("mixed", "1/70 65/65 0/0 7/129 1/1 33/400", **_SMOL),
        _case("two_partitions", "1/513 2/1030 1/1024", **_SMOL),
        _case("long_prompt", "530/530", N=4, K=2, H=32, block=32),
        _case("window", "1/70 65/65 7/700 90/130", **_SMOL, window=37),
        _case("window_of_one", "1/70 20/20", N=2, K=1, H=48, block=64, window=1),
        _case("long_window", "3/1400 1/90", N=2, K=1, H=64, block=64, window=600),
        _case("one_kv_head", "40/300 1/9", N=14, K=1, H=80, block=128),
        _case("wide_head", "5/150", N=2, K=2, H=256, block=64),
    ),
    make_inputs=make_inputs,
    tolerance={
        # the reference reads the same, already rounded cache: the cache's type costs nothing here
        dtype: Tol(atol=3e-6, rtol=3e-6)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    },
    takes_out=True,
    bytes_moved=_bytes,
    flops=lambda case: 4.0 * _pairs(case) * case.N * case.H,
    baselines={"torch_sdpa": _sdpa},
    bench_cases=(
        _case("prefill_512", "512/512", **_SMOL),
        _case("prefill_2048", "2048/2048", N=16, K=8, H=128),
        _case("decode_1x1k", "1/1024", **_SMOL),
        _case("decode_32x1k", " ".join(["1/1024"] * 32), **_SMOL),
        _case("decode_32x1k_wide", " ".join(["1/1024"] * 32), N=16, K=8, H=128),
    ),
)
