"""The server on a GPU over HTTP, beside its own engine offline: streams of a small model.

The load client is `benchmarks.http_load`, a process of its own. Where a package of the HTTP side is
missing, the row says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.engine_figures import figure
from benchmarks.model_shapes import CONFIGS, write_config
from benchmarks.offline_engine import OfflineEngine, Workload

if TYPE_CHECKING:
    from benchmarks.gpu_recorder import Recorder

NEEDED = ("fastapi", "uvicorn", "pydantic", "msgspec", "zmq", "tokenizers")
_START_TIMEOUT_S = 120.0
Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is sent."""

    levels: tuple[tuple[int, int], ...]  # streams, requests in all
    input_len: int
    output_len: int
    options: tuple[str, ...]  # of server and engine, as flags and numbers by turns
    flags: tuple[str, ...] = ()  # of the server alone


_FULL = Load(
    levels=((1, 4), (64, 256), (256, 768)),
    input_len=256,
    output_len=256,
    options=("--max-model-len", "2048"),
)
_TINY = Load(
    levels=((1, 1), (2, 3)),
    input_len=6,
    output_len=2,
    options=("--max-model-len", "64", "--max-num-seqs", "4", "--max-num-batched-tokens", "32"),
)


def run_serving(recorder: Recorder, *, is_short: bool) -> None:
    from benchmarks.gpu_engine import compile_kernels, keep_rows

    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        why = f"{', '.join(absent)} not installed"
        recorder.keep({"op": "HTTP", "case": "0.6B 49k", "skipped": why})
        return
    compile_kernels(recorder, "0.6B 49k")
    keep_rows(recorder, "gpu_serving", "all", "--shape", "0.6B 49k")


def measure_offline(shape: str, folder: Path, emit: Emit, *, load: Load) -> None:
    """The engine's own rate at the highest level."""
    streams, count = load.levels[-1]
    names = [name.removeprefix("--").replace("-", "_") for name in load.options[::2]]
    options = dict(zip(names, map(int, load.options[1::2]), strict=True))
    engine = OfflineEngine(folder, **options)
    engine.capture_all()
    rng = random.Random(0)
    vocab = engine.info.vocab_size
    prompts = [tuple(rng.randrange(2, vocab) for _ in range(load.input_len)) for _ in range(count)]
    lens = [load.output_len] * count
    engine.run(Workload(name="warm", prompts=prompts[:streams], output_lens=lens[:streams]))
    # All requests are there at once and max_num_seqs of them run, as with so many streams.
    workload = Workload(name="offline", prompts=prompts, output_lens=lens)
    rate = workload.num_tokens / engine.run(workload)
    engine.close()
    emit(figure("offline", f"{shape}, {streams} streams", rate, "tok/s"))


def measure_http(shape: str, folder: Path, emit: Emit, *, load: Load, offline: float) -> None:
    """Tokens a second at each level, its share of the offline rate, TTFT and ITL."""
    with _serving(folder, load, shape, emit) as port:
        for streams, count in load.levels:
            # The first time at a level captures graphs; what is measured is the second.
            for is_measured in (False, True):
                row = _send(port, load, CONFIGS[shape]["vocab_size"], streams, count, is_measured)
            case = f"{shape}, {streams} stream{'s' if streams > 1 else ''}"
            emit(figure("HTTP", case, row["out_tok_per_s"], "tok/s", load=row))
            emit(figure("HTTP TTFT p99", case, row["ttft_p99_ms"], "ms", p50=row["ttft_p50_ms"]))
            emit(figure("HTTP ITL p99", case, row["itl_p99_ms"], "ms", p50=row["itl_p50_ms"]))
        share = row["out_tok_per_s"] / offline
        emit(figure("HTTP of offline", case, share, "of offline", offline=round(offline, 1)))


@contextmanager
def _serving(folder: Path, load: Load, shape: str, emit: Emit) -> Iterator[int]:
    """The port of a server; its time to ready is a row. Raises RuntimeError if it never is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "octavo", "serve", str(folder), "--load-format", "dummy"]
    command += ["--device", "cuda", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--disable-uvicorn-access-log", *load.options, *load.flags]
    began = time.time()
    # In this process's group, so that it ends with a section that is stopped.
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not _is_ready(port):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with code {process.returncode}")
            if time.time() - began > _START_TIMEOUT_S:
                raise RuntimeError(f"the server was not ready in {_START_TIMEOUT_S:.0f} s")
            time.sleep(0.05)
        emit(figure("HTTP ready", shape, time.time() - began, "s"))
        yield port
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()  # its engine ends with it
            process.wait()


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _send(
    port: int, load: Load, vocab_size: int, streams: int, count: int, is_measured: bool
) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.http_load", "--port", str(port)]
    command += ["--streams", str(streams), "--requests", str(count if is_measured else streams)]
    command += ["--input-len", str(load.input_len), "--output-len", str(load.output_len)]
    command += ["--vocab", str(vocab_size), "--seed", str(2 * streams + is_measured)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the load client failed: {done.stderr[-500:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def _print(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("offline", "all"))
    parser.add_argument("--shape", choices=CONFIGS, required=True)
    parser.add_argument("--began", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    shape = arguments.shape
    load = _TINY if shape == "tiny" else _FULL
    with tempfile.TemporaryDirectory() as name:
        folder = write_config(shape, Path(name))
        if arguments.what == "offline":
            measure_offline(shape, folder, _print, load=load)
            return 0
        # In a process of its own: the GPU is the server's alone afterwards.
        command = [sys.executable, "-m", "benchmarks.gpu_serving", "offline", "--shape", shape]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        _print(row)
        measure_http(shape, folder, _print, load=load, offline=row["value"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
