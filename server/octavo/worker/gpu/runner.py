"""Launches steps on a GPU and brings their results back. Knows no model, policy or text.

Nothing here waits for the device but `GpuRunner.finish`, and then the next step is launched
already. So a request's failure is known a step late: what was launched for it since is dropped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from octavo.models.base import Model
from octavo.sampling.sampler import NON_FINITE_MESSAGE
from octavo.types import BlockCopy, ModelOutput, SchedulerOutput, TokenLogprobs
from octavo.worker.gpu.arena import RequestArena
from octavo.worker.gpu.buffers import StepBuffers
from octavo.worker.gpu.draft_planner import Outcome, Speculation
from octavo.worker.gpu.graphs import ForwardKey, GraphKey, StepGraphs
from octavo.worker.gpu.prefix_sharing import PrefixSharing
from octavo.worker.gpu.runtime import Event, Runtime
from octavo.worker.gpu.sampler import GpuSampler, PendingSamples, StagedSamples
from octavo.worker.gpu.scores import PendingScores, PromptScorer
from octavo.worker.gpu.table import GpuRequestTable, Ints, StepBatch
from octavo.worker.gpu.upload import Upload
from octavo.worker.kv_tensors import KVTensors
from octavo.worker.kv_transfer import NO_TRANSFER, KVTransfer, Loads
from octavo_kernels.step_inputs.gpu import build_step_inputs

_NONE: Mapping[str, int] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class _PromptScores:
    """Scores of one request's prompt tokens in a step, on their way."""

    place: int  # in the batch
    pending: PendingScores


@dataclass(slots=True, kw_only=True)
class _Drawn:
    """What requests of a step got."""

    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    logprobs: dict[str, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)  # by place in the batch
    num_found: Ints | None = None  # [P] of each one's drafts, those that were looked up


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlight:
    """A step that was launched."""

    step: int
    batch: StepBatch
    event: Event  # behind all its work
    loads: Loads  # from the host tier
    samples: PendingSamples | None  # None: nothing was to be drawn
    prompt_scores: Sequence[_PromptScores]
    launched: float  # when
    is_typical: bool  # whether such steps will be run as this one was

    @property
    def request_ids(self) -> tuple[str, ...]:
        return tuple(self.batch.request_ids)


class GpuRunner:
    """Runs steps in the order launched, on memory that does not move; for one thread.

    Steps are finished in the order they were launched; any number may be in flight.
    """

    def __init__(
        self,
        model: Model,
        *,
        runtime: Runtime,
        buffers: StepBuffers,
        arena: RequestArena,
        upload: Upload,
        table: GpuRequestTable,
        sampler: GpuSampler,
        scorer: PromptScorer,
        kv: KVTensors,
        graphs: StepGraphs,
        transfer: KVTransfer = NO_TRANSFER,
        prefixes: PrefixSharing | None = None,
        speculation: Speculation | None = None,
        seconds: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._model = model
        self._runtime = runtime
        self._buffers = buffers
        self._token_table = arena.view("token_ids")
        self._block_table = arena.view("block_tables")
        self._upload = upload
        self._table = table
        self._sampler = sampler
        self._scorer = scorer
        self._kv = kv
        self._transfer = transfer
        self._prefixes = prefixes
        self._speculation = speculation
        self._seconds = seconds
        self._finished = 0.0  # when the last step was
        self._graphs = graphs
        self._inflight: deque[InFlight] = deque()
        self._events: list[Event] = []  # of finished steps, to be used again
        graphs.bind(self._work_of)

    # ---- launching ----------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, step: SchedulerOutput) -> InFlight:
        """Launches a step. Its diffs are applied whatever is raised."""
        copies = None
        try:
            self._table.apply(step, self._upload)
            copies = self._stage_copies(step.block_copies)
            planner = self._speculation.planner if self._speculation is not None else None
            batch = self._table.batch(step, {} if planner is None else planner.choose(step))
            assert batch.num_tokens <= self._buffers.sizes.max_num_tokens, "more than a step holds"
            prefixes = self._prefixes
            shares_prefixes = prefixes is not None and prefixes.stage(batch, self._upload)
            staged = None
            if not self._sampler.is_plain(batch.sample_rows):
                staged = self._sampler.stage(batch.sample_rows, self._upload, batch.depths)
            self._fill(batch)
        finally:
            self._upload.send()
            loads = self._transfer.apply(step)
            if copies is not None:
                self._model.backend.copy_blocks(self._kv.layers, src=copies[0], dst=copies[1])
        is_typical = not batch.num_tokens or self._forward(batch, shares_prefixes=shares_prefixes)
        prompt_scores = self._score_prompts(batch)
        samples = self._sample(batch.num_samples, staged) if batch.num_samples else None
        event = self._events.pop() if self._events else self._runtime.event()
        event.record()
        flight = InFlight(
            step=step.step,
            batch=batch,
            event=event,
            loads=loads,
            samples=samples,
            prompt_scores=prompt_scores,
            launched=0.0 if planner is None else self._seconds(),
            is_typical=is_typical,
        )
        self._inflight.append(flight)
        return flight

    def _fill(self, batch: StepBatch) -> None:
        """Stages the batch: what hangs on drafts in flight as `BatchWords` says."""
        seq_lens, positions = batch.seq_lens, batch.sample_positions
        if self._speculation is not None:
            seq_lens = seq_lens.copy()
            seq_lens[batch.samples] = -1 if batch.drafts is None else ~batch.drafts
            positions = np.full_like(positions, -1) if batch.depths is None else ~batch.depths
        self._upload.batch.fill(
            rows=batch.rows,
            query_ends=batch.query_ends,
            seq_lens=seq_lens,
            sample_tokens=batch.sample_tokens,
            sample_rows=batch.sample_rows,
            sample_positions=positions,
        )

    def _stage_copies(self, copies: Sequence[BlockCopy]) -> tuple[Tensor, Tensor] | None:
        """No block is both source and destination in a step, so they may run in any order."""
        if not copies:
            return None
        src, dst = ([getattr(copy, name) for copy in copies] for name in ("src", "dst"))
        section = self._upload.section
        return section(np.array(src, np.int32)), section(np.array(dst, np.int32))

    def _forward(self, batch: StepBatch, *, shares_prefixes: bool) -> bool:
        """Whether steps of this size will go on to be run as it was: no graph of it is to come."""
        num_requests = len(batch.rows)
        key = self._graphs.forward_key(
            num_tokens=batch.num_tokens,
            num_requests=num_requests,
            is_decode=batch.max_query_len == 1,
            shares_prefixes=shares_prefixes,
            num_drafts=0 if batch.drafts is None else batch.max_query_len - 1,
        )
        if key is not None:
            self._graphs.replay(key)
            return True
        self._forward_work(batch.num_tokens, num_requests, batch.max_query_len, shares_prefixes)()
        return not self._graphs.num_missing

    def _forward_work(
        self, num_tokens: int, num_requests: int, max_query_len: int, shares_prefixes: bool
    ) -> Callable[[], None]:
        """From the uploaded batch to ``hidden``, for so many tokens of so many requests."""
        buffers = self._buffers
        attn = buffers.attention(
            num_tokens=num_tokens, num_requests=num_requests, max_query_len=max_query_len
        )
        if shares_prefixes:
            assert self._prefixes is not None
            attn = replace(attn, prefixes=self._prefixes.views(num_requests))
        token_ids, out = buffers.token_ids[:num_tokens], buffers.hidden[:num_tokens]
        lookup = self._speculation.lookup if self._speculation is not None else None

        def work() -> None:
            if lookup is not None:
                lookup.launch(buffers, num_requests=num_requests, num_tokens=num_tokens)
            build_step_inputs(
                buffers.batch.rows[:num_requests],
                attn.query_start_loc,
                attn.seq_lens,
                token_table=self._token_table,
                block_table=self._block_table,
                block_size=buffers.sizes.block_size,
                num_tokens=num_tokens,
                max_query_len=max_query_len,
                token_ids=token_ids,
                positions=attn.positions,
                slots=attn.slots,
                block_tables=attn.block_tables,
            )
            self._model.forward(token_ids, attn, self._kv.layers, out=out)

        return work

    def _sample(self, num_samples: int, staged: StagedSamples | None) -> PendingSamples:
        scores = None
        if staged is not None:
            scores = self._sampler.launch(self._model, self._buffers, staged)
        elif (key := self._graphs.sampling_key(num_samples)) is not None:
            self._graphs.replay(key)
        else:
            self._sampler.launch_plain(self._model, self._buffers, num_samples)
        return self._sampler.fetch(self._buffers, num_samples, scores)

    def _score_prompts(self, batch: StepBatch) -> Sequence[_PromptScores]:
        """The token at position p + 1 is scored by the hidden row of p, inside the prompt only."""
        if not self._table.scored_rows:
            return ()
        num_best = self._table.num_prompt_scores[batch.rows]
        found = []
        for place in np.flatnonzero(num_best >= 0).tolist():
            row, first = int(batch.rows[place]), int(batch.starts[place])
            num_prompt = int(self._table.num_prompt_tokens[row])
            end = min(int(batch.seq_lens[place]), num_prompt - 1)
            if end <= first:
                continue
            at = int(batch.query_ends[place] - batch.seq_lens[place]) + first
            pending = self._scorer.launch(
                self._model,
                self._buffers.hidden[at : at + end - first],
                row=row,
                start=first + 1,
                num_best=int(num_best[place]),
            )
            found.append(_PromptScores(place=place, pending=pending))
        return found

    # ---- graphs -------------------------------------------------------------------------------

    def capture_if_due(self) -> bool:
        """After a launch: captures one more graph, should it be time to; whether it did."""
        if not self._graphs.num_missing:
            return False
        with torch.inference_mode():
            return self._graphs.after_launch()

    @torch.inference_mode()
    def capture_one(self) -> bool:
        """When there is nothing to run: captures one more graph; False if none is missing."""
        return self._graphs.capture_one()

    def _work_of(self, key: GraphKey) -> Callable[[], None]:
        if isinstance(key, ForwardKey):
            num_requests = key.num_requests(self._buffers.sizes.max_num_seqs)
            return self._forward_work(
                key.num_tokens, num_requests, key.max_query_len, key.shares_prefixes
            )
        size = key.num_samples
        return lambda: self._sampler.launch_plain(self._model, self._buffers, size)

    # ---- results ------------------------------------------------------------------------------

    def finish(self, flight: InFlight) -> ModelOutput:
        """Waits for the oldest step in flight. A request that failed is in ``errors`` of this step
        and of every later one, until the scheduler finishes it."""
        assert self._inflight and self._inflight[0] is flight, "steps end in order"
        self._inflight.popleft()
        flight.event.wait()
        self._events.append(flight.event)
        batch = flight.batch
        drawn = self._read_samples(flight)
        tokens, logprobs, errors = drawn.tokens, drawn.logprobs, drawn.errors
        prompt_logprobs: dict[str, tuple[TokenLogprobs, ...]] = {}
        for asked in flight.prompt_scores:
            scores = self._scorer.read(asked.pending)
            finite = tuple(score for score in scores if score is not None)
            if len(finite) < len(scores):
                errors[asked.place] = NON_FINITE_MESSAGE
            else:
                prompt_logprobs[batch.request_ids[asked.place]] = finite
        failed = self._failed(batch, errors)
        for request_id in failed:
            tokens.pop(request_id, None)
            logprobs.pop(request_id, None)
            prompt_logprobs.pop(request_id, None)
        stats, num_verified, num_wanted = self._graphs.take_stats(), _NONE, 0
        if self._speculation is not None:
            planner, outcome = self._speculation.planner, self._outcome(flight, drawn)
            planner.learn(outcome)
            stats, num_wanted = planner.add_stats(stats), planner.num_wanted
            num_verified = outcome.num_verified
        return ModelOutput(
            step=flight.step,
            sampled_token_ids=tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            errors=failed,
            damaged_blocks=flight.loads.damaged(),
            num_draft_tokens=num_verified,
            num_drafts_wanted=num_wanted,
            worker=stats,
        )

    def _read_samples(self, flight: InFlight) -> _Drawn:
        """What each request got. Behind drafts that is its samples up to the first that is not the
        draft there; what was drawn, or failed, behind that one is nobody's."""
        batch, samples, drawn = flight.batch, flight.samples, _Drawn()
        if samples is None:
            return drawn
        ids = batch.sample_ids
        if batch.drafts is None:
            sampled = self._sampler.read(samples)
            drawn.tokens = dict(zip(ids, zip(sampled.token_ids, strict=True), strict=True))
            drawn.logprobs = {ids[s]: (score,) for s, score in sampled.logprobs.items()}
            drawn.errors = {int(batch.samples[s]): text for s, text in sampled.errors.items()}
            return drawn
        by_sample, num_found = self._sampler.drafted(samples, len(batch.rows))
        sampled = self._sampler.read(samples)
        firsts = batch.first_samples
        counts = by_sample[firsts]
        self._table.settle(batch, counts)
        drawn.num_found = num_found[batch.samples]
        runs = zip(ids, batch.samples.tolist(), firsts.tolist(), counts.tolist(), strict=True)
        for request_id, place, first, count in runs:
            run = range(first, first + max(count, 1))
            failed = [s for s in run if s in sampled.errors]
            if failed:
                drawn.errors[place] = sampled.errors[failed[0]]
                continue
            drawn.tokens[request_id] = tuple(sampled.token_ids[first : run.stop])
            if first in sampled.logprobs:
                drawn.logprobs[request_id] = tuple(map(sampled.logprobs.__getitem__, run))
        return drawn

    def _outcome(self, flight: InFlight, drawn: _Drawn) -> Outcome:
        """What a step yielded, for the planner. Steps run one after the other: it took from the end
        of the one before it."""
        now = self._seconds()
        began, self._finished = max(self._finished, flight.launched), now
        batch = flight.batch
        outcome = Outcome(
            num_requests=len(batch.rows),
            num_tokens=batch.num_tokens,
            is_plain=batch.num_tokens == batch.num_samples,
            tokens=drawn.tokens,
            seconds=now - began,
            is_typical=flight.is_typical,
        )
        if batch.drafts is not None:
            assert drawn.num_found is not None
            counts = zip(batch.drafts.tolist(), drawn.num_found.tolist(), strict=True)
            pairs = zip(batch.sample_ids, counts, strict=True)
            drafts = {request_id: pair for request_id, pair in pairs if pair[0]}
            outcome = replace(outcome, drafts=drafts)
        return outcome

    def _failed(self, batch: StepBatch, errors: Mapping[int, str]) -> dict[str, str]:
        """Requests of the batch that failed, here or before -> message."""
        failed = self._table.failed
        for place, message in errors.items():
            failed.setdefault(int(batch.serials[place]), message)
        if not failed:
            return {}
        serials = batch.serials.tolist()
        found = {
            request_id: failed[serial]
            for request_id, serial in zip(batch.request_ids, serials, strict=True)
            if serial in failed
        }
        alive = set(self._table.serials.tolist())
        alive.update(*(flight.batch.serials.tolist() for flight in self._inflight))
        self._table.failed = {s: message for s, message in failed.items() if s in alive}
        return found
