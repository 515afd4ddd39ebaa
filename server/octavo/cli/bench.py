"""``octavo bench``: which benchmarks there are. Knows their names only."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Protocol

from octavo.bench import latency, serve, throughput

HELP = "measure a server, or the engine by itself"


class Benchmark(Protocol):
    """A module of `octavo.bench`."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


BENCHMARKS: Mapping[str, Benchmark] = {
    "serve": serve,
    "throughput": throughput,
    "latency": latency,
}
