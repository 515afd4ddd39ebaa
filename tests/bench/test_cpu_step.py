"""The profile of a CPU step: what launches are seen, what they have to do, what the table says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cpu_limits, cpu_step, step_work
from benchmarks.launch_watch import Launch, LaunchWatch, watching
from benchmarks.step_work import Shape, StepWork, Work
from octavo.config import CacheConfig, EngineConfig, ModelConfig
from octavo_kernels import memory
from octavo_kernels.recording import Arena, recording
from octavo_kernels.rms_norm import rms_norm

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
LIMITS = cpu_limits.Limits(
    threads=2,
    read_gb_s=20.0,
    read_one_gb_s=10.0,
    int8_gop_s=1000.0,
    fp32_gop_s=300.0,
    path="generic",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model")
    (found / "config.json").write_text(json.dumps(CONFIG))
    return found


@pytest.fixture(scope="module")
def work(folder: Path) -> StepWork:
    """Of the model in float32, its cache in float16."""
    model = ModelConfig(model=str(folder), load_format="dummy", quantization="none")
    cache = CacheConfig(kv_cache_dtype="float16", num_gpu_blocks_override=32)
    bench = cpu_step.Bench(EngineConfig(model=model, cache=cache), LaunchWatch())
    bench.close()
    return bench._work


def address(work: StepWork, role: str) -> int:
    return next(start for start, _, matrix in work._matrices._found if matrix.role == role)


def test_every_weight_of_a_model_is_found_once(work: StepWork) -> None:
    found = work._matrices.all
    shapes = sorted((matrix.n, matrix.k) for matrix in found)
    layer = [(64, 64), (64, 160), (128, 64), (320, 64)]
    assert shapes == sorted(layer * 2 + [(512, 64)])
    assert {matrix.role for matrix in found if matrix.n != 512} == {
        *("qkv", "output", "gate_up", "down")
    }
    assert not any(matrix.is_int8 for matrix in found)


def test_a_launch_belongs_to_the_weight_that_it_points_into(work: StepWork) -> None:
    shape = Shape(counts=(1, 3), contexts=(9, 3))
    name = "octavo_kernels.matmul.cpu.matmul_float32"
    label, done = work.of(name, (7, 0.5, address(work, "gate_up") + 64), shape)
    assert label == "gate_up: matmul_float32"
    assert done.num_ops == 2 * 4 * 320 * 64
    weight = next(each for each in work._matrices.all if each.role == "gate_up")
    assert done.num_bytes == weight.num_bytes + 4 * (4 * 64 + 4 * 160)
    assert weight.num_bytes >= 320 * 64 * 4
    table = address(work, "embedding")
    label, done = work.of(name, (table,), shape)
    assert (label, done.num_ops) == ("head: matmul_float32", 2 * 2 * 512 * 64)
    label, done = work.of("octavo_kernels.matmul.cpu.gather_rows_float32", (table,), shape)
    head = next(each for each in work._matrices.all if each.n == 512)
    assert label == "embedding: gather_rows_float32"
    assert done == Work(4 * (head.num_bytes / 512 + 4 * 64))


def test_attention_reads_every_key_once_and_a_chunk_sees_a_triangle(work: StepWork) -> None:
    shape = Shape(counts=(1, 3), contexts=(9, 5))
    seen = sum(c - n + i + 1 for n, c in ((1, 9), (3, 5)) for i in range(n))
    assert shape.num_keys == seen
    label, done = work.of("octavo_kernels.paged_attention.cpu.attend_float16", (1,), shape)
    assert label == "paged_attention: attend_float16"
    assert done.num_ops == 4 * 4 * 16 * seen
    assert done.num_bytes == (9 + 5) * 2 * 2 * 16 * 2 + 2 * 4 * 4 * 4 * 16
    assert work.of("octavo_kernels.paged_attention.cpu.make_plan", (1,), shape)[1] == Work()


def test_8_bits_and_less_are_int8() -> None:
    for num_bytes, is_int8 in ((32 * 34, True), (16 * 40, True), (2048, False), (4096, False)):
        matrix = step_work.Matrix(role="x", n=32, k=32, num_bytes=num_bytes)
        assert matrix.is_int8 is is_int8


def test_launches_are_seen_as_they_run_and_as_they_are_replayed() -> None:
    x, weight = torch.randn(3, 32), torch.ones(32)
    with watching() as watch:
        rms_norm(x, weight, eps=1e-5)
        assert watch.take() == []
        watch.is_timing = True
        expected = rms_norm(x, weight, eps=1e-5)
        (plain,) = watch.take()
        watch.is_timing = False
        arena = Arena(1 << 20)
        with recording(arena) as recorded:
            out = rms_norm(x, weight, eps=1e-5)
            again = rms_norm(out, weight, eps=1e-5)
        again.zero_()
        recorded.replay()
        assert watch.take() == [] and again.count_nonzero() > 0
        out.zero_()
        watch.is_timing = True
        recorded.replay()
        first, second = watch.take()
    assert memory._keeper is None
    assert torch.equal(out, expected)
    assert plain.name == first.name == second.name and "rms_norm" in plain.name
    assert x.data_ptr() in first.args and out.data_ptr() in second.args
    assert first.seconds > 0


def test_labels_are_summed_by_step_and_their_median_taken() -> None:
    def work_of(name: str, args: Any, shape: Shape) -> tuple[str, Work]:
        return name, Work(1e6 * shape.contexts[0], 2e6, is_int8=name == "b")

    def step(*seconds: float) -> list[Launch]:
        a, b, c = seconds
        return [Launch("a", (), a), Launch("b", (), b), Launch("a", (), c)]

    steps = [step(0.001, 0.01, 0.001), step(0.002, 0.01, 0.003), step(0.5, 0.01, 0.5)]
    shapes = [Shape(counts=(1,), contexts=(n,)) for n in (7, 8, 9)]
    b, a = cpu_step.summed(steps, shapes, work_of)
    assert (b.label, b.calls, b.ms) == ("b", 1, pytest.approx(10.0))
    assert (a.label, a.calls, a.ms) == ("a", 2, pytest.approx(5.0))
    assert a.work == Work(16e6, 4e6) and b.work.is_int8
    assert a.limit_ms(LIMITS) == pytest.approx(16e6 / 20e9 * 1e3)
    profile = cpu_step.Profile(
        name="decode 1 x 7", step_ms=16.0, least_ms=15.0, watched_ms=17.0, entries=(b, a)
    )
    whole, first, _ = profile.rows(LIMITS)
    assert whole["kernels_ms"] == 15.0 and first["gb_s"] == 0.8 and first["gop_s"] == 0.2
    assert profile.text(LIMITS).splitlines()[-1].split()[-1] == "1.000"


def test_the_slower_of_two_limits_counts() -> None:
    assert LIMITS.least_ms(20e9, 1e9, is_int8=True) == pytest.approx(1000)
    assert LIMITS.least_ms(1, 3e11, is_int8=False) == pytest.approx(1000)
    faster = dataclasses.replace(LIMITS, int8_gop_s=2000.0, read_gb_s=1.0)
    assert LIMITS.best_of(faster) == dataclasses.replace(LIMITS, int8_gop_s=2000.0)


def test_the_probe_finds_rates_and_leaves_the_threads() -> None:
    limits = cpu_limits.measure(threads=2, times=1, read_bytes=1 << 22)
    rates = (limits.read_gb_s, limits.read_one_gb_s, limits.int8_gop_s, limits.fp32_gop_s)
    assert all(rate > 0 for rate in rates)


def test_a_whole_profile_of_a_small_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept: list[dict[str, Any]] = []
    monkeypatch.setattr(cpu_step, "keep_row", lambda name, row: kept.append(row))
    monkeypatch.setattr(cpu_step, "measure", lambda threads: LIMITS)
    cpu_step.main(
        [
            *("--model", str(folder), "--load-format", "dummy", "--batches", "1,2"),
            *("--context", "20", "--chunk", "24", "--reps", "3", "--write"),
        ]
    )
    assert {row["step"] for row in kept} == {"decode 1 x 20", "decode 2 x 20", "prefill 24"}
    labels = {row["label"].partition(":")[0] for row in kept if row["step"] == "decode 2 x 20"}
    assert {"qkv", "output", "gate_up", "down", "head", "paged_attention", "step"} <= labels
    assert "limits, " in capsys.readouterr().out
