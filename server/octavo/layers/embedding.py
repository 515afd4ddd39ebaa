"""Token embedding and output head. Knows the table, which the two may share."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.layers.linear import matrix_slot
from octavo.layers.slot import WeightSlot
from octavo.platforms.base import Platform


class TokenEmbedding:
    """Table of one vector per token; read by id on the way in, multiplied on the way out.

    A tied head is this same object, so the table is stored once. In the checkpoint it is
    ``{name}.weight``.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        name: str,
        hidden_size: int,
        platform: Platform,
        dtype: torch.dtype,
    ) -> None:
        self._name = f"{name}.weight"
        self.weight = platform.table(vocab_size, hidden_size, dtype=dtype, names=[self._name])

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """[T] int32 or int64 -> [T, D]."""
        return self.weight.rows(token_ids_T)

    def logits(self, hidden_SD: Tensor, *, out: Tensor | None = None) -> Tensor:
        """[S, D] -> [S, V] float32, into out if given."""
        return self.weight.logits(hidden_SD, out=out)

    @property
    def num_bytes(self) -> int:
        return self.weight.num_bytes

    def slots(self) -> dict[str, WeightSlot]:
        return {self._name: matrix_slot(self.weight)}
