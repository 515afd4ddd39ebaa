"""Whether speculation ever costs throughput: a minute and more of many requests, off and `auto`.

    python -m benchmarks.spec_minute run --data PROMPTS --concurrency 16 [--pairs 6] [--write]
    python -m benchmarks.spec_minute show [ROWS.jsonl]

PROMPTS as for `spec_serve`. Both servers run; slices of some seconds are measured in turns, the
idle server frozen: as many conversations in flight as the concurrency, the same for both, broken
off at the slice's end. Tokens are those that the server counts. ``show`` sums the slices of a
commit: runs may be as short as a machine can be had for.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import keep_row, passport, results_folder
from benchmarks.servers import Server, start
from benchmarks.spec_serve import MODES, SETS, Turn, command, end_cleanly, metrics, value_of
from octavo.bench.client import open_session, send

Row = dict[str, Any]
NAME = "spec_minute"
_TOKENS = "vllm:generation_tokens_total"
_GAIN, _GUARDED = "octavo:spec_decode_gain", "octavo:spec_decode_guarded_total"
_MODES = ("off", "auto")


async def load(turn: Turn, url: str, *, seconds: float) -> None:
    """Keeps the turn's talks in flight, over and over, and breaks off what is left at the end."""
    left = iter(range(len(turn.talks)))

    async def client() -> None:
        for index in left:
            target, prompt = turn.request(index, url)
            result = await send(session, target, prompt, intended=time.monotonic())
            if not result.is_success:
                raise RuntimeError(f"a request failed: {result.error}")
        raise RuntimeError(f"{len(turn.talks)} talks are too few for {seconds:g} s")

    async with open_session({}, timeout=600) as session:
        clients = [asyncio.create_task(client()) for _ in range(turn.concurrency)]
        done, pending = await asyncio.wait(
            clients, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION
        )
        for task in pending:
            task.cancel()
        for task in pending:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        for task in done:
            task.result()


def measure(server: Server, turn: Turn, *, seconds: float) -> Row:
    """A slice of one server."""
    before = value_of(metrics(server.base_url), _TOKENS)
    began = time.monotonic()
    asyncio.run(load(turn, server.base_url, seconds=seconds))
    took = time.monotonic() - began
    lines = metrics(server.base_url)
    return {
        "concurrency": turn.concurrency,
        "slice": turn.rep,
        "seconds": round(took, 3),
        "out_tokens": int(value_of(lines, _TOKENS) - before),
        "gain": round(value_of(lines, _GAIN), 4),  # as the server sees it
        "guarded": int(value_of(lines, _GUARDED)),
    }


def slices(args: argparse.Namespace, *, salt: str) -> list[Turn]:
    """Talks of all sets mixed, each slice beginning with others."""
    sets = [(args.data / f"{name}.jsonl").read_text().splitlines() for name in args.sets]
    talks = [json.loads(line)["turns"][0] for lines in zip(*sets, strict=False) for line in lines]
    found = []
    for number in range(args.pairs):
        first = number * len(talks) // max(args.pairs, 1)
        repeated = (talks[first:] + talks[:first]) * 40
        found.append(
            Turn(
                name="mixed",
                concurrency=args.concurrency,
                rep=number,
                talks=tuple(repeated),
                tokens=args.tokens,
                salt=f"{salt}-{args.concurrency}-{number}",
            )
        )
    return found


def run(args: argparse.Namespace) -> list[Row]:
    about = passport()
    servers: dict[str, Server] = {}
    rows: list[Row] = []
    try:
        for i, mode in enumerate(_MODES):
            line = command(MODES[mode], port=args.port + i, flags=args.flags)
            servers[mode] = start(mode, args.port + i, line, timeout=300)
            servers[mode].freeze()
        for number, turn in enumerate(slices(args, salt=about["time"])):
            for mode in _MODES if number % 2 else reversed(_MODES):
                servers[mode].thaw()
                found = measure(servers[mode], turn, seconds=args.seconds)
                servers[mode].freeze()
                row = {**about, "run": about["time"], "mode": mode, **found}
                rows.append(row)
                if args.write:
                    keep_row(NAME, row)
    finally:
        for server in servers.values():
            server.kill()
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown: of each concurrency the seconds and throughput of both, and what `auto` said."""
    lines = ["| in flight | seconds each | off, tok/s | `auto` | ratio | median of pairs | "
             "`auto`'s own estimates | guarded |",
             "|---:|---:|---:|---:|---:|---:|---|---:|"]  # fmt: skip
    for level in sorted({row["concurrency"] for row in rows}):
        of_mode = {
            mode: [row for row in rows if row["concurrency"] == level and row["mode"] == mode]
            for mode in _MODES
        }
        seconds = {mode: sum(row["seconds"] for row in each) for mode, each in of_mode.items()}
        if not all(seconds.values()):
            continue
        rates = {
            mode: sum(row["out_tokens"] for row in each) / seconds[mode]
            for mode, each in of_mode.items()
        }
        pairs: dict[tuple[str, int], dict[str, float]] = {}
        for row in (*of_mode["off"], *of_mode["auto"]):
            rate = row["out_tokens"] / row["seconds"]
            pairs.setdefault((row["run"], row["slice"]), {})[row["mode"]] = rate
        ratios = [pair["auto"] / pair["off"] for pair in pairs.values() if len(pair) == 2]
        values = [row["gain"] for row in of_mode["auto"]]
        gains = f"{min(values):+.3f} to {max(values):+.3f}"
        guarded: dict[str, int] = {}
        for row in of_mode["auto"]:  # a counter of each run's server
            guarded[row["run"]] = row["guarded"]
        lines.append(
            f"| {level} | {seconds['auto']:.0f} | {rates['off']:.0f} | {rates['auto']:.0f} | "
            f"{rates['auto'] / rates['off']:.3f} | {statistics.median(ratios):.3f} | {gains} | "
            f"{sum(guarded.values())} |"
        )
    return "\n".join(lines)


def of_last_commit(path: Path) -> list[Row]:
    """The rows of the commit that was measured last. Raises ValueError where there are none."""
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.strip()]
    if not rows:
        raise ValueError(f"{path} has no rows; `run --write` makes some")
    return [row for row in rows if row["commit"] == rows[-1]["commit"]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("run", help="start the servers and measure").add_argument
    add("--data", type=Path, required=True, help="folder of prompts_*.jsonl")
    add("--sets", nargs="+", default=list(SETS))
    add("--concurrency", type=int, default=16)
    add("--pairs", type=int, default=6, help="slices of each mode")
    add("--seconds", type=float, default=10.0, help="of a slice")
    add("--tokens", type=int, default=96, help="most of an answer")
    add("--flags", default="", help="more flags for octavo serve")
    add("--port", type=int, default=8140, help="and the next one")
    add("--write", action="store_true", help="append rows to benchmarks/results")
    reader = commands.add_parser("show", help="the table of the last commit's runs")
    reader.add_argument("rows", nargs="?", type=Path, help="JSONL file of rows")
    args = parser.parse_args(argv)
    try:
        if args.command == "run":
            print(table(run(args)))
        else:
            print(table(of_last_commit(args.rows or results_folder(passport()) / f"{NAME}.jsonl")))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end_cleanly)
    sys.exit(main())
