"""Rows of the engine's benchmarks: a figure, vLLM's beside it, the target. Needs no GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SMALLER_IS_BETTER = ("s", "ms", "compiles")


@dataclass(frozen=True, slots=True)
class Goal:
    """What vLLM 0.20.0 reached on one H100 80GB HBM3, in bfloat16 with random weights and its
    default settings, and what is wanted there. None: not known, or not set."""

    vllm: float | None
    target: float | None


# By what is measured and on which shape. tok/s are output tokens but for "prefill".
GOALS: Mapping[tuple[str, str], Goal] = {
    ("engine", "8B, 256 mixed"): Goal(8340, 9600),
    ("engine", "8B, batch 1"): Goal(153, 175),
    ("engine", "8B, batch 8"): Goal(1032, 1200),
    ("engine", "8B, batch 64"): Goal(3960, 4400),
    ("engine", "8B, prefill"): Goal(41_990, 44_000),
    ("engine", "8B, shared prefix"): Goal(8502, 10_500),
    ("engine", "0.6B, 256 mixed"): Goal(18_100, 25_000),
    ("engine", "0.6B, batch 1"): Goal(524, 1000),
    ("engine", "0.6B, batch 8"): Goal(3190, 5000),
    ("engine", "0.6B, batch 64"): Goal(11_844, 16_000),
    ("engine", "0.6B, prefill"): Goal(331_200, 400_000),
    ("engine", "0.6B, shared prefix"): Goal(15_988, 24_000),
    ("LLM", "0.6B, 256 mixed, with text"): Goal(18_100, 25_000),
    ("start", "8B, first token"): Goal(67.8, 10),
    ("start", "8B, all graphs"): Goal(67.8, 25),
    ("start", "0.6B, first token"): Goal(75.9, None),
    ("start", "0.6B, all graphs"): Goal(75.9, None),
    # vLLM: 0.3 to 1.2 ms.
    ("idle between steps", "8B, 256 running"): Goal(0.3, 0.1),
    ("idle between steps", "0.6B, 256 running"): Goal(0.3, 0.1),
    ("compiles after ready", "8B"): Goal(None, 0),
    ("compiles after ready", "0.6B"): Goal(None, 0),
    ("speculation", "8B, batch 1, summaries, auto"): Goal(None, 1.5),
    ("speculation", "8B, batch 128, summaries, auto"): Goal(None, 0.97),
    ("speculation", "8B, batch 1, chat, auto"): Goal(None, 0.97),
    ("speculation", "8B, batch 128, chat, auto"): Goal(None, 0.97),
    ("speculation", "0.6B, batch 1, summaries, auto"): Goal(None, 1.5),
    ("speculation", "0.6B, batch 128, summaries, auto"): Goal(None, 0.97),
    ("HTTP", "0.6B 49k, 1 stream"): Goal(369, 800),
    ("HTTP", "0.6B 49k, 64 streams"): Goal(14_506, 20_000),
    ("HTTP", "0.6B 49k, 256 streams"): Goal(17_689, 30_000),
    ("HTTP of offline", "0.6B 49k, 256 streams"): Goal(0.6, 0.9),
    ("HTTP TTFT p99", "0.6B 49k, 256 streams"): Goal(1348, 600),
    ("HTTP ready", "0.6B 49k"): Goal(105, 12),
}


def figure(op: str, case: str, value: float, unit: str, **extra: Any) -> dict[str, Any]:
    """A row of the GPU suite whose figure is ``value`` ``unit``, judged where there is a goal."""
    row: dict[str, Any] = {"op": op, "case": case, "value": round(value, 3), "unit": unit}
    goal = GOALS.get((op, case), Goal(None, None))
    row["baselines"] = {} if goal.vllm is None else {"vLLM": {"value": goal.vllm}}
    if goal.vllm is not None and value > 0:
        by = goal.vllm / value if unit in _SMALLER_IS_BETTER else value / goal.vllm
        row["by vLLM"] = round(by, 3)
    if goal.target is not None:
        row["target"] = {"unit": unit, "value": goal.target, "here": goal.target}
        is_smaller = unit in _SMALLER_IS_BETTER
        row["is_met"] = value <= goal.target if is_smaller else value >= goal.target
    return {**row, **extra}


def equality(case: str, *, num_equal: int, num_all: int, **extra: Any) -> dict[str, Any]:
    """A row of the matrix of bits: how many requests had the tokens and scores of the first way.

    One that did not is an error.
    """
    row = figure("same bits", case, num_equal, f"of {num_all}", **extra)
    row["is_met"] = num_equal == num_all
    if not row["is_met"]:
        row["error"] = f"{num_all - num_equal} of {num_all} requests differ"
    return row


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of `gpu_rows.table`."""
    beside = ", ".join(f"{name} {found['value']:g}" for name, found in row["baselines"].items())
    target = row.get("target")
    wanted = "" if target is None else f"{target['here']:g} {target['unit']}"
    verdict = "" if "is_met" not in row else ("met" if row["is_met"] else "MISSED")
    return (
        row["op"],
        row["case"],
        "-",
        f"{row['value']:g} {row['unit']}",
        "",
        beside,
        wanted,
        verdict,
    )
