"""Host time of a GPU engine's turn, part by part, on a device that takes no time. Needs no GPU.

Run: ``python -m benchmarks.bench_gpu_host [--write]``. A turn is what the engine's process does
between two steps: take messages, schedule, launch, collect, update, encode and send. Kernels are
dropped and graphs replay nothing (`benchmarks.fake_gpu`), so what CUDA's own calls take (two
copies, two graph launches and three events a step; each kernel of an eager step) comes on top.
Arrivals come over the socket, as they do in a server.

Times are of the thread's own work (`time.thread_time`): nothing in a turn waits, and what other
processes do on the machine counts for little. ``wall_us`` is the turn by the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from unittest.mock import patch

import msgspec
import torch
import zmq

from benchmarks.fake_gpu import FakeEngine, fake_engine, no_kernels, spec_of
from benchmarks.machine import keep_row, passport
from octavo.engine import ipc
from octavo.engine.core import EngineCore
from octavo.models.decoder import Decoder
from octavo.scheduler.scheduler import Scheduler
from octavo.types import EngineRequest, SamplingParams
from octavo.worker.gpu.graphs import StepGraphs
from octavo.worker.gpu.prefix_sharing import PrefixSharing
from octavo.worker.gpu.runner import GpuRunner
from octavo.worker.gpu.sampler import GpuSampler
from octavo.worker.gpu.table import GpuRequestTable
from octavo.worker.gpu.upload import HostBatch, Upload
from octavo_kernels.launch import collecting

# A part is the time in these less that in the parts within them.
PARTS: tuple[tuple[str, object, tuple[str, ...]], ...] = (
    ("receive", ipc.EngineEnd, ("receive",)),
    ("add", EngineCore, ("add_request",)),
    ("schedule", Scheduler, ("schedule",)),
    ("table", GpuRequestTable, ("apply", "batch")),
    ("stage", HostBatch, ("fill",)),
    ("stage", GpuSampler, ("is_plain", "stage")),
    ("stage", PrefixSharing, ("stage",)),
    ("upload", Upload, ("send",)),
    ("graphs", StepGraphs, ("forward_key", "sampling_key", "replay", "after_launch")),
    ("forward", Decoder, ("forward",)),
    ("sample", GpuSampler, ("launch", "launch_plain")),
    ("fetch", GpuSampler, ("fetch",)),
    ("launch", GpuRunner, ("launch",)),
    ("read", GpuSampler, ("read",)),
    ("finish", GpuRunner, ("finish",)),
    ("update", Scheduler, ("update",)),
    ("stats", Scheduler, ("stats",)),
    ("encode", ipc, ("encode",)),
    ("send", ipc.EngineEnd, ("send",)),
    ("loop", EngineCore, ("step",)),
)
_CHUNK = 25  # turns in a row with a stopwatch on every part, then as many without any


class Stopwatch:
    """Seconds of a turn's parts. The watch itself costs a turn some 20 us, so that the whole is
    measured without it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for part, owner, names in PARTS:
                for name in names:
                    timed = self._timed(part, getattr(owner, name))
                    stack.enter_context(patch.object(owner, name, timed))
            yield

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        inner, clock = self._inner, time.thread_time

        def timed(*args: Any, **options: Any) -> Any:
            inner.append(0.0)
            began = clock()
            try:
                return function(*args, **options)
            finally:
                took = clock() - began
                self.seconds[part] = self.seconds.get(part, 0.0) + took - inner.pop()
                inner[-1] += took

        return timed


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Requests that decode, and what else happens in a step."""

    name: str
    running: int
    params: SamplingParams = field(
        default_factory=lambda: SamplingParams(max_tokens=1 << 20, ignore_eos=True)
    )
    prompt_len: int = 64
    comes: tuple[int, int] | None = None  # prompt and output length of one more request a step
    shape: str = "0.6B"
    is_eager: bool = False
    largest_step: int = 4096 + 256
    max_model_len: int = 8192


def _cases() -> Iterator[Case]:
    for running in (1, 8, 64, 256):
        yield Case(name="decode", running=running)
    common = Case(name="", running=256)
    yield replace(common, name="logprobs 5", params=replace(common.params, logprobs=5))
    penalties = replace(common.params, repetition_penalty=1.1, presence_penalty=0.5)
    yield replace(common, name="penalties", params=penalties)
    yield replace(common, name="one comes, one ends", running=192, comes=(64, 64))
    yield replace(common, name="a 4096-token prompt", running=255, comes=(4096, 1))
    for shape in ("1B", "8B"):
        for running in (1, 64):
            yield Case(name="decode, eager", running=running, shape=shape, is_eager=True)


@dataclass(slots=True)
class Found:
    """Seconds of turns; those of parts are of other turns than the whole."""

    turns: list[float] = field(default_factory=list)
    walls: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    num_launches: int = 0  # of kernels in an eager step


class _Server:
    """The engine's process as far as a turn goes, with a front end that costs it nothing."""

    def __init__(self, engine: FakeEngine, case: Case, *, address: str) -> None:
        self._core, self._case = engine.core, case
        self._context: zmq.Context[Any] = zmq.Context()
        self._front = ipc.open_socket(self._context, address, bind=True)
        self._end = ipc.EngineEnd([address])
        self._numbers = itertools.count()

    def turn(self) -> tuple[float, float]:
        """Seconds of one turn as in `octavo.engine.process`: of the thread, and by the clock."""
        core, end = self._core, self._end
        wall, began = time.perf_counter(), time.thread_time()
        for message in end.receive(wait=False):
            assert isinstance(message, ipc.AddRequests)
            for request in message.requests:
                core.add_request(request)
        outputs = core.step()
        end.send(ipc.Step(outputs))
        took = time.thread_time() - began, time.perf_counter() - wall
        assert not any(output.error for output in outputs.outputs), outputs.outputs
        with contextlib.suppress(zmq.Again):
            while True:
                self._front.recv(zmq.NOBLOCK)
        return took

    def fill(self) -> None:
        """Adds those that decode, and waits until they do."""
        case = self._case
        # Prompts of all lengths modulo a block: each step gives some of them a new one.
        for number in range(case.running):
            self._core.add_request(self._request(case.prompt_len + number % 16, case.params))
        for _ in range(2 + case.running * (case.prompt_len + 16) // case.largest_step):
            self.turn()

    def send_arrivals(self) -> None:
        if self._case.comes is not None:
            num_in, num_out = self._case.comes
            params = replace(self._case.params, max_tokens=num_out)
            self._front.send(ipc.encode(ipc.AddRequests((self._request(num_in, params),))))

    def _request(self, length: int, params: SamplingParams) -> EngineRequest:
        number = next(self._numbers)
        prompt = tuple((number * 131 + i * 17) % 199 for i in range(length))
        return EngineRequest(
            request_id=f"cmpl-{number:012x}-0", prompt_token_ids=prompt, params=params
        )

    def close(self) -> None:
        self._core.abort([f"cmpl-{i:012x}-0" for i in range(next(self._numbers))])
        while self._core.has_work:
            self._core.step()
        self._core.reset_prefix_cache()
        self._end.close()
        self._front.close(linger=0)
        self._context.term()


def run_case(engine: FakeEngine, case: Case, *, num_turns: int, folder: Path) -> Found:
    """``num_turns`` turns timed as a whole and as many by their parts; inside `no_kernels`."""
    server = _Server(engine, case, address=f"ipc://{folder}/front")
    server.fill()
    found = Found()
    for turn in range(-_CHUNK * 2, 2 * num_turns):
        server.send_arrivals()
        if turn // _CHUNK % 2 == 0:
            took, wall = server.turn()
            if turn >= 0:
                found.turns.append(took)
                found.walls.append(wall)
            continue
        watch = Stopwatch()
        with watch.running():
            server.turn()
        if turn >= 0:
            found.parts.append(watch.seconds)
    if case.is_eager:
        with collecting() as launches:
            server.turn()
        found.num_launches = len(launches)
    server.close()
    return found


def row_of(case: Case, found: Found) -> dict[str, object]:
    def us(seconds: float) -> float:
        return round(seconds * 1e6, 1)

    deciles = quantiles(found.turns, n=100)
    names = dict.fromkeys(part for part, _, _ in PARTS)
    parts = {name: us(median(p.get(name, 0.0) for p in found.parts)) for name in names}
    row: dict[str, object] = {
        "name": "gpu_host.turn",
        "case": case.name,
        "shape": case.shape,
        "running": case.running,
        "turns": len(found.turns),
        "median_us": us(median(found.turns)),
        "p10_us": us(deciles[9]),
        "p90_us": us(deciles[89]),
        "p99_us": us(deciles[98]),
        "wall_us": us(median(found.walls)),
        "parts_us": {name: each for name, each in parts.items() if each},
    }
    if found.num_launches:
        both = parts["forward"] + parts["sample"]
        row |= {
            "launches": found.num_launches,
            "us_per_launch": round(both / found.num_launches, 2),
        }
    return row


def measure(cases: Sequence[Case], *, num_turns: int, folder: Path) -> Iterator[dict[str, object]]:
    """A row for each case; cases of one engine stand together."""

    def needs(case: Case) -> dict[str, Any]:
        return {
            "shape": case.shape,
            "is_eager": case.is_eager,
            "largest_step": case.largest_step,
            "max_model_len": case.max_model_len,
        }

    for need, group in itertools.groupby(cases, key=needs):
        alike = list(group)
        rows = max(case.running + (case.comes is not None) * 64 for case in alike)
        with no_kernels():
            engine = fake_engine(
                spec_of(need["shape"], folder / need["shape"]),
                max_model_len=need["max_model_len"],
                num_blocks=rows * 96 + need["max_model_len"] // 8,
                max_num_seqs=rows,
                max_num_batched_tokens=need["largest_step"],
                enforce_eager=need["is_eager"],
                max_cudagraph_capture_size=min(rows, 512),
            )
            for case in alike:
                yield row_of(case, run_case(engine, case, num_turns=num_turns, folder=folder))
        engine.core.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=400, help="timed turns per case")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--write", action="store_true", help="append rows to benchmarks/results")
    args = parser.parse_args()
    about = {**passport(), "msgspec": msgspec.__version__}
    torch.set_num_threads(1)  # as the engine does
    cases = [case for case in _cases() if args.only in case.name]
    gc.freeze()
    with tempfile.TemporaryDirectory() as name:
        for row in measure(cases, num_turns=args.turns, folder=Path(name)):
            print(
                f"{row['case']}, {row['running']} running ({row['shape']}):"
                f" {row['median_us']} us (p10 {row['p10_us']}, p90 {row['p90_us']},"
                f" wall {row['wall_us']})",
                flush=True,
            )
            for key in ("parts_us", "launches", "us_per_launch"):
                if key in row:
                    print(f"    {key}: {row[key]}", flush=True)
            if args.write:
                keep_row("gpu_host", {**row, **about})


if __name__ == "__main__":
    main()
