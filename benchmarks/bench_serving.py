"""Servers side by side on one machine: started once, measured in turns, the idle ones frozen.

    python -m benchmarks.bench_serving --load LOAD.py --tokenizer TOKENIZER.json --reps 3 \\
        --server octavo=8102 "octavo serve --port 8102 --served-model-name m" \\
        --server peer=8101 "some-server --port 8101"

LOAD.py is a closed-loop streaming client for OpenAI-compatible servers that prints one JSON row per
level; it takes ``--base-url --model --label --server-pid --workloads --concurrency --requests``. A
server that is not being measured is stopped with SIGSTOP, so it cannot disturb the others, and
every row says how busy the rest of the machine was (``other_cores``). Rows are appended to
``--out``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import passport


@dataclass(frozen=True, slots=True)
class Server:
    """One server under test, leading a process group of its own."""

    label: str
    port: int
    process: subprocess.Popen[bytes]
    seconds_to_ready: float

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)


def start(label: str, port: int, command: str, *, timeout: float) -> Server:
    """Starts a server and waits until it lists its models. Raises RuntimeError if it never does."""
    began = time.monotonic()
    process = subprocess.Popen(
        shlex.split(command),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while time.monotonic() - began < timeout:
        if process.poll() is not None:
            raise RuntimeError(f"{label} ended with code {process.returncode}: {command}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5):
                return Server(label, port, process, round(time.monotonic() - began, 1))
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    process.kill()
    raise RuntimeError(f"{label} was not ready in {timeout:.0f} s: {command}")


def measure(server: Server, args: argparse.Namespace, rep: int) -> list[dict[str, Any]]:
    """One turn of one server: the rows that the load client printed."""
    command = [sys.executable, args.load, "--base-url", server.base_url, "--model", args.model]
    command += ["--label", server.label, "--server-pid", str(server.process.pid)]
    command += ["--tokenizer", args.tokenizer, "--workloads", args.workloads]
    command += ["--concurrency", args.concurrency, "--requests", args.requests]
    command += ["--reps", "1", "--rep0", str(rep), "--quiet", str(args.quiet)]
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in output.stdout.splitlines() if line.startswith("{")]
    if not rows:
        raise RuntimeError(f"the load client measured nothing: {output.stdout}{output.stderr}")
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    """Medians per server, workload and concurrency."""
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["wl"], row["conc"], row["label"]].append(row)
    print(
        f"{'workload':<10}{'conc':>5}  {'server':<12}{'out tok/s':>10}"
        f"{'TTFT p50':>10}{'ITL p50':>9}"
    )
    for (workload, concurrency, label), found in sorted(groups.items()):
        speed, ttft, itl = (
            statistics.median(row[name] for row in found)
            for name in ("out_tps", "ttft_p50", "itl_p50")
        )
        print(
            f"{workload:<10}{concurrency:>5}  {label:<12}{speed:>10.1f}"
            f"{ttft * 1e3:>8.0f}ms{itl * 1e3:>7.1f}ms"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--server", nargs=2, action="append", required=True, metavar=("LABEL=PORT", "COMMAND"))
    add("--load", required=True, help="the load client's script")
    add("--tokenizer", required=True, help="tokenizer.json that the load client counts with")
    add("--model", default="m", help="name that all servers serve the model under")
    add("--workloads", default="p128")
    add("--concurrency", default="1,16")
    add("--requests", default="1:4,16:32,32:64")
    add("--reps", type=int, default=3)
    add("--quiet", type=float, default=0.15, help="wait for less than this many busy other cores")
    add("--start-timeout", type=float, default=600)
    add("--out", type=Path, help="JSONL file to append the rows to")
    args = parser.parse_args()
    servers: list[Server] = []
    rows: list[dict[str, Any]] = []
    try:
        for where, command in args.server:
            label, _, port = where.partition("=")
            servers.append(start(label, int(port), command, timeout=args.start_timeout))
            print(f"{label}: ready after {servers[-1].seconds_to_ready} s", flush=True)
            servers[-1].signal(signal.SIGSTOP)
        base = passport()
        for rep in range(args.reps):
            for server in servers:
                server.signal(signal.SIGCONT)
                for row in measure(server, args, rep):
                    row.pop("sample", None)
                    row["start_s"] = server.seconds_to_ready
                    rows.append({**base, **row})
                    print(json.dumps(row), flush=True)
                server.signal(signal.SIGSTOP)
    finally:
        for server in servers:
            server.signal(signal.SIGCONT)
            server.signal(signal.SIGKILL)
            server.process.wait()
        if args.out is not None and rows:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a") as out:
                out.writelines(json.dumps(row) + "\n" for row in rows)
    report(rows)


if __name__ == "__main__":
    main()
