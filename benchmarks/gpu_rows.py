"""Rows of the GPU suite: rates, ceilings, targets, the table. Knows no kernel and needs no GPU."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import engine_figures

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
        """The bound on this card, by its copy bandwidth or matmul rate to the H100's."""
        copy = ceilings.get("copy", H100_COPY_TB_S) / H100_COPY_TB_S
        matmul = ceilings.get("matmul", H100_MATMUL_TFLOP_S) / H100_MATMUL_TFLOP_S
        if self.unit == "TB/s":
            return self.value * copy
        if self.unit == "TFLOP/s":
            return self.value * matmul
        return self.value / copy if self.is_upper_bound else self.value

    def is_met(self, value: float, bound: float) -> bool:
        return value <= bound if self.is_upper_bound else value >= bound


# FA3 through vLLM 0.20.0, paged, block 16, bf16, 32 query and 8 kv heads, one H100 80GB HBM3:
# not of the run, since it is not installed everywhere. Microseconds, TFLOP/s.
FA3_DECODE_US = {
    "d128": {"1x1k": 16.3, "1x8k": 29.8, "1x64k": 114.0, "8x1k": 27.8, "8x8k": 111.0}
    | {"64x1k": 114.0, "64x4k": 376.0, "256x1k": 385.0, "256x2k": 730.0},
    "d64": {"1x1k": 14.1, "1x8k": 22.2, "1x64k": 71.0, "8x1k": 20.1, "8x8k": 68.0}
    | {"64x1k": 73.0, "64x4k": 208.0, "256x1k": 226.0, "256x2k": 405.0},
}
FA3_PREFILL_TFLOP_S = {"d128": {"16x1k": 393.0, "8x2k": 479.0, "4x4k": 527.0, "1x16k": 573.0}}

_PREFILL = {"d128": (450.0, 480.0, 540.0, 590.0), "d64": (420.0, 450.0, 420.0, 450.0)}


def _targets() -> dict[tuple[str, str], Target]:
    found = {}
    for dim, cells in FA3_DECODE_US.items():
        for cell, us in cells.items():
            found["decode_attention", f"{dim} {cell} block 16"] = Target("us", us)
    for case, rate in (
        ("d128 64x4k", 2.92),
        ("d128 256x2k", 2.98),
        ("d64 64x4k", 2.80),
        ("d64 256x2k", 2.85),
    ):
        found["decode_attention", f"{case} block 16"] = Target("TB/s", rate)
    found["decode_attention", "d128 64x4k block 16 fp8"] = Target("speedup over bf16", 1.7)
    for dim, rates in _PREFILL.items():
        for block in (16, 64):
            for op, pair in (("prefill", rates[:2]), ("prefill_hopper", rates[2:])):
                for cell, rate in zip(("4x4k", "1x16k"), pair, strict=True):
                    found[f"{op}_attention", f"{dim} {cell} block {block}"] = Target(
                        "TFLOP/s", rate
                    )
    for op in ("rms_norm", "rotary_kv_write", "silu_mul"):
        found[op, "8B, 4096 tokens"] = Target("% of ceiling", 85)
    for rows in (1, 16):
        found["matmuls of a step", f"8B, M={rows}"] = Target("ms", 5.35)
    found["sampling", "256x128k top-k 50, top-p 0.9"] = Target("speedup over torch sort", 8)
    return found


TARGETS = _targets()


def row_of(
    op: str,
    case: str,
    seconds: Mapping[str, float],
    *,
    baselines: Mapping[str, Mapping[str, float]] | None = None,
    known_us: Mapping[str, float] | None = None,
    bytes_moved: float = 0.0,
    flops: float = 0.0,
    ceilings: Mapping[str, float] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """A row from median_s, p10_s and p90_s of the op and of each baseline.

    `known_us` holds microseconds to compare with that were not measured in turn with the op.
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
    for name, us in (known_us or {}).items():
        row["baselines"][name] = {"us": us}
        row[f"speedup over {name}"] = round(us / row["us"], 3)
    row |= extra
    return judged(row, ceilings)


def judged(row: dict[str, Any], ceilings: Mapping[str, float]) -> dict[str, Any]:
    """The row with its target, the bound on this card, and whether it is met."""
    target = TARGETS.get((row["op"], row["case"]))
    if target is not None and target.unit == "ms":
        row = {**row, "ms": round(row["us"] / 1e3, 3)}
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
    if "skipped" in row:
        return (row["op"], row["case"], "-", "-", "-", str(row["skipped"])[:90], "", "skipped")
    if "value" in row:
        return engine_figures.cells(row)
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
