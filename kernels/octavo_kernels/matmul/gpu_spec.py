"""Cases, inputs and tolerances of the GPU's linear; knows no measurement and no threshold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from octavo_kernels.matmul.gpu import linear
from octavo_kernels.op import Case, OpSpec, Tol

_TOLERANCE = {
    torch.float32: Tol(atol=2e-6, rtol=2e-6),
    # Half a unit in the last place of the result, and of the product (up to 4) before bias,
    # gate (up to 2 of up) or residual.
    torch.float16: Tol(atol=4e-3, rtol=1e-3),
    torch.bfloat16: Tol(atol=3.2e-2, rtol=8e-3),
}
SHAPES_8B = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}


def _inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def eighths(*shape: int, most: int) -> Tensor:
        units = torch.randint(-most, most + 1, shape, generator=generator)
        return (units / 8).to(device, dtype)

    # Weights have a variance of about 1 / K, as a model's: the product is about 1. In the small
    # cases every sum is exact, in any order, so that a bit of difference is a fault even in the
    # interpreter, which sums as numpy does; orders are compared on a GPU (test_gpu_matmul).
    found: dict[str, Any] = {}
    if case.K < 1024:
        found["x"] = eighths(case.T, case.K, most=14)
        found["weight"] = eighths(case.N, case.K, most=max(1, round(12 * case.K**-0.5)))
    else:
        found["x"] = normal(case.T, case.K)
        found["weight"] = (normal(case.N, case.K) * case.K**-0.5).to(dtype)
    if "b" in case.extras:
        found["bias"] = normal(case.N)
    if "r" in case.extras:
        found["residual"] = normal(case.T, case.N)
    if "s" in case.extras:
        found["activation"] = "silu_mul"
    if "g" in case.extras:
        found["activation"] = "gelu_tanh_mul"
    return found


def linear_reference(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """`linear` in plain torch, nothing rounded on the way."""
    result = x @ weight.T
    if bias is not None:
        result = result + bias
    if activation is not None:
        gate, up = result.chunk(2, dim=-1)
        if activation == "silu_mul":
            result = torch.nn.functional.silu(gate) * up
        else:
            result = torch.nn.functional.gelu(gate, approximate="tanh") * up
    return result if residual is None else result + residual


def _torch(x: Tensor, weight: Tensor, **extras: Any) -> Tensor:
    return linear_reference(x, weight, **extras)


def _bytes(case: Case, itemsize: int) -> float:
    return float(itemsize * (case.N * case.K + case.T * (case.N + case.K)))


SPECS = (
    OpSpec(
        name="linear",
        op=linear,
        reference=linear_reference,
        cases=(
            Case("one", T=1, N=1, K=1, extras=""),
            Case("empty", T=0, N=7, K=5, extras="br"),
            Case("narrow", T=3, N=15, K=31, extras="b"),
            Case("aligned", T=16, N=96, K=256, extras="r"),
            Case("edge", T=17, N=97, K=129, extras="br"),
            Case("middle", T=40, N=70, K=264, extras=""),
            Case("tall", T=130, N=80, K=72, extras="br"),
            Case("silu", T=9, N=72, K=136, extras="s"),
            Case("silu_bias", T=33, N=34, K=65, extras="sb"),
            Case("gelu", T=5, N=64, K=64, extras="g"),
        ),
        make_inputs=_inputs,
        tolerance=_TOLERANCE,
        devices=("cuda",),
        takes_out=True,
        rows=("x", "residual"),
        bytes_moved=_bytes,
        flops=lambda case: 2.0 * case.T * case.N * case.K,
        baselines={"torch": _torch},
        bench_cases=tuple(
            Case(f"{name}/{t}", T=t, N=n, K=k, extras="")
            for name, (n, k) in SHAPES_8B.items()
            for t in (1, 16, 64, 128, 256, 2048)
        ),
    ),
)
