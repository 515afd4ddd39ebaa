"""What the card allows in this run; every kernel's figure is judged beside these."""

from __future__ import annotations

import torch

from benchmarks.gpu_recorder import Recorder

_GIB = 2**30
_N = 8192


def run_ceilings(recorder: Recorder, *, is_short: bool) -> None:
    seconds = 0.3 if is_short else 1.5
    source = torch.empty(_GIB, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    with recorder.case("copy", "1 GiB"):
        recorder.measure(
            "copy", "1 GiB", [lambda: target.copy_(source)], bytes_moved=2 * _GIB, seconds=seconds
        )
    words = source.view(torch.float32)
    with recorder.case("read", "1 GiB"):
        recorder.measure("read", "1 GiB", [lambda: words.sum()], bytes_moved=_GIB, seconds=seconds)
    a, b = (torch.randn(_N, _N, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    with recorder.case("matmul_bf16_8192", "cuBLAS"):
        recorder.measure(
            "matmul_bf16_8192", "cuBLAS", [lambda: a @ b], flops=2 * _N**3, seconds=seconds
        )
