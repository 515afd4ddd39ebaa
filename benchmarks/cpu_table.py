"""Octavo beside llama-server and vLLM on this CPU: one table, measured in one run, in turns.

    python -m benchmarks.cpu_table run --peers PEERS --write
    python -m benchmarks.cpu_table show [ROWS.jsonl]

PEERS is a folder with ``peers.sh`` and ``load.py`` (see `cpu_peers` and `servers`); a peer that is
not set up is left out, and said to be. Every server is started, some times over where that is quick
(the time until the first streamed token), then all rows are measured in turns, server by server
within a row, the idle ones frozen; last the memory (PSS of the process tree, after the load).
``show`` prints the table from the rows of the latest run in a file, by default this machine's.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cpu_peers import Contender, octavo, peers
from benchmarks.machine import keep_row, passport, results_folder
from benchmarks.processes import pss_bytes
from benchmarks.servers import Load, Server, start

Row = dict[str, Any]
NAME = "cpu_table"  # of the rows' file
_QUICK_START_S = 30.0  # a server that takes longer is started once
_BUSY_CORES = 0.15  # of others, above which a row is disturbed


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the table: a row's field, and what Octavo is to reach."""

    key: str
    title: str
    field: str
    unit: str
    target: float
    workload: str = ""  # of the load client; start and memory have none
    concurrency: int = 0
    is_ratio: bool = True  # the target: times the better peer, or else a value not to pass
    is_less_better: bool = False

    @property
    def goal(self) -> str:
        return f"{self.target:g}x" if self.is_ratio else f"{self.target:g} {self.unit}"


LINES = (
    Line(
        key="p128 c1",
        title="output tok/s, 128 in / 128 out, concurrency 1",
        workload="p128",
        concurrency=1,
        field="out_tps",
        unit="tok/s",
        target=2,
    ),
    Line(
        key="p128 c16",
        title="the same, concurrency 16",
        workload="p128",
        concurrency=16,
        field="out_tps",
        unit="tok/s",
        target=4,
    ),
    Line(
        key="p128 c32",
        title="the same, concurrency 32",
        workload="p128",
        concurrency=32,
        field="out_tps",
        unit="tok/s",
        target=4,
    ),
    Line(
        key="p512 c1",
        title="TTFT p50, 512 in, concurrency 1",
        workload="p512",
        concurrency=1,
        field="ttft_p50",
        unit="s",
        target=2,
        is_less_better=True,
    ),
    Line(
        key="shared c16",
        title="output tok/s, 512 in common + 64 own, 32 out, concurrency 16",
        workload="shared",
        concurrency=16,
        field="out_tps",
        unit="tok/s",
        target=2,
    ),
    Line(
        key="start",
        title="start until the first streamed token",
        field="start_s",
        unit="s",
        target=4,
        is_ratio=False,
        is_less_better=True,
    ),
    Line(
        key="memory",
        title="memory (PSS) after the load",
        field="memory_gb",
        unit="GB",
        target=1.2,
        is_ratio=False,
        is_less_better=True,
    ),
)


# ---- the table, from rows ----------------------------------------------------------------------


def latest_run(rows: Sequence[Row]) -> list[Row]:
    """The rows of the run that began last. Raises ValueError where there are none."""
    if not rows:
        raise ValueError("there are no rows to make a table of")
    last = max(str(row["run"]) for row in rows)
    return [row for row in rows if row["run"] == last]


def values(rows: Sequence[Row], line: Line, name: str) -> list[float]:
    """What a server reached on a line, a value a repetition; those with failed requests not."""
    return [
        row[line.field]
        for row in rows
        if (row["what"], row["server"]) == (line.key, name) and not row.get("err")
    ]


def ratio(line: Line, ours: float, theirs: Sequence[float]) -> float | None:
    """How many times better than the best of theirs; None without any."""
    if not theirs:
        return None
    return min(theirs) / ours if line.is_less_better else ours / max(theirs)


def is_reached(line: Line, ours: float, theirs: Sequence[float]) -> bool | None:
    """Whether the target is; None where it is a ratio and there is no peer."""
    if not line.is_ratio:
        return ours <= line.target
    found = ratio(line, ours, theirs)
    return None if found is None else found >= line.target


def _cell(found: Sequence[float]) -> str:
    if not found:
        return "-"
    middle = statistics.median(found)
    digits = 1 if middle >= 20 else 2
    spread = f" ({min(found):.{digits}f} to {max(found):.{digits}f})" if len(found) > 1 else ""
    return f"{middle:.{digits}f}{spread}"


def table(rows: Sequence[Row]) -> str:
    """Markdown: medians (least to most) of one run's rows, ratios and targets, what it ran on."""
    titles: dict[str, str] = {row["server"]: row["title"] for row in rows}
    names = sorted(titles, key=lambda name: name == "octavo")
    head = ["what", *(titles[name] for name in names), "to the better peer", "target", ""]
    lines = [head, ["---"] * len(head)]
    for line in LINES:
        found = {name: values(rows, line, name) for name in names}
        if not any(found.values()):
            continue
        theirs = [statistics.median(v) for name, v in found.items() if v and name != "octavo"]
        mine = found.get("octavo")
        times, verdict = "-", ""
        if mine:
            ours = statistics.median(mine)
            better = ratio(line, ours, theirs)
            times = "-" if better is None else f"{better:.2f}x"
            verdict = {True: "reached", False: "missed", None: ""}[is_reached(line, ours, theirs)]
        cells = [_cell(found[name]) for name in names]
        unit = "" if line.title.startswith("output") or line.unit == "tok/s" else f", {line.unit}"
        lines.append([f"{line.title}{unit}", *cells, times, line.goal, verdict])
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{body}\n\n{_about(rows)}"


def _about(rows: Sequence[Row]) -> str:
    first = rows[0]
    versions = {row["title"]: row["version"] for row in rows}
    named = ", ".join(f"{title} {version}" for title, version in versions.items())
    disturbed = sum((row.get("other_cores") or 0) > _BUSY_CORES for row in rows)
    failed = sum(bool(row.get("err")) for row in rows)
    notes = [f"{first['cpu']}, {first['cores']} cores, {first['run']}", named]
    if disturbed:
        notes.append(
            f"{disturbed} of {len(rows)} rows had more than {_BUSY_CORES} other cores busy"
        )
    if failed:
        notes.append(f"{failed} rows with failed requests are left out")
    return "; ".join(notes)


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSONL file. Raises ValueError where there is no such file."""
    if not path.is_file():
        raise ValueError(f"{path} is no file of rows; `run --write` makes one")
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


# ---- the run -------------------------------------------------------------------------------------


class Run:
    """One run: its servers, and the rows so far, each printed as it comes."""

    def __init__(self, load: Load, *, is_kept: bool, timeout: float) -> None:
        self._load, self._is_kept, self._timeout = load, is_kept, timeout
        self._about = passport()
        self.rows: list[Row] = []
        self.servers: dict[str, tuple[Contender, Server]] = {}

    def _keep(self, contender: Contender, what: str, found: Mapping[str, Any]) -> None:
        row = {
            **self._about,
            "run": self._about["time"],
            "server": contender.name,
            "title": contender.title,
            "version": contender.version,
            "what": what,
            **found,
        }
        self.rows.append(row)
        print(f"{contender.title} {what}: {json.dumps(dict(found))}", flush=True)
        if self._is_kept:
            keep_row(NAME, row)

    def start(self, contender: Contender, *, times: int) -> None:
        """Starts a server, and again if that is quick; the last one stays, frozen.

        A server that does not start is left out.
        """
        for rep in range(times):
            try:
                server = start(
                    contender.name,
                    contender.port,
                    contender.command,
                    timeout=self._timeout,
                    extra_env=contender.extra_env,
                )
            except RuntimeError as error:
                print(f"{contender.title}: left out, {error}", flush=True)
                return
            seconds = server.start_seconds
            self._keep(contender, "start", {"rep": rep, "start_s": seconds})
            if rep + 1 == times or seconds > _QUICK_START_S:
                break
            server.kill()
        server.freeze()
        self.servers[contender.name] = (contender, server)

    def measure(self, line: Line, *, requests: int, rep: int) -> None:
        """One line, server after server. A turn that fails is said and leaves no row."""
        for contender, server in self.servers.values():
            server.thaw()
            try:
                for row in self._load.measure(
                    server,
                    workloads=line.workload,
                    concurrency=str(line.concurrency),
                    requests=f"{line.concurrency}:{requests}",
                    rep=rep,
                ):
                    self._keep(contender, line.key, row)
            except RuntimeError as error:
                print(f"{contender.title} {line.key}: {error}", flush=True)
            server.freeze()

    def weigh(self) -> None:
        """The memory of every server."""
        for contender, server in self.servers.values():
            gigabytes = round(pss_bytes(server.process.pid) / 1e9, 3)
            self._keep(contender, "memory", {"rep": 0, "memory_gb": gigabytes})

    def close(self) -> None:
        for _, server in self.servers.values():
            server.kill()


def run(args: argparse.Namespace) -> list[Row]:
    """Measures all that the arguments ask for; returns the rows."""
    home = args.home.expanduser().resolve()
    load = Load(
        script=str(args.peers / "load.py"),
        tokenizer=str(args.tokenizer or home / "hf/tokenizer.json"),
        model="m",
        quiet=args.quiet,
    )
    this = Run(load, is_kept=args.write, timeout=args.start_timeout)
    commit = passport()["commit"]
    wanted = args.servers.split(",")
    ports = {name: args.port + 1 + i for i, name in enumerate(("llama", "vllm")) if name in wanted}
    contenders: list[Contender | str] = list(peers(args.peers, home, ports=ports))
    if "octavo" in wanted:
        contenders.append(octavo(port=args.port, flags=args.flags, version=commit))
    counts = dict(map(int, pair.split(":")) for pair in args.requests.split(","))
    try:
        for contender in contenders:
            if isinstance(contender, str):
                print(contender, flush=True)
            else:
                this.start(contender, times=args.starts)
        for rep in range(args.reps):
            for line in LINES:
                if line.key in args.lines:
                    this.measure(line, requests=counts[line.concurrency], rep=rep)
        this.weigh()
    finally:
        this.close()
    return this.rows


def _keys(known: Sequence[str]) -> Callable[[str], list[str]]:
    """What reads keys with commas between them, and refuses others."""

    def parse(text: str) -> list[str]:
        keys = text.split(",")
        unknown = [key for key in keys if key not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"no line {unknown[0]!r}, only {', '.join(known)}")
        return keys

    return parse


def _end(number: int, frame: object) -> None:
    """Ends as after an error, so that no server is left behind."""
    sys.exit(128 + number)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("run", help="start the servers and measure").add_argument
    add("--peers", type=Path, required=True, help="folder of peers.sh and load.py")
    home = os.environ.get("PEERS", "~/.cache/octavo-peers")
    add("--home", type=Path, default=Path(home), help="where peers.sh keeps the peers ($PEERS)")
    add("--tokenizer", type=Path, help="tokenizer.json that the client counts with")
    add("--servers", default="octavo,llama,vllm", help="which of them")
    add("--flags", default="", help="more flags for octavo serve")
    add("--reps", type=int, default=3)
    add("--starts", type=int, default=3, help="starts of a server that starts quickly")
    keys = [line.key for line in LINES if line.workload]
    add("--lines", type=_keys(keys), default=keys, help=f"only these of {','.join(keys)}")
    add("--requests", default="1:4,16:32,32:64", help="requests of a repetition, by concurrency")
    add("--quiet", type=float, default=_BUSY_CORES, help="wait for fewer busy other cores")
    add("--port", type=int, default=8110, help="and the next two")
    add("--start-timeout", type=float, default=900)
    add("--write", action="store_true", help="append rows to benchmarks/results")
    add = commands.add_parser("show", help="the table of the latest run").add_argument
    add("rows", nargs="?", type=Path, help="JSONL file of rows")
    args = parser.parse_args(argv)
    try:
        if args.command == "run":
            rows = run(args)
        else:
            path = args.rows or results_folder(passport()) / f"{NAME}.jsonl"
            rows = latest_run(read_rows(path))
        print(table(rows))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    main()
