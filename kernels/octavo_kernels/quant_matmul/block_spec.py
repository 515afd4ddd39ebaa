"""Cases, inputs and tolerances of the CPU's matmuls over blocks; knows no measurement."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from octavo_kernels.matmul import PackedWeight, matmul, pack_rows_
from octavo_kernels.op import Case, OpSpec, Tol
from octavo_kernels.quant_matmul.block_packed import BlockWeight, dequantise, write_rows
from octavo_kernels.quant_matmul.block_reference import (
    gated_blocks_reference,
    matmul_blocks_reference,
)
from octavo_kernels.quant_matmul.blocks import gated_blocks, gather_rows, matmul_blocks
from octavo_kernels.quant_matmul.cpu_blocks_tile import FORMATS, Kind
from octavo_kernels.silu_mul import silu_mul


def _blocks(kind: Kind, n: int, k: int, generator: torch.Generator) -> BlockWeight:
    weight = BlockWeight.empty(kind, n, k)
    # In three uneven parts, as q, k and v are.
    for start, end in ((0, n // 2), (n // 2, n // 2 + n // 3), (n // 2 + n // 3, n)):
        write_rows(weight, torch.randn(end - start, k, generator=generator), start=start)
    return weight


def _matmul_inputs(
    kind: Kind, case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    weight = _blocks(kind, case.N, case.K, generator)
    bias = torch.randn(case.N, generator=generator) if "b" in case.extras else None
    residual = torch.randn(case.T, case.N, generator=generator) if "r" in case.extras else None
    x = torch.randn(case.T, case.K, generator=generator)
    return {"x": x, "weight": weight, "bias": bias, "residual": residual}


def _gated_inputs(
    kind: Kind, case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    weight = _blocks(kind, case.N, case.K, generator)
    return {"x": torch.randn(case.T, case.K, generator=generator) / case.K**0.5, "weight": weight}


def _gather_inputs(
    kind: Kind, case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    ids = torch.randint(0, case.N, (case.T,), generator=generator)
    weight = _blocks(kind, case.N, case.K, generator)
    return {"weight": weight, "ids": ids if case.T % 2 else ids.int()}


def _matmul_reference(x: Tensor, weight: BlockWeight, **extras: Tensor | None) -> Tensor:
    block = FORMATS[weight.kind].block
    return matmul_blocks_reference(x, dequantise(weight), block=block, **extras)


def _gated_reference(x: Tensor, weight: BlockWeight) -> Tensor:
    return gated_blocks_reference(x, dequantise(weight), block=FORMATS[weight.kind].block)


def _gather_reference(weight: BlockWeight, ids: Tensor) -> Tensor:
    return dequantise(weight)[ids.long()]


@lru_cache(maxsize=1)
def _as_float32(weight: BlockWeight) -> PackedWeight:
    packed = PackedWeight.empty(weight.n, weight.k, dtype=torch.float32)
    pack_rows_(packed, dequantise(weight), start=0)
    return packed


@lru_cache(maxsize=1)
def _as_int8(weight: BlockWeight) -> tuple[Tensor, Tensor]:
    wide = dequantise(weight)
    scale = wide.abs().amax(1) / 127
    return (wide / scale[:, None]).round().to(torch.int8), scale


@lru_cache(maxsize=1)
def _ready_codes(num_rows: int, k: int) -> Tensor:
    return torch.randint(1, 256, (num_rows, k), dtype=torch.uint8)


def _float32(x: Tensor, weight: BlockWeight, **extras: Any) -> Tensor:
    return matmul(x, _as_float32(weight))


def _float32_gated(x: Tensor, weight: BlockWeight) -> Tensor:
    return silu_mul(matmul(x, _as_float32(weight)))


def _torch_int_mm(x: Tensor, weight: BlockWeight, **extras: Any) -> Tensor:
    """Integers of 8 bits alone: neither quantises x nor scales."""
    return torch._int_mm(_ready_codes(*x.shape), _as_int8(weight)[0].t())


def _torch_weight_int8(x: Tensor, weight: BlockWeight, **extras: Any) -> Tensor:
    """A scale per channel; x stays float32."""
    out: Tensor = torch.ops.aten._weight_int8pack_mm(x, *_as_int8(weight))
    return out


def _bytes(kind: Kind, case: Case, itemsize: int) -> float:
    weight = case.N * case.K * FORMATS[kind].file_bytes / FORMATS[kind].block
    return float(weight + 4 * case.T * (case.N + case.K))


def _flops(case: Case) -> float:
    return float(2 * case.T * case.N * case.K)


def _matmul_spec(kind: Kind, bench_cases: tuple[Case, ...]) -> OpSpec:
    return OpSpec(
        name=f"matmul_{kind}",
        op=matmul_blocks,
        reference=_matmul_reference,
        cases=(
            Case("one", T=1, N=1, K=1, extras=""),
            Case("empty", T=0, N=7, K=5, extras="br"),
            Case("narrow", T=3, N=15, K=31, extras="b"),
            Case("panel", T=6, N=16, K=32, extras="r"),
            Case("edge", T=17, N=97, K=130, extras="br"),
            Case("deep", T=9, N=49, K=1536, extras="br"),
            Case("row", T=1, N=960, K=576, extras="b"),
            Case("threads", T=33, N=960, K=576, extras=""),
        ),
        make_inputs=partial(_matmul_inputs, kind),
        # A float32 chain over K / 32 blocks, whose minima and codes cancel.
        tolerance={torch.float32: Tol(atol=2e-4, rtol=1e-5)},
        takes_out=True,
        rows=("x", "residual"),
        bytes_moved=partial(_bytes, kind),
        flops=_flops,
        baselines={
            "fp32": _float32,
            "torch int_mm": _torch_int_mm,
            "torch w8": _torch_weight_int8,
        },
        bench_cases=bench_cases,
    )


def _gated_spec(kind: Kind, bench_cases: tuple[Case, ...]) -> OpSpec:
    return OpSpec(
        name=f"gated_{kind}",
        op=gated_blocks,
        reference=_gated_reference,
        cases=(
            Case("one", T=1, N=2, K=1),
            Case("empty", T=0, N=32, K=5),
            Case("edge", T=7, N=2 * 61, K=130),
            Case("panels", T=13, N=2 * 48, K=130),
            Case("threads", T=33, N=768, K=576),
        ),
        make_inputs=partial(_gated_inputs, kind),
        tolerance={torch.float32: Tol(atol=2e-5, rtol=1e-5)},
        takes_out=True,
        rows=("x",),
        bytes_moved=partial(_bytes, kind),
        flops=_flops,
        baselines={"fp32": _float32_gated},
        bench_cases=bench_cases,
    )


def _gather_spec(kind: Kind, bench_cases: tuple[Case, ...]) -> OpSpec:
    return OpSpec(
        name=f"gather_rows_{kind}",
        op=gather_rows,
        reference=_gather_reference,
        cases=(
            Case("empty", T=0, N=5, K=3),
            Case("odd", T=33, N=101, K=77),
            Case("wide", T=300, N=500, K=576),
        ),
        make_inputs=partial(_gather_inputs, kind),
        tolerance={torch.float32: Tol(atol=0.0, rtol=0.0)},
        rows=("ids",),
        bytes_moved=lambda case, itemsize: float(case.T * case.K * 5),
        bench_cases=bench_cases,
    )


def block_specs(shapes: Sequence[tuple[int, int]], num_rows: Sequence[int]) -> tuple[OpSpec, ...]:
    """The ops for each kind of block; timed on weights of these shapes with so many rows."""
    sizes = [(n, k, t) for n, k in shapes for t in num_rows]
    cases = tuple(Case(f"{n}x{k}/{t}", T=t, N=n, K=k, extras="") for n, k, t in sizes)
    gated = tuple(Case(f"3072x576/{t}", T=t, N=3072, K=576) for t in num_rows)
    gathered = tuple(Case(f"576/{t}", T=t, N=49152, K=576) for t in (1, 16, 128))
    found = []
    for kind in FORMATS:
        found += [_matmul_spec(kind, cases), _gated_spec(kind, gated)]
        found.append(_gather_spec(kind, gathered))
    return tuple(found)
