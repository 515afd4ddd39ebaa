"""Packs places of requests for a pass of what drafts. Knows the request table and its blocks.

A request's K/V lie in its own blocks, in caches of what drafts. A sequence may begin at a later
block than the request: then positions and lengths count from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from octavo.models.base import Pass
from octavo.worker.input_batch import StepBuffers
from octavo.worker.replays import ForwardReplays
from octavo.worker.request_table import RequestTable
from octavo_kernels.drafting import cpu as drafting

MAX_JOBS = 16  # requests in a pass
MAX_FOLLOWING = 64  # places behind those of a pass that further ones may add
# Numbers of tokens that passes will often have: of one request, and of as many.
USUAL = range(1, 9)
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Following:
    """Memory through which passes of a head follow each other."""

    token_ids: Tensor  # [V'] int32: tokens that columns of logits stand for
    features: Tensor  # [MAX_JOBS, D] of the next pass
    probs: Tensor  # [MAX_JOBS] of its tokens


class Places:
    """Buffers of passes of at most ``max_num_tokens`` tokens of at most `MAX_JOBS` requests."""

    def __init__(self, table: RequestTable, *, max_num_tokens: int) -> None:
        self._table = table
        self.max_num_tokens = max_num_tokens
        self.buffers = StepBuffers(table, max_num_tokens=max_num_tokens)
        self.num_tokens = 0  # of the pass that was written last
        self.num_requests = 0

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
            # And the blocks of places that may follow.
            start, stop = origin // size, (first + count - 1 + MAX_FOLLOWING) // size + 1
            known = blocks[start:stop]
            buffers.block_tables[index, : len(known)] = known
            buffers.seq_lens[index] = first + count - origin
            at = buffers.query_start_loc[index + 1] = end
        buffers.num_requests[0] = len(rows)
        assert at <= self.max_num_tokens
        self.num_tokens = at
        self.num_requests = len(rows)

    def follow(self, logits: Tensor, hidden: Tensor, *, following: Following) -> None:
        """One launch, which a recording replays: the likeliest token of each request, behind its
        last place, is the next pass, its row of hidden [T, D] that pass's feature."""
        buffers = self.buffers
        drafting.follow(
            1, logits.data_ptr(), logits.shape[1], following.token_ids.data_ptr(),
            hidden.data_ptr(), following.features.data_ptr(), 4 * hidden.shape[1],
            buffers.num_requests.ctypes.data, buffers.query_start_loc.ctypes.data,
            buffers.token_ids.ctypes.data, buffers.positions.ctypes.data,
            buffers.slots.ctypes.data, buffers.block_tables.ctypes.data,
            buffers.block_tables.strides[0], self._table.block_size,
            buffers.seq_lens.ctypes.data, following.probs.data_ptr(),
        )  # fmt: skip

    def shrink(self) -> None:
        """Of the pass's tokens each request's last alone are the rows that `follow` gets."""
        num = self.num_requests
        self.buffers.query_start_loc[: num + 1] = np.arange(num + 1)

    def go_on(self, token_ids: Sequence[int]) -> None:
        """The pass that `follow` left, with these tokens."""
        num = self.num_tokens = self.num_requests
        self.buffers.token_ids[:num] = token_ids

    def run(self, replays: ForwardReplays, *, has_logits: bool) -> tuple[Tensor, Tensor | None]:
        """The pass that was written, as `ForwardReplays.run`."""
        found = replays.replay(self.num_tokens, has_logits=has_logits)
        if found is not None:
            return found
        token_ids, attn = self.buffers.of_batch(
            num_tokens=self.num_tokens, num_requests=self.num_requests
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


class FollowedPass:
    """`Pass` of a head that leaves the next pass behind: see `Places.follow`."""

    def __init__(self, inner: Pass, *, places: Places, following: Following) -> None:
        self._inner, self._places, self._following = inner, places, following
        self.forward = inner.forward

    def compute_logits(self, hidden: Tensor) -> Tensor:
        logits = self._inner.compute_logits(hidden)
        self._places.follow(logits, hidden, following=self._following)
        return logits
