"""Everything a GPU has to tell: tests, ceilings, every kernel beside its rivals; and the engine.

    OUT=results python -m benchmarks.gpu_suite [--short] [--only SECTION ...]
    OUT=results python -m benchmarks.gpu_suite --only engine
    OUT=results python -m benchmarks.gpu_suite --only speculation

Each under nine minutes, under three with --short; needs no network, and of the HTTP packages
only what its last section, a server, does not run without. "kernels" and "engine" name groups of
sections; without --only there are the tests and the kernels. Every
section is a process of its own with a time limit, so that a crash costs one section. Rows come to
$OUT/gpu_suite.jsonl as they are measured, what sections print to $OUT/gpu_suite.log, the tests'
output to $OUT/gpu_tests.log; $OUT/roofline.png is drawn where matplotlib is installed.
OCTAVO_COMMIT names the commit where there is no git history.
Exit status: 0, 1 when a test or a section failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from benchmarks import roofline
from benchmarks.gpu_rows import read_rows, table


@dataclass(frozen=True, slots=True)
class Section:
    """A module of benchmarks with `run_<name>(recorder, *, is_short)`, and its limits."""

    name: str
    module: str
    limit_s: float
    short_limit_s: float  # 0: not in the short form
    calls_ops: bool = True  # itself, so that what it launches can be listed


SECTIONS = (
    Section("ceilings", "gpu_ceilings", 40, 30, calls_ops=False),
    Section("compile", "gpu_ceilings", 90, 60, calls_ops=False),
    Section("decode", "gpu_attention", 90, 40),
    Section("prefill", "gpu_attention", 90, 40),
    Section("shared_prefix", "gpu_shared_prefix", 40, 20),
    Section("fused", "gpu_fused", 60, 30),
    Section("matmul", "gpu_matmul", 75, 40),
    Section("sampling", "gpu_sampling", 50, 30),
    Section("quant", "gpu_quant", 50, 0),
    Section("warm", "gpu_warm", 60, 0, calls_ops=False),
    Section("engine_8b", "gpu_engine", 170, 0, calls_ops=False),
    Section("engine_06b", "gpu_engine", 140, 100, calls_ops=False),
    Section("bits", "gpu_engine", 90, 0, calls_ops=False),
    Section("serving", "gpu_serving", 120, 0, calls_ops=False),
    Section("speculation", "gpu_speculation", 240, 0, calls_ops=False),
)
_ENGINE = ("engine_8b", "engine_06b", "bits", "serving")
_ALONE = ("speculation",)  # in no group
GROUPS = {
    "kernels": [section.name for section in SECTIONS if section.name not in (*_ENGINE, *_ALONE)],
    "engine": list(_ENGINE),
}
TESTS = "tests"
TESTS_LIMIT_S, TESTS_SHORT_LIMIT_S = 270, 60
WHOLE_LIMIT_S, WHOLE_SHORT_LIMIT_S = 530, 175


def _process(command: Sequence[str], log: IO[str], limit_s: float) -> str:
    """Runs command until limit_s, then ends it with all it started; "" for success, or why not."""
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        status = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_s:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return "" if status == 0 else f"exit status {status}"


def run_tests(log: Path, *, is_short: bool) -> str:
    """The GPU's tests, in several processes where pytest-xdist is installed; "" when green.

    In short the grid of all ops runs in bfloat16 alone.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(14, len(os.sched_getaffinity(0)))), "--dist", "worksteal"]
    # Named one by one: other tests need packages that a GPU machine may lack.
    files = sorted(str(path) for path in Path("tests/octavo_kernels").glob("test_gpu_*.py"))
    files += sorted(
        str(path)
        for path in Path("tests/octavo_kernels").glob("test_*.py")
        if "mark.gpu" in path.read_text() and str(path) not in files
    )
    if is_short:
        command += ["-k", "bfloat16 or not test_gpu_ops"]
    limit = TESTS_SHORT_LIMIT_S if is_short else TESTS_LIMIT_S
    with log.open("w") as out:
        verdict = _process([*command, *files], out, limit)
    print(log.read_text()[-2500:], flush=True)
    return verdict


def run_sections(
    names: Sequence[str], out: Path, *, is_short: bool, deadline: float
) -> dict[str, str]:
    """Runs sections one after another; why each failed, "" for those that did not."""
    rows = out / "gpu_suite.jsonl"
    verdicts = {}
    for section in SECTIONS:
        if section.name not in names or (is_short and not section.short_limit_s):
            continue
        left = deadline - time.monotonic()
        limit = min(section.short_limit_s if is_short else section.limit_s, left)
        if limit < 5:
            verdicts[section.name] = "no time was left"
            continue
        command = [sys.executable, "-m", "benchmarks.gpu_suite", "--section", section.name]
        command += ["--rows", str(rows), *(["--short"] if is_short else [])]
        start = time.monotonic()
        with (out / "gpu_suite.log").open("a") as log:
            log.write(f"== {section.name}\n")
            log.flush()
            verdicts[section.name] = _process(command, log, limit)
        took = time.monotonic() - start
        print(f"{section.name}: {verdicts[section.name] or 'done'} ({took:.0f} s)", flush=True)
    return verdicts


def run_one(name: str, rows: Path, *, is_short: bool) -> int:
    """One section in this process."""
    from benchmarks.gpu_recorder import Recorder

    section = next(section for section in SECTIONS if section.name == name)
    module = importlib.import_module(f"benchmarks.{section.module}")
    recorder = Recorder(rows)
    getattr(module, f"run_{name}")(recorder, is_short=is_short)
    return 1 if recorder.num_failed else 0


def _parser() -> argparse.ArgumentParser:
    names = [TESTS, *GROUPS, *(section.name for section in SECTIONS)]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="fewer cases, under three minutes")
    parser.add_argument(
        "--only", nargs="+", choices=names, default=[TESTS, "kernels"], metavar="SECTION"
    )
    parser.add_argument("--section", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure", file=sys.stderr)
        return 2
    if arguments.section:
        return run_one(arguments.section, arguments.rows, is_short=arguments.short)
    out = Path(os.environ.get("OUT", "."))
    out.mkdir(parents=True, exist_ok=True)
    rows = out / "gpu_suite.jsonl"
    for old in (rows, out / "gpu_suite.log"):
        old.unlink(missing_ok=True)
    is_short = arguments.short
    names = [name for word in arguments.only for name in GROUPS.get(word, [word])]
    deadline = time.monotonic() + (WHOLE_SHORT_LIMIT_S if is_short else WHOLE_LIMIT_S)
    verdicts = {}
    if TESTS in names:
        verdicts[TESTS] = run_tests(out / "gpu_tests.log", is_short=is_short)
    verdicts |= run_sections(names, out, is_short=is_short, deadline=deadline)
    print(table(read_rows(rows)))
    if importlib.util.find_spec("matplotlib") is not None:
        roofline.main([str(rows), "--out", str(out / "roofline.png")])
    for name, why in verdicts.items():
        if why:
            print(f"{name}: {why}")
    print("all green" if not any(verdicts.values()) else "NOT GREEN")
    return 1 if any(verdicts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
