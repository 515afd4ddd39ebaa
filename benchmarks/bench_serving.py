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
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.machine import passport
from benchmarks.servers import Load, Server, start


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
    load = Load(script=args.load, tokenizer=args.tokenizer, model=args.model, quiet=args.quiet)
    servers: list[Server] = []
    rows: list[dict[str, Any]] = []
    try:
        for where, command in args.server:
            label, _, port = where.partition("=")
            servers.append(
                start(label, int(port), command, timeout=args.start_timeout, model=args.model)
            )
            print(f"{label}: first token after {servers[-1].start_seconds} s", flush=True)
            servers[-1].freeze()
        base = passport()
        for rep in range(args.reps):
            for server in servers:
                server.thaw()
                for row in load.measure(
                    server,
                    workloads=args.workloads,
                    concurrency=args.concurrency,
                    requests=args.requests,
                    rep=rep,
                ):
                    rows.append({**base, **row, "start_s": server.start_seconds})
                    print(json.dumps(row), flush=True)
                server.freeze()
    finally:
        for server in servers:
            server.kill()
        if args.out is not None and rows:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a") as out:
                out.writelines(json.dumps(row) + "\n" for row in rows)
    report(rows)


if __name__ == "__main__":
    main()
