"""Times every kernel on the shapes of its spec, beside its baselines. Knows no particular op.

Run: ``python -m benchmarks.bench_kernels [--op NAME] [--dtype DTYPE] [--match TEXT] [--write]``.
An op is tested first and not timed when red. With ``--write`` rows go to
benchmarks/results/<cpu>/kernels.jsonl.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.machine import keep_row, passport
from octavo_kernels import num_threads, set_num_threads
from octavo_kernels.benchmarking import Timing, assert_green, time_case
from octavo_kernels.op import Case, OpSpec, all_specs


def row_of(spec: OpSpec, case: Case, dtype: torch.dtype, timing: Timing) -> dict[str, Any]:
    bytes_moved, flops = spec.bytes_moved(case, dtype.itemsize), spec.flops(case)
    return {
        "name": spec.name,
        "case": case.name,
        **case.items,
        "dtype": str(dtype).removeprefix("torch."),
        "contender": timing.contender,
        "threads": num_threads(),
        "calls": timing.calls,
        "median_us": round(timing.median_s * 1e6, 2),
        "p10_us": round(timing.p10_s * 1e6, 2),
        "p90_us": round(timing.p90_s * 1e6, 2),
        "gb_per_s": round(bytes_moved / timing.median_s / 1e9, 2),
        "gflop_per_s": round(flops / timing.median_s / 1e9, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", help="only this op")
    parser.add_argument("--dtype", help="only this dtype, e.g. float32")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--threads", type=int, help="kernel and torch threads (default: all cores)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="append rows to benchmarks/results")
    args = parser.parse_args()
    if args.threads:
        set_num_threads(args.threads)
        torch.set_num_threads(args.threads)
    about = passport()
    specs = [spec for spec in all_specs() if args.op in (None, spec.name)]
    if not specs:
        parser.error(f"no op {args.op!r}; there are {[spec.name for spec in all_specs()]}")
    head = f"{'op case dtype contender':60} {'median us':>10} {'p10':>9} {'p90':>9}"
    print(head, f"{'GB/s':>7} GFLOP/s")
    for spec in specs:
        for dtype in spec.tolerance:
            if args.dtype not in (None, str(dtype).removeprefix("torch.")):
                continue
            assert_green(spec, dtype)
            for case in spec.bench_cases:
                if args.match not in case.name:
                    continue
                for timing in time_case(spec, case, dtype, rounds=args.rounds):
                    row = row_of(spec, case, dtype, timing)
                    what = f"{spec.name} {case.name} {row['dtype']} {row['contender']}"
                    print(
                        f"{what:60} {row['median_us']:10.1f} {row['p10_us']:9.1f}"
                        f" {row['p90_us']:9.1f} {row['gb_per_s']:7.1f} {row['gflop_per_s']:7.1f}"
                    )
                    if args.write:
                        keep_row("kernels", {**row, **about})


if __name__ == "__main__":
    main()
