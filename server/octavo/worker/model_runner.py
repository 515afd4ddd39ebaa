"""Runs a step: diffs, moves and copies, forward pass, sampling. Knows no model, policy or text.

A step either happens to a request or it does not: the table moves on only with results in hand,
so a batch that fails can be repeated request by request and yields the same bits.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from octavo.models.base import Model
from octavo.sampling import Sampled, Sampler, SamplingBatch
from octavo.sampling.logprobs import score_hidden
from octavo.sampling.sampler import NON_FINITE_MESSAGE
from octavo.types import ModelOutput, SchedulerOutput, TokenLogprobs
from octavo.worker.input_batch import InputBatch, StepBuffers, build_input_batch
from octavo.worker.kv_tensors import KVTensors
from octavo.worker.kv_transfer import KVTransfer
from octavo.worker.replays import MAX_LOGITS_ROWS, ForwardReplays
from octavo.worker.request_table import RequestTable

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Results:
    """What requests of one step yielded; the fields of `ModelOutput`."""

    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    logprobs: dict[str, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    prompt_logprobs: dict[str, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


class ModelRunner:
    """Owns the request table and the K/V memory; one step at a time, in the order given."""

    def __init__(
        self,
        model: Model,
        *,
        table: RequestTable,
        kv: KVTensors,
        sampler: Sampler,
        transfer: KVTransfer,
        max_num_tokens: int,
    ) -> None:
        self._model = model
        self._table = table
        self._kv = kv
        self._sampler = sampler
        self._transfer = transfer
        self._buffers = StepBuffers(table, max_num_tokens=max_num_tokens)
        self._forward = ForwardReplays(model, kv_caches=kv.layers, buffers=self._buffers).forward

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
                live[request_id] = count
        if live:
            self._run(list(live), list(live.values()), results)
        table.failed.update(results.errors)
        return ModelOutput(
            step=step.step,
            sampled_token_ids=results.tokens,
            logprobs=results.logprobs,
            prompt_logprobs=results.prompt_logprobs,
            errors=results.errors,
            damaged_blocks=loads.damaged(),
        )

    def _run(self, request_ids: list[str], counts: list[int], results: _Results) -> None:
        """Runs a batch, or, should it fail, its requests one by one."""
        error = self._try(request_ids, counts, results)
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
        self, request_ids: list[str], counts: list[int], results: _Results
    ) -> Exception | None:
        """Runs a batch and adds to the results, or changes nothing and returns what was raised."""
        try:
            batch = build_input_batch(
                self._table,
                buffers=self._buffers,
                request_ids=request_ids,
                num_scheduled_tokens=counts,
            )
            found = self._compute(batch)
        except Exception as error:  # whatever it is, it must not take other requests with it
            return error
        self._commit(batch, found)
        results.tokens |= found.tokens
        results.logprobs |= found.logprobs
        results.prompt_logprobs |= found.prompt_logprobs
        results.errors |= found.errors
        return None

    def _compute(self, batch: InputBatch) -> _Results:
        """All results of a batch; changes nothing but K/V slots that nobody has read yet."""
        hidden, all_logits = self._forward(batch)
        found = _Results()
        if self._table.wants_prompt_logprobs[batch.rows].any():
            self._score_prompts(batch, hidden, found)
        for start in range(0, len(batch.samples), MAX_LOGITS_ROWS):
            group = slice(start, start + MAX_LOGITS_ROWS)
            logits = all_logits
            if logits is None:
                logits = self._model.compute_logits(hidden[batch.last_tokens[group]])
            chosen = batch.samples[group]
            sampled = self._sampler.sample(logits, self._sampling_batch(batch, chosen))
            self._collect(batch, chosen.tolist(), sampled, found)
        return found

    def _sampling_batch(
        self, batch: InputBatch, chosen: np.ndarray[tuple[int], np.dtype[np.int64]]
    ) -> SamplingBatch:
        table = self._table
        rows = batch.rows[chosen]
        has_params = table.logit_params.is_active[rows]
        asks = table.wants_logprobs[rows]
        return SamplingBatch(
            slots=rows.astype(np.int32),
            temperature=table.temperature[rows],
            top_k=table.top_k[rows],
            top_p=table.top_p[rows],
            min_p=table.min_p[rows],
            seeds=table.seeds[rows],
            positions=table.num_tokens[rows].astype(np.int64),
            has_params=has_params,
            params=table.logit_params.packed() if has_params.any() else None,
            num_logprobs=[table.params(row).logprobs for row in rows] if asks.any() else (),
        )

    def _collect(
        self, batch: InputBatch, chosen: Sequence[int], sampled: Sampled, found: _Results
    ) -> None:
        request_ids = [batch.request_ids[index] for index in chosen]
        for row, message in sampled.errors.items():
            found.errors[request_ids[row]] = message
        for row, request_id in enumerate(request_ids):
            if request_id not in found.errors:
                found.tokens[request_id] = (sampled.token_ids[row],)
        for row, score in sampled.logprobs.items():
            if request_ids[row] in found.tokens:
                found.logprobs[request_ids[row]] = (score,)

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
        drawn = [table.row(request_id) for request_id in found.tokens]
        if drawn:
            table.append_tokens(drawn, [tokens[0] for tokens in found.tokens.values()])
