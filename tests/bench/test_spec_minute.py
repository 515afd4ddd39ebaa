"""Slices are the same for both modes, and their table sums them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.spec_minute import of_last_commit, slices, table


def row(mode: str, **values: Any) -> dict[str, Any]:
    one = {"run": "r1", "commit": "c", "mode": mode, "concurrency": 16, "seconds": 10.0, "slice": 0}
    return {**one, "gain": 0.01, "guarded": 0, **values}


def test_slices_begin_with_other_talks_and_share_no_salt(tmp_path: Path) -> None:
    for name in ("a", "b"):
        lines = [json.dumps({"turns": [f"{name}{i}", "later"]}) for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    args = argparse.Namespace(data=tmp_path, sets=["a", "b"], pairs=3, concurrency=4, tokens=8)
    found = slices(args, salt="s")
    assert [turn.talks[0] for turn in found] == ["a0", "a2", "a4"]
    assert found[0].talks[:4] == ("a0", "b0", "a1", "b1")
    assert all(turn.talks[:12] == turn.talks[12:24] for turn in found)
    # A talk that comes again is not known from before.
    salts = [turn.request(i, "u")[0].body["cache_salt"] for turn in found for i in (0, 12)]
    assert len(set(salts)) == 6


def test_the_table_sums_slices_and_a_servers_counter_counts_once() -> None:
    rows = [
        row("off", out_tokens=1000),
        row("auto", out_tokens=1100, guarded=1),
        row("off", out_tokens=3000, slice=1),
        row("auto", out_tokens=2860, slice=1, guarded=2, gain=-0.015),
        row("auto", out_tokens=9, concurrency=32),
    ]
    last = table(rows).splitlines()[-1]
    assert last == "| 16 | 20 | 200 | 198 | 0.990 | 1.027 | -0.015 to +0.010 | 2 |"


def test_rows_of_the_last_commit_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match="has no rows"):
        of_last_commit(path)
    rows = [row("off", commit=commit) for commit in ("a", "b", "a", "b")]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert of_last_commit(path) == [rows[1], rows[3]]
