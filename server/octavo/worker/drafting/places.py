"""Packs places of requests for a pass of what drafts. Knows the request table and its blocks.

A request's K/V lie in its own blocks, in caches of what drafts. A sequence may begin at a later
block than the request: then positions and lengths count from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from octavo.attention.base import AttentionMetadata
from octavo.worker.input_batch import StepBuffers
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

    def write(
        self,
        rows: Sequence[int],
        *,
        firsts: Sequence[int],
        counts: Sequence[int],
        token_ids: Sequence[Ints] | Sequence[Sequence[int]],
        origins: Sequence[int],
    ) -> tuple[Tensor, AttentionMetadata]:
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
        return buffers.of_batch(num_tokens=at, num_requests=len(rows))

    def usual(self) -> Iterator[tuple[Tensor, AttentionMetadata, bool]]:
        """Passes of the usual numbers of tokens over the first block, each as often as it takes
        to have it recorded; whether they have logits."""
        for size in USUAL:
            kinds = ((1,) * size, (size,)) if size <= self.buffers.max_num_seqs else ((size,),)
            for counts in dict.fromkeys(kinds):
                for _ in range(2):
                    token_ids, attn = self.write(
                        [0] * len(counts),
                        firsts=[0] * len(counts),
                        counts=counts,
                        token_ids=[[0] * count for count in counts],
                        origins=[0] * len(counts),
                    )
                    yield token_ids, attn, len(counts) == size
