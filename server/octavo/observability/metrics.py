"""The server's Prometheus metrics, one table. Knows the wire types; nothing of engine or HTTP.

Names, labels and buckets are vLLM's wherever vLLM has the series, so that its dashboards,
gateways and autoscalers work; ours begin with ``octavo:``. A metric is one row of `TABLE`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from octavo import __version__
from octavo.observability.buckets import (
    HOST,
    HTTP,
    LATENCY,
    STEP_TOKENS,
    TOKEN,
    TTFT,
)
from octavo.observability.series import GroupedHistogram, Series, series_of
from octavo.types import (
    EngineInfo,
    EngineOutputs,
    EngineRequest,
    FinishReason,
    RequestTimes,
    StepStats,
    WorkerStats,
)

_ENGINE_LABELS = ("model_name", "engine")
# Steps and their requests that may wait to be counted. A lot of counting at once takes a fourth of
# the time that it takes step by step, when each time the kernels' data has replaced ours in the
# processor's caches.
_MAX_UNCOUNTED = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One metric. ``buckets`` None makes the 1-2-5 series up to the context length."""

    kind: type[Counter] | type[Gauge] | type[Histogram] | type[GroupedHistogram]
    help: str
    labels: tuple[str, ...] = _ENGINE_LABELS
    buckets: tuple[float, ...] | None = None


def _gauge(text: str, *labels: str) -> Row:
    return Row(kind=Gauge, help=text, labels=(*_ENGINE_LABELS, *labels))


def _counter(text: str, *labels: str) -> Row:
    return Row(kind=Counter, help=text, labels=(*_ENGINE_LABELS, *labels))


def _histogram(text: str, buckets: tuple[float, ...] | None = None) -> Row:
    return Row(kind=Histogram, help=text, buckets=buckets)


TABLE: Mapping[str, Row] = {
    "vllm:num_requests_running": _gauge("Requests in the running batch."),
    "vllm:num_requests_waiting": _gauge("Requests waiting to be run."),
    "vllm:kv_cache_usage_perc": _gauge("Share of K/V blocks in use; 1 is all."),
    "vllm:prefix_cache_queries": _counter("Prompt tokens looked up in the prefix cache."),
    "vllm:prefix_cache_hits": _counter("Prompt tokens found in the prefix cache."),
    "vllm:external_prefix_cache_queries": _counter(
        "Prompt tokens not found in the prefix cache and looked up in the host tier."
    ),
    "vllm:external_prefix_cache_hits": _counter("Prompt tokens found in the host tier."),
    "vllm:num_preemptions": _counter("Preemptions."),
    "vllm:prompt_tokens": _counter("Prompt tokens processed, cached ones included."),
    "vllm:prompt_tokens_cached": _counter("Prompt tokens served by the prefix cache."),
    "vllm:prompt_tokens_by_source": _counter("Prompt tokens by where they came from.", "source"),
    "vllm:generation_tokens": _counter("Generated tokens."),
    "vllm:request_success": _counter("Requests that ended, by reason.", "finished_reason"),
    "vllm:iteration_tokens_total": _histogram("Tokens per step.", STEP_TOKENS),
    "vllm:request_prompt_tokens": _histogram("Prompt tokens per request."),
    "vllm:request_generation_tokens": _histogram("Generated tokens per request."),
    "vllm:admission_rejections": _counter("Requests refused on arrival, by limit.", "reason"),
    "vllm:request_params_max_tokens": _histogram("max_tokens of requests."),
    "vllm:request_max_num_generation_tokens": _histogram("Most generated tokens asked for."),
    "vllm:request_prefill_kv_computed_tokens": _histogram("Prompt tokens computed, not cached."),
    "vllm:request_params_n": _histogram("n of requests.", (1, 2, 5, 10, 20)),
    "vllm:request_num_preemptions": _histogram("Preemptions per request.", (0, 1, 2, 5, 10, 20)),
    "vllm:time_to_first_token_seconds": _histogram("Arrival to first token.", TTFT),
    "vllm:inter_token_latency_seconds": Row(
        kind=GroupedHistogram, help="Between two tokens of a request.", buckets=TOKEN
    ),
    "vllm:request_time_per_output_token_seconds": _histogram(
        "Mean time per token after the first, per request.", TOKEN
    ),
    "vllm:e2e_request_latency_seconds": _histogram("Arrival to end.", LATENCY),
    "vllm:request_queue_time_seconds": _histogram("Queued to first scheduled.", LATENCY),
    "vllm:request_inference_time_seconds": _histogram("First scheduled to last token.", LATENCY),
    "vllm:request_prefill_time_seconds": _histogram("First scheduled to first token.", LATENCY),
    "vllm:request_decode_time_seconds": _histogram("First token to last token.", LATENCY),
    "http_requests": Row(
        kind=Counter, help="HTTP requests.", labels=("handler", "method", "status")
    ),
    "http_request_duration_seconds": Row(
        kind=Histogram,
        help="HTTP request to the end of its response.",
        labels=("handler", "method", "status"),
        buckets=HTTP,
    ),
    "octavo:kv_blocks": _gauge("K/V blocks: free, cached (reusable), owned by requests.", "state"),
    "octavo:kv_offload_usage_perc": _gauge("Share of the host tier in use; 1 is all."),
    "octavo:kv_offload_saved_blocks": _counter("K/V blocks copied to the host tier."),
    "octavo:kv_offload_loaded_blocks": _counter("K/V blocks brought back from the host tier."),
    "octavo:kv_offload_damaged_blocks": _counter(
        "K/V blocks of the host tier that were not what had been saved, and computed anew."
    ),
    "octavo:kv_wasted_slots": _gauge("Token places allocated to running requests and not filled."),
    "octavo:step_host_seconds": _histogram("Time per step outside the model.", HOST),
    "octavo:steps": _counter("Steps run."),
    "vllm:spec_decode_num_drafts": _counter("Times that a request got drafts."),
    "vllm:spec_decode_num_draft_tokens": _counter("Drafted tokens."),
    "vllm:spec_decode_num_accepted_tokens": _counter("Drafted tokens that were accepted."),
    "vllm:spec_decode_num_accepted_tokens_per_pos": _counter(
        "Accepted drafts by their place behind the known token, from 0.", "position"
    ),
    "octavo:spec_decode_switched_off": _counter("Times that drafting did not pay and was stopped."),
    "octavo:spec_decode_failed_proposers": _counter(
        "Requests that go on without drafts, whose proposer failed or was slow."
    ),
    "octavo:spec_decode_guarded": _counter(
        "Times that drafting was stopped because a minute would else have lost more than 2 %."
    ),
    "octavo:spec_decode_gain": _gauge(
        "Throughput of the last minute of steps beside that without drafts, less 1, as method auto "
        "estimates it; guaranteed to be at least -0.03."
    ),
    "octavo:spec_decode_drafting_seconds": _counter("Time spent on finding drafts."),
    "octavo:spec_decode_seconds_without": _counter(
        "Time that the steps which sought drafts would have taken without, as estimated."
    ),
    "octavo:spec_decode_seconds_saved": _gauge(
        "Step time saved by drafts beside the same tokens without, as estimated; below 0 is lost."
    ),
    "octavo:forward_passes": _counter("Forward passes on a GPU, by how: graph, eager.", "how"),
    "octavo:graphs_captured": _counter("Graphs captured since the server was ready."),
    "octavo:kernel_compiles_after_ready": _counter(
        "Kernels compiled, or loaded from the compiler's cache, since the server was ready."
    ),
    "octavo:ready_seconds": _gauge("Seconds each phase of the start took.", "phase"),
    "octavo:build": _gauge("Always 1; the version is a label.", "version"),
}


def one_two_five(limit: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 ... up to `limit`."""
    buckets: list[float] = []
    scale = 1
    while True:
        for mantissa in (1, 2, 5):
            if mantissa * scale > limit:
                return tuple(buckets)
            buckets.append(mantissa * scale)
        scale *= 10


@dataclass(slots=True)
class _Track:
    """What is remembered of a running request."""

    request: EngineRequest
    num_choices: int = 1
    num_generated: int = 0
    num_cached: int = 0
    first_token: float = 0.0
    last_token: float = 0.0
    is_stopped: bool = False  # by a stop string: the engine only hears an abort


class Metrics:
    """The series of one HTTP process: an engine observer, and what ``GET /metrics`` answers.

    ``model_name`` is the name clients use. What is told of the engine or the server as a whole is
    counted by the first process alone (``is_first``): the sum over all processes is the server's.
    """

    content_type = prometheus_client.CONTENT_TYPE_LATEST

    def __init__(
        self,
        info: EngineInfo,
        *,
        model_name: str,
        is_first: bool = True,
        cache_config: Mapping[str, Any] | None = None,
        start_phases: Mapping[str, float] | None = None,
    ) -> None:
        # Off: the creation time of each series, as one more series that nobody reads.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        self._any: dict[str, Any] = {
            name: self._make(name, row, info.max_model_len) for name, row in TABLE.items()
        }
        # Series of the engine alone, resolved once: labels() costs more than the increment.
        self._plain: dict[str, Any] = {
            name: self._any[name].labels(**self._labels)
            for name, row in TABLE.items()
            if row.labels == _ENGINE_LABELS
        }
        self._tracks: dict[str, _Track] = {}
        self._uncounted: list[tuple[EngineOutputs, float]] = []
        self._num_uncounted = 0
        self._seconds_saved = 0.0  # by speculation
        for reason in FinishReason:  # so that rates have a zero to start from
            self._labelled("vllm:request_success", finished_reason=reason.value)
        for source in ("local_compute", "local_cache_hit", "external_kv_transfer"):
            self._labelled("vllm:prompt_tokens_by_source", source=source)
        self._labelled("vllm:admission_rejections", reason="max_num_queued_reqs")
        for position in range(max(1, info.max_drafts)):
            self._labelled("vllm:spec_decode_num_accepted_tokens_per_pos", position=str(position))
        for how in ("graph", "eager"):
            self._labelled("octavo:forward_passes", how=how)
        self._is_first = is_first
        if not is_first:
            return
        self._labelled("octavo:build", version=__version__).set(1)
        for phase, seconds in (start_phases or info.phases).items():
            self._labelled("octavo:ready_seconds", phase=phase).set(seconds)
        self._on_stats(StepStats(num_blocks=info.num_blocks, num_free_blocks=info.num_blocks))
        self._set_cache_config(info, cache_config or {})

    def _make(self, name: str, row: Row, max_model_len: int) -> Any:
        if issubclass(row.kind, Histogram | GroupedHistogram):
            buckets = row.buckets or one_two_five(max_model_len)
            return row.kind(name, row.help, row.labels, registry=self._registry, buckets=buckets)
        return row.kind(name, row.help, row.labels, registry=self._registry)

    def _labelled(self, name: str, **labels: str) -> Any:
        return self._any[name].labels(**self._labels, **labels)

    def _set_cache_config(self, info: EngineInfo, config: Mapping[str, Any]) -> None:
        # As in vLLM, whose gauge has the options as labels and no model_name.
        values = {**config, "block_size": info.block_size, "num_gpu_blocks": info.num_blocks}
        values["cache_dtype"] = info.kv_cache_dtype
        labels = {name: str(value) for name, value in values.items()} | {"engine": "0"}
        Gauge(
            "vllm:cache_config_info",
            "Always 1; the options of the K/V cache are labels.",
            tuple(labels),
            registry=self._registry,
        ).labels(**labels).set(1)

    def render(self) -> bytes:
        """Every series in Prometheus' text format."""
        self._count()
        data: bytes = prometheus_client.generate_latest(self._registry)
        return data

    def series(self) -> list[Series]:
        """Every series, for `octavo.observability.series.render_sum`."""
        self._count()
        return series_of(self._registry)

    def observe_http(self, *, handler: str, method: str, status: int, seconds: float) -> None:
        """One HTTP request has been answered. `handler` is the route, not the raw path."""
        labels = {"handler": handler, "method": method, "status": f"{status // 100}xx"}
        self._any["http_requests"].labels(**labels).inc()
        self._any["http_request_duration_seconds"].labels(**labels).observe(seconds)

    # ---- engine observer ---------------------------------------------------------------------

    def on_request(self, request: EngineRequest) -> None:
        self._tracks[request.request_id] = _Track(request)
        parent = self._tracks.get(request.fork_of) if request.fork_of is not None else None
        if parent is not None:
            parent.num_choices += 1

    def on_rejected(self, reason: str) -> None:
        """A request was refused on arrival, because of the limit ``reason``."""
        self._labelled("vllm:admission_rejections", reason=reason).inc()

    def on_stop_string(self, request_id: str) -> None:
        """The front end found a stop string and ends the request: a stop, not an abort."""
        if (track := self._tracks.get(request_id)) is not None:
            track.is_stopped = True

    def on_outputs(self, outputs: EngineOutputs, now: float) -> None:
        """`now`: monotonic seconds at which these outputs reached the front end.

        They are counted now and then, and before anybody reads what was counted.
        """
        self._uncounted.append((outputs, now))
        self._num_uncounted += 1 + len(outputs.outputs)
        if self._num_uncounted >= _MAX_UNCOUNTED:
            self._count()

    def _count(self) -> None:
        """Counts what has been put off."""
        uncounted, self._uncounted, self._num_uncounted = self._uncounted, [], 0
        for outputs, now in uncounted:
            self._count_outputs(outputs, now)
        if not self._is_first:
            return
        steps = [outputs.stats for outputs, _ in uncounted if outputs.stats is not None]
        for stats in steps:
            self._count_step(stats)
            if stats.worker is not None:
                self._count_work(stats.worker)
        if steps:
            self._on_stats(steps[-1])

    def _count_outputs(self, outputs: EngineOutputs, now: float) -> None:
        gaps: dict[float, int] = {}  # when a request had its last token -> requests
        for output in outputs.outputs:
            track = self._tracks.get(output.request_id)
            if track is None:
                continue
            num_new = len(output.new_token_ids)
            if num_new and track.num_generated:
                gaps[track.last_token] = gaps.get(track.last_token, 0) + 1
                track.num_generated += num_new
                track.last_token = now
            elif num_new:
                self._on_first_token(track, num_new, now)
            if output.num_cached_tokens > track.num_cached:
                track.num_cached = output.num_cached_tokens
            if output.finish_reason is not None:
                del self._tracks[output.request_id]
                reason = FinishReason.STOP if track.is_stopped else output.finish_reason
                self._on_finish(track, reason, output.times, now)
        for last_token, count in gaps.items():
            self._plain["vllm:inter_token_latency_seconds"].observe(now - last_token, count)

    def _on_first_token(self, track: _Track, num_new: int, now: float) -> None:
        track.first_token = track.last_token = now
        track.num_generated = num_new
        waited = now - track.request.arrival_time
        self._plain["vllm:time_to_first_token_seconds"].observe(waited)

    def _on_finish(
        self, track: _Track, reason: FinishReason, times: RequestTimes | None, now: float
    ) -> None:
        self._labelled("vllm:request_success", finished_reason=reason.value).inc()
        if reason is FinishReason.ERROR:
            return
        request, plain = track.request, self._plain
        num_prompt = len(request.prompt_token_ids)
        plain["vllm:request_prompt_tokens"].observe(num_prompt)
        plain["vllm:request_generation_tokens"].observe(track.num_generated)
        plain["vllm:request_params_max_tokens"].observe(request.params.max_tokens)
        plain["vllm:request_max_num_generation_tokens"].observe(request.params.max_tokens)
        plain["vllm:request_prefill_kv_computed_tokens"].observe(num_prompt - track.num_cached)
        if request.fork_of is None:
            plain["vllm:request_params_n"].observe(track.num_choices)
        plain["vllm:e2e_request_latency_seconds"].observe(now - request.arrival_time)
        if track.num_generated > 1:
            per_token = (track.last_token - track.first_token) / (track.num_generated - 1)
            plain["vllm:request_time_per_output_token_seconds"].observe(per_token)
        if times is None or not times.scheduled:
            return
        plain["vllm:request_num_preemptions"].observe(times.num_preemptions)
        plain["vllm:request_queue_time_seconds"].observe(times.scheduled - times.queued)
        if times.first_token:
            first, last = times.first_token, times.last_token
            plain["vllm:request_inference_time_seconds"].observe(last - times.scheduled)
            plain["vllm:request_prefill_time_seconds"].observe(first - times.scheduled)
            plain["vllm:request_decode_time_seconds"].observe(last - first)

    def _on_stats(self, stats: StepStats) -> None:
        plain = self._plain
        plain["vllm:num_requests_running"].set(stats.num_running)
        plain["vllm:num_requests_waiting"].set(stats.num_waiting)
        plain["vllm:kv_cache_usage_perc"].set(stats.kv_cache_usage)
        self._labelled("octavo:kv_blocks", state="free").set(stats.num_free_blocks)
        self._labelled("octavo:kv_blocks", state="cached").set(stats.num_cached_blocks)
        self._labelled("octavo:kv_blocks", state="owned").set(stats.num_owned_blocks)
        plain["octavo:kv_wasted_slots"].set(stats.num_wasted_slots)
        plain["octavo:kv_offload_usage_perc"].set(stats.host_tier_usage)

    def _count_work(self, worker: WorkerStats) -> None:
        for how, count in (("graph", worker.graph_steps), ("eager", worker.eager_steps)):
            self._labelled("octavo:forward_passes", how=how).inc(count)
        self._plain["octavo:graphs_captured"].inc(worker.graphs_captured)
        self._plain["octavo:kernel_compiles_after_ready"].inc(worker.kernel_compiles)
        self._count_drafts(worker)

    def _count_drafts(self, worker: WorkerStats) -> None:
        plain = self._plain
        plain["vllm:spec_decode_num_drafts"].inc(worker.drafts)
        plain["vllm:spec_decode_num_draft_tokens"].inc(worker.draft_tokens)
        plain["vllm:spec_decode_num_accepted_tokens"].inc(worker.accepted_tokens)
        for position, count in enumerate(worker.accepted_per_position):
            self._labelled(
                "vllm:spec_decode_num_accepted_tokens_per_pos", position=str(position)
            ).inc(count)
        plain["octavo:spec_decode_switched_off"].inc(worker.speculation_switched_off)
        plain["octavo:spec_decode_failed_proposers"].inc(worker.failed_proposers)
        plain["octavo:spec_decode_guarded"].inc(worker.speculation_guarded)
        plain["octavo:spec_decode_drafting_seconds"].inc(worker.drafting_seconds)
        plain["octavo:spec_decode_seconds_without"].inc(worker.draft_seconds_without)
        if worker.speculation_gain is not None:
            plain["octavo:spec_decode_gain"].set(worker.speculation_gain)
        self._seconds_saved += worker.draft_seconds_saved
        plain["octavo:spec_decode_seconds_saved"].set(self._seconds_saved)

    def _count_step(self, stats: StepStats) -> None:
        plain = self._plain
        plain["vllm:prefix_cache_queries"].inc(stats.prefix_cache_queries)
        cache_hits = stats.prefix_cache_hits - stats.prefix_cache_host_hits
        plain["vllm:prefix_cache_hits"].inc(cache_hits)
        if stats.num_host_slots:
            queries = stats.prefix_cache_queries - cache_hits
            plain["vllm:external_prefix_cache_queries"].inc(queries)
            plain["vllm:external_prefix_cache_hits"].inc(stats.prefix_cache_host_hits)
            plain["octavo:kv_offload_saved_blocks"].inc(stats.saved_blocks)
            plain["octavo:kv_offload_loaded_blocks"].inc(stats.loaded_blocks)
            plain["octavo:kv_offload_damaged_blocks"].inc(stats.damaged_blocks)
        plain["vllm:num_preemptions"].inc(stats.preemptions)
        plain["vllm:prompt_tokens"].inc(stats.prompt_tokens + stats.prefix_cache_hits)
        plain["vllm:prompt_tokens_cached"].inc(stats.prefix_cache_hits)
        for source, count in (
            ("local_compute", stats.prompt_tokens),
            ("local_cache_hit", cache_hits),
            ("external_kv_transfer", stats.prefix_cache_host_hits),
        ):
            self._labelled("vllm:prompt_tokens_by_source", source=source).inc(count)
        plain["vllm:generation_tokens"].inc(stats.generation_tokens)
        if stats.num_scheduled_tokens:
            plain["vllm:iteration_tokens_total"].observe(stats.num_scheduled_tokens)
            plain["octavo:step_host_seconds"].observe(stats.host_seconds)
            plain["octavo:steps"].inc()
