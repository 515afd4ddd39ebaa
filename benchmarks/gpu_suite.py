"""Everything a GPU has to tell in one command: tests, ceilings, kernels. Writes ``$OUT/*.jsonl``.

    OUT=results python -m benchmarks.gpu_suite [--short]

Needs no network and none of the HTTP packages. Exits 1 when a test fails, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import passport


def median_seconds(work: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median, p10 and p90 seconds of ``work`` on the current CUDA stream, after three warm-ups."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    deciles = statistics.quantiles(times, n=10)
    return {"median_s": statistics.median(times), "p10_s": deciles[0], "p90_s": deciles[-1]}


def ceilings(repeats: int) -> list[dict[str, Any]]:
    """What the card allows in this run; every kernel figure is judged beside these."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), repeats)
    words = source.view(torch.float32)
    read = median_seconds(lambda: words.sum(), repeats)
    n = 8192
    a = torch.randn(n, n, dtype=torch.bfloat16, device="cuda")
    matmul = median_seconds(lambda: a @ a, repeats)
    return [
        {"op": "copy", "TB/s": 2 * source.nbytes / copy["median_s"] / 1e12, **copy},
        {"op": "read", "TB/s": source.nbytes / read["median_s"] / 1e12, **read},
        {"op": "matmul_bf16_8192", "TFLOP/s": 2 * n**3 / matmul["median_s"] / 1e12, **matmul},
    ]


def run_tests(log: Path) -> int:
    """The GPU tests; returns pytest's exit status, with "no tests" counted as a pass."""
    with log.open("w") as out:
        status = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"],
            stdout=out,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    print(log.read_text()[-2000:])
    return 0 if status == 5 else status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="fewer repeats, under three minutes")
    short = parser.parse_args().short
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure", file=sys.stderr)
        return 2
    out = Path(os.environ.get("OUT", "."))
    out.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_properties(0)
    base = {**passport(), "gpu": device.name, "cuda": torch.version.cuda}
    status = run_tests(out / "gpu_tests.log")
    with (out / "gpu_ceilings.jsonl").open("w") as rows:
        for row in ceilings(20 if short else 100):
            rows.write(json.dumps({**base, **row}) + "\n")
            print(row)
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())
