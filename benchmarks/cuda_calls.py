"""Host time of the CUDA and Triton calls that a step is made of. Needs a GPU; knows no engine.

Run: ``python -m benchmarks.cuda_calls [--write]``. What `benchmarks.bench_gpu_host` leaves out: a
step calls two copies, two graph launches and three event records, or, run kernel by kernel, a
launch for each kernel. Calls are timed while the device has work, so that none waits for it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.machine import keep_row, passport
from octavo.worker.gpu.runtime import CudaRuntime
from octavo_kernels.matmul.gpu import linear
from octavo_kernels.rms_norm.gpu import rms_norm

_CALLS = 200  # in a row: the device's queue holds about 1000
_ROUNDS = 15
_GRAPH_LAYERS = 28  # of nine kernels, as Qwen3-0.6B


def host_us(call: Callable[[], object], *, num_calls: int = _CALLS) -> float:
    """Median microseconds of the host for one call."""
    found = []
    for _ in range(_ROUNDS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(num_calls):
            call()
        found.append((time.perf_counter() - began) / num_calls)
    torch.cuda.synchronize()
    return round(median(found) * 1e6, 2)


@torch.inference_mode()
def measure() -> dict[str, float]:
    """Microseconds by name."""
    runtime = CudaRuntime()
    x = torch.zeros(64, 1024, dtype=torch.bfloat16, device="cuda")
    scale = torch.ones(1024, dtype=torch.bfloat16, device="cuda")
    weight = torch.zeros(1024, 1024, dtype=torch.bfloat16, device="cuda")
    words = torch.zeros(4096, dtype=torch.int32, device="cuda")
    pinned = runtime.host_tensor(4096, torch.int32)
    event = runtime.event()

    def norm() -> None:
        rms_norm(x, scale, eps=1e-6, out=x, use_pdl=True)

    def work() -> None:
        for _ in range(_GRAPH_LAYERS * 9):
            norm()

    work()
    graph = runtime.capture(work)
    return {
        "copy to device": host_us(lambda: words.copy_(pinned, non_blocking=True)),
        "copy to host": host_us(lambda: pinned.copy_(words, non_blocking=True)),
        "event record": host_us(event.record),
        "graph of 252 kernels": host_us(graph.replay, num_calls=8),
        "rms_norm": host_us(norm),
        "linear": host_us(lambda: linear(x, weight, use_pdl=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="append a row to benchmarks/results")
    args = parser.parse_args()
    row = {"name": "gpu_host.calls", "us": measure()}
    print(row["us"])
    if args.write:
        keep_row("gpu_host", {**row, **passport(), "gpu": torch.cuda.get_device_name()})


if __name__ == "__main__":
    main()
