"""Measures callables on the GPU and keeps their rows as they come; knows no kernel."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_rows import ceilings_of, read_rows, row_of
from benchmarks.machine import passport
from octavo_kernels.benchmarking import Captured, Issued, timings

Calls = Sequence[Callable[[], Any]]  # on input sets of their own, taken in turn


_ANY = {"median_s": 1e-5, "p10_s": 1e-5, "p90_s": 1e-5}


def gpu_passport() -> dict[str, Any]:
    """What every row says of the machine."""
    device = torch.cuda.get_device_properties()
    return {**passport(), "gpu": device.name, "cuda": torch.version.cuda, "driver": _driver()}


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def times_to_fill(num_bytes: float, *, most: int = 96) -> int:
    """Input sets of num_bytes each of which hardly anything stays in L2, taken in turn.

    Two at least: a set of a few times the cache's size still finds some of itself there.
    """
    l2 = torch.cuda.get_device_properties().L2_cache_size
    return int(min(most, max(2, -(-8 * l2 // max(num_bytes, 1)))))


class Rehearsal:
    """Stands in for a `Recorder`: what would be timed is called once, to be listed and compiled.

    Sections run with it under `OnMeta` and `collecting`, without data and without a device.
    """

    def __init__(self) -> None:
        self.kept: list[tuple[str, str]] = []  # op and case

    @contextmanager
    def case(self, op: str, case: str) -> Iterator[None]:
        yield

    def measure(self, op: str, case: str, calls: Calls, **fields: Any) -> dict[str, Any]:
        calls[0]()
        fields.pop("seconds", None)
        names = fields.pop("baselines", None) or {}
        return self.keep_times(op, case, _ANY, baselines=dict.fromkeys(names, _ANY), **fields)

    def relative_error(self, got: Callable[[], Any], want: Callable[[], Any]) -> float:
        got()
        want()
        return 0.0

    def keep_times(
        self, op: str, case: str, seconds: Mapping[str, float], **fields: Any
    ) -> dict[str, Any]:
        self.kept.append((op, case))
        return row_of(op, case, seconds, **fields)


class Recorder:
    """Appends rows to a file; a case that fails is a row with its error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.about = gpu_passport()
        self.ceilings = ceilings_of(read_rows(path))
        self.num_failed = 0

    def keep(self, row: Mapping[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({**row, **self.about}) + "\n")
        print({k: v for k, v in row.items() if k not in self.about}, flush=True)

    @contextmanager
    def case(self, op: str, case: str) -> Iterator[None]:
        """What fails inside becomes a row; an error of the device itself ends the section."""
        try:
            yield
            torch.cuda.synchronize()
        except Exception as error:
            self.num_failed += 1
            traceback.print_exc()
            self.keep({"op": op, "case": case, "error": f"{type(error).__name__}: {error}"[:300]})
            torch.cuda.synchronize()
        finally:
            torch.cuda.empty_cache()

    def measure(
        self,
        op: str,
        case: str,
        calls: Calls,
        *,
        baselines: Mapping[str, Calls] | None = None,
        seconds: float = 0.3,
        **fields: Any,
    ) -> dict[str, Any]:
        """Times calls and their baselines in turn as CUDA graphs; the row, kept.

        A baseline that fails is left out and named in the row.
        """
        graphs: dict[str, Captured | Issued] = {"octavo": Captured(calls)}
        absent = {}
        for name, contender in (baselines or {}).items():
            try:
                graphs[name] = Captured(contender)
            except Exception as error:
                absent[name] = f"{type(error).__name__}: {error}"[:200]
                torch.cuda.synchronize()
        times = {t.contender: dataclasses.asdict(t) for t in timings(graphs, seconds=seconds)}
        own = times.pop("octavo")
        if absent:
            fields["absent"] = absent
        return self.keep_times(op, case, own, baselines=times, replays=own["calls"], **fields)

    def relative_error(self, got: Callable[[], Any], want: Callable[[], Any]) -> float:
        """Norm of the difference of what two calls return, by the norm of the second's."""
        left, right = got().double(), want().double()
        return float((left - right).norm() / right.norm())

    def measure_issued(
        self, op: str, case: str, call: Callable[[], Any], *, seconds: float, **fields: Any
    ) -> dict[str, Any]:
        """Times a long call outside graphs; the row, kept."""
        times = dataclasses.asdict(timings({"octavo": Issued(call)}, seconds=seconds)[0])
        return self.keep_times(op, case, times, replays=times["calls"], **fields)

    def keep_times(
        self, op: str, case: str, seconds: Mapping[str, float], **fields: Any
    ) -> dict[str, Any]:
        """Keeps and returns the row of times already known (see `row_of`)."""
        about = {"ceilings": self.ceilings, "gpu": self.about["gpu"]}
        row = row_of(op, case, seconds, **about, **fields)
        self.keep(row)
        return row
