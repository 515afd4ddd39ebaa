"""Where a step's time goes on the CPU, kernel by kernel, beside what the machine allows.

    python -m benchmarks.cpu_step [--quantization int8] [--kv-cache-dtype float16] [--write]

Decode steps of some requests, and one prefill chunk. A step is timed as it runs; then again launch
by launch, which adds about a microsecond to each. ``limit`` is what reading the bytes or doing the
arithmetic takes at the rates that `cpu_limits` finds in the same run, and ``x`` how many times that
the launches took. With ``--write`` rows go to benchmarks/results/<machine>/cpu_step.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from benchmarks.cpu_limits import Limits, measure
from benchmarks.launch_watch import Launch, LaunchWatch, watching
from benchmarks.machine import keep_row, passport
from benchmarks.processes import OtherCores
from benchmarks.step_work import Matrices, Shape, StepWork, Work
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from octavo.models import Model
from octavo.types import NewRequest, SamplingParams, SchedulerOutput
from octavo.worker import startup
from octavo.worker.worker import build_worker

_UNTIMED_STEPS = 3  # at first: a recording is made, memory is touched
_GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """All launches of one label in a step."""

    label: str
    calls: int
    ms: float
    work: Work

    def limit_ms(self, limits: Limits) -> float:
        work = self.work
        return limits.least_ms(work.num_bytes, work.num_ops, is_int8=work.is_int8)

    def row(self, limits: Limits) -> dict[str, Any]:
        seconds = self.ms / 1e3
        return {
            "label": self.label,
            "calls": self.calls,
            "ms": round(self.ms, 4),
            "mbytes": round(self.work.num_bytes / 1e6, 3),
            "gb_s": round(self.work.num_bytes / seconds / 1e9, 2),
            "gop_s": round(self.work.num_ops / seconds / 1e9, 1),
            "limit_ms": round(self.limit_ms(limits), 4),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One kind of step: as it runs, and its launches by label, the longest first."""

    name: str
    step_ms: float
    least_ms: float
    watched_ms: float
    entries: tuple[Entry, ...]

    @property
    def kernels_ms(self) -> float:
        return sum(entry.ms for entry in self.entries)

    def limit_ms(self, limits: Limits) -> float:
        return sum(entry.limit_ms(limits) for entry in self.entries)

    def rows(self, limits: Limits) -> list[dict[str, Any]]:
        whole = {
            "label": "step",
            "ms": round(self.step_ms, 4),
            "least_ms": round(self.least_ms, 4),
            "kernels_ms": round(self.kernels_ms, 4),
            "watched_ms": round(self.watched_ms, 4),
            "limit_ms": round(self.limit_ms(limits), 4),
        }
        rows = (whole, *(entry.row(limits) for entry in self.entries))
        return [{"step": self.name, **row} for row in rows]

    def text(self, limits: Limits) -> str:
        lines = [
            f"{self.name}: step {self.step_ms:.2f} ms (least {self.least_ms:.2f}), "
            f"kernels {self.kernels_ms:.2f}, limit {self.limit_ms(limits):.2f}",
            f"  {'launches':44}{'calls':>6}{'ms':>8}{'MB':>8}{'GB/s':>7}{'GOP/s':>8}"
            f"{'limit':>8}{'x':>6}",
        ]
        for entry in self.entries:
            row, limit = entry.row(limits), entry.limit_ms(limits)
            times = f"{entry.ms / limit:6.1f}" if limit else f"{'-':>6}"
            lines.append(
                f"  {entry.label:44}{entry.calls:6}{entry.ms:8.3f}{row['mbytes']:8.2f}"
                f"{row['gb_s']:7.1f}{row['gop_s']:8.1f}{limit:8.3f}{times}"
            )
        others = self.step_ms - self.kernels_ms
        lines.append(f"  {'the step less its launches, as timed one by one':50}{others:8.3f}")
        return "\n".join(lines)


def summed(
    steps: Sequence[Sequence[Launch]],
    shapes: Sequence[Shape],
    work_of: Callable[[str, Sequence[int | float], Shape], tuple[str, Work]],
) -> tuple[Entry, ...]:
    """Launches of like steps by label: the median of a step's time, the middle step's work."""
    seconds: dict[str, list[float]] = defaultdict(list)
    work: dict[str, Work] = {}
    calls: dict[str, int] = {}
    middle = len(steps) // 2
    for index, (launches, shape) in enumerate(zip(steps, shapes, strict=True)):
        spent: dict[str, float] = defaultdict(float)
        for launch in launches:
            label, done = work_of(launch.name, launch.args, shape)
            spent[label] += launch.seconds
            if index == middle:
                work[label] = work.get(label, Work()) + done
                calls[label] = calls.get(label, 0) + 1
        for label, value in spent.items():
            seconds[label].append(value)
    entries = [
        Entry(
            label=label,
            calls=calls[label],
            ms=statistics.median(seconds[label]) * 1e3,
            work=done,
        )
        for label, done in work.items()
    ]
    return tuple(sorted(entries, key=lambda entry: -entry.ms))


class Bench:
    """A worker's runner over made-up requests, watched."""

    def __init__(self, config: EngineConfig, watch: LaunchWatch) -> None:
        self._watch = watch
        models: list[Model] = []
        load_model = startup.load_model

        def load(*args: Any, **options: Any) -> Model:
            models.append(load_model(*args, **options))
            return models[0]

        with mock.patch.object(startup, "load_model", load):
            self._executor, self.info = build_worker(config)
        itemsize = getattr(torch, self.info.kv_cache_dtype).itemsize
        self._work = StepWork(Matrices(models[0]), models[0].spec, cache_itemsize=itemsize)

    def _execute(self, step: SchedulerOutput) -> None:
        self._executor.submit(step)
        failed = self._executor.collect().errors
        assert not failed, failed

    def close(self) -> None:
        self._executor.close()

    def _request(self, number: int, *, length: int, room: int) -> NewRequest:
        """One of `length` prompt tokens, in blocks of its own for `room` tokens."""
        blocks = -(-room // self.info.block_size)
        return NewRequest(
            request_id=f"r{number}",
            token_ids=tuple((7 * number + i) % 40_000 + 10 for i in range(length)),
            num_prompt_tokens=length,
            num_computed_tokens=0,
            block_ids=tuple(range(number * blocks, (number + 1) * blocks)),
            params=_GREEDY,
        )

    def decode(self, batch: int, *, context: int, reps: int) -> Profile:
        """Steps of one token a request, from ``context`` tokens on."""
        room = context + 2 * reps + _UNTIMED_STEPS + 2
        requests = [self._request(i, length=context, room=room) for i in range(batch)]
        ids = {request.request_id: 1 for request in requests}
        for request in requests:
            whole = {request.request_id: context}
            self._execute(
                SchedulerOutput(step=0, new_requests=(request,), num_scheduled_tokens=whole)
            )

        def steps() -> Iterator[tuple[SchedulerOutput, Shape]]:
            for end in range(context + 1, room):
                shape = Shape(counts=(1,) * batch, contexts=(end,) * batch)
                yield SchedulerOutput(step=0, num_scheduled_tokens=ids), shape

        profile = self._profile(f"decode {batch} x {context}", steps(), reps)
        self._execute(SchedulerOutput(step=0, finished_request_ids=tuple(ids)))
        return profile

    def prefill(self, length: int, *, reps: int) -> Profile:
        """Whole prompts, one a step."""

        def steps() -> Iterator[tuple[SchedulerOutput, Shape]]:
            gone: tuple[str, ...] = ()
            while True:
                request = self._request(0, length=length, room=length + 1)
                request = dataclasses.replace(
                    request, request_id="even" if gone == ("odd",) else "odd"
                )
                step = SchedulerOutput(
                    step=0,
                    new_requests=(request,),
                    num_scheduled_tokens={request.request_id: length},
                    finished_request_ids=gone,
                )
                gone = (request.request_id,)
                yield step, Shape(counts=(length,), contexts=(length,))

        made = steps()
        profile = self._profile(f"prefill {length}", made, reps)
        last = next(made)[0].finished_request_ids
        self._execute(SchedulerOutput(step=0, finished_request_ids=last))
        return profile

    def _profile(
        self, name: str, steps: Iterator[tuple[SchedulerOutput, Shape]], reps: int
    ) -> Profile:
        def run(*, is_timing: bool) -> tuple[float, list[Launch], Shape]:
            step, shape = next(steps)
            self._watch.is_timing = is_timing
            began = time.perf_counter()
            self._execute(step)
            seconds = time.perf_counter() - began
            self._watch.is_timing = False
            return seconds, self._watch.take(), shape

        for _ in range(_UNTIMED_STEPS):
            run(is_timing=False)
        plain, watched = [], []
        for _ in range(reps):  # in turns: what disturbs one disturbs the other
            plain.append(run(is_timing=False)[0])
            watched.append(run(is_timing=True))
        seconds, launches, shapes = zip(*watched, strict=True)
        return Profile(
            name=name,
            step_ms=statistics.median(plain) * 1e3,
            least_ms=min(plain) * 1e3,
            watched_ms=statistics.median(seconds) * 1e3,
            entries=summed(launches, shapes, self._work.of),
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="as octavo serve takes it; the default model without")
    add("--load-format", default="auto", choices=("auto", "dummy"))
    add("--quantization", help="the default of octavo serve without")
    add("--kv-cache-dtype", help="likewise")
    add("--threads", type=int)
    add("--batches", default="1,16,32", help="requests of a decode step")
    add("--context", type=int, default=192, help="tokens that a request has before it")
    add("--chunk", type=int, default=256, help="tokens of the prefill chunk; 0 leaves it out")
    add("--reps", type=int, default=30)
    add("--write", action="store_true", help="append rows to benchmarks/results")
    return parser


def _config(args: argparse.Namespace) -> EngineConfig:
    model = {
        "model": args.model,
        "load_format": args.load_format,
        "quantization": args.quantization,
        "num_threads": args.threads,
    }
    cache = {"kv_cache_dtype": args.kv_cache_dtype}
    batches = max(map(int, args.batches.split(",")))
    return EngineConfig(
        model=ModelConfig(**{k: v for k, v in model.items() if v is not None}),
        cache=CacheConfig(**{k: v for k, v in cache.items() if v is not None}),
        scheduler=SchedulerConfig(max_num_seqs=max(batches, 32), async_scheduling=False),
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    config = _config(args)
    threads = startup.set_threads(args.threads)
    limits = measure(threads=threads)
    clock = OtherCores()
    with watching() as watch:
        bench = Bench(config, watch)
        profiles = [
            bench.decode(int(batch), context=args.context, reps=args.reps)
            for batch in args.batches.split(",")
        ]
        if args.chunk:
            profiles.append(bench.prefill(args.chunk, reps=max(3, args.reps // 3)))
        bench.close()
    limits = limits.best_of(measure(threads=threads))  # a neighbour may have spoilt the first
    about = {
        **passport(),
        "model": bench.info.model,
        "quantization": bench.info.quantization,
        "kv_cache_dtype": bench.info.kv_cache_dtype,
        **{f"limit_{key}": value for key, value in dataclasses.asdict(limits).items()},
        "other_cores": clock.busy(),
    }
    print(f"{about['model']}, {about['quantization']}, K/V {about['kv_cache_dtype']}")
    print(
        f"limits, {threads} threads: read {limits.read_gb_s} GB/s ({limits.read_one_gb_s} one), "
        f"int8 {limits.int8_gop_s:.0f} GOP/s, fp32 {limits.fp32_gop_s:.0f} GFLOP/s ({limits.path});"
        f" others kept {about['other_cores']:.2f} cores busy"
    )
    for profile in profiles:
        print(f"\n{profile.text(limits)}")
        for row in profile.rows(limits) if args.write else ():
            keep_row("cpu_step", {**about, **row})


if __name__ == "__main__":
    main()
