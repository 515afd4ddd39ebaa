"""What the card allows in this run; every kernel's figure is judged beside these."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable

import torch

from benchmarks.gpu_recorder import Recorder, Rehearsal
from octavo_kernels.compiling import compile_all, distinct
from octavo_kernels.launch import collecting
from octavo_kernels.tune import OnMeta

_GIB = 2**30
_N = 8192


def run_ceilings(recorder: Recorder, *, is_short: bool) -> None:
    seconds = 0.3 if is_short else 1.5
    source = torch.empty(_GIB, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    words = source.view(torch.float32)
    a, b = (torch.randn(_N, _N, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    calls: tuple[tuple[str, str, Callable[[], object], dict[str, float]], ...] = (
        ("copy", "1 GiB", lambda: target.copy_(source), {"bytes_moved": 2.0 * _GIB}),
        ("read", "1 GiB", lambda: words.sum(), {"bytes_moved": _GIB}),
        ("matmul_bf16_8192", "cuBLAS", lambda: torch.mm(a, b), {"flops": 2.0 * _N**3}),
    )
    for op, case, call, amount in calls:
        with recorder.case(op, case):
            recorder.measure_issued(op, case, call, seconds=seconds, **amount)


def run_compile(recorder: Recorder, *, is_short: bool) -> None:
    """Compiles what the other sections will launch, on all cores; a kernel that fails is a row."""
    from benchmarks.gpu_suite import SECTIONS

    with collecting() as found, OnMeta():
        for section in SECTIONS:
            is_left_out = is_short and not section.short_limit_s
            if section.calls_ops and not is_left_out:
                module = importlib.import_module(f"benchmarks.{section.module}")
                try:
                    getattr(module, f"run_{section.name}")(Rehearsal(), is_short=is_short)
                except Exception:  # the section itself will say what is wrong with it
                    traceback.print_exc()
    launches = distinct(found)
    major, minor = torch.cuda.get_device_capability()
    failed = compile_all(launches, capability=10 * major + minor)
    for index, why in failed.items():
        launch = launches[index]
        recorder.num_failed += 1
        recorder.keep({"op": launch.name, "case": "compile", "error": why[:300]})
    print(f"{len(launches)} kernels, {len(failed)} failed")
