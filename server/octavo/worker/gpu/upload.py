"""What one step brings to the device, staged in pinned memory: one copy, one scatter. Knows the
arena's columns and no request.

The words of a step lie in the device's ``words`` tensor in this order::

    batch | sections (read where they lie) and values for the arena, as they came | ranges

A step with more words than a slot of the ring holds is sent in several copies, each followed by its
scatter; sections stay where they are until the step after.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.worker.gpu.arena import RequestArena
from octavo.worker.gpu.buffers import BatchWords, StepSizes, padded
from octavo.worker.gpu.runtime import Event, Runtime
from octavo_kernels.step_inputs.gpu import scatter_words

Ints = npt.NDArray[np.int32]

NUM_SLOTS = 3  # the step being staged, and two whose copies may not have run
_WORD_BYTES = 4
_SLACK = 2 * padded(1)  # words that aligning a section and the ranges may cost
_SPARE = 1 << 16  # words for the arena, beside two longest requests
_LARGEST = 1 << 20
_DTYPES = {torch.int32: np.int32, torch.float32: np.float32, torch.int64: np.int64}


def upload_words(sizes: StepSizes) -> int:
    """Words of a slot, and of the device's copy of one: ordinary steps fit by far.

    A bound there is not: any number of requests may come, each with all its tokens.
    """
    batch = BatchWords.num_words(sizes.max_num_seqs, max_samples=sizes.max_samples)
    values = min(2 * sizes.max_model_len + _SPARE, _LARGEST)
    return padded(batch + _section_words(sizes) + values)


def _section_words(sizes: StepSizes) -> int:
    """Room that a step's sections are given together: lists of places and rows, block copies."""
    return 16 * sizes.max_samples + 64


@dataclass(frozen=True, slots=True, kw_only=True)
class HostBatch:
    """`BatchWords` of one slot as arrays, and how they are filled."""

    rows: Ints
    query_start_loc: Ints
    seq_lens: Ints
    sample_tokens: Ints
    sample_rows: Ints
    sample_positions: Ints

    @classmethod
    def of(cls, slot: Tensor, *, sizes: StepSizes) -> HostBatch:
        words = BatchWords.of(slot, max_num_seqs=sizes.max_num_seqs, max_samples=sizes.max_samples)
        return cls(**{name: getattr(words, name).numpy() for name in cls.__slots__})

    def fill(
        self,
        *,
        rows: npt.NDArray[np.integer],
        query_ends: npt.NDArray[np.integer],
        seq_lens: npt.NDArray[np.integer],
        sample_tokens: npt.NDArray[np.integer],
        sample_rows: npt.NDArray[np.integer],
        sample_positions: npt.NDArray[np.integer],
    ) -> None:
        """R requests, which draw S tokens; every other place is padding, as `BatchWords`
        says."""
        size, num_samples = len(rows), len(sample_rows)
        self.rows[:size] = rows
        self.rows[size:] = -1
        self.query_start_loc[0] = 0
        self.query_start_loc[1 : size + 1] = query_ends
        self.query_start_loc[size + 1 :] = query_ends[-1] if size else 0
        self.seq_lens[:size] = seq_lens
        self.seq_lens[size:] = 0
        self.sample_tokens[:num_samples] = sample_tokens
        self.sample_tokens[num_samples:] = 0
        self.sample_rows[:num_samples] = sample_rows
        self.sample_rows[num_samples:] = -1
        self.sample_positions[:num_samples] = sample_positions
        self.sample_positions[num_samples:] = 0


class Upload:
    """Stages a step's words, then sends them; for one thread.

    First what goes to the arena, then sections. Between two sends no word of the arena may be put
    twice: ranges are written in no order.
    """

    def __init__(
        self, runtime: Runtime, *, sizes: StepSizes, words: Tensor, arena: RequestArena
    ) -> None:
        self._words = words
        self._arena = arena
        self._capacity = words.shape[0]
        self._batch_words = BatchWords.num_words(sizes.max_num_seqs, max_samples=sizes.max_samples)
        self._section_words = _section_words(sizes)
        self._slots = [runtime.host_tensor(self._capacity, torch.int32) for _ in range(NUM_SLOTS)]
        self._arrays: list[Ints] = [slot.numpy() for slot in self._slots]
        self._batches = [HostBatch.of(slot, sizes=sizes) for slot in self._slots]
        self._events: list[Event] = [runtime.event() for _ in range(NUM_SLOTS)]
        self._slot = 0
        self._is_open = False  # whether the slot's last copy is known to have run
        self._is_batch_filled = False
        # Source, destination and length of each: one after the other, and [n, 3].
        self._singles: list[int] = []
        self._ranges: list[Ints] = []
        self._num_ranges = 0
        self._longest = 0  # of them
        # Of the slot, [0, _batch_words) and [_begin, _cursor) are staged; on the device,
        # [0, _begin) is this step's already, and sections end at _sections_end.
        self._begin = self._cursor = self._sections_end = self._batch_words

    @property
    def batch(self) -> HostBatch:
        """The step's batch, to be filled when all else is staged; other arrays for every step."""
        self._open()
        self._is_batch_filled = True
        return self._batches[self._slot]

    def put(self, column: str, row: int, values: npt.ArrayLike, *, start: int = 0) -> None:
        """Writes values (one, or a list) to a row of a column of the arena, from ``start`` on."""
        dtype = _DTYPES[self._arena.column(column).dtype]
        data = np.array(values, dtype, ndmin=1).view(np.int32)
        self._put(self._arena.offset(column, row, start=start), data)

    def put_many(
        self,
        column: str,
        rows: npt.NDArray[np.int64],
        *,
        starts: Ints,
        lengths: Ints,
        values: Ints,
    ) -> None:
        """`put` for several rows of an int32 column, one row's values after another's."""
        targets = self._arena.offset(column, 0) + starts + rows * self._arena.row_words(column)
        ends = np.cumsum(lengths)
        if self._room(len(rows)) < len(values):
            for target, length, end in zip(targets, lengths, ends, strict=True):
                self._put(int(target), values[end - length : end])
            return
        ranges = np.empty((len(rows), 3), np.int32)
        ranges[:, 0] = self._cursor + ends - lengths
        ranges[:, 1] = targets
        ranges[:, 2] = lengths
        self._ranges.append(ranges)
        self._add(values, num_ranges=len(rows), longest=int(lengths.max(initial=0)))

    def section(self, values: npt.NDArray[np.generic]) -> Tensor:
        """Where these 4-byte values [n] will lie on the device, as words [n], 16-byte aligned.

        They are there from `send` on, until the next step is sent. The sections of a step are a
        few values for each of its requests, not more.
        """
        assert values.dtype.itemsize == _WORD_BYTES and values.ndim == 1
        if self._sections_end == self._batch_words and self._room(0) < self._section_words:
            self._flush()  # now, as what lies before a section cannot be sent on its own later
        assert self._room(0) >= len(values), f"{len(values)} words do not fit into an upload"
        self._open()
        start = self._cursor = padded(self._cursor)
        end = self._sections_end = self._cursor = start + len(values)
        self._arrays[self._slot][start:end] = values.view(np.int32)
        return self._words[start:end]

    def send(self) -> None:
        """Launches what brings the batch and all that was staged to the device."""
        self._open()
        ranges = self._lay_ranges()
        slot, end = self._slots[self._slot], self._cursor
        if self._begin > self._batch_words:  # parts of this step were sent before
            self._words[: self._batch_words].copy_(slot[: self._batch_words], non_blocking=True)
        begin = self._begin if self._begin > self._batch_words else 0
        self._words[begin:end].copy_(slot[begin:end], non_blocking=True)
        self._scatter(ranges)
        self._begin = self._cursor = self._sections_end = self._batch_words
        self._is_batch_filled = False

    def _flush(self) -> None:
        """Sends what was staged, but the batch, to make room; sections stay where they are."""
        assert not self._is_batch_filled, "the batch is filled last"
        ranges = self._lay_ranges()
        begin, end = self._begin, self._cursor
        slot = self._slots[self._slot]
        self._words[begin:end].copy_(slot[begin:end], non_blocking=True)
        self._scatter(ranges)
        self._begin = self._cursor = padded(self._sections_end)

    def _lay_ranges(self) -> Tensor | None:
        """Puts the ranges behind the words they name; where they will lie on the device."""
        if not self._num_ranges:
            return None
        singles = np.array(self._singles, np.int32)
        ranges = np.concatenate([singles, *(many.ravel() for many in self._ranges)])
        self._singles, self._ranges, self._num_ranges = [], [], 0
        start = padded(self._cursor)
        self._cursor = start + ranges.size
        self._arrays[self._slot][start : self._cursor] = ranges
        return self._words[start : self._cursor].view(-1, 3)

    def _scatter(self, ranges: Tensor | None) -> None:
        if ranges is not None:
            scatter_words(
                self._words, ranges=ranges, arena=self._arena.words, max_len=self._longest
            )
            self._longest = 0
        self._events[self._slot].record()
        self._slot = (self._slot + 1) % NUM_SLOTS
        self._is_open = False

    def _open(self) -> None:
        """Holds up the host should the slot's words still be on their way, of three steps ago."""
        if not self._is_open:
            self._events[self._slot].wait()
            self._is_open = True

    def _room(self, num_ranges: int) -> int:
        """Words that may still be staged as so many ranges (and be padded)."""
        taken = self._cursor + 3 * (self._num_ranges + num_ranges)
        return self._capacity - taken - _SLACK

    def _put(self, target: int, words: Ints) -> None:
        done, total = 0, len(words)
        while done < total:
            if self._room(1) <= 0:
                self._flush()
            size = min(total - done, self._room(1))
            assert size > 0, "no room in an empty upload"
            self._singles += (self._cursor, target + done, size)
            self._add(words[done : done + size], num_ranges=1, longest=size)
            done += size

    def _add(self, words: Ints, *, num_ranges: int, longest: int) -> None:
        """Stages values whose ranges were noted."""
        if not self._is_open:
            self._open()
        end = self._cursor + len(words)
        self._arrays[self._slot][self._cursor : end] = words
        self._cursor = end
        self._num_ranges += num_ranges
        self._longest = max(self._longest, longest)
