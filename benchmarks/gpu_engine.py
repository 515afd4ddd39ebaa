"""The offline engine on a GPU: vLLM's workloads, its start, its idle gaps, and the matrix of bits.

Every engine runs in a process of its own, so that its start is a start and nothing else has used
CUDA: `python -m benchmarks.gpu_engine workloads --shape 8B` prints its rows, a JSON object a line.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.engine_bits import measure_bits
from benchmarks.engine_figures import figure
from benchmarks.model_shapes import CONFIGS, write_config
from benchmarks.offline_engine import OfflineEngine, Workload, workloads
from octavo.types import SamplingParams

if TYPE_CHECKING:
    from benchmarks.gpu_recorder import Recorder

Emit = Callable[[dict[str, Any]], None]
_OPTIONS = {"max_model_len": 4096, "max_num_seqs": 256}
_PROFILED_STEPS = 20
_TINY_SHRINK = 128  # of lengths and counts, for the shape "tiny"


def run_engine_8b(recorder: Recorder, *, is_short: bool) -> None:
    compile_kernels(recorder, "8B")
    keep_rows(recorder, "gpu_engine", "workloads", "--shape", "8B", *_short(is_short))


def run_engine_06b(recorder: Recorder, *, is_short: bool) -> None:
    compile_kernels(recorder, "0.6B")
    keep_rows(recorder, "gpu_engine", "workloads", "--shape", "0.6B", *_short(is_short))
    if not is_short:
        keep_rows(recorder, "gpu_engine", "text", "--shape", "0.6B")


def run_bits(recorder: Recorder, *, is_short: bool) -> None:
    compile_kernels(recorder, "0.6B")
    keep_rows(recorder, "gpu_engine", "bits", "--shape", "0.6B", *_short(is_short))


def _short(is_short: bool) -> list[str]:
    return ["--short"] if is_short else []


def compile_kernels(recorder: Recorder, shape: str) -> None:
    """Fills Triton's cache, as an image with `octavo compile` has it: starts are measured with it.

    What that takes, which is little where the kernels are there already, is a row.
    """
    import torch

    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = write_config(shape, Path(name))
        command = [sys.executable, "-m", "octavo", "compile", str(folder), "--arch", arch]
        done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout, done.stderr, flush=True)
    row = figure("octavo compile", shape, time.monotonic() - began, "s", arch=arch)
    if done.returncode:
        recorder.num_failed += 1
        row["error"] = done.stderr[-300:]
    recorder.keep(row)


def keep_rows(recorder: Recorder, module: str, *words: str) -> None:
    """Runs a module of benchmarks and keeps the rows it prints, as they come; its failure is a
    row too."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *words, "--began", str(time.time())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"op"'):
                row = json.loads(line)
                recorder.num_failed += "error" in row
                recorder.keep(row)
            else:
                print(line, end="", flush=True)
    if process.returncode:
        recorder.num_failed += 1
        error = f"exit status {process.returncode}"
        recorder.keep({"op": words[0], "case": " ".join(words[1:]), "error": error})


# ---- the process of one engine -----------------------------------------------------------------


def measure_workloads(
    shape: str, folder: Path, emit: Emit, *, began: float, is_short: bool
) -> None:
    """Start-up, workloads, idle gaps and memory. ``began``: the process's, by `time.time`."""
    shrink = _TINY_SHRINK if shape == "tiny" else 1
    options = {**_OPTIONS, "max_model_len": 256, "max_num_seqs": 8} if shrink > 1 else _OPTIONS
    engine = OfflineEngine(folder, **options)
    phases = dict(engine.info.phases)
    emit(figure("start", f"{shape}, ready", time.time() - began, "s", phases=phases))
    engine.answer([(2, 3, 4)], [SamplingParams(max_tokens=1, temperature=0.0)])
    emit(figure("start", f"{shape}, first token", time.time() - began, "s"))
    captured = engine.capture_all()
    emit(figure("start", f"{shape}, all graphs", time.time() - began, "s", graphs=captured))
    todo = workloads(engine.info.vocab_size, shrink=shrink, is_short=is_short)
    engine.run(todo[1])  # whatever is slow once
    for workload in todo:
        emit(_workload_row(shape, engine, workload))
    for batch in (1, 256):
        emit(_idle_row(shape, engine, batch=min(batch, engine.info.max_num_seqs)))
    compiles = engine.counts.get("kernel_compiles", 0)
    emit(figure("compiles after ready", shape, compiles, "compiles", counts=engine.counts))
    emit(_memory_row(shape, engine))
    engine.close()


def _workload_row(shape: str, engine: OfflineEngine, workload: Workload) -> dict[str, Any]:
    before = dict(engine.counts)
    seconds = [engine.run(workload) for _ in range(workload.times)]
    done = {name: number - before.get(name, 0) for name, number in engine.counts.items()}
    rate = workload.num_tokens / statistics.median(seconds)
    return figure(
        "engine",
        f"{shape}, {workload.name}",
        rate,
        "tok/s",
        seconds=[round(each, 3) for each in seconds],
        requests=len(workload.prompts),
        counts=done,
    )


def _idle_row(shape: str, engine: OfflineEngine, *, batch: int) -> dict[str, Any]:
    """Milliseconds a step in which the GPU does nothing, while ``batch`` requests decode; with the
    kernels of a step and their microseconds."""
    import torch

    case = f"{shape}, {batch} running"
    if not torch.cuda.is_available():
        return {"op": "idle between steps", "case": case, "skipped": "no CUDA device"}
    engine.core.reset_prefix_cache()
    for number in range(batch):
        prompt = tuple(2 + (number + i) % 200 for i in range(128))
        engine.add(prompt, SamplingParams(max_tokens=96, temperature=0.0, ignore_eos=True))
    for _ in range(24):  # prompts are computed, and steps overlap
        engine.step()
    for num_steps in (2, _PROFILED_STEPS):  # the first time the profiler is slow to begin
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(num_steps):
                engine.step()
            torch.cuda.synchronize()
    while engine.core.has_work:
        engine.step()
    found = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type.name == "CUDA"
    ]
    idle, longest, span = idle_time([(start, end) for _, start, end in found])
    return figure(
        "idle between steps",
        case,
        idle / _PROFILED_STEPS / 1e3,
        "ms",
        longest_gap_us=round(longest, 1),
        step_us=round(span / _PROFILED_STEPS, 1),
        kernels_a_step=round(len(found) / _PROFILED_STEPS, 1),
        us_a_step=_largest(found),
    )


def idle_time(intervals: Iterable[tuple[float, float]]) -> tuple[float, float, float]:
    """Of a device that was busy in these intervals: time idle between the first and the last,
    the longest gap, and the whole time."""
    ordered = sorted(intervals)
    if not ordered:
        return 0.0, 0.0, 0.0
    idle = longest = 0.0
    first, busy_until = ordered[0]
    for start, end in ordered:
        gap = max(0.0, start - busy_until)
        idle, longest = idle + gap, max(longest, gap)
        busy_until = max(busy_until, end)
    return idle, longest, busy_until - first


def _largest(found: Iterable[tuple[str, float, float]], *, count: int = 12) -> dict[str, float]:
    """Microseconds a step of the kernels that take most."""
    times: dict[str, float] = {}
    for name, start, end in found:
        times[name] = times.get(name, 0.0) + (end - start) / _PROFILED_STEPS
    most = sorted(times.items(), key=lambda item: -item[1])[:count]
    return {name: round(time, 1) for name, time in most}


def _memory_row(shape: str, engine: OfflineEngine) -> dict[str, Any]:
    """What the process has taken of the GPU at most, beside the plan."""
    import torch

    from octavo.worker.gpu.memory_plan import plan_gpu_memory

    if not torch.cuda.is_available():
        return {"op": "memory", "case": shape, "skipped": "no CUDA device"}
    free, total = torch.cuda.mem_get_info()
    plan = plan_gpu_memory(engine.spec, engine.config, total_bytes=total)
    gib = 2**30
    return figure(
        "memory",
        shape,
        (total - free) / gib,
        "GiB in use",
        planned=round(plan.used_bytes / gib, 3),
        usable=round(plan.usable_bytes / gib, 3),
        reserved=round(torch.cuda.max_memory_reserved() / gib, 3),
        beside_torch=round((total - free - torch.cuda.memory_reserved()) / gib, 3),
        parts={part.name: round(part.num_bytes / gib, 3) for part in plan.parts},
    )


def measure_text(shape: str, folder: Path, emit: Emit) -> None:
    """The mixed workload through `octavo.LLM`, which makes text of every token."""
    from octavo.llm import LLM

    shrink = _TINY_SHRINK if shape == "tiny" else 1
    options = {**_OPTIONS, "max_model_len": 256, "max_num_seqs": 8} if shrink > 1 else _OPTIONS
    llm = LLM(str(folder), load_format="dummy", device="cuda", **options)
    while llm._core.use_idle_time():
        pass
    workload = workloads(llm.info.vocab_size, shrink=shrink)[-1]
    params = [
        {"max_tokens": length, "temperature": 0.0, "ignore_eos": True}
        for length in workload.output_lens
    ]
    llm.generate(list(workload.prompts[:2]), params[:2])
    llm.reset_prefix_cache()
    began = time.perf_counter()
    generations = llm.generate(list(workload.prompts), params)
    seconds = time.perf_counter() - began
    assert sum(len(each.token_ids) for each in generations) == workload.num_tokens
    case = f"{shape}, {workload.name}, with text"
    emit(figure("LLM", case, workload.num_tokens / seconds, "tok/s", seconds=round(seconds, 3)))


def _print(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("workloads", "text", "bits"))
    parser.add_argument("--shape", choices=CONFIGS, required=True)
    parser.add_argument("--short", action="store_true", help="fewer workloads")
    parser.add_argument("--began", type=float, default=time.time(), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    shape, is_short = arguments.shape, arguments.short
    with tempfile.TemporaryDirectory() as name:
        folder = write_config(shape, Path(name))
        if arguments.what == "workloads":
            measure_workloads(shape, folder, _print, began=arguments.began, is_short=is_short)
        elif arguments.what == "text":
            measure_text(shape, folder, _print)
        else:
            measure_bits(shape, folder, _print, is_short=is_short)
        gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
