"""What tests and benchmarks need to know of rotary_kv_write; runs nothing."""

from __future__ import annotations

from typing import Any

import torch

from octavo_kernels.op import Case, OpSpec, Tol
from octavo_kernels.paged_attention import kv_cache_shapes
from octavo_kernels.rotary_kv_write import rotary_kv_write, rotary_kv_write_reference

_MAX_POSITION = 4096


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    num_blocks = case.T // case.block + 2
    shapes = kv_cache_shapes(
        num_blocks, block_size=case.block, num_kv_heads=case.K, head_dim=case.H
    )
    angle = torch.rand(_MAX_POSITION, case.R // 2, generator=generator) * 6.3
    index = torch.int64 if case.is_long else torch.int32
    slots = torch.randperm(num_blocks * case.block, generator=generator)[: case.T]
    slots[1::7] = -1
    inputs: dict[str, Any] = {
        "qkv": normal(case.T, (case.N + 2 * case.K) * case.H),
        "num_heads": case.N,
        "num_kv_heads": case.K,
        "head_dim": case.H,
        "positions": torch.randint(_MAX_POSITION, (case.T,), generator=generator).to(index),
        "cos": angle.cos().to(device),
        "sin": angle.sin().to(device),
        "slots": slots.to(index).to(device),
        "k_cache": torch.full(shapes[0], 7.0, dtype=dtype, device=device),
        "v_cache": torch.full(shapes[1], 7.0, dtype=dtype, device=device),
        "eps": 1e-6,
    }
    if case.norm:
        inputs |= {"q_norm": normal(case.H), "k_norm": normal(case.H)}
    return inputs


def _case(name: str, *, T: int, N: int, K: int, H: int, R: int, block: int, norm: int) -> Case:
    return Case(name, T=T, N=N, K=K, H=H, R=R, block=block, norm=norm, is_long=T % 2)


def _bytes(case: Case, itemsize: int) -> float:
    heads = 2 * (case.N + case.K) + case.K
    return float(case.T * case.H * (4 * heads + 2 * itemsize * case.K))


SPEC = OpSpec(
    name="rotary_kv_write",
    op=rotary_kv_write,
    reference=rotary_kv_write_reference,
    cases=(
        _case("none", T=0, N=2, K=1, H=16, R=16, block=16, norm=0),
        _case("one", T=1, N=2, K=1, H=16, R=16, block=16, norm=1),
        _case("tiny_head", T=37, N=4, K=2, H=16, R=16, block=16, norm=1),
        _case("gqa", T=130, N=9, K=3, H=64, R=64, block=16, norm=0),
        _case("qk_norm", T=48, N=4, K=4, H=128, R=128, block=64, norm=1),
        _case("partial_rotation", T=50, N=4, K=2, H=80, R=20, block=32, norm=0),
        _case("no_rotation", T=9, N=2, K=2, H=32, R=0, block=128, norm=0),
        _case("wide_head", T=16, N=2, K=1, H=256, R=256, block=128, norm=1),
    ),
    make_inputs=make_inputs,
    tolerance={
        torch.float32: Tol(atol=4e-6, rtol=4e-6),
        # half a unit in the last place of the cache's type
        torch.bfloat16: Tol(atol=4e-6, rtol=4e-3),
        torch.float16: Tol(atol=4e-6, rtol=5e-4),
    },
    mutated=("k_cache", "v_cache"),
    rows=("qkv", "positions", "slots"),
    bytes_moved=_bytes,
    bench_cases=tuple(
        _case(f"T{t}", T=t, N=9, K=3, H=64, R=64, block=16, norm=0) for t in (1, 16, 128, 512)
    ),
)
