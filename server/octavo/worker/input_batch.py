"""Packs a step's tokens into tensors. Knows the request table; knows no model and no sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.attention.base import AttentionMetadata
from octavo.worker.request_table import RequestTable
from octavo_kernels.step_inputs import BAD_COUNT, NO_BLOCK, fill_step

_NO_DRAFTS: Mapping[str, Sequence[int]] = {}


@dataclass(frozen=True, kw_only=True)  # no slots: `attn` is made when asked for
class InputBatch:
    """The tokens of R requests, packed one request after the other (T in all)."""

    request_ids: tuple[str, ...]
    rows: npt.NDArray[np.int64]  # [R] of the request table
    num_scheduled: npt.NDArray[np.int32]  # [R] tokens that are known, without drafts
    num_tokens: int  # T
    buffers: StepBuffers
    # Of each token after which one is drawn, a request's side by side: the request's index, the
    # drafts up to it, and its place in [0, T). The first is the request's last known token.
    samples: npt.NDArray[np.int64]  # [S]
    sample_depths: npt.NDArray[np.int32]  # [S]
    sample_tokens: npt.NDArray[np.int32]  # [S]
    has_drafts: bool = False

    @property
    def token_ids(self) -> Tensor:
        """[T] int32."""
        return self._inputs[0]

    @property
    def attn(self) -> AttentionMetadata:
        return self._inputs[1]

    @cached_property
    def _inputs(self) -> tuple[Tensor, AttentionMetadata]:
        """Made at the first look, as a pass that is replayed needs none."""
        num_requests = len(self.request_ids)
        return self.buffers.of_batch(num_tokens=self.num_tokens, num_requests=num_requests)


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
        # numpy's views of the same memory, for those who write single tokens.
        self.token_ids = self._token_ids.numpy()
        self.positions = self._positions.numpy()
        self.slots = self._slots.numpy()
        self.block_tables = self._block_tables.numpy()
        self.query_start_loc = self._query_start_loc.numpy()
        self.seq_lens = self._seq_lens.numpy()
        self.num_requests = self._num_requests.numpy()
        # Per token to draw after, and what `fill_step` found.
        self._samples = np.zeros(max_num_tokens, np.int64)
        self._sample_depths = np.zeros(max_num_tokens, np.int32)
        self._sample_tokens = np.zeros(max_num_tokens, np.int32)
        self._found = np.zeros(3, np.int64)
        # Addresses of what stays where it is, in the kernel's order.
        self._of_table = (
            *_address_and_stride(table.token_ids),
            *_address_and_stride(table.block_tables),
            table.num_tokens.ctypes.data,
            table.num_computed_tokens.ctypes.data,
            table.num_blocks.ctypes.data,
            table.block_size,
        )
        self._of_step = (
            self._token_ids.data_ptr(),
            self._positions.data_ptr(),
            self._slots.data_ptr(),
            *_address_and_stride(self.block_tables),
            self._query_start_loc.data_ptr(),
            self._seq_lens.data_ptr(),
            self._num_requests.data_ptr(),
            self._samples.ctypes.data,
            self._sample_depths.ctypes.data,
            self._sample_tokens.ctypes.data,
            self._found.ctypes.data,
        )
        self._table = table  # which owns the memory behind the addresses

    def fill(
        self,
        rows: npt.NDArray[np.int64],
        *,
        num_known: npt.NDArray[np.int32],
        counts: npt.NDArray[np.int32],
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Writes the batch of these rows; returns `InputBatch`'s samples, depths and tokens.

        They are of these buffers, too. num_known, counts: tokens of each row without drafts and
        with them, which fit the buffers.
        """
        fill_step.run_held(
            rows.ctypes.data, num_known.ctypes.data, counts.ctypes.data, len(rows),
            *self._of_table, *self._of_step,
        )  # fmt: skip
        drawn, status, _ = self._found.tolist()
        assert status != BAD_COUNT, "scheduled past the known tokens"
        assert status != NO_BLOCK, "tokens without a block"
        return self._samples[:drawn], self._sample_depths[:drawn], self._sample_tokens[:drawn]

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
    num_tokens = sum(num_scheduled_tokens) + sum(map(len, drafts.values()))
    assert len(rows) <= buffers.max_num_seqs and num_tokens <= buffers.max_num_tokens
    samples, depths, sample_tokens = buffers.fill(rows, num_known=num_known, counts=counts)
    return InputBatch(
        request_ids=tuple(request_ids),
        rows=rows,
        num_scheduled=num_known,
        num_tokens=num_tokens,
        buffers=buffers,
        samples=samples,
        sample_depths=depths,
        sample_tokens=sample_tokens,
        has_drafts=bool(drafts),
    )


def _address_and_stride(array: npt.NDArray[np.int32]) -> tuple[int, int]:
    return array.ctypes.data, array.strides[0]
