"""Rows of the GPU suite: rates, ceilings, targets, the table. Knows no kernel and needs no GPU."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Of the run in which the targets were set: one H100 80GB HBM3.
H100_COPY_TB_S = 3.03
H100_MATMUL_TFLOP_S = 680.0


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure must reach. `unit` names a row's field; us and ms are upper bounds."""

    unit: str
    value: float

    @property
    def is_upper_bound(self) -> bool:
        return self.unit in ("us", "ms")

    def scaled(self, ceilings: Mapping[str, float]) -> float:
        """The bound on this run's card: by its copy bandwidth, or its matmul rate, to the H100's."""
        copy = ceilings.get("copy", H100_COPY_TB_S) / H100_COPY_TB_S
        matmul = ceilings.get("matmul", H100_MATMUL_TFLOP_S) / H100_MATMUL_TFLOP_S
        if self.unit == "TB/s":
            return self.value * copy
        if self.unit == "TFLOP/s":
            return self.value * matmul
        return self.value / copy if self.is_upper_bound else self.value

    def is_met(self, value: float, bound: float) -> bool:
        return value <= bound if self.is_upper_bound else value >= bound


def _decode_targets() -> dict[tuple[str, str], Target]:
    """No cell slower than FA3 (us measured on one H100, bf16, block 16), four cells faster."""
    cells = ("1x1k", "1x8k", "1x64k", "8x1k", "8x8k", "64x1k", "64x4k", "256x1k", "256x2k")
    fa3_us = {
        "d128": (16.3, 29.8, 114, 27.8, 111, 114, 376, 385, 730),
        "d64": (14.1, 22.2, 71, 20.1, 68, 73, 208, 226, 405),
    }
    found = {
        ("decode_attention", f"{dim} {cell} block 16"): Target("us", us)
        for dim, row in fa3_us.items()
        for cell, us in zip(cells, row, strict=True)
    }
    for case, rate in (
        ("d128 64x4k", 2.92),
        ("d128 256x2k", 2.98),
        ("d64 64x4k", 2.80),
        ("d64 256x2k", 2.85),
    ):
        found["decode_attention", f"{case} block 16"] = Target("TB/s", rate)
    return found


TARGETS: dict[tuple[str, str], Target] = {
    **_decode_targets(),
    ("decode_attention", "d128 64x4k block 16 fp8"): Target("speedup over bf16", 1.7),
    ("prefill_attention", "d128 4x4k"): Target("TFLOP/s", 450),
    ("prefill_attention", "d128 1x16k"): Target("TFLOP/s", 480),
    ("prefill_attention", "d64 4x4k"): Target("TFLOP/s", 420),
    ("prefill_attention", "d64 1x16k"): Target("TFLOP/s", 450),
    ("prefill_attention_hopper", "d128 4x4k"): Target("TFLOP/s", 540),
    ("prefill_attention_hopper", "d128 1x16k"): Target("TFLOP/s", 590),
    ("prefill_attention_hopper", "d64 4x4k"): Target("TFLOP/s", 420),
    ("prefill_attention_hopper", "d64 1x16k"): Target("TFLOP/s", 450),
    ("rms_norm", "4096x4096 + residual"): Target("% of ceiling", 85),
    ("rotary_kv_write", "4096 tokens, 32/8x128"): Target("% of ceiling", 85),
    ("silu_mul", "4096x14336"): Target("% of ceiling", 85),
    ("matmuls of a step", "8B, M=1"): Target("ms", 5.35),
    ("matmuls of a step", "8B, M=16"): Target("ms", 5.35),
    ("sampling", "256x128k top-k 50 top-p 0.9"): Target("speedup over torch sort", 8),
}


def row_of(
    op: str,
    case: str,
    seconds: Mapping[str, float],
    *,
    baselines: Mapping[str, Mapping[str, float]] | None = None,
    bytes_moved: float = 0.0,
    flops: float = 0.0,
    ceilings: Mapping[str, float] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """A row from median_s, p10_s and p90_s of the op and of each baseline.

    `ceilings` holds this run's copy (TB/s) and matmul (TFLOP/s); what the op does more of, bytes or
    operations, by the time each would take at its ceiling, is what its percentage refers to.
    """
    ceilings = ceilings or {}
    row: dict[str, Any] = {"op": op, "case": case, **_microseconds(seconds)}
    median = seconds["median_s"]
    times = {}
    for unit, amount, ceiling in (
        ("TB/s", bytes_moved, ceilings.get("copy")),
        ("TFLOP/s", flops, ceilings.get("matmul")),
    ):
        if amount:
            row[unit] = round(amount / median / 1e12, 3)
            if ceiling:
                times[unit] = amount / ceiling / 1e12
    if times:
        bound = max(times, key=times.__getitem__)
        row["bound by"] = bound
        row["% of ceiling"] = round(100 * times[bound] / median, 1)
    row |= {"bytes": bytes_moved, "flops": flops}
    row["baselines"] = {}
    for name, timing in (baselines or {}).items():
        row["baselines"][name] = _microseconds(timing)
        row[f"speedup over {name}"] = round(timing["median_s"] / median, 3)
    row |= extra
    return judged(row, ceilings)


def judged(row: dict[str, Any], ceilings: Mapping[str, float]) -> dict[str, Any]:
    """The row with its target, the bound on this card, and whether it is met."""
    target = TARGETS.get((row["op"], row["case"]))
    if target is None or target.unit not in row:
        return row
    bound = target.value if "H100" in str(row.get("gpu", "H100")) else target.scaled(ceilings)
    return {
        **row,
        "target": {"unit": target.unit, "value": target.value, "here": round(bound, 3)},
        "is_met": target.is_met(row[target.unit], bound),
    }


def _microseconds(seconds: Mapping[str, float]) -> dict[str, float]:
    return {
        f"{name}us".replace("median_", ""): round(seconds[f"{name}s"] * 1e6, 2)
        for name in ("median_", "p10_", "p90_")
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows written so far; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def ceilings_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Copy (TB/s) and matmul (TFLOP/s) of the run whose rows these are, where measured."""
    found = {}
    for row in rows:
        if row["op"] == "copy":
            found["copy"] = float(row["TB/s"])
        elif row["op"] == "matmul_bf16_8192":
            found["matmul"] = float(row["TFLOP/s"])
    return found


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """A line a row: op, case, time, rate, share of the ceiling, baselines, target."""
    head = ("op", "case", "us", "rate", "% ceil", "beside", "target", "")
    lines = [head, *map(_cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    if "error" in row:
        return (row["op"], row["case"], "-", "-", "-", str(row["error"])[:90], "", "FAILED")
    by_unit = "TFLOP/s" if row.get("bound by") == "TFLOP/s" or "TB/s" not in row else "TB/s"
    rate = f"{row[by_unit]:.3g} {by_unit}" if by_unit in row else ""
    beside = ", ".join(f"{name} {time['us']:.1f}" for name, time in row["baselines"].items())
    target = row.get("target")
    wanted = "" if target is None else f"{target['here']:g} {target['unit']}"
    verdict = "" if target is None else ("met" if row["is_met"] else "MISSED")
    if target is not None and target["unit"] not in ("us", by_unit, "% of ceiling"):
        wanted += f" (is {row[target['unit']]:g})"
    share = f"{row['% of ceiling']:.0f}" if "% of ceiling" in row else ""
    time = f"{row['us']:.1f}"
    return (row["op"], row["case"], time, rate, share, beside, wanted, verdict)
