"""Compiles kernels in several processes at once while the server loads; knows names and durations.

The first start on a machine needs 20 s of compilation, and numba compiles one function at a time
per process. Every process here keeps its share in the cache, where the server then finds it. All
of this only saves time: what they leave undone is compiled by whoever needs it.
"""

from __future__ import annotations

import logging
import math
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import octavo_kernels
from octavo_kernels import parallel
from octavo_kernels.machine_code import is_any_writable
from octavo_kernels.parallel import Kernel

if TYPE_CHECKING:
    from octavo_kernels.quant_matmul.blocks import Kind

_log = logging.getLogger("octavo_kernels.precompile")  # not __name__, which may be __main__

# Seconds of compilation by the start of the name, measured on a 2.6 GHz Xeon; the order matters
# more than the values.
_SECONDS = {
    "attend": 6.5,
    "sample_rows": 3.4,
    "apply_params": 3.0,
    "logprob_rows": 1.3,
    "matmul": 1.2,
    "make_plan": 1.0,
    "rotate": 0.9,
}
_OTHER_SECONDS = 0.4
_START_SECONDS = 2.0  # of a process that imports torch and numba; less work is not worth one
_LONGEST_SECONDS = 180.0  # that a process may take, and that anyone waits for it


@contextmanager
def precompiled(
    *, weight_dtype: torch.dtype, cache_dtype: torch.dtype, block_kinds: Sequence[Kind] = ()
) -> Iterator[None]:
    """While the block runs, other processes compile what the cache lacks; its end waits for them.

    An exception in the block ends them. Starts none where all is cached, where only one thread
    may be used or where no directory can be written. Never raises by itself.
    """
    needed = octavo_kernels.kernels(
        weight_dtype=weight_dtype, cache_dtype=cache_dtype, block_kinds=block_kinds
    )
    missing = [kernel for kernel in needed if not kernel.is_cached]
    dtypes = [str(dtype).removeprefix("torch.") for dtype in (weight_dtype, cache_dtype)]
    numbers = [*dtypes, ",".join(block_kinds)]
    deadline = time.monotonic() + _LONGEST_SECONDS
    processes = _start(missing, numbers) if missing else []
    try:
        yield
        if processes:
            parallel.warm()  # compiled here, in time that is spent waiting anyway
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            if process.returncode != 0:
                code = process.returncode  # None: it still runs
                _log.info("a process that compiled kernels ended early (exit code %s)", code)
    finally:
        for process in processes:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


def _seconds(kernel: Kernel) -> float:
    name = kernel.name.rpartition(".")[2]
    return next((s for start, s in _SECONDS.items() if name.startswith(start)), _OTHER_SECONDS)


def _shares(kernels: Sequence[Kernel], count: int) -> list[list[Kernel]]:
    """At most `count` lists of about equal duration, the longest kernel of each first."""
    shares: list[list[Kernel]] = [[] for _ in range(min(count, len(kernels)))]
    for kernel in sorted(kernels, key=_seconds, reverse=True):
        min(shares, key=lambda share: sum(map(_seconds, share))).append(kernel)
    return shares


def _start(missing: Sequence[Kernel], numbers: Sequence[str]) -> list[subprocess.Popen[bytes]]:
    durations = [_seconds(kernel) for kernel in missing]
    total = sum(durations)
    # More processes would only wait for the longest kernel.
    count = min(octavo_kernels.num_threads(), math.ceil(total / max(durations)))
    is_kept = is_any_writable()
    is_worth_it = is_kept and count > 1 and total >= _START_SECONDS
    shares = _shares(missing, count) if is_worth_it else []
    longest = max((sum(map(_seconds, share)) for share in shares), default=total)
    if total >= _START_SECONDS:
        _log.info(
            "compiling CPU kernels for this machine, %s: about %.0f s",
            "once" if is_kept else "at every start since no cache directory can be written",
            longest + (_START_SECONDS if shares else 0),
        )
    processes = []
    for share in shares:
        try:
            processes.append(_launch([*numbers, *(kernel.name for kernel in share)]))
        except OSError as error:
            _log.info("no process could be started to compile kernels: %s", error)
            break
    return processes


def _launch(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    roots = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-m", "octavo_kernels.precompile", *arguments],
        # A pipe that nobody writes to: the system closes it however this process ends.
        stdin=subprocess.PIPE,
        # What goes wrong there goes wrong here again, where it is shown.
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, roots))},
        start_new_session=True,  # Ctrl-C is for the parent to understand
    )


def _end_with_parent() -> None:
    select.select([0], [], [], _LONGEST_SECONDS)
    os._exit(3)


def main(arguments: Sequence[str]) -> None:
    """Compiles and keeps kernels: weight dtype, cache dtype, kinds of blocks with commas between,
    then the kernels' names, in order."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    weight_dtype, cache_dtype = (getattr(torch, name) for name in arguments[:2])
    kinds: Any = tuple(filter(None, arguments[2].split(",")))
    known = octavo_kernels.kernels(
        weight_dtype=weight_dtype, cache_dtype=cache_dtype, block_kinds=kinds
    )
    by_name = {kernel.name: kernel for kernel in known}
    for name in arguments[3:]:
        assert by_name[name].address


if __name__ == "__main__":
    main(sys.argv[1:])
