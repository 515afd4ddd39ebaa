"""The host's account of the rows on the GPU: who has which, and every count. Knows no token drawn.

The scheduler's diffs are applied here and staged for the device at once. Counts run ahead of the
device: a step that will draw a token has it counted when the step is launched, and every draft as
if accepted, until its results take back those that were not (`settle`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from octavo.types import NewRequest, SamplingParams, SchedulerOutput
from octavo.worker.gpu.buffers import StepSizes
from octavo.worker.gpu.upload import Upload

Ints = npt.NDArray[np.int32]
Rows = npt.NDArray[np.int64]
Int = TypeVar("Int", np.int32, np.int64)

_log = logging.getLogger(__name__)
_NO_DRAFTS: Mapping[str, int] = {}


class RowParams(Protocol):
    """Who keeps the sampling parameters of rows; `GpuSampler` is one."""

    def set_row(self, row: int, params: SamplingParams, upload: Upload) -> None:
        """Takes over the parameters of the request that now has the row."""

    def clear_row(self, row: int) -> None:
        """Forgets the row's request; stages nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """R requests of a step, packed one after the other (T tokens), P of which draw S tokens: one
    each, and one behind each draft. Lengths and positions count all drafts before as accepted."""

    request_ids: list[str]  # R
    rows: Rows  # [R]
    serials: Rows  # [R]: tells one holder of a row from the next
    starts: Ints  # [R] position of the first token
    query_ends: Ints  # [R] place in [0, T) behind the last token
    seq_lens: Ints  # [R]
    num_tokens: int  # T
    max_query_len: int
    samples: Rows  # [P] places in [0, R) of requests whose known tokens end in this step
    sample_rows: Rows  # [S]
    sample_tokens: Ints  # [S] places in [0, T) of the tokens after which one is drawn
    sample_positions: Ints  # [S] of the tokens to draw
    least_lens: Ints  # [R] of seq_lens, should no draft before have been accepted
    drafts: Ints | None = None  # [P] behind the last token of each; None: behind nobody's
    depths: Ints | None = None  # [S] drafts before each sample; None where drafts is

    @property
    def num_samples(self) -> int:
        return len(self.sample_rows)

    @property
    def sample_ids(self) -> list[str]:
        """[P] of the requests that draw."""
        ids = self.request_ids
        return ids if len(self.samples) == len(ids) else [ids[i] for i in self.samples.tolist()]

    @property
    def first_samples(self) -> Rows:
        """[P] the first sample of each request that draws."""
        if self.drafts is None:
            return np.arange(len(self.samples))
        return np.cumsum(1 + self.drafts) - 1 - self.drafts


class GpuRequestTable:
    """Rows of live requests, kept by the scheduler's diffs.

    Of row r, the device knows tokens [0, num_tokens[r]) once the steps launched so far have run;
    the K/V of [0, num_computed[r]) are then in its blocks, ``block_tables[r]``. Of both,
    num_unsure[r] are drafts of steps in flight.
    """

    def __init__(self, *, sizes: StepSizes, params: RowParams) -> None:
        num_rows = sizes.max_num_seqs
        self._block_size = sizes.block_size
        self._params = params
        self.block_tables = np.zeros((num_rows, sizes.max_blocks), np.int32)
        self.num_blocks = np.zeros(num_rows, np.int32)
        self.num_prompt_tokens = np.zeros(num_rows, np.int32)
        self.num_tokens = np.zeros(num_rows, np.int32)
        self.num_computed = np.zeros(num_rows, np.int32)
        self.num_unsure = np.zeros(num_rows, np.int32)
        self._has_drafted = False
        self.serials = np.full(num_rows, -1, np.int64)
        # How many likely tokens to tell of each prompt position; negative: no scores wanted.
        self.num_prompt_scores = np.full(num_rows, -1, np.int32)
        self.scored_rows: set[int] = set()  # those that want any
        self.failed: dict[int, str] = {}  # serial -> message
        self._row_of: dict[str, int] = {}
        self._free_rows = list(range(num_rows - 1, -1, -1))
        self._next_serial = 0
        # Most steps have the requests of the one before, with one token each.
        self._last_ids: list[str] | None = None
        self._last_rows: Rows = np.zeros(0, np.int64)
        self._last_serials: Rows = np.zeros(0, np.int64)
        self._places = _constant(np.arange(num_rows, dtype=np.int64))
        self._ends = _constant(np.arange(1, num_rows + 1, dtype=np.int32))

    def __len__(self) -> int:
        return len(self._row_of)

    def row(self, request_id: str) -> int:
        return self._row_of[request_id]

    def apply(self, step: SchedulerOutput, upload: Upload) -> None:
        """Applies a step's diffs in the documented order: finished, new, blocks."""
        for request_id in step.finished_request_ids:
            self._remove(request_id)
        for request in step.new_requests:
            self._remove(request.request_id)
            self._add(request, upload)
        if step.new_block_ids:
            self._append_blocks(step.new_block_ids, upload)

    def batch(self, step: SchedulerOutput, drafts: Mapping[str, int] = _NO_DRAFTS) -> StepBatch:
        """The batch of a step whose diffs are applied; counts it as run.

        ``drafts``: of requests that the step has room for, no more than that.
        """
        request_ids = list(step.num_scheduled_tokens)
        size = len(request_ids)
        rows, serials = self._rows_of(request_ids)
        starts, known = self.num_computed[rows], self.num_tokens[rows]
        extra = None  # [R] drafts of this step
        if set(step.num_scheduled_tokens.values()) == {1}:
            seq_lens, query_ends, max_query_len = starts + 1, self._ends[:size], 1
            ends = seq_lens
        else:
            counts = np.fromiter(step.num_scheduled_tokens.values(), np.int32, size)
            assert counts.min(initial=1) > 0, "scheduled no token"
            counts -= _values(step.max_drafts, request_ids)
            ends = starts + counts  # of known tokens
            if drafts:
                extra = _values(drafts, request_ids)
                assert not np.count_nonzero(extra[ends != known]), "drafts before the last token"
                counts = counts + extra
            seq_lens, query_ends = starts + counts, np.cumsum(counts, dtype=np.int32)
            max_query_len = int(counts.max(initial=0))
        assert not np.count_nonzero(ends > known), "scheduled past the known tokens"
        num_slots = self.num_blocks[rows] * self._block_size
        assert not np.count_nonzero(seq_lens > num_slots), "tokens without a block"
        (samples,) = (ends == known).nonzero()
        sample_rows, sample_ends, positions = rows, query_ends, known
        if len(samples) == size:
            samples = self._places[:size]
        else:
            sample_rows, sample_ends, positions = rows[samples], query_ends[samples], known[samples]
        self.num_computed[rows] = seq_lens
        self.num_tokens[sample_rows] = positions + 1
        batch = StepBatch(
            request_ids=request_ids,
            rows=rows,
            serials=serials,
            starts=starts,
            query_ends=query_ends,
            seq_lens=seq_lens,
            num_tokens=int(query_ends[-1]) if size else 0,
            max_query_len=max_query_len,
            samples=samples,
            sample_rows=sample_rows,
            sample_tokens=sample_ends - 1,
            sample_positions=positions,
            least_lens=seq_lens - self.num_unsure[rows] if self._has_drafted else seq_lens,
        )
        return batch if extra is None else self._with_drafts(batch, extra)

    def _with_drafts(self, batch: StepBatch, extra: Ints) -> StepBatch:
        """The batch with samples behind these drafts [R], which its other numbers count."""
        rows, drafts = batch.sample_rows, extra[batch.samples]
        self._has_drafted = True
        self.num_tokens[rows] += drafts
        self.num_unsure[rows] += drafts
        each = 1 + drafts
        depths = np.arange(each.sum(), dtype=np.int32)
        depths -= np.repeat(np.cumsum(each, dtype=np.int32) - each, each)
        return replace(
            batch,
            sample_rows=np.repeat(rows, each),
            sample_tokens=np.repeat(batch.sample_tokens - drafts, each) + depths,
            sample_positions=np.repeat(batch.sample_positions, each) + depths,
            drafts=drafts,
            depths=depths,
        )

    def settle(self, batch: StepBatch, num_drawn: Ints) -> None:
        """Takes back drafts of a batch that were not accepted: the requests that drew got so many
        tokens [P], or 0 where they failed. For batches in the order they were made."""
        assert batch.drafts is not None
        rows = batch.rows[batch.samples]
        is_same = self.serials[rows] == batch.serials[batch.samples]
        rows, drafts = rows[is_same], batch.drafts[is_same]
        rejected = np.minimum(1 + drafts - num_drawn[is_same], drafts)
        self.num_computed[rows] -= rejected
        self.num_tokens[rows] -= rejected
        self.num_unsure[rows] -= drafts

    def _rows_of(self, request_ids: list[str]) -> tuple[Rows, Rows]:
        """Rows and serials; nobody changes the arrays."""
        if request_ids != self._last_ids:
            places = map(self._row_of.__getitem__, request_ids)
            rows = np.fromiter(places, np.int64, len(request_ids))
            self._last_ids = request_ids
            self._last_rows, self._last_serials = _constant(rows), _constant(self.serials[rows])
        return self._last_rows, self._last_serials

    def _add(self, request: NewRequest, upload: Upload) -> None:
        assert self._free_rows, "more live requests than max_num_seqs"
        row = self._free_rows.pop()
        self._row_of[request.request_id] = row
        self._last_ids = None
        self.serials[row] = self._next_serial
        self._next_serial += 1
        num_tokens, num_blocks = len(request.token_ids), len(request.block_ids)
        self.num_tokens[row] = num_tokens
        self.num_prompt_tokens[row] = request.num_prompt_tokens
        self.num_computed[row] = request.num_computed_tokens
        self.num_unsure[row] = 0
        self.num_blocks[row] = num_blocks
        self.block_tables[row, :num_blocks] = request.block_ids
        wanted = request.params.prompt_logprobs
        self.num_prompt_scores[row] = -1 if wanted is None else wanted
        if wanted is not None:
            self.scored_rows.add(row)
        upload.put("token_ids", row, request.token_ids)
        upload.put("block_tables", row, self.block_tables[row, :num_blocks])
        upload.put("num_prompt_tokens", row, request.num_prompt_tokens)
        upload.put("num_tokens", row, num_tokens)
        try:
            self._params.set_row(row, request.params, upload)
        except Exception as error:  # whatever it is, it must not take other requests with it
            _log.error("request %s has no parameters", request.request_id, exc_info=error)
            self._params.clear_row(row)
            message = f"its sampling parameters cannot be applied ({type(error).__name__})"
            self.failed[int(self.serials[row])] = message

    def _append_blocks(self, new: Mapping[str, tuple[int, ...]], upload: Upload) -> None:
        rows = np.fromiter(map(self._row_of.__getitem__, new), np.int64, len(new))
        lengths = np.fromiter(map(len, new.values()), np.int32, len(new))
        blocks = np.fromiter(chain.from_iterable(new.values()), np.int32)
        starts = self.num_blocks[rows]
        # Place i of `blocks` goes to starts[r] + i - (values of the requests before r).
        ends = np.cumsum(lengths, dtype=np.int32)
        places = np.arange(len(blocks)) + np.repeat(starts - ends + lengths, lengths)
        self.block_tables[np.repeat(rows, lengths), places] = blocks
        self.num_blocks[rows] = starts + lengths
        upload.put_many("block_tables", rows, starts=starts, lengths=lengths, values=blocks)

    def _remove(self, request_id: str) -> None:
        row = self._row_of.pop(request_id, None)
        if row is None:
            return
        self._last_ids = None
        self.scored_rows.discard(row)
        self.serials[row] = -1
        self._params.clear_row(row)
        self._free_rows.append(row)


def _values(numbers: Mapping[str, int], names: list[str]) -> Ints:
    """[n] of each of the names, 0 where there is none."""
    if not numbers:
        return np.zeros(len(names), np.int32)
    return np.fromiter((numbers.get(name, 0) for name in names), np.int32, len(names))


def _constant(array: npt.NDArray[Int]) -> npt.NDArray[Int]:
    """The array, which many steps share and none may change."""
    array.flags.writeable = False
    return array
