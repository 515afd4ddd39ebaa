"""The GPU suite as far as it goes without a GPU: rows, targets, table, limits, calls."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import gpu_rows, gpu_suite, roofline

pytest.importorskip("triton")

from benchmarks import gpu_recorder
from octavo_kernels.launch import collecting
from octavo_kernels.tune import OnMeta

CEILINGS = {"copy": 3.0, "matmul": 600.0}


def times(median_us: float) -> dict[str, float]:
    return {"median_s": median_us / 1e6, "p10_s": median_us / 2e6, "p90_s": median_us / 5e5}


def test_a_row_says_rate_share_and_speedup() -> None:
    row = gpu_rows.row_of(
        "op",
        "case",
        times(100),
        baselines={"cuBLAS": times(150)},
        known_us={"FA3": 120.0},
        bytes_moved=150e6,
        flops=6e9,
        ceilings=CEILINGS,
    )
    assert row["us"] == 100 and row["p10_us"] == 50 and row["p90_us"] == 200
    assert row["TB/s"] == 1.5 and row["TFLOP/s"] == 60
    assert row["bound by"] == "TB/s" and row["% of ceiling"] == 50
    assert row["speedup over cuBLAS"] == 1.5 and row["speedup over FA3"] == 1.2
    assert "target" not in row


@pytest.mark.parametrize(("us", "is_met"), [(373.0, False), (360.0, True)])
def test_a_rate_target_on_an_h100(us: float, is_met: bool) -> None:
    row = gpu_rows.row_of(
        "decode_attention",
        "d128 64x4k block 16",
        times(us),
        bytes_moved=2**30,
        ceilings=CEILINGS,
        gpu="NVIDIA H100 80GB HBM3",
    )
    assert row["target"] == {"unit": "TB/s", "value": 2.92, "here": 2.92}
    assert row["is_met"] is is_met


def test_targets_move_with_the_ceilings_of_another_card() -> None:
    ceilings = {"copy": 2 * gpu_rows.H100_COPY_TB_S, "matmul": gpu_rows.H100_MATMUL_TFLOP_S / 2}
    decode = gpu_rows.judged(
        {"op": "decode_attention", "case": "d64 1x1k block 16", "us": 7.0, "gpu": "NVIDIA H200"},
        ceilings,
    )
    assert decode["target"]["here"] == pytest.approx(14.1 / 2) and decode["is_met"]
    prefill = {"op": "prefill_attention", "case": "d128 4x4k block 64", "gpu": "NVIDIA H200"}
    assert gpu_rows.judged({**prefill, "TFLOP/s": 230.0}, ceilings)["is_met"]
    assert not gpu_rows.judged({**prefill, "TFLOP/s": 220.0}, ceilings)["is_met"]


def test_every_row_and_a_failed_one_have_a_line() -> None:
    rows = [
        gpu_rows.row_of(
            "silu_mul", "8B, 4096 tokens", times(80), bytes_moved=2e8, ceilings=CEILINGS
        ),
        {"op": "sampling", "case": "x", "error": "RuntimeError: no"},
    ]
    lines = gpu_rows.table(rows).splitlines()
    assert len(lines) == 3
    assert "83" in lines[1] and lines[1].endswith("MISSED")
    assert "RuntimeError: no" in lines[2] and lines[2].endswith("FAILED")


def test_rows_survive_a_crash_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"op": "copy", "case": "1 GiB", "TB/s": 3.1}) + '\n{"op": "rea')
    rows = gpu_rows.read_rows(path)
    assert gpu_rows.ceilings_of(rows) == {"copy": 3.1}
    assert gpu_rows.read_rows(tmp_path / "none.jsonl") == []


def test_a_section_that_crashes_or_hangs_is_named(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        assert gpu_suite._process([sys.executable, "-c", "exit(3)"], log, 60) == "exit status 3"
        sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
        assert gpu_suite._process(sleeps, log, 0.5) == "stopped after 0 s"
        assert gpu_suite._process([sys.executable, "-c", ""], log, 60) == ""


def test_sections_run_within_what_is_left_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: dict[str, float] = {}

    def process(command: Sequence[str], log: object, limit_s: float) -> str:
        limits[command[command.index("--section") + 1]] = limit_s
        return ""

    monkeypatch.setattr(gpu_suite, "_process", process)
    names = [section.name for section in gpu_suite.SECTIONS]
    now = time.monotonic()
    verdicts = gpu_suite.run_sections(names, tmp_path, is_short=True, deadline=now + 35)
    long = {section.name for section in gpu_suite.SECTIONS if not section.short_limit_s}
    assert {"quant", "warm", "bits"} <= long
    assert set(limits) == set(verdicts) == set(names) - long, "too long for the short form"
    assert limits["ceilings"] == 30 and 30 < limits["compile"] <= 35
    limits.clear()
    verdicts = gpu_suite.run_sections(["decode", "quant"], tmp_path, is_short=False, deadline=now)
    assert verdicts == dict.fromkeys(["decode", "quant"], "no time was left") and not limits


MEASURED = [section.name for section in gpu_suite.SECTIONS if section.calls_ops]


@pytest.mark.parametrize("name", MEASURED)
def test_a_section_calls_its_ops_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    section = next(section for section in gpu_suite.SECTIONS if section.name == name)
    module = importlib.import_module(f"benchmarks.{section.module}")
    monkeypatch.setattr(module, "times_to_fill", lambda num_bytes: 1)
    rehearsal = gpu_recorder.Rehearsal()
    with OnMeta(), collecting() as found:
        getattr(module, f"run_{name}")(rehearsal, is_short=False)
    assert found and rehearsal.kept
    ops = {op for op, _ in rehearsal.kept}
    missing = [target for target in gpu_rows.TARGETS if target[0] in ops]
    assert set(missing) <= set(rehearsal.kept), "a target that nothing is measured for"


def test_a_roofline_has_a_point_for_each_kernel(tmp_path: Path) -> None:
    rows = [
        {"op": "copy", "case": "1 GiB", "TB/s": 3.0, "bytes": 1e9, "flops": 0.0, "us": 1.0},
        {"op": "matmul_bf16_8192", "case": "cuBLAS", "TFLOP/s": 600.0, "bytes": 0, "flops": 1e9},
        {"op": "matmul", "case": "qkv M=1", "bytes": 1e8, "flops": 2e8, "us": 40.0},
        {"op": "sampling", "case": "x", "error": "RuntimeError: no"},
    ]
    assert roofline.points_of(rows) == {"matmul": [(2.0, 5.0, "qkv M=1")]}
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"gpu": "H100", "commit": "a", **row}) + "\n" for row in rows)
    )
    picture = tmp_path / "roofline.png"
    status = roofline.main([str(path), "--out", str(picture)])
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    assert status == (0 if has_matplotlib else 2)
    assert picture.exists() == has_matplotlib


def test_nothing_is_measured_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_suite.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_input_sets_fill_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        L2_cache_size = 50 * 2**20

    monkeypatch.setattr(gpu_recorder.torch.cuda, "get_device_properties", lambda: Properties)
    assert gpu_recorder.times_to_fill(2**30) == 2
    assert gpu_recorder.times_to_fill(50 * 2**20) == 8
    assert gpu_recorder.times_to_fill(1) == 96
