"""What tests and benchmarks need to know of paged_attention on a GPU; runs nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from octavo_kernels.op import Case, OpSpec, Tol
from octavo_kernels.paged_attention.gpu import kv_cache_shape, paged_attention

FP8 = torch.float8_e4m3fn


def reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    block_tables: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    max_query_len: int | None = None,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    rel_bias: Tensor | None = None,
    is_causal: bool = True,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """See `paged_attention`; request by request, every logit in memory."""
    num_heads = q.shape[1]
    num_kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    kv_head = torch.arange(num_heads, device=q.device) // (num_heads // num_kv_heads)
    if k_scale is not None:
        k_cache = k_cache * k_scale[:, None, None]
    if v_scale is not None:
        v_cache = v_cache * v_scale[:, None, None]
    out = torch.zeros_like(q)
    starts = query_start_loc.tolist()
    for row, keys in enumerate(seq_lens.tolist()):
        first, last = starts[row], starts[row + 1]
        if first == last or keys == 0:
            continue
        blocks = block_tables[row, : -(-keys // block_size)].long()
        k = k_cache[blocks].transpose(1, 2).flatten(0, 1)[:keys][:, kv_head]
        v = v_cache[blocks].transpose(1, 2).flatten(0, 1)[:keys][:, kv_head]
        logits = torch.einsum("qnh,knh->nqk", q[first:last], k) * scale
        if soft_cap:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        query_pos = keys - (last - first) + torch.arange(last - first, device=q.device)
        distance = torch.arange(keys, device=q.device)[None, :] - query_pos[:, None]
        if alibi_slopes is not None:
            logits = logits + alibi_slopes[:, None, None] * distance
        if rel_bias is not None:
            reach = rel_bias.shape[1] // 2
            logits = logits + rel_bias[:, distance.clamp(-reach, reach) + reach]
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if is_causal:
            hidden |= distance > 0
        if sliding_window:
            hidden |= distance.abs() >= sliding_window
        logits = logits.masked_fill(hidden, float("-inf"))
        v = v.masked_fill(hidden.all(dim=0)[:, None, None], 0.0)  # 0 * NaN is NaN
        if sinks is not None:
            sink = sinks[:, None, None].expand(-1, last - first, 1)
            logits = torch.cat([logits, sink], dim=2)
        weights = torch.softmax(logits, dim=2)[:, :, :keys]
        out[first:last] = torch.einsum("nqk,knh->qnh", weights, v)
    return out.flatten(1)


def lengths(case: Case) -> list[tuple[int, int]]:
    """(query length, tokens present) of each request: "4/20 0/0" reads as two requests."""
    pairs = [pair.split("/") for pair in str(case.batch).split()]
    return [(int(query), int(present)) for query, present in pairs]


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    pairs = lengths(case)
    per_request = max([-(-present // case.block) for _, present in pairs], default=0)
    num_blocks = len(pairs) * per_request + 2
    shape = kv_cache_shape(num_blocks, block_size=case.block, num_kv_heads=case.K, head_dim=case.H)
    order = torch.randperm(num_blocks, generator=generator)[: len(pairs) * per_request]
    tables = order.reshape(len(pairs), per_request).to(torch.int32)
    caches = [torch.randn(*shape, generator=generator) for _ in range(2)]
    # What no request wrote, or may no longer see, can hold anything; nor are entries past a
    # request's last block followed.
    free = torch.ones(num_blocks, case.block, dtype=torch.bool)
    for row, (query, present) in enumerate(pairs):
        seen = torch.arange(per_request * case.block)
        oldest = max(0, present - query - case.window + 1) if case.window else 0
        free[tables[row].long()] = ((seen >= present) | (seen < oldest)).view(-1, case.block)
        tables[row, -(-present // case.block) :] = -1
    for cache in caches:
        cache.transpose(1, 2)[free] = float("nan")
    starts = torch.tensor([0] + [query for query, _ in pairs]).cumsum(0)
    cache_dtype = FP8 if case.fp8 else dtype
    inputs: dict[str, Any] = {
        # rows of T strided, as a view of qkv is
        "q": torch.randn(int(starts[-1]), case.N + 3, case.H, generator=generator).to(
            device, dtype
        )[:, : case.N],
        "k_cache": caches[0].to(cache_dtype).to(device),
        "v_cache": caches[1].to(cache_dtype).to(device),
        "block_tables": tables.to(device),
        "query_start_loc": starts.to(device, torch.int32),
        "seq_lens": torch.tensor([p for _, p in pairs], dtype=torch.int32).to(device),
        "scale": case.H**-0.5,
        "sliding_window": case.window,
    }
    if case.fp8:
        for name in ("k_scale", "v_scale"):
            inputs[name] = (torch.rand(case.K, generator=generator) + 0.5).to(device)
    return inputs | _options(case, device, generator)


def _options(case: Case, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    found: dict[str, Any] = {}
    asked = str(case.options).split()
    if "full" in asked:
        found["is_causal"] = False
    if "cap" in asked:
        found["soft_cap"] = 2.5
    if "sinks" in asked:
        found["sinks"] = torch.randn(case.N, generator=generator).to(device)
    if "alibi" in asked:
        found["alibi_slopes"] = (0.1 * torch.rand(case.N, generator=generator)).to(device)
    if "bias" in asked:
        found["rel_bias"] = torch.randn(case.N, 2 * 20 - 1, generator=generator).to(device)
    return found


def _case(
    name: str,
    batch: str,
    *,
    N: int,
    K: int,
    H: int,
    block: int = 16,
    window: int = 0,
    options: str = "",
    fp8: int = 0,
) -> Case:
    return Case(
        name, batch=batch, N=N, K=K, H=H, block=block, window=window, options=options, fp8=fp8
    )


def _bytes(case: Case, itemsize: int) -> float:
    pairs = lengths(case)
    keys = sum(min(p, q + case.window) if case.window else p for q, p in pairs)
    tokens = sum(query for query, _ in pairs)
    cached = 1 if case.fp8 else itemsize
    return float(2 * keys * case.K * case.H * cached + 2 * itemsize * tokens * case.N * case.H)


def _flops(case: Case) -> float:
    pairs = 0
    window = int(case.window)
    for query, present in lengths(case):
        for position in range(present - query, present):
            pairs += min(position + 1, window) if window else position + 1
    return float(4 * pairs * case.N * case.H)


_GQA: dict[str, Any] = {"N": 4, "K": 2, "H": 32}

# Weights are rounded to the dtype before they meet the values.
_ROUNDED = {
    torch.float16: Tol(atol=2e-3, rtol=2e-3),
    torch.bfloat16: Tol(atol=1.6e-2, rtol=1.6e-2),
}

_SPEC = OpSpec(
    name="paged_attention_gpu",
    op=paged_attention,
    reference=reference,
    cases=(
        _case("no_request", "", N=2, K=1, H=16),
        _case("empty_requests", "0/0 0/5 0/0", N=2, K=1, H=16),
        _case("one_token", "1/1", N=2, K=2, H=16),
        _case("full_blocks", "16/16 1/16 1/17 1/128 1/129", N=4, K=2, H=32),
        _case("mixed", "1/70 33/40 0/0 3/129 1/1", N=6, K=2, H=32),
        _case("partitions", "1/1030", N=3, K=1, H=64, block=64),
        _case("window", "1/70 40/65 3/300", N=2, K=1, H=64, window=37),
        _case("window_of_one", "1/70 20/20", N=2, K=1, H=48, block=64, window=1),
        _case("window_over_partitions", "2/1250", N=2, K=1, H=32, block=32, window=300),
        _case("seven_heads", "1/140 5/33", N=7, K=1, H=96, block=32),
        _case("many_heads", "1/40 2/17", N=65, K=1, H=16, block=128),
        _case("wide_head", "2/70", N=2, K=1, H=256, block=128),
        _case("full", "2/70 3/150", **_GQA, options="full"),
        _case("cross", "9/4 40/20 1/0", N=2, K=1, H=32, options="full"),
        _case("full_window", "2/70 40/60", N=2, K=1, H=32, window=30, options="full"),
        _case("relative_bias", "2/70 40/40", N=2, K=1, H=32, options="bias full"),
        _case("all_options", "2/70 33/40", **_GQA, window=50, options="cap sinks alibi bias"),
    ),
    make_inputs=make_inputs,
    tolerance={torch.float32: Tol(atol=1e-5, rtol=1e-5), **_ROUNDED},
    devices=("cuda",),
    takes_out=True,
    bytes_moved=_bytes,
    flops=_flops,
    bench_cases=(
        _case("decode_64x4k", " ".join(["1/4096"] * 64), N=32, K=8, H=128),
        _case("verify_64x4k", " ".join(["5/4096"] * 64), N=32, K=8, H=128),
        _case("prefill_4x4k", " ".join(["4096/4096"] * 4), N=32, K=8, H=128),
        _case("mixed_63x2k_1x2k", " ".join(["1/2048"] * 63 + ["2048/2048"]), N=32, K=8, H=128),
    ),
)

_FP8_SPEC = dataclasses.replace(
    _SPEC,
    name="paged_attention_gpu_fp8",
    cases=(
        _case("fp8", "1/70 33/40", **_GQA, fp8=1),
        _case("fp8_options", "1/70", N=4, K=2, H=128, block=64, fp8=1, options="cap sinks"),
    ),
    tolerance=_ROUNDED,  # the reference reads the same float8 values
    bench_cases=(_case("decode_64x4k", " ".join(["1/4096"] * 64), N=32, K=8, H=128, fp8=1),),
)

SPECS = (_SPEC, _FP8_SPEC)
