"""Draws the roofline of a GPU suite's rows: what each kernel reaches of what the card allows.

    python -m benchmarks.roofline gpu_suite.jsonl [--out roofline.png]

Needs matplotlib, which the project itself does not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_rows import ceilings_of, read_rows

MARKS = "osD^vP*Xhd<>"


def points_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float, str]]]:
    """(FLOPs per byte, TFLOP/s, case) by op, of rows that know both; ceilings are no points."""
    found: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        has_both = row.get("bytes") and row.get("flops") and "us" in row
        if has_both and row["op"] not in ("copy", "read", "matmul_bf16_8192"):
            intensity = row["flops"] / row["bytes"]
            rate = row["flops"] / row["us"] / 1e6
            found.setdefault(row["op"], []).append((intensity, rate, row["case"]))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--out", type=Path, default=Path("roofline.png"))
    arguments = parser.parse_args(argv)
    rows = read_rows(arguments.rows)
    ceilings, points = ceilings_of(rows), points_of(rows)
    if set(ceilings) != {"copy", "matmul"} or not points:
        print(f"{arguments.rows} holds no ceilings or no kernels", file=sys.stderr)
        return 1
    try:
        import matplotlib
    except ImportError:
        print("the roofline needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 2
    matplotlib.use("Agg")
    about = f"{rows[0]['gpu']}, commit {rows[0]['commit']}, triton {rows[0].get('triton', '?')}"
    draw(ceilings, points, arguments.out, about=about)
    print(f"wrote {arguments.out}")
    return 0


def draw(
    ceilings: Mapping[str, float],
    points: Mapping[str, Sequence[tuple[float, float, str]]],
    out: Path,
    *,
    about: str,
) -> None:
    """The roof (copy bandwidth, then matmul rate) and a mark for every case."""
    from matplotlib import pyplot

    ridge = ceilings["matmul"] / ceilings["copy"]
    every = [point for case in points.values() for point in case]
    left = min(point[0] for point in every) / 2
    right = max(*(point[0] for point in every), 4 * ridge) * 2
    figure, axes = pyplot.subplots(figsize=(10, 6), layout="constrained")
    roof = ([left, ridge, right], [left * ceilings["copy"], *[ceilings["matmul"]] * 2])
    axes.plot(*roof, color="black", linewidth=1.5)
    axes.text(left * 1.1, left * ceilings["copy"] * 1.5, f"copy {ceilings['copy']:.2f} TB/s")
    axes.text(ridge, ceilings["matmul"] * 1.06, f"cuBLAS {ceilings['matmul']:.0f} TFLOP/s")
    for mark, (op, cases) in zip(MARKS * len(points), points.items(), strict=False):
        xs, ys = [x for x, _, _ in cases], [y for _, y, _ in cases]
        axes.scatter(xs, ys, marker=mark, s=28, alpha=0.8, label=op)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="TFLOP/s", title=about)
    axes.set_ylim(top=ceilings["matmul"] * 2)
    axes.grid(which="both", linewidth=0.3)
    axes.legend(loc="lower right")
    figure.savefig(out, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
