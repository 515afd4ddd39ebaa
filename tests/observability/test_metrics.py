"""The metrics table against scripted engine news, read back from the text clients scrape."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from octavo.observability.logging import ThroughputLog
from octavo.observability.metrics import TABLE, Metrics, one_two_five
from octavo.observability.series import GroupedHistogram, render_sum
from octavo.types import (
    EngineInfo,
    EngineOutput,
    EngineOutputs,
    EngineRequest,
    FinishReason,
    RequestTimes,
    SamplingParams,
    StepStats,
    WorkerStats,
)

INFO = EngineInfo(
    model="m",
    architecture="a",
    device="cpu",
    dtype="float32",
    kv_cache_dtype="float32",
    vocab_size=10,
    max_model_len=2048,
    block_size=16,
    num_blocks=100,
    max_num_seqs=4,
    max_num_batched_tokens=5,
    phases={"load": 1.5},
)


def samples(metrics: Metrics) -> dict[str, float]:
    """Every series by name and labels, those of the engine left out."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            extra = "".join(f"{{{k}={v}}}" for k, v in sorted(labels.items()))
            found[sample.name + extra] = sample.value
    return found


def request(name: str, *, arrival: float, fork_of: str | None = None) -> EngineRequest:
    return EngineRequest(
        request_id=name,
        prompt_token_ids=tuple(range(30)),
        params=SamplingParams(max_tokens=7),
        arrival_time=arrival,
        fork_of=fork_of,
    )


def scripted() -> dict[str, float]:
    """One request of n=2: tokens at 10.3 and 10.5, ended at 11; the fork is aborted."""
    metrics = Metrics(INFO, model_name="name", cache_config={"enable_prefix_caching": True})
    metrics.on_request(request("a-0", arrival=10.0))
    metrics.on_request(request("a-1", arrival=10.0, fork_of="a-0"))
    stats = StepStats(
        num_running=2,
        num_waiting=3,
        num_blocks=100,
        num_free_blocks=70,
        num_cached_blocks=5,
        num_owned_blocks=25,
        num_wasted_slots=9,
        num_scheduled_tokens=14,
        prompt_tokens=14,
        generation_tokens=1,
        prefix_cache_queries=30,
        prefix_cache_hits=16,
        prefix_cache_host_hits=6,
        num_host_slots=40,
        num_host_blocks=10,
        saved_blocks=4,
        loaded_blocks=3,
        damaged_blocks=1,
        preemptions=1,
        host_seconds=0.0004,
        worker=WorkerStats(
            graph_steps=3,
            eager_steps=2,
            graphs_captured=4,
            kernel_compiles=1,
            drafts=2,
            draft_tokens=7,
            accepted_tokens=3,
            accepted_per_position=(2, 1),
            draft_seconds_saved=-0.25,
            draft_seconds_without=2.0,
            drafting_seconds=0.01,
            speculation_gain=-0.02,
            speculation_guarded=1,
            speculation_switched_off=1,
            failed_proposers=1,
        ),
    )
    first = EngineOutput(request_id="a-0", new_token_ids=(1,), num_cached_tokens=16)
    metrics.on_outputs(EngineOutputs(outputs=(first,), stats=stats), 10.3)
    second = EngineOutput(request_id="a-0", new_token_ids=(2,))
    metrics.on_outputs(EngineOutputs(outputs=(second,), stats=stats), 10.5)
    times = RequestTimes(
        arrival=10.0,
        queued=10.05,
        scheduled=10.1,
        first_token=10.25,
        last_token=10.95,
        finished=10.95,
        num_preemptions=1,
    )
    last = EngineOutput(
        request_id="a-0", new_token_ids=(3,), finish_reason=FinishReason.STOP, times=times
    )
    gone = EngineOutput(request_id="a-1", finish_reason=FinishReason.ABORT)
    metrics.on_outputs(EngineOutputs(outputs=(last, gone)), 11.0)
    metrics.observe_http(handler="/v1/completions", method="POST", status=200, seconds=0.2)
    metrics.observe_http(handler="/v1/completions", method="POST", status=404, seconds=0.2)
    return samples(metrics)


EXPECTED = {
    "vllm:num_requests_running": 2,
    "vllm:num_requests_waiting": 3,
    "vllm:kv_cache_usage_perc": 0.25,
    "vllm:prefix_cache_queries_total": 60,
    "vllm:prefix_cache_hits_total": 20,
    "vllm:external_prefix_cache_queries_total": 40,
    "vllm:external_prefix_cache_hits_total": 12,
    "octavo:kv_offload_usage_perc": 0.25,
    "octavo:kv_offload_saved_blocks_total": 8,
    "octavo:kv_offload_loaded_blocks_total": 6,
    "octavo:kv_offload_damaged_blocks_total": 2,
    "vllm:num_preemptions_total": 2,
    "vllm:prompt_tokens_total": 60,
    "vllm:prompt_tokens_cached_total": 32,
    "vllm:prompt_tokens_by_source_total{source=local_compute}": 28,
    "vllm:prompt_tokens_by_source_total{source=local_cache_hit}": 20,
    "vllm:prompt_tokens_by_source_total{source=external_kv_transfer}": 12,
    "vllm:generation_tokens_total": 2,
    "vllm:request_success_total{finished_reason=stop}": 1,
    "vllm:request_success_total{finished_reason=abort}": 1,
    "vllm:request_success_total{finished_reason=length}": 0,
    "vllm:time_to_first_token_seconds_sum": 0.3,
    "vllm:inter_token_latency_seconds_sum": 0.7,
    "vllm:inter_token_latency_seconds_count": 2,
    "vllm:request_time_per_output_token_seconds_sum": 0.35,
    "vllm:e2e_request_latency_seconds_sum": 2.0,
    "vllm:e2e_request_latency_seconds_count": 2,
    "vllm:request_queue_time_seconds_sum": 0.05,
    "vllm:request_inference_time_seconds_sum": 0.85,
    "vllm:request_prefill_time_seconds_sum": 0.15,
    "vllm:request_decode_time_seconds_sum": 0.7,
    "vllm:request_num_preemptions_sum": 1,
    "vllm:request_prompt_tokens_sum": 60,
    "vllm:request_generation_tokens_sum": 3,
    "vllm:request_params_max_tokens_sum": 14,
    "vllm:request_prefill_kv_computed_tokens_sum": 44,
    "vllm:request_params_n_sum": 2,
    "vllm:iteration_tokens_total_sum": 28,
    "vllm:iteration_tokens_total_count": 2,
    "octavo:kv_blocks{state=free}": 70,
    "octavo:kv_blocks{state=cached}": 5,
    "octavo:kv_blocks{state=owned}": 25,
    "octavo:kv_wasted_slots": 9,
    "octavo:forward_passes_total{how=graph}": 6,
    "octavo:forward_passes_total{how=eager}": 4,
    "octavo:graphs_captured_total": 8,
    "vllm:spec_decode_num_drafts_total": 4,
    "vllm:spec_decode_num_draft_tokens_total": 14,
    "vllm:spec_decode_num_accepted_tokens_total": 6,
    "vllm:spec_decode_num_accepted_tokens_per_pos_total{position=0}": 4,
    "vllm:spec_decode_num_accepted_tokens_per_pos_total{position=1}": 2,
    "octavo:spec_decode_switched_off_total": 2,
    "octavo:spec_decode_failed_proposers_total": 2,
    "octavo:spec_decode_seconds_saved": -0.5,
    "octavo:spec_decode_seconds_without_total": 4.0,
    "octavo:spec_decode_drafting_seconds_total": 0.02,
    "octavo:spec_decode_gain": -0.02,
    "octavo:spec_decode_guarded_total": 2,
    "octavo:kernel_compiles_after_ready_total": 2,
    "octavo:step_host_seconds_sum": 0.0008,
    "octavo:ready_seconds{phase=load}": 1.5,
    "http_requests_total{handler=/v1/completions}{method=POST}{status=2xx}": 1,
    "http_requests_total{handler=/v1/completions}{method=POST}{status=4xx}": 1,
    "vllm:cache_config_info{block_size=16}{cache_dtype=float32}{enable_prefix_caching=True}"
    "{num_gpu_blocks=100}": 1,
}


def test_figures_of_a_scripted_run() -> None:
    found = scripted()
    assert {name: found.get(name) for name in EXPECTED} == {
        name: pytest.approx(value) for name, value in EXPECTED.items()
    }
    assert not [name for name in found if "_created" in name]


def test_every_series_is_there_from_the_start() -> None:
    text = Metrics(INFO, model_name="name").render().decode()
    for name, row in TABLE.items():
        if "handler" not in row.labels:
            assert f"\n{name}" in "\n" + text, name
    assert 'model_name="name"' in text


def test_buckets() -> None:
    assert one_two_five(2048) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
    assert one_two_five(1) == (1,)


def test_ended_requests_are_forgotten() -> None:
    metrics = Metrics(INFO, model_name="name")
    for i in range(10):
        metrics.on_request(request(str(i), arrival=0.0))
        end = EngineOutput(request_id=str(i), finish_reason=FinishReason.ERROR, error="no")
        metrics.on_outputs(EngineOutputs(outputs=(end,)), 1.0)
    metrics.render()  # which counts all that has happened
    assert not metrics._tracks


def test_throughput_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("octavo.observability.logging.log.info", lines.append)
    log = ThroughputLog(period=10.0)

    def step(now: float, **fields: int) -> None:
        log.on_outputs(EngineOutputs(stats=StepStats(num_blocks=10, **fields)), now)

    step(100.0, num_running=1, prompt_tokens=50, prefix_cache_queries=40, prefix_cache_hits=10)
    step(105.0, num_running=1, generation_tokens=20)
    assert lines == []
    step(110.0, num_running=2, num_waiting=1, num_owned_blocks=5, generation_tokens=20)
    assert lines == [
        "Avg prompt throughput: 5.0 tokens/s, Avg generation throughput: 4.0 tokens/s, "
        "Running: 2 reqs, Waiting: 1 reqs, KV cache usage: 50.0%, Prefix cache hit rate: 25.0%"
    ]
    step(112.0)  # idle: what follows is a burst of its own
    step(500.0, num_running=1, generation_tokens=10)
    step(510.0, num_running=1, generation_tokens=10)
    assert len(lines) == 2
    assert "Avg generation throughput: 2.0 tokens/s" in lines[1]


def test_a_grouped_histogram_is_a_histogram() -> None:
    values = [0.001, 0.01, 0.0100001, 0.5, 2.0, 100.0] * 3
    texts = []
    for is_grouped in (False, True):
        registry = CollectorRegistry()
        kind: Any = GroupedHistogram if is_grouped else Histogram
        series = kind("x", "Text.", ("b", "a"), registry=registry, buckets=(0.01, 0.5, 2, 50))
        series = series.labels(a="1", b="2")
        for value in values:
            series.observe(value, 1) if is_grouped else series.observe(value)
        texts.append(generate_latest(registry).decode())
    assert texts[0] == texts[1]


def test_the_sum_of_one_share_is_what_it_renders() -> None:
    metrics = Metrics(INFO, model_name="name")
    metrics.on_request(request("a", arrival=10.0))
    output = EngineOutput(request_id="a", new_token_ids=(1,), finish_reason=FinishReason.STOP)
    metrics.on_outputs(EngineOutputs(outputs=(output,), stats=StepStats(num_running=3)), 10.5)
    metrics.observe_http(handler="/x", method="GET", status=200, seconds=0.2)
    assert render_sum([metrics.series()]) == metrics.render()
    other = Metrics(INFO, model_name="name", is_first=False)
    other.on_request(request("b", arrival=10.0))
    other.on_outputs(EngineOutputs(outputs=(), stats=StepStats(num_running=3)), 10.5)
    assert render_sum([metrics.series(), other.series()]) == metrics.render()
    assert render_sum([other.series(), other.series()]).count(b"\n") > 100
