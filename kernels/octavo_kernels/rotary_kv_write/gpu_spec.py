"""What tests and benchmarks need to know of rotary_kv_write on a GPU; runs nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from octavo_kernels.op import Case, OpSpec, Tol
from octavo_kernels.rotary_kv_write.gpu import rotary_kv_write

_MAX_POSITION = 500


def reference(
    qkv: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    is_interleaved: bool = False,
) -> Tensor:
    """See `rotary_kv_write`; leaves qkv as it is."""
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    q, k = heads[:, :num_heads], heads[:, num_heads : num_heads + num_kv_heads]
    v = heads[:, num_heads + num_kv_heads :]
    pairs = cos.shape[1]
    first = torch.arange(pairs) * 2 if is_interleaved else torch.arange(pairs)
    second = first + 1 if is_interleaved else first + pairs

    def prepare(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (weight + weight_offset)
        turned = x.clone()
        c, s = cos[positions.long()][:, None], sin[positions.long()][:, None]
        turned[..., first] = x[..., first] * c - x[..., second] * s
        turned[..., second] = x[..., second] * c + x[..., first] * s
        return turned

    k = prepare(k, k_norm)
    if k_scale is not None and v_scale is not None:
        k = (k / k_scale[:, None]).clamp(-448, 448)
        v = (v / v_scale[:, None]).clamp(-448, 448)
    kept = slots >= 0
    block, offset = slots[kept].long() // k_cache.shape[2], slots[kept].long() % k_cache.shape[2]
    k_cache[block, :, offset] = k[kept]
    v_cache[block, :, offset] = v[kept]
    return prepare(q, q_norm)


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    num_blocks = case.T // case.block + 2
    shape = (num_blocks, case.K, case.block, case.H)
    cache_dtype = torch.float8_e4m3fn if case.fp8 else dtype
    angle = torch.rand(_MAX_POSITION, case.R // 2, generator=generator) * 6.3
    index = torch.int64 if case.T % 2 else torch.int32
    slots = torch.randperm(num_blocks * case.block, generator=generator)[: case.T]
    slots[1::7] = -1
    positions = torch.randint(_MAX_POSITION, (case.T,), generator=generator)
    inputs: dict[str, Any] = {
        "qkv": normal(case.T, (case.N + 2 * case.K) * case.H),
        "num_heads": case.N,
        "num_kv_heads": case.K,
        "head_dim": case.H,
        "positions": positions.to(device, index),
        "cos": angle.cos().to(device),
        "sin": angle.sin().to(device),
        "slots": slots.to(device, index),
        "k_cache": torch.full(shape, 7.0, device=device).to(cache_dtype),
        "v_cache": torch.full(shape, 7.0, device=device).to(cache_dtype),
        "is_interleaved": bool(case.is_interleaved),
    }
    if case.norm:
        inputs |= {"q_norm": normal(case.H), "k_norm": normal(case.H), "eps": 1e-5}
        inputs["weight_offset"] = float(case.norm - 1)
    if case.fp8:
        for name in ("k_scale", "v_scale"):
            inputs[name] = (torch.rand(case.K, generator=generator) + 0.01).to(device)
    return inputs


def _case(
    name: str,
    *,
    T: int,
    N: int,
    K: int,
    H: int,
    R: int,
    block: int = 16,
    norm: int = 0,
    is_interleaved: int = 0,
    fp8: int = 0,
) -> Case:
    """norm: 0 without, 1 with, 2 with weights less one."""
    sizes: dict[str, int | str] = {"T": T, "N": N, "K": K, "H": H, "R": R, "block": block}
    return Case(name, **sizes, norm=norm, is_interleaved=is_interleaved, fp8=fp8)


def _bytes(case: Case, itemsize: int) -> float:
    """Each of q, k, v is read once and written once."""
    return float(case.T * case.H * itemsize * 2 * (case.N + 2 * case.K))


_CASES = (
    _case("none", T=0, N=2, K=1, H=16, R=16),
    _case("one", T=1, N=2, K=1, H=16, R=16, norm=1),
    _case("gqa", T=6, N=9, K=3, H=64, R=64),
    _case("parts", T=2, N=24, K=12, H=256, R=256, norm=1, block=128),
    _case("offset_norm", T=3, N=4, K=4, H=128, R=128, norm=2, block=64),
    _case("partial_rotation", T=4, N=4, K=2, H=80, R=20, block=32),
    _case("partial_with_norm", T=5, N=6, K=2, H=80, R=20, norm=1),
    _case("no_rotation", T=3, N=2, K=2, H=32, R=0, block=128, norm=1),
    _case("odd_head", T=4, N=3, K=1, H=21, R=14, norm=1),
    _case("interleaved", T=3, N=4, K=2, H=64, R=64, is_interleaved=1),
    _case("interleaved_partial", T=4, N=4, K=2, H=48, R=24, norm=1, is_interleaved=1),
)
_TOLERANCE = {
    torch.float32: Tol(atol=4e-6, rtol=4e-6),
    # The interpreter truncates to bfloat16.
    torch.bfloat16: Tol(atol=2e-5, rtol=8e-3),
    torch.float16: Tol(atol=4e-6, rtol=6e-4),
}


# half of the last of three places, and half of 2**-9 near 0
_E4M3 = Tol(atol=1e-3, rtol=0.0635)


def _spec(name: str, fp8: int) -> OpSpec:
    cases: tuple[Case, ...] = _CASES
    tolerance = _TOLERANCE
    if fp8:
        cases = tuple(
            Case(case.name, **{**case.items, "fp8": 1})
            for case in _CASES
            if case.name in ("gqa", "partial_with_norm", "interleaved")
        )
        tolerance = {dtype: _E4M3 for dtype in _TOLERANCE if dtype != torch.float16}
    return OpSpec(
        name=name,
        op=rotary_kv_write,
        reference=reference,
        cases=cases,
        make_inputs=make_inputs,
        tolerance=tolerance,
        devices=("cuda",),
        mutated=("k_cache", "v_cache"),
        rows=("qkv", "positions", "slots"),
        bytes_moved=_bytes,
        bench_cases=tuple(
            _case(f"{name}_T{t}", T=t, N=n, K=8, H=128, R=128, norm=norm, fp8=fp8)
            for name, n, norm in (("8B", 32, 0), ("0.6B", 16, 1))
            for t in (1, 16, 64, 256, 4096)
        ),
    )


SPECS = (_spec("rotary_kv_write", 0), _spec("rotary_kv_write_fp8", 1))
