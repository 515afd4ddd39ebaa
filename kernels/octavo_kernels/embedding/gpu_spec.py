"""Cases, inputs and tolerances of the embedding gather; knows no measurement."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from octavo_kernels.embedding.gpu import embedding
from octavo_kernels.embedding.reference import embedding_reference
from octavo_kernels.op import Case, OpSpec, Tol


def _inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    weight = torch.randn(case.V, case.D, generator=generator).to(device, dtype)
    # Some ids lie outside.
    ids = torch.randint(-2, case.V + 2, (case.T,), generator=generator).to(device)
    found: dict[str, Any] = {"ids": ids if case.T % 2 else ids.int(), "weight": weight}
    if case.scaled:
        found["scale"] = 25.2982
    return found


def _torch(ids: Tensor, weight: Tensor, *, scale: float | None = None) -> Tensor:
    rows = torch.nn.functional.embedding(ids.clamp(0, weight.shape[0] - 1), weight)
    return rows if scale is None else rows * scale


def _spec(name: str, scaled: int, tolerance: dict[torch.dtype, Tol]) -> OpSpec:
    sizes = [(0, 5, 3), (1, 1, 1), (33, 101, 77), (40, 50, 1024), (7, 9, 1500)]
    return OpSpec(
        name=name,
        op=embedding,
        reference=embedding_reference,
        cases=tuple(Case(f"{t}x{v}x{d}", T=t, V=v, D=d, scaled=scaled) for t, v, d in sizes),
        make_inputs=_inputs,
        tolerance=tolerance,
        devices=("cuda",),
        takes_out=True,
        rows=("ids",),
        bytes_moved=lambda case, itemsize: 2.0 * case.T * case.D * itemsize,
        baselines={"torch": _torch},
        bench_cases=tuple(Case(f"4096/{t}", T=t, V=128256, D=4096, scaled=0) for t in (1, 4096)),
    )


_EXACT = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), Tol(atol=0.0, rtol=0.0))
_ROUNDED = {
    torch.float32: Tol(atol=0.0, rtol=2.4e-7),
    torch.float16: Tol(atol=1e-6, rtol=1e-3),
    torch.bfloat16: Tol(atol=1e-6, rtol=8e-3),
}
SPECS = (_spec("embedding", 0, _EXACT), _spec("embedding_scaled", 1, _ROUNDED))
