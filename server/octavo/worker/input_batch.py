"""Packs a step's tokens into tensors. Knows the request table; knows no model and no sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.attention.base import AttentionMetadata
from octavo.worker.request_table import RequestTable

_NO_DRAFTS: Mapping[str, Sequence[int]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class InputBatch:
    """The tokens of R requests, packed one request after the other (T in all)."""

    request_ids: tuple[str, ...]
    rows: npt.NDArray[np.int64]  # [R] of the request table
    num_scheduled: npt.NDArray[np.int32]  # [R] tokens that are known, without drafts
    token_ids: Tensor  # [T] int32
    attn: AttentionMetadata
    # Of each token after which one is drawn, a request's side by side: the request's index, the
    # drafts up to it, and its place in [0, T). The first is the request's last known token.
    samples: npt.NDArray[np.int64]  # [S]
    sample_depths: npt.NDArray[np.int32]  # [S]
    sample_tokens: npt.NDArray[np.int32]  # [S]
    has_drafts: bool = False


class StepBuffers:
    """Where the inputs of every step are written, so that recorded launches find them.

    A step's tensors are views of these, valid until the next step is built.
    """

    def __init__(self, table: RequestTable, *, max_num_tokens: int) -> None:
        max_num_seqs, max_blocks = table.block_tables.shape
        self.max_num_tokens, self.max_num_seqs = max_num_tokens, max_num_seqs
        self._token_ids = torch.zeros(max_num_tokens, dtype=torch.int32)
        self._positions = torch.zeros(max_num_tokens, dtype=torch.int32)
        self._slots = torch.zeros(max_num_tokens, dtype=torch.int32)
        self._block_tables = torch.zeros(max_num_seqs, max_blocks, dtype=torch.int32)
        self._query_start_loc = torch.zeros(max_num_seqs + 1, dtype=torch.int32)
        self._seq_lens = torch.zeros(max_num_seqs, dtype=torch.int32)
        self._num_requests = torch.zeros(1, dtype=torch.int64)
        # numpy's views of the same memory, which are quicker to write through.
        self.token_ids = self._token_ids.numpy()
        self.positions = self._positions.numpy()
        self.slots = self._slots.numpy()
        self.block_tables = self._block_tables.numpy()
        self.query_start_loc = self._query_start_loc.numpy()
        self.seq_lens = self._seq_lens.numpy()
        self.num_requests = self._num_requests.numpy()

    def of_batch(self, *, num_tokens: int, num_requests: int) -> tuple[Tensor, AttentionMetadata]:
        """Token ids [T] and metadata of the batch that lies here."""
        attn = AttentionMetadata(
            positions=self._positions[:num_tokens],
            slots=self._slots[:num_tokens],
            block_tables=self._block_tables[:num_requests],
            query_start_loc=self._query_start_loc[: num_requests + 1],
            seq_lens=self._seq_lens[:num_requests],
        )
        return self._token_ids[:num_tokens], attn

    def of_any_batch(self, num_tokens: int) -> tuple[Tensor, AttentionMetadata]:
        """The same for whatever batch of so many tokens will lie here when kernels look."""
        attn = AttentionMetadata(
            positions=self._positions[:num_tokens],
            slots=self._slots[:num_tokens],
            block_tables=self._block_tables,
            query_start_loc=self._query_start_loc,
            seq_lens=self._seq_lens,
            num_requests=self._num_requests,
        )
        return self._token_ids[:num_tokens], attn


def build_input_batch(
    table: RequestTable,
    *,
    buffers: StepBuffers,
    request_ids: Sequence[str],
    num_scheduled_tokens: Sequence[int],
    drafts: Mapping[str, Sequence[int]] = _NO_DRAFTS,
) -> InputBatch:
    """The batch of these requests, each at its next ``num_scheduled_tokens`` tokens (all > 0).

    ``drafts`` come behind a request's last known token, and are written into the table there.
    It lies in the buffers: a batch built earlier is no more.
    """
    rows = table.rows(request_ids)
    num_known = counts = np.asarray(num_scheduled_tokens, np.int32)
    if drafts:
        num_drafts = np.asarray([len(drafts.get(name, ())) for name in request_ids], np.int32)
        counts = num_known + num_drafts
        table.write_drafts(drafts)
    num_requests, num_tokens = len(rows), int(counts.sum())
    assert num_requests <= buffers.max_num_seqs and num_tokens <= buffers.max_num_tokens
    computed = table.num_computed_tokens[rows]
    seq_lens = np.add(computed, counts, out=buffers.seq_lens[:num_requests])
    known = table.num_tokens[rows]
    last_known = computed + num_known
    assert (num_known > 0).all() and (last_known <= known).all(), "scheduled past the known tokens"
    starts = buffers.query_start_loc[: num_requests + 1]
    np.cumsum(counts, out=starts[1:])
    positions = buffers.positions[:num_tokens]
    if num_tokens == num_requests:  # one token each, as in most steps
        row_of_token = rows
        positions[:] = computed
    else:
        row_of_token = np.repeat(rows, counts)
        # Position of token t of request r: computed[r] + t - starts[r].
        positions[:] = np.arange(num_tokens, dtype=np.int32)
        positions += np.repeat(computed - starts[:-1], counts)
    block_size = table.block_size
    blocks, offsets = np.divmod(positions, np.int32(block_size))
    buffers.slots[:num_tokens] = table.block_tables[row_of_token, blocks] * block_size + offsets
    buffers.token_ids[:num_tokens] = table.token_ids[row_of_token, positions]
    max_blocks = -(-int(seq_lens.max()) // block_size)
    assert (-(-seq_lens // block_size) <= table.num_blocks[rows]).all(), "tokens without a block"
    buffers.block_tables[:num_requests, :max_blocks] = table.block_tables[rows, :max_blocks]
    buffers.num_requests[0] = num_requests
    token_ids, attn = buffers.of_batch(num_tokens=num_tokens, num_requests=num_requests)
    samples = np.flatnonzero(last_known == known)
    depths = np.zeros(len(samples), np.int32)
    if drafts:
        each = 1 + num_drafts[samples]
        first = np.cumsum(each) - each
        samples = np.repeat(samples, each)
        depths = np.arange(len(samples), dtype=np.int32) - np.repeat(first, each).astype(np.int32)
    return InputBatch(
        request_ids=tuple(request_ids),
        rows=rows,
        num_scheduled=num_known,
        token_ids=token_ids,
        attn=attn,
        samples=samples,
        sample_depths=depths,
        sample_tokens=starts[samples] + num_known[samples] - 1 + depths,
        has_drafts=bool(drafts),
    )
