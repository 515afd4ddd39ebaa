"""Runs a step: diffs, moves and copies, forward pass, sampling. Knows no model, policy or text.

A step either happens to a request or it does not: the table moves on only with results in hand,
so a batch that fails can be repeated request by request and yields the same bits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from octavo.models.base import Model, TappedPass, Taps
from octavo.sampling import Sampled, Sampler, SamplingBatch
from octavo.sampling.logprobs import score_hidden
from octavo.sampling.sampler import NON_FINITE_MESSAGE
from octavo.speculative import Drafter, NoDrafts, Outlook
from octavo.types import ModelOutput, SchedulerOutput, TokenLogprobs
from octavo.worker.drafting.base import NoWatcher, StepWatcher
from octavo.worker.input_batch import InputBatch, StepBuffers, build_input_batch
from octavo.worker.kv_tensors import KVTensors
from octavo.worker.kv_transfer import KVTransfer
from octavo.worker.replays import MAX_LOGITS_ROWS, ForwardReplays
from octavo.worker.request_table import RequestTable
from octavo.worker.sampling_rows import sampling_batch

_log = logging.getLogger(__name__)
_NO_DRAFTS: Mapping[str, Sequence[int]] = {}


@dataclass(slots=True)
class _Results:
    """What requests of one step yielded; the fields of `ModelOutput`."""

    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    logprobs: dict[str, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    prompt_logprobs: dict[str, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    num_drafts: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Rows:
    """What all rows of logits of one step yielded; the fields of `Sampled`."""

    token_ids: list[int] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)

    def add(self, sampled: Sampled) -> None:
        """The next rows."""
        first = len(self.token_ids)
        self.token_ids += sampled.token_ids
        self.errors |= {first + row: message for row, message in sampled.errors.items()}
        self.logprobs |= {first + row: score for row, score in sampled.logprobs.items()}


class ModelRunner:
    """Owns the request table and the K/V memory; one step at a time, in the order given.

    ``taps``: what every forward pass leaves behind, for the ``watcher`` of what was computed.
    """

    def __init__(
        self,
        model: Model,
        *,
        table: RequestTable,
        kv: KVTensors,
        sampler: Sampler,
        transfer: KVTransfer,
        max_num_tokens: int,
        drafter: Drafter | None = None,
        watcher: StepWatcher | None = None,
        taps: Taps | None = None,
        seconds: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._model = model
        self._table = table
        self._kv = kv
        self._sampler = sampler
        self._transfer = transfer
        self._drafter: Drafter = drafter or NoDrafts()
        self._watcher: StepWatcher = watcher or NoWatcher()
        self._seconds = seconds
        self._buffers = StepBuffers(table, max_num_tokens=max_num_tokens)
        used = model if taps is None else TappedPass(model, taps)
        self._replays = ForwardReplays(used, kv_caches=kv.layers, buffers=self._buffers)

    @torch.inference_mode()
    def warm_drafting(self) -> None:
        """To be called before the first step."""
        self._watcher.warm()

    @torch.inference_mode()
    def use_idle_time(self) -> bool:
        """Prepares one more kind of step, between steps; False if none is left."""
        return self._replays.record_one()

    @torch.inference_mode()
    def execute(self, step: SchedulerOutput) -> ModelOutput:
        """Computes one step. A request that failed alone is in the result's ``errors``; it stays
        failed until the scheduler finishes it."""
        table = self._table
        table.apply(step)
        loads = self._transfer.apply(step)
        self._kv.copy(step.block_copies)
        results = _Results()
        live: dict[str, int] = {}
        for request_id, count in step.num_scheduled_tokens.items():
            if request_id in table.failed:  # its next step was scheduled before this was known
                results.errors[request_id] = table.failed[request_id]
            else:
                live[request_id] = count - step.max_drafts.get(request_id, 0)
        if live:
            self._drafter.begin(step)
            drafts = self._draft(step, live) if step.max_drafts else {}
            began = self._seconds()
            self._run(list(live), list(live.values()), drafts, results)
            self._drafter.learn(
                drafts,
                results.tokens,
                num_tokens=sum(live.values()) + sum(map(len, drafts.values())),
                seconds=self._seconds() - began,
            )
        table.failed.update(results.errors)
        return ModelOutput(
            step=step.step,
            sampled_token_ids=results.tokens,
            logprobs=results.logprobs,
            prompt_logprobs=results.prompt_logprobs,
            errors=results.errors,
            damaged_blocks=loads.damaged(),
            num_draft_tokens=results.num_drafts,
            num_drafts_wanted=self._drafter.num_wanted,
            worker=self._drafter.take_stats(),
        )

    def _draft(self, step: SchedulerOutput, live: Mapping[str, int]) -> Mapping[str, Sequence[int]]:
        table, outlooks = self._table, []
        for request_id, room in step.max_drafts.items():
            if request_id in live:
                row = table.row(request_id)
                known = table.token_ids[row, : table.num_tokens[row]]
                outlooks.append(Outlook(request_id, known, room))
        return self._drafter.draft(outlooks, num_tokens=sum(live.values()))

    def _run(
        self,
        request_ids: list[str],
        counts: list[int],
        drafts: Mapping[str, Sequence[int]],
        results: _Results,
    ) -> None:
        """Runs a batch, or, should it fail, its requests one by one and without drafts."""
        error = self._try(request_ids, counts, results, drafts)
        if error is None:
            return
        _log.error("a batch of %d requests failed", len(request_ids), exc_info=error)
        for request_id, count in zip(request_ids, counts, strict=True):
            if len(request_ids) > 1:
                error = self._try([request_id], [count], results)
            if error is not None:
                _log.error("request %s failed: %r", request_id, error)
                reason = f"the model failed on this request ({type(error).__name__})"
                results.errors[request_id] = reason

    def _try(
        self,
        request_ids: list[str],
        counts: list[int],
        results: _Results,
        drafts: Mapping[str, Sequence[int]] = _NO_DRAFTS,
    ) -> Exception | None:
        """Runs a batch and adds to the results, or changes nothing and returns what was raised."""
        try:
            batch = build_input_batch(
                self._table,
                buffers=self._buffers,
                request_ids=request_ids,
                num_scheduled_tokens=counts,
                drafts=drafts,
            )
            found = self._compute(batch)
        except Exception as error:  # whatever it is, it must not take other requests with it
            return error
        self._commit(batch, found)
        self._watcher.see(batch)
        results.tokens |= found.tokens
        results.logprobs |= found.logprobs
        results.prompt_logprobs |= found.prompt_logprobs
        results.errors |= found.errors
        if drafts:
            results.num_drafts |= {n: len(drafts[n]) for n in found.tokens if n in drafts}
        return None

    def _compute(self, batch: InputBatch) -> _Results:
        """All results of a batch; changes nothing but K/V slots that nobody has read yet."""
        hidden, all_logits = self._replays.forward(batch)
        found = _Results()
        if self._table.wants_prompt_logprobs[batch.rows].any():
            self._score_prompts(batch, hidden, found)
        rows = _Rows()
        for start in range(0, len(batch.samples), MAX_LOGITS_ROWS):
            group = slice(start, start + MAX_LOGITS_ROWS)
            logits = all_logits
            if logits is None:
                logits = self._model.compute_logits(hidden[batch.sample_tokens[group]])
            rows.add(self._sampler.sample(logits, self._sampling_batch(batch, group)))
        if batch.has_drafts:
            self._accept(batch, rows, found)
        else:
            self._collect(batch, rows, found)
        return found

    def _sampling_batch(self, batch: InputBatch, group: slice) -> SamplingBatch:
        return sampling_batch(
            self._table,
            batch.rows[batch.samples[group]],
            depths=batch.sample_depths[group],
            has_drafts=batch.has_drafts,
        )

    def _collect(self, batch: InputBatch, rows: _Rows, found: _Results) -> None:
        """Results of rows of which each is another request's."""
        request_ids = [batch.request_ids[index] for index in batch.samples.tolist()]
        for row, message in rows.errors.items():
            found.errors[request_ids[row]] = message
        for row, request_id in enumerate(request_ids):
            if request_id not in found.errors:
                found.tokens[request_id] = (rows.token_ids[row],)
        for row, score in rows.logprobs.items():
            if request_ids[row] in found.tokens:
                found.logprobs[request_ids[row]] = (score,)

    def _accept(self, batch: InputBatch, rows: _Rows, found: _Results) -> None:
        """Of each request's rows those up to the first whose token is not the draft behind it.

        What is drawn at a position does not depend on drafts: each has its own random key, and a
        row's logits are those of its own tokens. So these tokens are the ones that steps of one
        token would draw.
        """
        table, depths = self._table, batch.sample_depths.tolist()
        token_ids, end = rows.token_ids, len(depths)
        for row, index in enumerate(batch.samples.tolist()):
            if depths[row]:
                continue
            request_id, last = batch.request_ids[index], row
            if row in rows.errors:
                found.errors[request_id] = rows.errors[row]
                continue
            table_row = batch.rows[index]
            known = int(table.num_tokens[table_row])
            while last + 1 < end and depths[last + 1] and last + 1 not in rows.errors:
                if token_ids[last] != table.token_ids[table_row, known + depths[last]]:
                    break
                last += 1
            found.tokens[request_id] = tuple(token_ids[row : last + 1])
            if row in rows.logprobs:
                found.logprobs[request_id] = tuple(
                    map(rows.logprobs.__getitem__, range(row, last + 1))
                )

    def _score_prompts(self, batch: InputBatch, hidden: Tensor, found: _Results) -> None:
        """The token at position p + 1 is scored by the hidden row of p, inside the prompt only."""
        table = self._table
        starts = batch.attn.query_start_loc.numpy()
        for index in np.flatnonzero(table.wants_prompt_logprobs[batch.rows]):
            row = batch.rows[index]
            first = int(table.num_computed_tokens[row])
            end = min(
                first + int(batch.num_scheduled[index]), int(table.num_prompt_tokens[row]) - 1
            )
            if end <= first:
                continue
            at = int(starts[index])
            scores = score_hidden(
                hidden[at : at + end - first],
                compute_logits=self._model.compute_logits,
                chosen=table.token_ids[row, first + 1 : end + 1].tolist(),
                num_best=table.params(row).prompt_logprobs or 0,
            )
            request_id = batch.request_ids[index]
            finite = tuple(score for score in scores if score is not None)
            if len(finite) < len(scores):
                found.errors[request_id] = NON_FINITE_MESSAGE
            else:
                found.prompt_logprobs[request_id] = finite

    def _commit(self, batch: InputBatch, found: _Results) -> None:
        table = self._table
        table.num_computed_tokens[batch.rows] += batch.num_scheduled
        for request_id in found.errors:
            found.prompt_logprobs.pop(request_id, None)
        if batch.has_drafts:
            for request_id, tokens in found.tokens.items():
                table.append_run(table.row(request_id), tokens)
            return
        drawn = [table.row(request_id) for request_id in found.tokens]
        if drawn:
            table.append_tokens(drawn, [tokens[0] for tokens in found.tokens.values()])
