"""Cases, inputs and tolerances of the CPU's quantised matmuls; knows no measurement."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from octavo_kernels.matmul import PackedWeight, matmul, pack_rows_
from octavo_kernels.op import Case, OpSpec, Tol
from octavo_kernels.quant_matmul.block_spec import block_specs
from octavo_kernels.quant_matmul.int8 import (
    Int8Weight,
    gated_int8,
    gather_rows_int8,
    matmul_int8,
    unpack,
    write_rows,
)
from octavo_kernels.quant_matmul.int8_packed import codes_of
from octavo_kernels.quant_matmul.int8_reference import gated_int8_reference, matmul_int8_reference
from octavo_kernels.silu_mul import silu_mul

# SmolLM2-135M: q, k and v; o; gate and up; down; head
SMOLLM2 = ((960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576))
BENCH_ROWS = (1, 4, 16, 32, 128)


def _int8(n: int, k: int, is_gated: bool, generator: torch.Generator) -> Int8Weight:
    weight = Int8Weight.empty(n, k, is_gated=is_gated)
    # In three uneven parts, as q, k and v are.
    for start, end in ((0, n // 2), (n // 2, n // 2 + n // 3), (n // 2 + n // 3, n)):
        write_rows(weight, torch.randn(end - start, k, generator=generator), start=start)
    return weight


def _matmul_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    weight = _int8(case.N, case.K, False, generator)
    bias = torch.randn(case.N, generator=generator) if "b" in case.extras else None
    residual = torch.randn(case.T, case.N, generator=generator) if "r" in case.extras else None
    x = torch.randn(case.T, case.K, generator=generator)
    return {"x": x, "weight": weight, "bias": bias, "residual": residual}


def _gated_inputs(
    is_gelu: bool,
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> dict[str, Any]:
    weight = _int8(case.N, case.K, True, generator)
    x = torch.randn(case.T, case.K, generator=generator) / case.K**0.5
    return {"x": x, "weight": weight, "is_gelu": is_gelu}


def _gather_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    ids = torch.randint(0, case.N, (case.T,), generator=generator)
    weight = _int8(case.N, case.K, False, generator)
    return {"weight": weight, "ids": ids if case.T % 2 else ids.int()}


def _matmul_reference(x: Tensor, weight: Int8Weight, **extras: Tensor | None) -> Tensor:
    codes, scale = codes_of(weight)
    return matmul_int8_reference(x, codes, scale, **extras)


def _gated_reference(x: Tensor, weight: Int8Weight, is_gelu: bool) -> Tensor:
    return gated_int8_reference(x, *codes_of(weight), is_gelu=is_gelu)


def _gather_reference(weight: Int8Weight, ids: Tensor) -> Tensor:
    return unpack(weight)[ids.long()]


@lru_cache(maxsize=1)
def _as_float32(weight: Int8Weight) -> PackedWeight:
    packed = PackedWeight.empty(weight.n, weight.k, dtype=torch.float32)
    pack_rows_(packed, unpack(weight), start=0)
    return packed


@lru_cache(maxsize=1)
def _plain_codes(weight: Int8Weight) -> tuple[Tensor, Tensor]:
    return codes_of(weight)


@lru_cache(maxsize=1)
def _ready_codes(num_rows: int, k: int) -> Tensor:
    return torch.randint(1, 256, (num_rows, k), dtype=torch.uint8)


def _float32(x: Tensor, weight: Int8Weight, **extras: Any) -> Tensor:
    return matmul(x, _as_float32(weight))


def _float32_gated(x: Tensor, weight: Int8Weight, is_gelu: bool) -> Tensor:
    return silu_mul(matmul(x, _as_float32(weight)))


def _torch_int_mm(x: Tensor, weight: Int8Weight, **extras: Any) -> Tensor:
    """Integers alone: neither quantises x nor scales."""
    return torch._int_mm(_ready_codes(*x.shape), _plain_codes(weight)[0].t())


def _torch_weight_int8(x: Tensor, weight: Int8Weight, **extras: Any) -> Tensor:
    """x stays float32."""
    product: Tensor = torch.ops.aten._weight_int8pack_mm(x, *_plain_codes(weight))
    return product


def _bytes(case: Case, itemsize: int) -> float:
    return float(case.N * case.K + 4 * case.T * (case.N + case.K))


def _flops(case: Case) -> float:
    return float(2 * case.T * case.N * case.K)


def _gated_spec(name: str, is_gelu: bool) -> OpSpec:
    return OpSpec(
        name=name,
        op=gated_int8,
        reference=_gated_reference,
        cases=(
            Case("one", T=1, N=2, K=1),
            Case("empty", T=0, N=14, K=5),
            Case("edge", T=7, N=2 * 61, K=130),
            Case("threads", T=33, N=768, K=576),
        ),
        make_inputs=partial(_gated_inputs, is_gelu),
        tolerance={torch.float32: Tol(atol=2e-6, rtol=2e-6)},
        takes_out=True,
        rows=("x",),
        bytes_moved=_bytes,
        flops=_flops,
        baselines={"fp32": _float32_gated},
        bench_cases=tuple(Case(f"3072x576/{t}", T=t, N=3072, K=576) for t in BENCH_ROWS)
        if not is_gelu
        else (),
    )


SPECS: tuple[OpSpec, ...] = (
    OpSpec(
        name="matmul_int8",
        op=matmul_int8,
        reference=_matmul_reference,
        cases=(
            Case("one", T=1, N=1, K=1, extras=""),
            Case("empty", T=0, N=7, K=5, extras="br"),
            Case("narrow", T=3, N=15, K=31, extras="b"),
            Case("panel", T=6, N=48, K=64, extras="r"),
            Case("edge", T=17, N=97, K=130, extras="br"),
            Case("deep", T=9, N=49, K=1536, extras="br"),
            Case("row", T=1, N=960, K=576, extras="b"),
            Case("threads", T=33, N=960, K=576, extras=""),
        ),
        make_inputs=_matmul_inputs,
        # The sum is exact: three roundings of it and one of each extra.
        tolerance={torch.float32: Tol(atol=2e-6, rtol=1e-6)},
        takes_out=True,
        rows=("x", "residual"),
        bytes_moved=_bytes,
        flops=_flops,
        baselines={
            "fp32": _float32,
            "torch int_mm": _torch_int_mm,
            "torch w8": _torch_weight_int8,
        },
        bench_cases=tuple(
            Case(f"{n}x{k}/{t}", T=t, N=n, K=k, extras="") for n, k in SMOLLM2 for t in BENCH_ROWS
        ),
    ),
    _gated_spec("gated_int8", False),
    _gated_spec("gated_int8_gelu", True),
    OpSpec(
        name="gather_rows_int8",
        op=gather_rows_int8,
        reference=_gather_reference,
        cases=(
            Case("empty", T=0, N=5, K=3),
            Case("odd", T=33, N=101, K=77),
            Case("wide", T=300, N=500, K=576),
        ),
        make_inputs=_gather_inputs,
        tolerance={torch.float32: Tol(atol=0.0, rtol=0.0)},
        rows=("ids",),
        bytes_moved=lambda case, itemsize: float(case.T * case.K * 5),
        bench_cases=tuple(Case(f"576/{t}", T=t, N=49152, K=576) for t in (1, 16, 128)),
    ),
    *block_specs(SMOLLM2, BENCH_ROWS),
)
