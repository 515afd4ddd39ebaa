"""One tensor that holds what a GPU knows of live requests, as named columns. Knows no meaning.

Being one tensor of words, any part of any column is written by the one kernel that scatters an
upload.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.worker.gpu.buffers import StepSizes, padded

_WORD_BYTES = 4


@dataclass(frozen=True, slots=True)
class Column:
    """One value per row, or a list of ``width`` values."""

    name: str
    dtype: torch.dtype  # of 4 or 8 bytes
    width: int = 0  # 0: one value, and the view is [N]

    @property
    def row_words(self) -> int:
        return max(self.width, 1) * self.dtype.itemsize // _WORD_BYTES


def request_columns(sizes: StepSizes) -> tuple[Column, ...]:
    """What the engine keeps of each live request.

    ``token_ids`` has room for a token drawn after a full context, which is dropped later.
    ``num_tokens`` counts prompt and output as far as the device has come: drawing a token appends
    it here without the host.
    """
    i32, f32 = torch.int32, torch.float32
    return (
        Column("token_ids", i32, sizes.max_model_len + 1),
        Column("block_tables", i32, sizes.max_blocks),
        Column("num_prompt_tokens", i32),
        Column("num_tokens", i32),
        Column("temperature", f32),
        Column("top_k", i32),
        Column("top_p", f32),
        Column("min_p", f32),
        Column("seeds", torch.int64),
        Column("repetition_penalty", f32),
        Column("frequency_penalty", f32),
        Column("presence_penalty", f32),
        Column("min_tokens", i32),
        # Of a batch's places and groups, not of rows: see `PrefixSharing`.
        Column("prefix_request_partitions", i32),
        Column("prefix_members", i32),
        Column("prefix_starts", i32),
        Column("prefix_partitions", i32),
    )


class RequestArena:
    """Columns of ``num_rows`` rows, each from a multiple of 16 bytes on, all zero at first."""

    def __init__(
        self, columns: Sequence[Column], *, num_rows: int, device: torch.device | str
    ) -> None:
        self.num_rows = num_rows
        self._columns = {column.name: column for column in columns}
        assert len(self._columns) == len(columns), "two columns of one name"
        self._starts: dict[str, int] = {}
        num_words = 0
        for column in columns:
            self._starts[column.name] = num_words
            num_words += padded(column.row_words * num_rows)
        assert num_words < 2**31, "places in the arena are 32-bit words"
        self.words = torch.zeros(num_words, dtype=torch.int32, device=device)

    @staticmethod
    def num_words(columns: Sequence[Column], *, num_rows: int) -> int:
        """Words of 4 bytes that such an arena takes."""
        return sum(padded(column.row_words * num_rows) for column in columns)

    def view(self, name: str) -> Tensor:
        """[N, width] of the column's dtype, or [N]; the same memory at every call."""
        column, start = self._columns[name], self._starts[name]
        flat = self.words[start : start + column.row_words * self.num_rows].view(column.dtype)
        return flat.view(self.num_rows, column.width) if column.width else flat

    def column(self, name: str) -> Column:
        return self._columns[name]

    def row_words(self, name: str) -> int:
        """Words from one row of a column to the next."""
        return self._columns[name].row_words

    def offset(self, name: str, row: int, *, start: int = 0) -> int:
        """Word of the arena at which value ``start`` of a row lies."""
        column = self._columns[name]
        assert 0 <= row < self.num_rows and 0 <= start < max(column.width, 1), (name, row, start)
        value_words = column.dtype.itemsize // _WORD_BYTES
        return self._starts[name] + row * column.row_words + start * value_words
