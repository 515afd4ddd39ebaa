"""Packs a step's tokens into tensors. Knows the request table; knows no model and no sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.attention.base import AttentionMetadata
from octavo.worker.request_table import RequestTable


@dataclass(frozen=True, slots=True, kw_only=True)
class InputBatch:
    """The tokens of R requests, packed one request after the other (T in all)."""

    request_ids: tuple[str, ...]
    rows: npt.NDArray[np.int64]  # [R] of the request table
    num_scheduled: npt.NDArray[np.int32]  # [R]
    token_ids: Tensor  # [T] int32
    attn: AttentionMetadata
    samples: npt.NDArray[np.int64]  # [S] indices of requests whose known tokens end in this step

    @property
    def last_tokens(self) -> npt.NDArray[np.int32]:
        """[S] places in [0, T) of the tokens after which a token is drawn."""
        ends: npt.NDArray[np.int32] = self.attn.query_start_loc.numpy()[1:][self.samples] - 1
        return ends


def _tensor(values: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(values)


def build_input_batch(
    table: RequestTable, *, request_ids: Sequence[str], num_scheduled_tokens: Sequence[int]
) -> InputBatch:
    """The batch of these requests, each at its next ``num_scheduled_tokens`` tokens (all > 0)."""
    rows = table.rows(request_ids)
    counts = np.asarray(num_scheduled_tokens, np.int32)
    computed = table.num_computed_tokens[rows]
    seq_lens = computed + counts
    known = table.num_tokens[rows]
    assert (counts > 0).all() and (seq_lens <= known).all(), "scheduled past the known tokens"
    query_start_loc = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(counts, out=query_start_loc[1:])
    row_of_token = np.repeat(rows, counts)
    # Position of token t of request r: computed[r] + t - query_start_loc[r].
    positions = np.arange(query_start_loc[-1], dtype=np.int32)
    positions += np.repeat(computed - query_start_loc[:-1], counts)
    block_size = table.block_size
    blocks = table.block_tables[row_of_token, positions // block_size]
    max_blocks = -(-int(seq_lens.max()) // block_size)
    assert (-(-seq_lens // block_size) <= table.num_blocks[rows]).all(), "tokens without a block"
    return InputBatch(
        request_ids=tuple(request_ids),
        rows=rows,
        num_scheduled=counts,
        token_ids=_tensor(table.token_ids[row_of_token, positions]),
        attn=AttentionMetadata(
            positions=_tensor(positions),
            slots=_tensor(blocks * np.int32(block_size) + positions % np.int32(block_size)),
            block_tables=_tensor(table.block_tables[rows, :max_blocks]),
            query_start_loc=_tensor(query_start_loc),
            seq_lens=_tensor(seq_lens),
        ),
        samples=np.flatnonzero(seq_lens == known),
    )
