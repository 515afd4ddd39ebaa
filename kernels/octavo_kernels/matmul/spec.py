"""Cases, inputs and tolerances of matmul and gather_rows; knows no measurement or threshold."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from octavo_kernels.matmul import PackedWeight, gather_rows, matmul, pack_rows_, unpack
from octavo_kernels.matmul.reference import gather_rows_reference, matmul_reference
from octavo_kernels.op import Case, OpSpec, Tol

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the weight; x is float32


def _packed(n: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> PackedWeight:
    weight = PackedWeight.empty(n, k, dtype=dtype)
    # In three uneven parts, as q, k and v are.
    for start, end in ((0, n // 2), (n // 2, n // 2 + n // 3), (n // 2 + n // 3, n)):
        pack_rows_(weight, torch.randn(end - start, k, generator=generator), start=start)
    return weight


def _matmul_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    weight = _packed(case.N, case.K, dtype, generator)
    bias = torch.randn(case.N, generator=generator) if "b" in case.extras else None
    residual = torch.randn(case.T, case.N, generator=generator) if "r" in case.extras else None
    x = torch.randn(case.T, case.K, generator=generator)
    return {"x": x, "weight": weight, "bias": bias, "residual": residual}


def _gather_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    weight = _packed(case.N, case.K, dtype, generator)
    ids = torch.randint(0, case.N, (case.T,), generator=generator)
    return {"weight": weight, "ids": ids if case.T % 2 else ids.int()}


def _matmul_reference(x: Tensor, weight: PackedWeight, **extras: Tensor | None) -> Tensor:
    return matmul_reference(x, unpack(weight).to(x.dtype), **extras)


def _gather_reference(weight: PackedWeight, ids: Tensor) -> Tensor:
    return gather_rows_reference(unpack(weight), ids)


@lru_cache(maxsize=1)
def _plain(weight: PackedWeight) -> Tensor:
    return unpack(weight).to(weight.data.dtype)


def _torch_linear(x: Tensor, weight: PackedWeight, **extras: None) -> Tensor:
    plain = _plain(weight)
    return torch.nn.functional.linear(x.to(plain.dtype), plain)


def _torch_embedding(weight: PackedWeight, ids: Tensor) -> Tensor:
    return torch.nn.functional.embedding(ids, _plain(weight)).float()


def _matmul_bytes(case: Case, itemsize: int) -> float:
    return float(case.N * case.K * itemsize + 4 * case.T * (case.N + case.K))


_SMOLLM2 = ((960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576))

SPECS = (
    OpSpec(
        name="matmul",
        op=matmul,
        reference=_matmul_reference,
        cases=(
            Case("one", T=1, N=1, K=1, extras=""),
            Case("empty", T=0, N=7, K=5, extras="br"),
            Case("narrow", T=3, N=15, K=31, extras="b"),
            Case("panel", T=6, N=48, K=64, extras="r"),
            Case("edge", T=17, N=97, K=129, extras="br"),
            Case("tiles", T=23, N=160, K=257, extras=""),
            Case("deep", T=9, N=49, K=1536, extras="br"),
            Case("threads", T=40, N=960, K=576, extras=""),
        ),
        make_inputs=_matmul_inputs,
        # Rounding of K float32 sums of standard normal products; 16-bit weights add none.
        tolerance=dict.fromkeys(_DTYPES, Tol(atol=4e-4, rtol=1e-5)),
        takes_out=True,
        rows=("x", "residual"),
        bytes_moved=_matmul_bytes,
        flops=lambda case: 2.0 * case.T * case.N * case.K,
        baselines={"torch": _torch_linear},
        bench_cases=tuple(
            Case(f"{n}x{k}/{t}", T=t, N=n, K=k, extras="")
            for n, k in _SMOLLM2
            for t in (1, 4, 16, 64, 128)
        ),
    ),
    OpSpec(
        name="gather_rows",
        op=gather_rows,
        reference=_gather_reference,
        cases=(
            Case("empty", T=0, N=5, K=3),
            Case("one", T=1, N=1, K=1),
            Case("odd", T=33, N=101, K=77),
            Case("wide", T=300, N=500, K=576),
        ),
        make_inputs=_gather_inputs,
        tolerance=dict.fromkeys(_DTYPES, Tol(atol=0.0, rtol=0.0)),
        rows=("ids",),
        bytes_moved=lambda case, itemsize: float(case.T * case.K * (itemsize + 4)),
        baselines={"torch": _torch_embedding},
        bench_cases=tuple(Case(f"576/{t}", T=t, N=49152, K=576) for t in (1, 16, 128)),
    ),
)
