"""Packs places of requests for a pass of what drafts. Knows the request table and its blocks.

A request's K/V lie in its own blocks, in caches of what drafts. A sequence may begin at a later
block than the request: then positions and lengths count from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from octavo.worker.input_batch import StepBuffers
from octavo.worker.replays import ForwardReplays
from octavo.worker.request_table import RequestTable

MAX_JOBS = 16  # requests in a pass
# Numbers of tokens that passes will often have: of one request, and of as many.
USUAL = range(1, 9)
Ints = npt.NDArray[np.int32]


class Places:
    """Buffers of passes of at most ``max_num_tokens`` tokens of at most `MAX_JOBS` requests."""

    def __init__(self, table: RequestTable, *, max_num_tokens: int) -> None:
        self._table = table
        self.max_num_tokens = max_num_tokens
        self.buffers = StepBuffers(table, max_num_tokens=max_num_tokens)
        self.num_tokens = 0  # of the pass that was written last
        # Of its requests: rows of the table, last places, the first blocks of their sequences.
        self._rows = self._lasts = self._starts = np.zeros(0, np.int64)
        self._order = np.arange(MAX_JOBS + 1)

    def write(
        self,
        rows: Sequence[int],
        *,
        firsts: Sequence[int],
        counts: Sequence[int],
        token_ids: Sequence[Ints] | Sequence[Sequence[int]],
        origins: Sequence[int],
    ) -> None:
        """Of each request (its row of the table) ``counts`` places from ``firsts`` on, with as many
        tokens. ``origins``: where its sequence begins, the first place of a block."""
        buffers, table, size = self.buffers, self._table, self._table.block_size
        at = 0
        for index, (row, first, count, tokens, origin) in enumerate(
            zip(rows, firsts, counts, token_ids, origins, strict=True)
        ):
            end = at + count
            places = np.arange(first, first + count, dtype=np.int32)
            blocks = table.block_tables[row]
            buffers.positions[at:end] = places - origin
            buffers.slots[at:end] = blocks[places // size] * size + places % size
            buffers.token_ids[at:end] = tokens
            start, stop = origin // size, (first + count - 1) // size + 1
            buffers.block_tables[index, : stop - start] = blocks[start:stop]
            buffers.seq_lens[index] = first + count - origin
            at = buffers.query_start_loc[index + 1] = end
        buffers.num_requests[0] = len(rows)
        assert at <= self.max_num_tokens
        self.num_tokens = at
        self._rows = np.asarray(rows, np.int64)
        self._lasts = np.asarray(firsts, np.int64) + np.asarray(counts) - 1
        self._starts = np.asarray(origins, np.int64) // size

    def advance(self, token_ids: Sequence[int]) -> None:
        """For the same requests the place behind their last, with a token each."""
        buffers, size, num = self.buffers, self._table.block_size, len(self._rows)
        self._lasts = places = self._lasts + 1
        numbers = places // size
        blocks = self._table.block_tables[self._rows, numbers]
        numbers -= self._starts
        buffers.positions[:num] = places - self._starts * size
        buffers.slots[:num] = blocks * size + places % size
        buffers.token_ids[:num] = token_ids
        buffers.block_tables[self._order[:num], numbers] = blocks
        buffers.seq_lens[:num] += 1
        if self.num_tokens != num:
            buffers.query_start_loc[: num + 1] = self._order[: num + 1]
            self.num_tokens = num

    def run(self, replays: ForwardReplays, *, has_logits: bool) -> tuple[Tensor, Tensor | None]:
        """The pass that was written, as `ForwardReplays.run`."""
        found = replays.replay(self.num_tokens, has_logits=has_logits)
        if found is not None:
            return found
        token_ids, attn = self.buffers.of_batch(
            num_tokens=self.num_tokens, num_requests=len(self._rows)
        )
        return replays.run(token_ids, attn, has_logits=has_logits)

    def usual(self) -> Iterator[bool]:
        """Writes passes of the usual numbers of tokens over the first block, each as often as it
        takes to have it recorded; whether each of the tokens is a request's last."""
        for size in USUAL:
            kinds = ((1,) * size, (size,)) if size <= self.buffers.max_num_seqs else ((size,),)
            for counts in dict.fromkeys(kinds):
                for _ in range(2):
                    self.write(
                        [0] * len(counts),
                        firsts=[0] * len(counts),
                        counts=counts,
                        token_ids=[[0] * count for count in counts],
                        origins=[0] * len(counts),
                    )
                    yield len(counts) == size
