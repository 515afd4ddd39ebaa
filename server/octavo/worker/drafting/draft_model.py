"""A small model of the same tokens that drafts for a large one. Knows tokens and K/V; no head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from octavo.attention.base import KVLayer
from octavo.models import Model
from octavo.types import SchedulerOutput
from octavo.worker.drafting.base import Guesses, Job
from octavo.worker.drafting.places import MAX_JOBS, Ints, Places
from octavo.worker.input_batch import InputBatch
from octavo.worker.replays import ForwardReplays
from octavo.worker.request_table import RequestTable

_CHUNK = 64  # tokens of one request that a step reads at most, so that it is not held up long


@dataclass(slots=True)
class _Reading:
    """[0, num_done) have K/V, and so have ``drafts`` behind them, should they come true."""

    num_done: int = 0
    drafts: list[int] = field(default_factory=list)


class DraftModelGuesser:
    """`Guesser` by a model that reads all of a request's tokens itself, a chunk a step at most.

    What it writes into a block that requests share is the same whoever writes it, and a request
    reads nothing that was not written for it.
    """

    def __init__(self, model: Model, *, table: RequestTable, kv_caches: Sequence[KVLayer]) -> None:
        self._model = model
        self._table = table
        self._places = Places(table, max_num_tokens=MAX_JOBS * _CHUNK)
        self._replays = ForwardReplays(model, kv_caches=kv_caches, buffers=self._places.buffers)
        self._readings: dict[str, _Reading] = {}
        self._max_len = model.spec.max_model_len
        self.num_read = 0

    def begin(self, step: SchedulerOutput) -> None:
        for request_id in step.finished_request_ids:
            self._readings.pop(request_id, None)
        for request in step.new_requests:
            self._readings[request.request_id] = _Reading()

    def see(self, batch: InputBatch) -> None:
        pass  # the table tells all that it needs

    def warm(self) -> None:
        for has_logits in self._places.usual():
            self._places.run(self._replays, has_logits=has_logits)

    def catch_up(self, jobs: Sequence[Job]) -> tuple[list[Job], Guesses | None]:
        self.num_read = 0
        token_ids = self._table.token_ids
        reading, firsts, counts = [], [], []
        for job in jobs:
            if job.num_known + job.depth > self._max_len:
                continue
            done = self._settle(job)
            reading.append(job)
            firsts.append(done)
            counts.append(min(job.num_known - done, _CHUNK))
        if not reading:
            return [], None
        self.num_read = sum(counts)
        ends = [first + count for first, count in zip(firsts, counts, strict=True)]
        hidden, logits = self._run(
            reading,
            firsts=firsts,
            tokens=[
                token_ids[job.row, first:end]
                for job, first, end in zip(reading, firsts, ends, strict=True)
            ],
        )
        for job, end in zip(reading, ends, strict=True):
            self._readings[job.request_id].num_done = end
        ready = [i for i, job in enumerate(reading) if ends[i] == job.num_known]
        if logits is None or len(ready) < len(reading):
            lasts = torch.tensor(counts).cumsum(0)[ready] - 1
            logits = self._model.compute_logits(hidden[lasts]) if ready else None
        guesses = None if logits is None else Guesses(all_logits=logits)
        return [reading[i] for i in ready], guesses

    def go_on(self, jobs: Sequence[Job], kept: Sequence[int]) -> Guesses:
        for job in jobs:
            self._readings[job.request_id].drafts.append(job.drafts[-1])
        _, logits = self._run(
            jobs,
            firsts=[job.num_known + len(job.drafts) - 1 for job in jobs],
            tokens=[job.drafts[-1:] for job in jobs],
        )
        assert logits is not None
        return Guesses(all_logits=logits)

    def _settle(self, job: Job) -> int:
        """Of the request's known tokens those with K/V, but for the last, which logits need."""
        reading = self._readings[job.request_id]
        done = reading.num_done
        known = self._table.token_ids[job.row]
        for draft in reading.drafts:
            if done >= job.num_known or known[done] != draft:
                break
            done += 1
        reading.drafts.clear()
        reading.num_done = done = min(done, job.num_known - 1)
        return done

    def _run(
        self,
        jobs: Sequence[Job],
        *,
        firsts: Sequence[int],
        tokens: Sequence[Ints] | Sequence[Sequence[int]],
    ) -> tuple[Tensor, Tensor | None]:
        self._places.write(
            [job.row for job in jobs],
            firsts=firsts,
            counts=list(map(len, tokens)),
            token_ids=tokens,
            origins=[0] * len(jobs),
        )
        return self._places.run(self._replays, has_logits=self._places.num_tokens == len(jobs))
