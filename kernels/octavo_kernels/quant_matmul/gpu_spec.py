"""What tests and benchmarks need to know of quant_matmul; runs nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from octavo_kernels.op import Case, OpSpec, Tol
from octavo_kernels.quant_matmul import gpu
from octavo_kernels.quant_matmul.reference import quant_matmul_reference
from octavo_kernels.quant_matmul.weight import (
    QuantWeight,
    pack_fp8,
    pack_fp8_blocks,
    pack_int4,
    pack_int8,
)

Pack = Callable[[torch.Tensor], QuantWeight]
# An odd N with K of one and a half groups; K below a group; several groups; one token.
_SIZES = ((0, 64, 128), (1, 33, 200), (5, 48, 96), (17, 40, 384))
# 8B shapes: qkv, o, gate-up, down, head
BENCH_SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096))


def _make_inputs(
    pack: Pack,
    quantised: bool,
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> dict[str, Any]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    inputs: dict[str, Any] = {
        "x": normal(case.T, case.K).to(device, dtype),
        "weight": pack((normal(case.N, case.K) / case.K**0.5).to(device)),
    }
    if quantised:
        inputs["quantise_activations"] = True
    if case.T != 1:
        inputs["bias"] = normal(case.N).to(device, dtype)
        inputs["residual"] = normal(case.T, case.N).to(device, dtype)
    return inputs


def _bytes(bits: int, case: Case, itemsize: int) -> float:
    return float(case.N * case.K * bits / 8 + case.T * (case.N + case.K) * itemsize)


def _spec(name: str, pack: Pack, *, bits: int = 8, quantised: bool = False) -> OpSpec:
    # fp8 times fp8 keeps about 14 bits of a sum within 128 elements.
    exact = 2e-3 if quantised and "fp8" in name else 1e-5
    return OpSpec(
        name=f"quant_matmul_{name}",
        op=gpu.quant_matmul,
        reference=quant_matmul_reference,
        cases=tuple(Case(f"{t}x{n}x{k}", T=t, N=n, K=k) for t, n, k in _SIZES),
        make_inputs=partial(_make_inputs, pack, quantised),
        tolerance={
            torch.float32: Tol(atol=exact, rtol=exact),
            torch.float16: Tol(atol=2e-3, rtol=2e-3),
            torch.bfloat16: Tol(atol=1e-2, rtol=1e-2),
        },
        devices=("cuda",),
        takes_out=True,
        rows=("x", "residual"),
        bytes_moved=partial(_bytes, bits),
        flops=lambda case: 2.0 * case.T * case.N * case.K,
        bench_cases=tuple(
            Case(f"{t}x{n}x{k}", T=t, N=n, K=k) for n, k in BENCH_SHAPES for t in (1, 16, 2048)
        ),
    )


SPECS = (
    _spec("fp8", pack_fp8),
    _spec("fp8_blocks", pack_fp8_blocks),
    _spec("int8", pack_int8),
    _spec("int4_32", partial(pack_int4, group=32), bits=4),
    _spec("int4_64_zero", partial(pack_int4, group=64, symmetric=False), bits=4),
    _spec(
        "int4_128_zero",
        partial(pack_int4, group=128, symmetric=False, scale_dtype=torch.bfloat16),
        bits=4,
    ),
    _spec("fp8_a8", pack_fp8, quantised=True),
    _spec("fp8_blocks_a8", pack_fp8_blocks, quantised=True),
    _spec("int8_a8", pack_int8, quantised=True),
)
