"""Token embedding and output head. Knows the packed table, which the two may share."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.layers.linear import packed_slot
from octavo.layers.slot import WeightSlot
from octavo_kernels.matmul import PackedWeight, gather_rows, matmul


class TokenEmbedding:
    """Table of one vector per token; read by id on the way in, multiplied on the way out.

    A tied head is this same object, so the table is stored once, packed for the multiplication.
    """

    def __init__(self, vocab_size: int, *, hidden_size: int, dtype: torch.dtype) -> None:
        self.weight = PackedWeight.empty(vocab_size, hidden_size, dtype=dtype)

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """[T] int32 or int64 -> [T, D] float32."""
        return gather_rows(self.weight, token_ids_T)

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """[S, D] float32 -> [S, V] float32."""
        return matmul(hidden_SD, self.weight)

    def slots(self, name: str) -> dict[str, WeightSlot]:
        return {f"{name}.weight": packed_slot(self.weight)}
