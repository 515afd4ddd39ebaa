"""The engine's GPU benchmarks as far as they go without a GPU: workloads, rows, the matrix of bits.

The scheduler is real; a made-up device answers, but for one run of the interpreter's.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import octavo.llm
from benchmarks import (
    engine_figures,
    gpu_engine,
    gpu_rows,
    gpu_serving,
    gpu_speculation,
    gpu_suite,
    offline_engine,
)
from benchmarks.engine_bits import measure_bits
from benchmarks.model_shapes import CONFIGS, write_config
from benchmarks.offline_engine import Answer, OfflineEngine, Workload, workloads
from octavo.checkpoint import parse_config
from octavo.engine import build
from octavo.types import SamplingParams
from octavo.worker.gpu import sampler
from octavo.worker.gpu.draft_planner import FixedPlanner
from octavo_kernels import sampling
from octavo_kernels.testing import gpu_device

DEVICE = gpu_device()
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines have a device that makes tokens of (seed, position)."""
    fake = functools.partial(build.build_engine, use_fake_executor=True)
    monkeypatch.setattr(build, "build_engine", fake)
    monkeypatch.setattr(octavo.llm, "build_engine", fake)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    return write_config("tiny", tmp_path / "tiny")


class Kept:
    """A `Recorder` that needs no GPU."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.num_failed = 0

    def keep(self, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))


def test_the_workloads_are_those_of_the_table() -> None:
    found = {workload.name: workload for workload in workloads(1000)}
    mixed = found["256 mixed"]
    assert len(mixed.prompts) == len(mixed.output_lens) == 256
    for lens in (list(map(len, mixed.prompts)), mixed.output_lens):
        assert min(lens) >= 100 and max(lens) <= 1024 and 130_000 < sum(lens) < 160_000
    assert found["batch 1"].num_tokens == 256 and len(found["batch 1"].prompts[0]) == 128
    assert found["batch 64"].num_tokens == 64 * 256
    assert found["prefill"].num_tokens == 64 * 2048 and set(found["prefill"].output_lens) == {1}
    prefix = found["shared prefix"]
    assert len({prompt[:1024] for prompt in prefix.prompts}) == 1
    assert len({prompt[1024:] for prompt in prefix.prompts}) == 128
    assert {name for op, name in engine_figures.GOALS if op == "engine"} == {
        f"{shape}, {name}" for shape in ("8B", "0.6B") for name in found
    }


@pytest.mark.parametrize("shape", CONFIGS)
def test_shapes_are_models(shape: str) -> None:
    spec = parse_config(CONFIGS[shape])
    known = {"8B": "llama-3.1-8b", "0.6B": "qwen3-0.6b"}.get(shape)
    if known is not None:
        other = parse_config(json.loads((ROOT / f"tests/cli/models/{known}.json").read_text()))
        for name in ("hidden_size", "num_layers", "num_kv_heads", "vocab_size", "rope", "qk_norm"):
            assert getattr(spec, name) == getattr(other, name)


@pytest.mark.usefixtures("made_up")
def test_rows_of_an_engine(folder: Path) -> None:
    rows: list[dict[str, Any]] = []
    gpu_engine.measure_workloads("tiny", folder, rows.append, began=0.0, is_short=False)
    gpu_engine.measure_text("tiny", folder, rows.append)
    names = {(row["op"], row["case"]) for row in rows}
    wanted = {(op, case.replace("0.6B", "tiny").replace("256 r", "8 r")) for op, case in
              engine_figures.GOALS if case.startswith("0.6B") and "49k" not in case
              and op != "speculation"}  # fmt: skip
    assert wanted <= names
    assert not [row for row in rows if "error" in row]
    by_case = {row["case"]: row for row in rows if row["op"] == "engine"}
    assert by_case["tiny, prefill"]["value"] > 0 and by_case["tiny, prefill"]["unit"] == "tok/s"
    assert {row["op"] for row in rows if "skipped" in row} == {"idle between steps", "memory"}
    table = gpu_rows.table(rows).splitlines()
    assert len(table) == len(rows) + 1 and any(line.endswith("skipped") for line in table)


@pytest.mark.usefixtures("made_up")
def test_the_matrix_of_bits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = []
    measure_bits("tiny", folder, rows.append)
    cases = [row["case"].removeprefix("tiny, ") for row in rows]
    assert cases == [
        "together",
        "warm prefix",
        "among 2 others",
        "captured graphs, alone",
        "captured graphs, among 2 others",
        "chunks of 8",
        "preempted",
    ]
    assert all(row["is_met"] and row["value"] == 3 and "error" not in row for row in rows)
    # A device whose tokens depend on the batch is found out.
    plain = OfflineEngine.answer

    def crowded(self: OfflineEngine, prompts: Any, params: Any) -> list[Answer]:
        answers = plain(self, prompts, params)
        if len(prompts) > 3:
            answers[-1].token_ids[-1] += 1
        return answers

    monkeypatch.setattr(OfflineEngine, "answer", crowded)
    rows.clear()
    measure_bits("tiny", folder, rows.append)
    wrong = {row["case"].removeprefix("tiny, ") for row in rows if "error" in row}
    assert wrong == {"among 2 others", "captured graphs, among 2 others"}
    assert "1 of 3 requests differ" in gpu_rows.table(rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
def test_rows_of_speculation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them is run in truth, with drafts that are all accepted; the others take no time."""
    monkeypatch.setattr(gpu_speculation, "CHANCES", {"sure": (1.0,) * 7})
    monkeypatch.setattr(gpu_speculation, "_FIXED", (3,))
    drawn: list[list[int]] = []

    def sample(logits: Any, *, workspace: Any, out: Any, **columns: Any) -> None:
        for mine, found in zip(out, sampling.sample(logits, **columns), strict=True):
            mine.copy_(found)

    def rate(engine: OfflineEngine, workload: Workload) -> float:
        if not engine.info.max_drafts:
            return 2.0
        runner: Any = engine.core._executor._runner  # type: ignore[attr-defined]
        is_fixed = isinstance(runner._speculation.planner, FixedPlanner)
        if is_fixed and workload.name == "batch 1":
            params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
            drawn.append(engine.answer([(5, 6)], [params])[0].token_ids)
        return 3.0

    monkeypatch.setattr(sampler, "sample", sample)  # which is slow in the interpreter
    monkeypatch.setattr(gpu_speculation, "rate", rate)
    rows: list[dict[str, Any]] = []
    gpu_speculation.measure_speculation("tiny", folder, rows.append, shrink=64)
    found = {row["case"].removeprefix("tiny, "): row for row in rows}
    names = ("none", "3 drafts", "auto")
    assert list(found) == [
        *("batch 1, off", "batch 2, off"),
        *(f"batch {batch}, sure, {name}" for batch in (1, 2) for name in names),
    ]
    assert found["batch 2, sure, auto"]["value"] == 1.5
    assert found["batch 1, sure, 3 drafts"]["counts"]["accepted_tokens"] >= 2
    assert not found["batch 1, sure, none"]["counts"]
    assert [len(tokens) for tokens in drawn] == [5]


def test_replayed_drafts_agree_as_often_as_they_should() -> None:
    generator = torch.Generator().manual_seed(1)
    num_rows, most = 300, 4
    rows = torch.arange(num_rows, dtype=torch.int32).repeat_interleave(1 + most)
    tokens = torch.randint(0, 99, rows.shape, generator=generator)
    table = torch.full((num_rows, 20), -5, dtype=torch.int32)
    num_tokens = torch.randint(3, 9, (num_rows,), generator=generator, dtype=torch.int32)
    counts, num_drawn = torch.zeros(num_rows, 99, dtype=torch.int32), torch.empty_like(rows)
    given = [each.to(DEVICE) for each in (rows, tokens, table, num_tokens, counts, num_drawn)]
    known = num_tokens.clone()
    with gpu_speculation.replaying(torch.tensor([0.5, 0.9, 0.9, 0.9], device=DEVICE)):
        sampler.accept(
            given[0],
            given[1],
            token_table=given[2],
            num_tokens=given[3],
            counts=given[4],
            num_drawn=given[5],
            max_drafts=most,
        )
    drawn = given[5].cpu()[:: 1 + most] - 1
    assert 0.4 < (drawn > 0).float().mean() < 0.6
    assert 0.8 < (drawn[drawn > 0] > 1).float().mean() < 1.0
    assert torch.equal(given[3].cpu(), known + drawn + 1)


def test_idle_time_is_what_no_kernel_covers() -> None:
    assert gpu_engine.idle_time([]) == (0, 0, 0)
    busy = [(10.0, 20.0), (0.0, 5.0), (12.0, 15.0), (18.0, 30.0), (31.0, 32.0)]
    assert gpu_engine.idle_time(busy) == (6.0, 5.0, 32.0)


def test_figures_are_judged() -> None:
    good = engine_figures.figure("engine", "8B, batch 1", 180.0, "tok/s")
    assert good["is_met"] and good["by vLLM"] == pytest.approx(180 / 153, abs=1e-3)
    late = engine_figures.figure("start", "8B, first token", 20.0, "s")
    assert not late["is_met"] and late["by vLLM"] == pytest.approx(3.39)
    plain = engine_figures.figure("memory", "8B", 70.0, "GiB in use")
    assert "is_met" not in plain
    lines = gpu_rows.table([good, late, plain]).splitlines()
    assert lines[1].endswith("met") and "vLLM 153" in lines[1]
    assert lines[2].endswith("MISSED") and "10 s" in lines[2]


def test_what_an_engines_process_prints_is_kept(tmp_path: Path) -> None:
    kept: Any = Kept()
    gpu_engine.keep_rows(kept, "gpu_engine", "nothing")
    assert kept.num_failed == 1
    assert kept.rows == [{"op": "nothing", "case": "", "error": "exit status 2"}]


def test_kernels_are_compiled_before_a_start_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, len(commands) - 1, "", "no such thing")

    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(subprocess, "run", run)
    kept: Any = Kept()
    gpu_engine.compile_kernels(kept, "tiny")
    gpu_engine.compile_kernels(kept, "tiny")
    assert commands[0][1:4] == ["-m", "octavo", "compile"] and commands[0][-2:] == [
        "--arch",
        "sm_90",
    ]
    assert [row.get("error") for row in kept.rows] == [None, "no such thing"]
    assert kept.num_failed == 1


def test_groups_of_sections(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[str] = []

    def run_sections(names: list[str], *_: Any, **__: Any) -> dict[str, str]:
        ran.extend(names)
        return {}

    monkeypatch.setattr(gpu_suite, "run_sections", run_sections)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("OUT", str(tmp_path))
    gpu_suite.main(["--only", "engine", "fused"])
    assert ran == ["engine_8b", "engine_06b", "bits", "serving", "fused"]
    limits = {section.name: section.limit_s for section in gpu_suite.SECTIONS}
    assert sum(limits[name] for name in gpu_suite.GROUPS["engine"]) < gpu_suite.WHOLE_LIMIT_S


def test_serving_is_left_out_where_packages_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_serving, "NEEDED", ("json", "no_such_package"))
    kept: Any = Kept()
    gpu_serving.run_serving(kept, is_short=False)
    assert [row["skipped"] for row in kept.rows] == ["no_such_package not installed"]


def test_serving_rows(folder: Path) -> None:
    rows: list[dict[str, Any]] = []
    load = gpu_serving.Load(
        levels=((1, 1), (2, 3)),
        input_len=6,
        output_len=4,
        options=("--max-model-len", "64"),
        flags=("--fake-executor",),
    )
    gpu_serving.measure_http("tiny", folder, rows.append, load=load, offline=1000.0)
    assert [(row["op"], row["case"]) for row in rows] == [
        ("HTTP ready", "tiny"),
        ("HTTP", "tiny, 1 stream"),
        ("HTTP TTFT p99", "tiny, 1 stream"),
        ("HTTP ITL p99", "tiny, 1 stream"),
        ("HTTP", "tiny, 2 streams"),
        ("HTTP TTFT p99", "tiny, 2 streams"),
        ("HTTP ITL p99", "tiny, 2 streams"),
        ("HTTP of offline", "tiny, 2 streams"),
    ]
    last = next(row for row in rows if row["case"] == "tiny, 2 streams")
    assert last["load"]["requests"] == 3 and last["load"]["events"] >= 3
    assert rows[-1]["value"] == pytest.approx(last["value"] / 1000, abs=1e-3)


BLOCKED = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("fastapi", "uvicorn", "starlette", "pydantic", "msgspec", "zmq"):
            raise ImportError(name + " must not be needed")
sys.meta_path.insert(0, Blocked())
import functools
from pathlib import Path
import benchmarks.gpu_suite, benchmarks.gpu_engine, benchmarks.gpu_serving
import octavo.llm
import octavo.worker.worker, octavo.worker.startup, octavo.worker.gpu.startup
from octavo.engine import build
octavo.llm.build_engine = functools.partial(build.build_engine, use_fake_executor=True)
llm = octavo.LLM(sys.argv[1], load_format="dummy", max_model_len=64)
(answer,) = llm.generate([[1, 2, 3]], max_tokens=4, ignore_eos=True)
assert len(answer.token_ids) == 4
"""


def test_the_offline_engine_needs_no_package_of_the_http_side(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(folder)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_engine_in_the_interpreter(folder: Path) -> None:
    engine = OfflineEngine(
        folder, max_model_len=32, max_num_seqs=2, max_num_batched_tokens=8, dtype="float32"
    )
    assert engine.info.device != "cpu"
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True, logprobs=1)
    (answer,) = engine.answer([(5, 6, 7)], [params])
    assert len(answer.token_ids) == len(answer.logprobs) == 2 and answer.error is None
    assert engine.capture_all() == 0
    engine.close()


def test_an_answer_that_fails_is_raised(made_up: None, folder: Path) -> None:
    engine = OfflineEngine(folder, max_model_len=32)
    workload = offline_engine.Workload(name="too long", prompts=[(1,) * 40], output_lens=[4])
    with pytest.raises(RuntimeError, match="r1 failed"):
        engine.run(workload)
