"""What speculation is worth over HTTP: throughput by concurrency, without it, fixed, and `auto`.

    python -m benchmarks.spec_serve run --data PROMPTS --write
    python -m benchmarks.spec_serve show [ROWS.jsonl]
    python -m benchmarks.spec_serve plot [ROWS.jsonl] [--out speculation.png]

PROMPTS is a folder of ``prompts_*.jsonl`` (EAGLE's question sets). One ``octavo serve`` for each
mode; all turns (a set, a concurrency, a repetition) are measured server after server in changing
order, the idle ones frozen. A turn keeps as many conversations in flight as its concurrency, greedy
and to their own end or ``--tokens``, until its prompts are used up; nothing it computes serves
another turn.
``show`` and ``plot`` take the latest run in a file, by default this machine's; ``plot`` needs
matplotlib.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import shlex
import signal
import statistics
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import keep_row, passport, results_folder
from benchmarks.servers import Server, start
from octavo.bench.client import Result, Target, open_session, send
from octavo.bench.datasets import Prompt

Row = dict[str, Any]
NAME = "spec_serve"
SETS = ("prompts_sum", "prompts_humaneval", "prompts_mt_bench")
MODES: Mapping[str, str] = {
    "off": '{"method": "off"}',
    "n-gram, 5": '{"method": "ngram", "num_speculative_tokens": 5}',
    "auto": '{"method": "auto"}',
}
# Enough to tell a few percent, all three sets and modes within 13 minutes on two cores.
REQUESTS = "1:12,2:12,4:16,8:20,16:24,32:36,64:64"
_SERVE = "-m octavo serve --served-model-name m --max-model-len 4096 --max-num-seqs 64"
_COUNTERS = {
    "drafts": "vllm:spec_decode_num_drafts_total",
    "draft_tokens": "vllm:spec_decode_num_draft_tokens_total",
    "accepted_tokens": "vllm:spec_decode_num_accepted_tokens_total",
}
_GAIN = "octavo:spec_decode_gain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What each server is asked once, the same of all."""

    name: str  # of the set
    concurrency: int
    rep: int
    talks: tuple[str, ...]
    tokens: int
    salt: str

    def request(self, index: int, url: str) -> tuple[Target, Prompt]:
        """The request of one talk; what was said in another round of the set is not known in it."""
        first = self.talks.index(self.talks[index])
        num_before = self.talks[first:index].count(self.talks[index])
        body = {"cache_salt": f"{self.salt}-{num_before}"}
        target = Target(url=f"{url}/chat/completions", is_chat=True, model="m", body=body)
        return target, Prompt(text=self.talks[index], num_tokens=0, output_len=self.tokens)


# ---- the run -------------------------------------------------------------------------------------


async def load(turn: Turn, url: str) -> tuple[list[Result], float]:
    """Results in the order of the turn's talks, and the seconds they took together."""
    left = iter(range(len(turn.talks)))
    results: dict[int, Result] = {}
    async with open_session({}, timeout=600) as session:

        async def client() -> None:
            for index in left:
                target, prompt = turn.request(index, url)
                now = time.monotonic()
                results[index] = await send(session, target, prompt, intended=now)

        began = time.monotonic()
        await asyncio.gather(*(client() for _ in range(turn.concurrency)))
        took = time.monotonic() - began
    return [results[index] for index in sorted(results)], took


def counters(base_url: str) -> dict[str, float]:
    """The counts of drafts that a server tells, ours or vLLM."""
    lines = metrics(base_url)
    return {key: value_of(lines, name) for key, name in _COUNTERS.items()}


def metrics(base_url: str) -> list[str]:
    with urllib.request.urlopen(base_url.removesuffix("/v1") + "/metrics") as answer:
        lines: list[str] = answer.read().decode().splitlines()
    return lines


def value_of(lines: Sequence[str], name: str) -> float:
    """Of a series, the sum over its labels; 0 where there is none."""
    named = (line for line in lines if line.startswith((f"{name} ", f"{name}{{")))
    return sum(float(line.rpartition(" ")[2]) for line in named)


def measure(server: Server, turn: Turn) -> Row:
    """One server's row of a turn. Raises RuntimeError where a request failed."""
    before = counters(server.base_url)
    results, took = asyncio.run(load(turn, server.base_url))
    if failed := [result.error for result in results if not result.is_success]:
        raise RuntimeError(f"{len(failed)} of {len(results)} requests failed: {failed[0]}")
    after = counters(server.base_url)
    counted = {key: int(after[key] - before[key]) for key in before}
    out = sum(result.output_len for result in results)
    drafts = counted["drafts"]
    texts = "\0".join(result.text for result in results)
    tpots = [tpot for result in results if (tpot := result.tpot) is not None]
    return {
        "set": turn.name,
        "concurrency": turn.concurrency,
        "rep": turn.rep,
        "requests": len(results),
        "max_tokens": turn.tokens,
        "out_tokens": out,
        "seconds": round(took, 3),
        "out_tps": round(out / took, 2),
        "ttft_p50": round(statistics.median(result.ttft for result in results), 4),
        "tpot_p50": round(statistics.median(tpots), 5) if tpots else None,
        **counted,
        "mean_accepted_length": round(1 + counted["accepted_tokens"] / drafts, 3) if drafts else 0,
        "gain": round(value_of(metrics(server.base_url), _GAIN), 4),  # as the server sees it
        "texts": hashlib.sha256(texts.encode()).hexdigest()[:16],
    }


def turns(args: argparse.Namespace, *, salt: str) -> Iterator[Turn]:
    counts = args.requests
    for rep in range(args.reps):
        for name in args.sets:
            lines = (args.data / f"{name}.jsonl").read_text().splitlines()
            talks = [json.loads(line)["turns"][0] for line in lines]
            for concurrency in args.concurrency:
                start = rep * counts[concurrency]
                chosen = [talks[(start + i) % len(talks)] for i in range(counts[concurrency])]
                yield Turn(
                    name=name,
                    concurrency=concurrency,
                    rep=rep,
                    talks=tuple(chosen),
                    tokens=args.tokens,
                    salt=f"{salt}-{name}-{concurrency}-{rep}",
                )


def command(config: str, *, port: int, flags: str) -> str:
    quoted = shlex.quote(config)
    program = f"{shlex.quote(sys.executable)} {_SERVE} --port {port}"
    return f"{program} --speculative-config {quoted} {flags}".rstrip()


def run(args: argparse.Namespace) -> list[Row]:
    """Measures all turns; each row is printed as it comes, and kept if asked."""
    about = passport()
    modes = {name: MODES[name] for name in args.modes} | dict(args.config)
    if args.head is not None:
        modes["auto, head"] = json.dumps({"method": "auto", "model": str(args.head.resolve())})
    servers: dict[str, Server] = {}
    rows: list[Row] = []
    try:
        for i, (mode, config) in enumerate(modes.items()):
            port = args.port + i
            line = command(config, port=port, flags=args.flags)
            servers[mode] = start(mode, port, line, timeout=300)
            warm(servers[mode], args)
            servers[mode].freeze()
        for number, turn in enumerate(turns(args, salt=about["time"])):
            order = list(servers)
            for mode in order if number % 2 else reversed(order):
                server = servers[mode]
                server.thaw()
                found = measure(server, turn)
                server.freeze()
                row = {**about, "run": about["time"], "mode": mode, "config": modes[mode], **found}
                rows.append(row)
                print(
                    f"{turn.name} c={turn.concurrency} {mode}: {found['out_tps']} tok/s, "
                    f"{found['accepted_tokens']} of {found['draft_tokens']} drafts accepted",
                    flush=True,
                )
                if args.write:
                    keep_row(NAME, row)
    finally:
        for server in servers.values():
            server.kill()
    return rows


def warm(server: Server, args: argparse.Namespace) -> None:
    """Some talks that no turn has: a server that has just started knows no step's cost yet."""
    lines = (args.data / f"{args.sets[0]}.jsonl").read_text().splitlines()
    talks = [f"Once more: {json.loads(line)['turns'][0]}" for line in lines[-args.warm :]]
    for concurrency in (1, 4):
        turn = Turn(
            name="warm",
            concurrency=concurrency,
            rep=0,
            talks=tuple(talks),
            tokens=args.tokens,
            salt=f"warm-{concurrency}",
        )
        measure(server, turn)


# ---- from rows -----------------------------------------------------------------------------------


def latest_run(path: Path) -> list[Row]:
    """The rows of the run that began last. Raises ValueError where there are none."""
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.strip()]
    if not rows:
        raise ValueError(f"{path} has no rows; `run --write` makes some")
    last = max(row["run"] for row in rows)
    return [row for row in rows if row["run"] == last]


def throughputs(rows: Sequence[Row]) -> dict[str, dict[str, dict[int, list[float]]]]:
    """Set -> mode -> concurrency -> tokens a second of each repetition."""
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for row in rows:
        of_mode = found.setdefault(row["set"], {}).setdefault(row["mode"], {})
        of_mode.setdefault(row["concurrency"], []).append(row["out_tps"])
    return found


def num_different(rows: Sequence[Row]) -> int:
    """Turns in which two modes said different things."""
    texts: dict[tuple[str, int, int], set[str]] = {}
    for row in rows:
        texts.setdefault((row["set"], row["concurrency"], row["rep"]), set()).add(row["texts"])
    return sum(len(each) > 1 for each in texts.values())


def table(rows: Sequence[Row]) -> str:
    """Markdown: tokens a second by set and concurrency; in brackets beside the first mode's."""
    modes = list(dict.fromkeys(row["mode"] for row in sorted(rows, key=_mode_order)))
    lines = [["set", "concurrency", *modes], ["---", *["---:"] * (1 + len(modes))]]
    for name, of_modes in throughputs(rows).items():
        levels = sorted({level for values in of_modes.values() for level in values})
        for level in levels:
            medians = {
                mode: statistics.median(of_modes[mode][level])
                for mode in modes
                if of_modes.get(mode, {}).get(level)
            }
            base = medians.get(modes[0])
            cells = []
            for mode in modes:
                value = medians.get(mode)
                cell = "-" if value is None else f"{value:.0f}"
                if value is not None and base and mode != modes[0]:
                    cell += f" ({value / base:.2f}x)"
                cells.append(cell)
            lines.append([name, str(level), *cells])
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    same = "the same texts from all modes" if not num_different(rows) else (
        f"DIFFERENT TEXTS in {num_different(rows)} turns"
    )  # fmt: skip
    return f"{body}\n\n{_about(rows)}; {same}"


def _mode_order(row: Row) -> int:
    known = list(MODES)
    return known.index(row["mode"]) if row["mode"] in known else len(known)


def _about(rows: Sequence[Row]) -> str:
    first = rows[0]
    return f"{first['cpu']}, {first['cores']} cores, commit {first['commit']}, {first['run']}"


def plot(rows: Sequence[Row], out: Path) -> None:
    """Throughput over concurrency, a panel for each set. Raises ValueError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot  # after the choice of what draws

    found = throughputs(rows)
    figure, panels = pyplot.subplots(1, len(found), figsize=(4.4 * len(found), 3.9), squeeze=False)
    modes = list(dict.fromkeys(row["mode"] for row in sorted(rows, key=_mode_order)))
    for panel, (name, of_modes) in zip(panels[0], found.items(), strict=True):
        for number, mode in enumerate(modes):
            values = sorted(of_modes.get(mode, {}).items())
            levels = [level for level, _ in values]
            medians = [statistics.median(each) for _, each in values]
            marker, color = "osD^v"[number % 5], f"C{number}"
            panel.plot(levels, medians, marker=marker, color=color, label=mode, markersize=4)
            low, high = [min(each) for _, each in values], [max(each) for _, each in values]
            panel.fill_between(levels, low, high, color=color, alpha=0.15)
        panel.set_xscale("log", base=2)
        ticks = sorted({level for values in of_modes.values() for level in values})
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.set_ylim(bottom=0)
        panel.set_title(name.removeprefix("prompts_"))
        panel.set_xlabel("concurrency")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("output tokens a second")
    panels[0][0].legend(title="speculation", fontsize=8)
    figure.text(0.01, 0.01, _about(rows), fontsize=6, color="gray")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(out, dpi=150)


# ---- the command line ----------------------------------------------------------------------------


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _counts(text: str) -> dict[int, int]:
    pairs = (pair.split(":") for pair in text.split(","))
    return {int(level): int(count) for level, count in pairs}


def _named(text: str) -> tuple[str, str]:
    name, is_given, config = text.partition("=")
    if not is_given:
        raise argparse.ArgumentTypeError(f"must be NAME=JSON, got {text!r}")
    return name, config


def end_cleanly(number: int, frame: object) -> None:
    """Ends as after an error, so that no server is left behind."""
    sys.exit(128 + number)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("run", help="start the servers and measure").add_argument
    add("--data", type=Path, required=True, help="folder of prompts_*.jsonl")
    add("--sets", nargs="+", default=list(SETS))
    add("--modes", nargs="*", default=list(MODES), choices=list(MODES))
    add("--config", type=_named, action="append", default=[], metavar="NAME=JSON", help="more")
    add("--head", type=Path, help="folder of a draft head: `auto` with it as one more mode")
    add("--concurrency", type=_numbers, default=[1, 2, 4, 8, 16, 32, 64])
    add("--requests", type=_counts, default=_counts(REQUESTS), help="by concurrency")
    add("--tokens", type=int, default=256, help="most of an answer")
    add("--reps", type=int, default=1)
    add("--warm", type=int, default=4, help="conversations before the first turn")
    add("--flags", default="", help="more flags for octavo serve")
    add("--port", type=int, default=8120, help="and the next ones")
    add("--write", action="store_true", help="append rows to benchmarks/results")
    for name, text in (("show", "the table of the latest run"), ("plot", "its picture")):
        reader = commands.add_parser(name, help=text)
        reader.add_argument("rows", nargs="?", type=Path, help="JSONL file of rows")
        if name == "plot":
            reader.add_argument("--out", type=Path, help="PNG; default beside the rows")
    args = parser.parse_args(argv)
    try:
        if args.command == "run":
            if missing := [c for c in args.concurrency if c not in args.requests]:
                parser.error(f"--requests says nothing of concurrency {missing[0]}")
            print(table(run(args)))
            return
        path = args.rows or results_folder(passport()) / f"{NAME}.jsonl"
        rows = latest_run(path)
        if args.command == "show":
            print(table(rows))
        else:
            out = args.out or path.with_suffix(".png")
            plot(rows, out)
            print(f"wrote {out}")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end_cleanly)
    main()
