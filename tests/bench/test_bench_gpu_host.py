"""The host benchmark of the GPU engine runs: tokens flow, and every part of a turn is timed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.bench_gpu_host import Case, measure
from octavo.types import SamplingParams

CASE = Case(name="decode", running=2, shape="tiny", largest_step=64, max_model_len=256)
ALWAYS = {"schedule", "table", "upload", "launch", "read", "finish", "update", "encode", "send"}


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        (CASE, {"graphs", "fetch"}),
        (replace(CASE, params=SamplingParams(max_tokens=100, logprobs=2)), {"sample", "stage"}),
        (replace(CASE, running=1, comes=(20, 1)), {"add", "receive"}),
        (replace(CASE, is_eager=True), {"forward", "sample"}),
    ],
    ids=["graphs", "logprobs", "arrivals", "eager"],
)
def test_every_part_of_a_turn_is_timed(tmp_path: Path, case: Case, parts: set[str]) -> None:
    (row,) = measure([case], num_turns=25, folder=tmp_path)
    assert row["turns"] == 25
    found = row["parts_us"]
    assert isinstance(found, dict) and parts | ALWAYS <= set(found)
    assert ("launches" in row) == case.is_eager
