"""The arithmetic of a serving benchmark, on results whose figures are known."""

from __future__ import annotations

import math

import pytest

from octavo.bench.client import Result
from octavo.bench.report import as_json, percentile_word, render, summarize
from octavo.bench.serve import arrivals

METRICS = ("ttft", "tpot", "itl", "e2el")


def results() -> list[Result]:
    return [
        # Meant for 0.0, sent at 0.1, tokens at 0.5, 0.7 and 1.2.
        Result(
            prompt_len=10,
            intended=0.0,
            sent=0.1,
            first=0.5,
            last=1.2,
            itls=[0.2, 0.5],
            output_len=3,
            text="abc",
        ),
        Result(
            prompt_len=20,
            intended=1.0,
            sent=1.2,
            first=1.3,
            last=1.3,
            output_len=1,
            text="d",
        ),
        Result(prompt_len=30, intended=1.0, sent=1.0, error="HTTP 500: no"),
    ]


def test_figures() -> None:
    summary = summarize(results(), duration=2.0, goodput={"ttft": 400, "e2el": 1000})
    out = as_json(summary, results(), metrics=METRICS, percentiles=(50, 99), is_detailed=True)
    expected = {
        "completed": 2,
        "failed": 1,
        "total_input_tokens": 30,
        "total_output_tokens": 4,
        "request_throughput": 1.0,
        "request_goodput": 0.5,
        "output_throughput": 2.0,
        "total_token_throughput": 17.0,
        "max_output_tokens_per_s": 2.0,
        "max_concurrent_requests": 1,
        "mean_ttft_ms": 400.0,
        "mean_ttft_from_send_ms": 250.0,
        "median_ttft_ms": 400.0,
        "std_ttft_ms": 100.0,
        "p50_ttft_ms": 400.0,
        "p99_ttft_ms": 498.0,
        "mean_tpot_ms": 350.0,
        "mean_itl_ms": 350.0,
        "p50_itl_ms": 350.0,
        "mean_e2el_ms": 750.0,
    }
    assert {k: out[k] for k in expected} == {k: pytest.approx(v) for k, v in expected.items()}
    assert out["input_lens"] == [10, 20, 30]
    assert out["itls"] == [[0.2, 0.5], [], []]
    assert out["generated_texts"] == ["abc", "d", ""]
    assert out["errors"] == ["", "", "HTTP 500: no"]


def test_the_printed_block() -> None:
    summary = summarize(results(), duration=2.0, goodput={"ttft": 400})
    text = render(
        summary, metrics=METRICS, percentiles=(99.0, 99.9), max_concurrency=4, request_rate=3
    )
    labels = [line.split(":")[0] + ":" for line in text.splitlines() if ":" in line]
    assert labels[:13] == [
        "Successful requests:",
        "Failed requests:",
        "Maximum request concurrency:",
        "Request rate configured (RPS):",
        "Benchmark duration (s):",
        "Total input tokens:",
        "Total generated tokens:",
        "Request throughput (req/s):",
        "Request goodput (req/s):",
        "Output token throughput (tok/s):",
        "Peak output token throughput (tok/s):",
        "Peak concurrent requests:",
        "Total token throughput (tok/s):",
    ]
    assert labels[13:17] == [
        "Mean TTFT (ms):",
        "Median TTFT (ms):",
        "P99 TTFT (ms):",
        "P99.9 TTFT (ms):",
    ]
    lines = text.splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert "-----Time per Output Token (excl. 1st token)------" in lines
    assert "Successful requests:                     2         " in lines
    assert "Mean TTFT (ms):                          400.00    " in lines


def test_nothing_succeeded() -> None:
    failed = [Result(prompt_len=1, intended=0.0, error="no")]
    summary = summarize(failed, duration=1.0)
    out = as_json(summary, failed, metrics=METRICS, percentiles=(99,), is_detailed=False)
    assert (out["completed"], out["failed"], out["mean_ttft_ms"]) == (0, 1, 0.0)
    assert out["request_goodput"] is None


def test_percentile_words() -> None:
    assert [percentile_word(p) for p in (99.0, 99.9, 50.0)] == ["99", "99.9", "50"]


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 100.0])
def test_arrivals(burstiness: float) -> None:
    times = arrivals(2000, rate=50.0, burstiness=burstiness, seed=3)
    assert times == arrivals(2000, rate=50.0, burstiness=burstiness, seed=3)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(40.0)
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    spread = math.sqrt(sum((g - mean) ** 2 for g in gaps) / len(gaps)) / mean
    assert spread == pytest.approx(1 / math.sqrt(burstiness), rel=0.1)


def test_infinite_rate_is_at_once() -> None:
    assert arrivals(3, rate=math.inf, burstiness=1.0, seed=0) == [0.0, 0.0, 0.0]
