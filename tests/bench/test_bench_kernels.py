"""The spec-driven benchmark: what it finds, refuses and keeps; on a GPU as far as it goes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import octavo_kernels
from benchmarks import bench_kernels, gpu_recorder
from octavo_kernels.benchmarking import Timing
from octavo_kernels.op import OpSpec, all_specs

PACKAGE = Path(octavo_kernels.__file__).parent


@pytest.mark.parametrize("op", sorted(path.parent.name for path in PACKAGE.glob("*/gpu.py")))
def test_every_gpu_op_has_a_benchmark(op: str) -> None:
    module = importlib.import_module(f"octavo_kernels.{op}.gpu_spec")
    specs: list[OpSpec] = [module.SPEC] if hasattr(module, "SPEC") else list(module.SPECS)
    assert any(spec.bench_cases for spec in specs)


@pytest.mark.parametrize(("device", "file"), [("cpu", "spec"), ("cuda", "gpu_spec")])
def test_everything_that_is_timed_can_be_listed(
    device: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bench_kernels.main(["--device", device, "--list"])
    lines = capsys.readouterr().out.splitlines()
    wanted = {spec.name for spec in all_specs(file) if spec.bench_cases}
    assert {line.split()[0] for line in lines} == wanted
    bench_kernels.main(["--device", device, "--list", "--op", "rms_norm", "--dtype", "float32"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("rms_norm float32 T1")


def test_what_cannot_be_timed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_kernels.main(["--device", "cuda", "--op", "nothing", "--list"])
    told = capsys.readouterr().err
    assert "no op 'nothing'; there are [" in told and "'block_copy'," in told
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            bench_kernels.main(["--device", "cuda"])
        assert "no CUDA device" in capsys.readouterr().err


def test_a_gpu_run_tests_then_times_there_and_keeps_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Any] = []
    rows: list[dict[str, Any]] = []

    def time_case(spec: OpSpec, case: Any, dtype: torch.dtype, **options: Any) -> list[Timing]:
        steps.append((case.name, options))
        return [Timing(contender="octavo", calls=9, median_s=2e-6, p10_s=1e-6, p90_s=3e-6)]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_recorder, "gpu_passport", lambda: {"cpu": "a", "gpu": "NVIDIA X"})
    monkeypatch.setattr(bench_kernels, "assert_green", lambda *_, device: steps.append(device))
    monkeypatch.setattr(bench_kernels, "time_case", time_case)
    monkeypatch.setattr(bench_kernels, "keep_row", lambda name, row: rows.append(row))
    chosen = ["--op", "block_copy", "--dtype", "float16", "--match", "n16"]
    bench_kernels.main(["--device", "cuda", *chosen, "--rounds", "2", "--write"])
    assert steps == ["cuda", ("n16", {"device": "cuda", "rounds": 2})]
    assert [row["gpu"] for row in rows] == ["NVIDIA X"] and rows[0]["median_us"] == 2.0
