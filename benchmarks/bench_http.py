"""The host's share of serving over HTTP: a made-up device computes, everything else is real.

    python -m benchmarks.bench_http --reps 3 --out http --tree before=../octavo-before

Measures ``octavo serve --fake-executor`` of this checkout and of each ``--tree`` (sources, and the
commit in a file COMMIT; where there is no ``--fake-device``, patched to make a `FakeDevice` of the
costs in OCTAVO_FAKE_DEVICE), in turns: tokens a second, TTFT, gaps between tokens, and the
microseconds of processor time that the API processes, the engine process and the client spend per
token. A step of the made-up device takes ``--step-us``, and ``--row-us`` and ``--token-us`` for
each row and token in it, on no processor. API processes are pinned to ``--api-cpus``, the engine
and the client to ``--other-cpus``: what is measured is the API side as long as the others are
faster, which their columns tell.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import commit, keep_row, passport, version

ROOT = Path(__file__).resolve().parents[1]
ENGINE_MODULE = b"octavo.engine.process"
PACKAGES = ("uvicorn", "uvloop", "msgspec", "pyzmq", "tokenizers", "starlette")


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: its port and the processes it is made of."""

    label: str
    port: int
    commit: str
    api_pids: tuple[int, ...]
    engine_pid: int

    def cpu(self) -> tuple[float, float]:
        """Processor seconds used by the API processes and by the engine, so far."""
        return sum(map(cpu_seconds, self.api_pids)), cpu_seconds(self.engine_pid)


def cpu_seconds(pid: int) -> float:
    """Time on a processor of all threads that live, to the nanosecond."""
    paths = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(path.read_text().split()[0]) for path in paths) * 1e-9


def family(pid: int) -> Iterator[int]:
    """A process and all that it has started."""
    yield pid
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            yield from family(int(child))


def pin(pid: int, cpus: set[int]) -> None:
    """All threads of a process, also those it will start."""
    for task in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(task), cpus)


@contextmanager
def running(label: str, tree: Path, args: argparse.Namespace, *flags: str) -> Iterator[Server]:
    """The server of a source tree, pinned. Raises RuntimeError when it does not start."""
    command = [sys.executable, "-m", "octavo", "serve", "--fake-executor", "--host", "127.0.0.1"]
    command += ["--port", "0", "--max-model-len", "2048", "--num-gpu-blocks-override", "40000"]
    command += ["--max-num-batched-tokens", "8192", "--disable-uvicorn-access-log", *flags]
    environment = os.environ | {"PYTHONPATH": f"{tree}/server:{tree}/kernels"}
    device = f"{args.step_us},{args.row_us},{args.token_us}"
    if "--fake-device" in (tree / "server/octavo/cli/options.py").read_text():
        command += ["--fake-device", device]
    environment["OCTAVO_FAKE_DEVICE"] = device
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = ""
        while not line.startswith("ready in"):
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"{label} ended without being ready: {command}")
        pids = list(family(process.pid))
        engine = next(
            pid for pid in pids if ENGINE_MODULE in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        apis = tuple(pid for pid in pids if pid != engine)
        for pid in apis:
            pin(pid, args.api_cpus)
        pin(engine, args.other_cpus)
        yield Server(label, int(line.rpartition(":")[2]), commit_of(tree), apis, engine)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def commit_of(tree: Path) -> str:
    return commit() if tree == ROOT else (tree / "COMMIT").read_text().strip()


def measure(server: Server, level: tuple[int, int], args: argparse.Namespace) -> dict[str, Any]:
    """One run of the client at one level: (streams, requests)."""
    streams, requests = level
    command = [sys.executable, "-m", "benchmarks.http_load", "--port", str(server.port)]
    command += ["--streams", str(streams), "--requests", str(requests)]
    command += ["--input-len", str(args.input_len), "--output-len", str(args.output_len)]
    before = server.cpu()
    ended = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, args.other_cpus),
    )
    after = server.cpu()
    if ended.returncode:
        raise RuntimeError(f"the client failed: {ended.stderr}")
    row: dict[str, Any] = json.loads(ended.stdout)
    num_tokens = requests * args.output_len
    for name, start, end in zip(("api", "engine"), before, after, strict=True):
        row[f"{name}_us_per_tok"] = round((end - start) * 1e6 / num_tokens, 2)
    return row


def report(rows: Sequence[dict[str, Any]]) -> None:
    """Medians per level and server."""
    latencies = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")
    costs = ("api_us_per_tok", "engine_us_per_tok", "client_us_per_tok")
    columns = ("out_tok_per_s", *latencies, *costs)
    groups: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["streams"], row["label"]].append(row)
    print(f"{'streams':>7} {'server':<12}" + "".join(f"{name:>18}" for name in columns))
    for (streams, label), found in sorted(groups.items()):
        values = (statistics.median(row[name] for row in found) for name in columns)
        print(f"{streams:>7} {label:<12}" + "".join(f"{value:>18.2f}" for value in values))


def cpu_set(text: str) -> set[int]:
    return {int(part) for part in text.split(",")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tree", action="append", default=[], metavar="LABEL=FOLDER", help="also measure it")
    add("--flags", default="", help="more flags for this checkout's server")
    add("--levels", default="1:3,64:192,256:512", help="streams:requests, ...")
    add("--reps", type=int, default=3)
    add("--input-len", type=int, default=256)
    add("--output-len", type=int, default=256)
    add("--step-us", type=float, default=900)
    add("--row-us", type=float, default=16)
    add("--token-us", type=float, default=2)
    add("--api-cpus", type=cpu_set, default={0})
    add("--other-cpus", type=cpu_set, default={1})
    add("--out", help="append the rows to results/<machine>/<OUT>.jsonl")
    args = parser.parse_args()
    trees = {"this": ROOT}
    for tree in args.tree:
        label, _, folder = tree.partition("=")
        trees[label] = Path(folder).resolve()
    levels = [(int(s), int(r)) for s, _, r in (t.partition(":") for t in args.levels.split(","))]
    base = passport() | {name: version(name) for name in PACKAGES}
    rows: list[dict[str, Any]] = []
    for rep in range(args.reps):
        for label, tree in trees.items():
            flags = args.flags.split() if tree == ROOT else []
            with running(label, tree, args, *flags) as server:
                measure(server, (1, 1), args)  # first uses of everything
                for level in levels:
                    row = {"label": label, "rep": rep, **measure(server, level, args)}
                    row |= {"commit": server.commit, "api_processes": len(server.api_pids)}
                    row |= {"step_us": args.step_us, "row_us": args.row_us}
                    row |= {"token_us": args.token_us, "load_avg": os.getloadavg()[0]}
                    rows.append({**base, **row})
                    print(json.dumps(row), flush=True)
                    time.sleep(0.2)  # the server's last words on the run before
    if args.out is not None:
        for row in rows:
            keep_row(args.out, row)
    report(rows)


if __name__ == "__main__":
    main()
