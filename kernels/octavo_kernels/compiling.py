"""Compiles many launches at once in other processes; knows launches, no op.

Triton compiles one kernel at a time per process. Every process here fills Triton's disk cache, from
which the launch then takes its machine code in milliseconds. Nothing here needs a device: the
capability says what to build for.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from octavo_kernels.device import shared_bytes_of
from octavo_kernels.launch import Launch, compiling_for

_WATCH_SECONDS = 0.5
_LAUNCHES_A_PROCESS = 4  # fewer take less time than to import torch and triton


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """The launches that differ in machine code, in order."""
    return list({launch.key: launch for launch in launches}.values())


def compile_all(
    launches: Sequence[Launch],
    *,
    capability: int,
    processes: int | None = None,
    seconds: float = math.inf,
) -> dict[int, str]:
    """Fills Triton's disk cache for `capability` (90 = Hopper); what failed by index, and why.

    Uses `processes` at most (default: one per core). What is not done after `seconds` is in the
    result too. Raises RuntimeError under TRITON_INTERPRET, where there is nothing to compile.
    """
    for launch in launches:
        if not isinstance(launch.kernel, JITFunction):
            raise RuntimeError(f"{launch.name} is interpreted: unset TRITON_INTERPRET to compile")
    wanted = math.ceil(len(launches) / _LAUNCHES_A_PROCESS)
    count = min(wanted, processes or len(os.sched_getaffinity(0)))
    # Neighbours are alike and take alike long, so that every process gets one of each kind.
    shares = [range(start, len(launches), count) for start in range(count)]
    workers = [_Worker([launches[i] for i in share], capability) for share in shares]
    deadline = time.monotonic() + seconds
    failed: dict[int, str] = {}
    try:
        for worker, share in zip(workers, shares, strict=True):
            outcomes = worker.outcomes(deadline)
            for place, index in enumerate(share):
                outcome = outcomes.get(place, worker.why_absent)
                if outcome is not None:
                    failed[index] = outcome
    finally:
        for worker in workers:
            worker.end()
    return failed


def _error_of(launch: Launch, capability: int) -> str | None:
    # Whatever a kernel's compilation raises is its answer: a candidate that does not fit the GPU.
    try:
        needed = launch.compile().metadata.shared
    except Exception as error:
        return f"{type(error).__name__}: {error}".strip()[:500]
    there = shared_bytes_of((capability // 10, capability % 10))
    # What compiles all the same could not be loaded.
    return f"takes {needed} bytes of shared memory, of {there}" if needed > there else None


class _Worker:
    """A process compiling its share; tells each outcome as a line as soon as it is known."""

    def __init__(self, share: Sequence[Launch], capability: int) -> None:
        roots = [str(Path(__file__).parents[1]), *sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "octavo_kernels.compiling", str(capability)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what goes wrong is in the outcome
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, roots))},
        )
        self._lines: list[bytes] = []
        self._is_late = False
        assert self._process.stdin is not None and self._process.stdout is not None
        _dump(list(share), self._process.stdin)
        # Read as they come: a full pipe would stop the process.
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,))
        self._reader.start()

    def _read(self, stdout: Any) -> None:
        self._lines.extend(stdout)

    def outcomes(self, deadline: float) -> dict[int, str | None]:
        """By place in the share: None for compiled, else the error; waits until deadline."""
        left = max(0.0, deadline - time.monotonic())
        self._reader.join(None if math.isinf(left) else left)
        self._is_late = self._reader.is_alive()
        self.end()
        return dict(map(json.loads, self._lines))

    @property
    def why_absent(self) -> str:
        return "no time was left" if self._is_late else "its process ended before"

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class _Pickler(pickle.Pickler):
    """Writes of a tensor only what is compiled for, of a kernel where to find it."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            return _bare_tensor, (obj.dtype,)
        if isinstance(obj, JITFunction):
            return _find_kernel, (obj.fn.__module__, obj.fn.__name__)
        return NotImplemented


def _bare_tensor(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device="meta")


def _find_kernel(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _dump(launches: list[Launch], file: Any) -> None:
    buffer = io.BytesIO()
    _Pickler(buffer).dump(launches)
    try:
        file.write(buffer.getvalue())
        file.close()
    except BrokenPipeError:
        pass  # it ended at once: each of its launches is reported as not compiled


def _end_with_parent(parent: int) -> None:
    """Its pipe cannot tell: nothing is written there while a kernel compiles."""
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(3)


def _main(capability: int, launches: BinaryIO) -> None:
    watch = threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True)
    watch.start()
    for place, launch in enumerate(pickle.load(launches)):
        with compiling_for(capability):
            error = _error_of(launch, capability)
        sys.stdout.write(json.dumps([place, error]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.stdin.buffer)
