"""What tests and benchmarks need to know of packed_attention; runs nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from octavo_kernels.op import Case, OpSpec, Tol
from octavo_kernels.packed_attention.gpu import FP8, packed_attention
from octavo_kernels.packed_attention.reference import packed_attention_reference


def lengths(case: Case) -> list[tuple[int, int]]:
    """(queries, keys) of each sequence: "4/20 0/0" reads as two."""
    pairs = [pair.split("/") for pair in str(case.batch).split()]
    return [(int(queries), int(keys)) for queries, keys in pairs]


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    pairs = lengths(case)

    def starts(which: int) -> Tensor:
        ends = torch.tensor([0] + [pair[which] for pair in pairs]).cumsum(0)
        return ends.to(device, torch.int32)

    def heads(rows: int, count: int, kind: torch.dtype) -> Tensor:
        # rows of a wider matrix, as a view of qkv is
        wide = torch.randn(rows, count + 3, case.H, generator=generator)
        return wide.to(dtype).to(kind).to(device)[:, :count]

    kind = FP8 if case.fp8 else dtype
    inputs: dict[str, Any] = {
        "q": heads(sum(pair[0] for pair in pairs), case.N, dtype),
        "k": heads(sum(pair[1] for pair in pairs), case.K, kind),
        "v": heads(sum(pair[1] for pair in pairs), case.K, kind),
        "query_start_loc": starts(0),
        "key_start_loc": starts(1),
        "max_query_len": max([pair[0] for pair in pairs], default=0) + 2,
        "scale": case.H**-0.5,
        "sliding_window": case.window,
    }
    asked = str(case.options).split()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    if case.fp8:
        inputs |= {name: normal(case.K).abs() + 0.5 for name in ("k_scale", "v_scale")}
    if "causal" in asked:
        inputs["is_causal"] = True
    if "cap" in asked:
        inputs["soft_cap"] = 2.5
    if "sinks" in asked:
        inputs["sinks"] = normal(case.N)
    if "alibi" in asked:
        inputs["alibi_slopes"] = 0.1 * normal(case.N).abs()
    if "bias" in asked:
        inputs["rel_bias"] = normal(case.N, 2 * 20 - 1)
    return inputs


def _case(
    name: str,
    batch: str,
    *,
    N: int,
    K: int,
    H: int,
    window: int = 0,
    options: str = "",
    fp8: int = 0,
) -> Case:
    return Case(name, batch=batch, N=N, K=K, H=H, window=window, options=options, fp8=fp8)


def _pairs(case: Case) -> int:
    """(query, key) pairs that are seen; windows aside."""
    halved = "causal" in str(case.options).split()
    return sum(q * k - (q * (q - 1) // 2 if halved else 0) for q, k in lengths(case))


def _bytes(case: Case, itemsize: int) -> float:
    queries, keys = (sum(pair[i] for pair in lengths(case)) for i in (0, 1))
    cached = 1 if case.fp8 else itemsize
    return float(2 * queries * case.N * case.H * itemsize + 2 * keys * case.K * case.H * cached)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, is_causal: bool = False, **starts: Any
) -> Tensor:
    """torch's attention for sequences of one length."""
    count = starts["query_start_loc"].shape[0] - 1

    def batched(x: Tensor) -> Tensor:
        return x.reshape(count, -1, *x.shape[1:]).transpose(1, 2)

    out = torch.nn.functional.scaled_dot_product_attention(
        batched(q), batched(k), batched(v), is_causal=is_causal, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(0, 1)


_SMALL: dict[str, Any] = {"N": 2, "K": 1, "H": 32}
_BERT: dict[str, Any] = {"N": 16, "K": 16, "H": 64}

SPEC = OpSpec(
    name="packed_attention",
    op=packed_attention,
    reference=packed_attention_reference,
    cases=(
        _case("no_sequence", "", **_SMALL),
        _case("empty_sequences", "0/0 0/5 0/0 3/0", **_SMALL),
        _case("one_token", "1/1", N=2, K=2, H=16),
        _case("full", "70/70 1/1 33/33", **_SMALL),
        _case("causal", "70/70 128/128 1/1", **_SMALL, options="causal"),
        _case("cross", "5/140 70/9 1/1", N=6, K=2, H=64),
        _case("causal_tail", "9/140 20/64", N=6, K=2, H=64, options="causal"),
        _case("window", "70/70 9/200", **_SMALL, window=30),
        _case("causal_window", "70/70 9/200", **_SMALL, window=30, options="causal"),
        _case("partitions", "3/1100", N=1, K=1, H=64),
        _case("odd_head", "20/30", N=7, K=1, H=80),
        _case("wide_head", "4/70", N=2, K=2, H=256),
        _case("bias", "40/40 3/70", **_SMALL, options="bias"),
        _case("all_options", "40/60 3/70", **_SMALL, window=50, options="causal cap sinks alibi"),
        _case("fp8", "40/60 3/70", **_SMALL, fp8=1, options="sinks"),
    ),
    make_inputs=make_inputs,
    tolerance={
        # weights are rounded to the dtype before they meet the values
        torch.float32: Tol(atol=1e-5, rtol=1e-5),
        torch.float16: Tol(atol=2e-3, rtol=2e-3),
        torch.bfloat16: Tol(atol=1.6e-2, rtol=1.6e-2),
    },
    devices=("cuda",),
    takes_out=True,
    bytes_moved=_bytes,
    flops=lambda case: 4.0 * _pairs(case) * case.N * case.H,
    baselines={"torch_sdpa": _sdpa},
    bench_cases=(
        _case("encoder_32x512", " ".join(["512/512"] * 32), **_BERT),
        _case("encoder_4x4k", " ".join(["4096/4096"] * 4), N=32, K=8, H=128),
        _case("causal_4x4k", " ".join(["4096/4096"] * 4), N=32, K=8, H=128, options="causal"),
    ),
)
