"""A trained head that drafts from the target's hidden states. Knows places and K/V; no training.

It sees only tokens whose hidden states pass by while it looks: of a prompt the last few, and then
all that is generated. Where it has missed some, because there were too many requests or drafts did
not pay, it begins anew from the last ones.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.attention.base import KVLayer
from octavo.models import Taps
from octavo.models.draft_head import DraftHead, OwnPass, TapPass
from octavo.types import SchedulerOutput
from octavo.worker.drafting.base import Guesses, Job
from octavo.worker.drafting.places import MAX_JOBS, USUAL, FollowedPass, Following, Places
from octavo.worker.input_batch import InputBatch
from octavo.worker.replays import ForwardReplays
from octavo.worker.request_table import RequestTable

_log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
_AGAIN = 32  # places that are read when it begins anew
_ROOM = 32  # places more than are read at once that are kept for a request


class Reading:
    """Of a request the places [first, done) have K/V; taps of [done, done + count) wait.

    ``first`` is where its sequence begins, or -1: nothing has K/V.
    """

    __slots__ = ("count", "done", "first", "taps")

    def __init__(self, num_kept: int, width: int) -> None:
        self.taps = np.empty((num_kept, width), np.float32)
        self.first, self.done, self.count = -1, 0, 0

    def restart(self, place: int) -> None:
        self.first, self.done, self.count = -1, place, 0

    def keep_last(self, count: int) -> None:
        """Forgets what waits but for the last places."""
        dropped = self.count - count
        if dropped > 0:
            self.taps[:count] = self.taps[dropped : self.count].copy()
            self.restart(self.done + dropped)
            self.count = count


class HeadGuesser:
    """`Guesser` and `StepWatcher` by a draft head.

    ``taps``: where the target leaves its hidden states. ``most_requests``: in a step that it looks
    at.
    """

    _num_more = 0  # places of a request that a pass may have behind those that it reads

    def __init__(
        self,
        head: DraftHead,
        *,
        table: RequestTable,
        kv_cache: KVLayer,
        taps: Taps,
        most_requests: int,
    ) -> None:
        self._head = head
        self._table = table
        self._taps = taps.out.numpy()
        self._most_requests = most_requests
        self._max_len = head.max_len
        self._num_kept = head.spec.num_read + _ROOM
        self._places = Places(table, max_num_tokens=MAX_JOBS * (self._num_kept + self._num_more))
        waiting = torch.zeros(self._places.max_num_tokens, taps.out.shape[1])
        self._waiting = waiting.numpy()
        self._readings: dict[str, Reading] = {}
        self.num_read = 0
        self._has_failed = False
        self._make_passes(TapPass(head, waiting), kv_cache)

    def _make_passes(self, reading: TapPass, kv_cache: KVLayer) -> None:
        head = self._head
        following = self._following = Following(
            token_ids=head.token_ids.to(torch.int32),
            features=torch.zeros(MAX_JOBS, head.spec.layer.hidden_size),
            probs=torch.zeros(MAX_JOBS),
        )
        self._reading, guessing = (
            FollowedPass(each, places=self._places, following=following)
            for each in (reading, OwnPass(head, following.features))
        )
        self._reads, self._guesses = (
            ForwardReplays(each, kv_caches=[kv_cache], buffers=self._places.buffers)
            for each in (self._reading, guessing)
        )
        self._recorded: tuple[ForwardReplays, ...] = (self._reads, self._guesses)

    def begin(self, step: SchedulerOutput) -> None:
        for request_id in step.finished_request_ids:
            self._readings.pop(request_id, None)
        for request in step.new_requests:
            self._readings.pop(request.request_id, None)

    def see(self, batch: InputBatch) -> None:
        if len(batch.rows) > self._most_requests:
            return
        try:
            self._look(batch)
        except Exception as error:  # it begins anew with what comes
            self._readings.clear()
            if not self._has_failed:
                self._has_failed = True
                _log.error("a draft head could not follow a step", exc_info=error)

    def _look(self, batch: InputBatch) -> None:
        buffers = batch.buffers
        starts = buffers.query_start_loc[: len(batch.rows)].tolist()
        firsts = buffers.positions[starts].tolist()
        ends = self._table.num_computed_tokens[batch.rows].tolist()
        for request_id, at, first, end in zip(batch.request_ids, starts, firsts, ends, strict=True):
            if end > first:
                self._keep(request_id, first, self._taps[at : at + end - first])

    def warm(self) -> None:
        for is_of_each in self._places.usual():
            if is_of_each:
                for passes in self._recorded:
                    self._places.run(passes, has_logits=True)

    def _keep(self, request_id: str, place: int, taps: Floats) -> None:
        reading = self._readings.get(request_id)
        if reading is None:
            reading = self._readings[request_id] = Reading(self._num_kept, taps.shape[1])
            reading.restart(place)
        if reading.done + reading.count != place:
            reading.restart(place)
        most = self._head.spec.num_read
        if len(taps) > most:
            place, taps = place + len(taps) - most, taps[-most:]
            reading.restart(place)
        if reading.count + len(taps) > self._num_kept:
            reading.keep_last(min(_AGAIN, self._num_kept - len(taps)))
        reading.taps[reading.count : reading.count + len(taps)] = taps
        reading.count += len(taps)

    def catch_up(self, jobs: Sequence[Job]) -> tuple[list[Job], Guesses | None]:
        self.num_read = 0
        ready = [job for job in jobs if self._is_ready(job)]
        if not ready:
            return [], None
        readings = [self._readings[job.request_id] for job in ready]
        guesses = self._read(ready, readings)
        for reading in readings:
            reading.done += reading.count
            reading.count = 0
        return ready, guesses

    def _read(self, ready: Sequence[Job], readings: Sequence[Reading]) -> Guesses:
        """A pass over what waits, and the guesses that it gives."""
        counts = [reading.count for reading in readings]
        at = 0
        for reading in readings:
            self._waiting[at : at + reading.count] = reading.taps[: reading.count]
            at += reading.count
        token_ids = self._table.token_ids
        self._places.write(
            [job.row for job in ready],
            firsts=[reading.done for reading in readings],
            counts=counts,
            token_ids=[
                token_ids[job.row, reading.done + 1 : reading.done + 1 + reading.count]
                for job, reading in zip(ready, readings, strict=True)
            ],
            origins=[reading.first for reading in readings],
        )
        # Of few tokens all have logits, for passes are recorded by their number alone.
        hidden, logits = self._places.run(self._reads, has_logits=at <= max(USUAL))
        self.num_read = at
        lasts = None if at == len(ready) else (np.cumsum(counts) - 1).tolist()
        if logits is None:
            hidden, lasts = hidden[lasts], None
            self._places.shrink()
            logits = self._reading.compute_logits(hidden)
        return self._guessed(logits, lasts)

    def go_on(self, jobs: Sequence[Job], kept: Sequence[int]) -> Guesses:
        if len(kept) == self._places.num_requests:
            self._places.go_on([job.drafts[-1] for job in jobs])
        else:
            features = self._following.features
            features[: len(jobs)] = features[list(kept)]
            self._places.write(
                [job.row for job in jobs],
                # The place before the draft's own, as ever.
                firsts=[job.num_known + len(job.drafts) - 2 for job in jobs],
                counts=[1] * len(jobs),
                token_ids=[job.drafts[-1:] for job in jobs],
                origins=[self._readings[job.request_id].first for job in jobs],
            )
        _, logits = self._places.run(self._guesses, has_logits=True)
        assert logits is not None
        return self._guessed(logits, None)

    def _guessed(self, logits: Tensor, rows: Sequence[int] | None) -> Guesses:
        num = self._places.num_requests
        best = self._places.buffers.token_ids[:num].tolist(), self._following.probs[:num].tolist()
        return Guesses(all_logits=logits, rows=rows, best=best)

    def _is_ready(self, job: Job) -> bool:
        """Whether all of its computed places have been seen, from the first of a block on."""
        reading = self._readings.get(job.request_id)
        if reading is None or reading.done + reading.count != job.num_known - 1:
            return False
        if reading.first >= 0 and job.num_known + job.depth - reading.first > self._max_len:
            reading.restart(job.num_known - 1)  # what waits is lost: it begins with what comes
            return False
        if reading.first < 0:
            size = self._table.block_size
            first = -(-reading.done // size) * size
            left = reading.done + reading.count - first
            if left <= 0:
                return False
            reading.keep_last(left)
            reading.first = first
        return reading.count > 0
