"""Times every kernel on the shapes of its spec, beside its baselines. Knows no particular op.

Run: ``python -m benchmarks.bench_kernels [--device cuda] [--op NAME] [--dtype DTYPE]
[--match TEXT] [--list] [--write]``. An op is tested first and not timed when red. With ``--write``
rows go to benchmarks/results/<machine>/kernels.jsonl. On a GPU calls are captured into CUDA graphs
on one set of inputs, which stay in L2 where they fit; `gpu_suite` times them cold.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from benchmarks.machine import keep_row, passport
from octavo_kernels import num_threads, set_num_threads
from octavo_kernels.benchmarking import Timing, assert_green, time_case
from octavo_kernels.op import Case, OpSpec, all_specs

Work = tuple[OpSpec, torch.dtype, list[Case]]


def row_of(spec: OpSpec, case: Case, dtype: torch.dtype, timing: Timing) -> dict[str, Any]:
    bytes_moved, flops = spec.bytes_moved(case, dtype.itemsize), spec.flops(case)
    return {
        "name": spec.name,
        "case": case.name,
        **case.items,
        "dtype": str(dtype).removeprefix("torch."),
        "contender": timing.contender,
        "calls": timing.calls,
        "median_us": round(timing.median_s * 1e6, 2),
        "p10_us": round(timing.p10_s * 1e6, 2),
        "p90_us": round(timing.p90_s * 1e6, 2),
        "gb_per_s": round(bytes_moved / timing.median_s / 1e9, 2),
        "gflop_per_s": round(flops / timing.median_s / 1e9, 2),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.bench_kernels")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--op", help="only this op")
    parser.add_argument("--dtype", help="only this dtype, e.g. float32")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--threads", type=int, help="kernel and torch threads (default: all cores)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--list", action="store_true", help="say what would be timed, no more")
    parser.add_argument("--write", action="store_true", help="append rows to benchmarks/results")
    return parser


def _passport(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {**passport(), "threads": num_threads()}
    from benchmarks.gpu_recorder import gpu_passport  # late: a CPU-only install has no triton

    return gpu_passport()


def _chosen(specs: Iterable[OpSpec], args: argparse.Namespace) -> list[Work]:
    """Ops in one dtype with the cases to time; those of none are left out."""
    found = []
    for spec in specs:
        cases = [case for case in spec.bench_cases if args.match in case.name]
        for dtype in spec.tolerance:
            if cases and args.dtype in (None, str(dtype).removeprefix("torch.")):
                found.append((spec, dtype, cases))
    return found


def _time(work: Work, args: argparse.Namespace, about: dict[str, Any]) -> None:
    spec, dtype, cases = work
    assert_green(spec, dtype, device=args.device)
    for case in cases:
        for timing in time_case(spec, case, dtype, device=args.device, rounds=args.rounds):
            row = {**row_of(spec, case, dtype, timing), **about}
            what = f"{spec.name} {case.name} {row['dtype']} {row['contender']}"
            print(
                f"{what:60} {row['median_us']:10.1f} {row['p10_us']:9.1f}"
                f" {row['p90_us']:9.1f} {row['gb_per_s']:7.1f} {row['gflop_per_s']:7.1f}",
                flush=True,
            )
            if args.write:
                keep_row("kernels", row)


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    on_gpu = args.device == "cuda"
    known = all_specs("gpu_spec" if on_gpu else "spec")
    specs = [spec for spec in known if args.op in (None, spec.name)]
    if not specs:
        parser.error(f"no op {args.op!r}; there are {[spec.name for spec in known]}")
    todo = _chosen(specs, args)
    if args.list:
        for spec, dtype, cases in todo:
            print(spec.name, str(dtype).removeprefix("torch."), *(case.name for case in cases))
        return
    if on_gpu and not torch.cuda.is_available():
        parser.error("no CUDA device: nothing can be timed (--list says what would be)")
    if args.threads:
        set_num_threads(args.threads)
        torch.set_num_threads(args.threads)
    about = _passport(args.device)
    head = f"{'op case dtype contender':60} {'median us':>10} {'p10':>9} {'p90':>9}"
    print(head, f"{'GB/s':>7} GFLOP/s")
    for work in todo:
        _time(work, args, about)


if __name__ == "__main__":
    main()
