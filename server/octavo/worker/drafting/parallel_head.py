"""A head that guesses several tokens in one pass: behind the known ones, and behind such as are not
known yet (P-EAGLE, 2602.01469).

Those have one token and one hidden state in place of all, which were learned. What is written of
them is never read: the next pass begins where the known tokens end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from octavo.attention.base import KVLayer
from octavo.models.draft_head import TapPass
from octavo.worker.drafting.base import Guesses, Job
from octavo.worker.drafting.head import HeadGuesser, Reading
from octavo.worker.drafting.places import MAX_FOLLOWING, USUAL, Ints
from octavo.worker.replays import ForwardReplays


class ParallelHeadGuesser(HeadGuesser):
    """`HeadGuesser` whose `catch_up` makes all guesses, and `go_on` no pass."""

    _num_more = MAX_FOLLOWING

    def _make_passes(self, reading: TapPass, kv_cache: KVLayer) -> None:
        mask_taps, mask_token_id = self._head.mask_taps, self._head.spec.mask_token_id
        assert mask_taps is not None and mask_token_id is not None, "the head guesses by one pass"
        self._pass = reading
        self._reads = ForwardReplays(reading, kv_caches=[kv_cache], buffers=self._places.buffers)
        self._recorded = (self._reads,)
        self._mask_taps, self._mask_token_id = mask_taps.numpy(), mask_token_id
        self._logits: Tensor
        self._firsts: dict[str, int] = {}  # of each request the row of its first guess

    def _read(self, ready: Sequence[Job], readings: Sequence[Reading]) -> Guesses:
        token_ids, waiting = self._table.token_ids, self._waiting
        tokens: list[Ints] = []
        rows: list[int] = []
        at = 0
        self._firsts.clear()
        for job, reading in zip(ready, readings, strict=True):
            known = at + reading.count
            waiting[at:known] = reading.taps[: reading.count]
            at = known + job.depth - 1
            waiting[known:at] = self._mask_taps
            first = reading.done + 1
            masks = np.full(job.depth - 1, self._mask_token_id, np.int32)
            tokens.append(
                np.concatenate([token_ids[job.row, first : first + reading.count], masks])
            )
            self._firsts[job.request_id] = len(rows)
            rows += range(known - 1, at)
        self._places.write(
            [job.row for job in ready],
            firsts=[reading.done for reading in readings],
            counts=list(map(len, tokens)),
            token_ids=tokens,
            origins=[reading.first for reading in readings],
        )
        hidden, logits = self._places.run(self._reads, has_logits=at <= max(USUAL))
        self.num_read = at
        # Of few tokens all have logits, for passes are recorded by their number alone.
        self._logits = self._pass.compute_logits(hidden[rows]) if logits is None else logits[rows]
        return self._guesses_of(ready)

    def go_on(self, jobs: Sequence[Job], kept: Sequence[int]) -> Guesses:
        return self._guesses_of(jobs)

    def _guesses_of(self, jobs: Sequence[Job]) -> Guesses:
        rows = [self._firsts[job.request_id] + len(job.drafts) for job in jobs]
        return Guesses(all_logits=self._logits, rows=rows)
