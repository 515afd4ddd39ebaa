"""Results of a serving benchmark to figures, vLLM's printed block and its JSON. Pure arithmetic.

TTFT and end-to-end latency count from the time at which the schedule meant to send the request,
so that a client that falls behind, or holds requests back for its concurrency limit, does not
flatter the server. ``mean_ttft_from_send_ms`` gives the other reading.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from octavo.bench.client import Result

METRICS: Mapping[str, tuple[str, str]] = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
_WIDTH = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The figures of one run. `samples`: milliseconds of each metric."""

    duration: float
    completed: int
    failed: int
    total_input_tokens: int
    total_output_tokens: int
    good: int | None
    peak_output_tokens_per_second: float
    peak_concurrency: int
    samples: Mapping[str, np.ndarray] = field(default_factory=dict)
    mean_ttft_from_send_ms: float = 0.0

    @property
    def request_throughput(self) -> float:
        return self.completed / self.duration

    @property
    def request_goodput(self) -> float | None:
        return None if self.good is None else self.good / self.duration

    @property
    def output_throughput(self) -> float:
        return self.total_output_tokens / self.duration

    @property
    def total_token_throughput(self) -> float:
        return (self.total_input_tokens + self.total_output_tokens) / self.duration


def summarize(
    results: Sequence[Result], *, duration: float, goodput: Mapping[str, float] | None = None
) -> Summary:
    """Figures of a run of `duration` seconds. `goodput`: metric -> most milliseconds allowed."""
    done = [r for r in results if r.is_success]
    samples = {
        "ttft": [r.ttft for r in done],
        "tpot": [r.tpot for r in done if r.tpot is not None],
        "itl": [itl for r in done for itl in r.itls],
        "e2el": [r.latency for r in done],
    }
    good = None
    if goodput:
        good = sum(_is_good(r, goodput) for r in done)
    from_send = [r.ttft_from_send for r in done]
    return Summary(
        duration=duration,
        completed=len(done),
        failed=len(results) - len(done),
        total_input_tokens=sum(r.prompt_len for r in done),
        total_output_tokens=sum(r.output_len for r in done),
        good=good,
        peak_output_tokens_per_second=_peak_rate(done),
        peak_concurrency=_peak_concurrency(done),
        samples={name: 1000 * np.array(values) for name, values in samples.items()},
        mean_ttft_from_send_ms=1000 * float(np.mean(from_send)) if from_send else 0.0,
    )


def _is_good(result: Result, goodput: Mapping[str, float]) -> bool:
    values = {"ttft": result.ttft, "tpot": result.tpot or 0.0, "e2el": result.latency}
    return all(1000 * values[name] <= limit for name, limit in goodput.items())


def _peak_rate(results: Sequence[Result]) -> float:
    """Most token events in one second of the run, whole seconds from its first request."""
    if not results:
        return 0.0
    start = min(r.sent for r in results)
    seconds: Counter[int] = Counter()
    for result in results:
        when = result.first
        seconds[int(when - start)] += 1
        for itl in result.itls:
            when += itl
            seconds[int(when - start)] += 1
    return float(max(seconds.values()))


def _peak_concurrency(results: Sequence[Result]) -> int:
    # An end and a beginning at the same instant do not overlap: ends (-1) sort first.
    changes = sorted([(r.sent, 1) for r in results] + [(r.last, -1) for r in results])
    running = peak = 0
    for _, change in changes:
        running += change
        peak = max(peak, running)
    return peak


def percentile_word(percentile: float) -> str:
    """99.0 -> "99", 99.9 -> "99.9"."""
    return str(int(percentile)) if int(percentile) == percentile else str(percentile)


def statistics(
    summary: Summary, *, metrics: Sequence[str], percentiles: Sequence[float]
) -> dict[str, float]:
    """``mean_ttft_ms``, ``median_``, ``std_`` and ``p99_`` of each of `metrics`."""
    out: dict[str, float] = {}
    for name in metrics:
        values = summary.samples[name] if summary.samples[name].size else np.zeros(1)
        out[f"mean_{name}_ms"] = float(np.mean(values))
        out[f"median_{name}_ms"] = float(np.median(values))
        out[f"std_{name}_ms"] = float(np.std(values))
        for p in percentiles:
            out[f"p{percentile_word(p)}_{name}_ms"] = float(np.percentile(values, p))
    return out


def render(
    summary: Summary,
    *,
    metrics: Sequence[str],
    percentiles: Sequence[float],
    max_concurrency: int | None,
    request_rate: float,
) -> str:
    """vLLM's printed block, label for label."""
    lines = [f"{' Serving Benchmark Result ':=^{_WIDTH}}"]

    def row(label: str, value: float | int) -> None:
        lines.append(f"{label:<40} {value:<10}" if isinstance(value, int) else _real(label, value))

    row("Successful requests:", summary.completed)
    row("Failed requests:", summary.failed)
    if max_concurrency is not None:
        row("Maximum request concurrency:", max_concurrency)
    if request_rate != float("inf"):
        row("Request rate configured (RPS):", float(request_rate))
    row("Benchmark duration (s):", summary.duration)
    row("Total input tokens:", summary.total_input_tokens)
    row("Total generated tokens:", summary.total_output_tokens)
    row("Request throughput (req/s):", summary.request_throughput)
    if summary.request_goodput is not None:
        row("Request goodput (req/s):", summary.request_goodput)
    row("Output token throughput (tok/s):", summary.output_throughput)
    row("Peak output token throughput (tok/s):", summary.peak_output_tokens_per_second)
    row("Peak concurrent requests:", float(summary.peak_concurrency))
    row("Total token throughput (tok/s):", summary.total_token_throughput)
    figures = statistics(summary, metrics=metrics, percentiles=percentiles)
    for name in metrics:
        short, title = METRICS[name]
        lines.append(f"{title:-^{_WIDTH}}")
        row(f"Mean {short} (ms):", figures[f"mean_{name}_ms"])
        row(f"Median {short} (ms):", figures[f"median_{name}_ms"])
        for p in percentiles:
            word = percentile_word(p)
            row(f"P{word} {short} (ms):", figures[f"p{word}_{name}_ms"])
    lines.append("=" * _WIDTH)
    return "\n".join(lines)


def _real(label: str, value: float) -> str:
    return f"{label:<40} {value:<10.2f}"


def as_json(
    summary: Summary,
    results: Sequence[Result],
    *,
    metrics: Sequence[str],
    percentiles: Sequence[float],
    is_detailed: bool,
) -> dict[str, Any]:
    """vLLM's keys of the measured part; the caller adds what was configured."""
    out: dict[str, Any] = {
        "duration": summary.duration,
        "completed": summary.completed,
        "failed": summary.failed,
        "total_input_tokens": summary.total_input_tokens,
        "total_output_tokens": summary.total_output_tokens,
        "request_throughput": summary.request_throughput,
        "request_goodput": summary.request_goodput,
        "output_throughput": summary.output_throughput,
        "total_token_throughput": summary.total_token_throughput,
        "max_output_tokens_per_s": summary.peak_output_tokens_per_second,
        "max_concurrent_requests": summary.peak_concurrency,
        "mean_ttft_from_send_ms": summary.mean_ttft_from_send_ms,
        **statistics(summary, metrics=metrics, percentiles=percentiles),
    }
    if is_detailed:
        out |= {
            "input_lens": [r.prompt_len for r in results],
            "output_lens": [r.output_len for r in results],
            "ttfts": [r.ttft if r.is_success else 0.0 for r in results],
            "itls": [r.itls for r in results],
            "start_times": [r.sent for r in results],
            "generated_texts": [r.text for r in results],
            "errors": [r.error for r in results],
        }
    return out
