"""Linear maps with packed weights. Knows the matmul kernel; knows nothing of models."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from octavo.layers.slot import WeightSlot, vector_slot
from octavo_kernels.matmul import PackedWeight, matmul, pack_rows_


class Linear:
    """``y = x W^T + b`` whose rows are several checkpoint tensors stacked: q, k and v, say.

    ``parts``: checkpoint name -> output features, in order of the output. A bias is float32
    whatever the weights are.
    """

    def __init__(
        self, in_features: int, *, parts: Mapping[str, int], bias: bool, dtype: torch.dtype
    ) -> None:
        self.in_features = in_features
        self.parts = dict(parts)
        out_features = sum(self.parts.values())
        self.weight = PackedWeight.empty(out_features, in_features, dtype=dtype)
        self.bias = torch.zeros(out_features) if bias else None

    def __call__(self, x_TD: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """[T, D] float32 -> [T, out] float32, plus ``residual`` [T, out]."""
        return matmul(x_TD, self.weight, bias=self.bias, residual=residual)

    def slots(self, prefix: str) -> dict[str, WeightSlot]:
        """Checkpoint name -> slot, as ``{prefix}{part}.weight`` and ``.bias``."""
        slots: dict[str, WeightSlot] = {}
        offset = 0
        for name, size in self.parts.items():
            slots[f"{prefix}{name}.weight"] = packed_slot(self.weight, offset=offset, size=size)
            if self.bias is not None:
                slots[f"{prefix}{name}.bias"] = vector_slot(
                    self.bias, kind="bias", offset=offset, size=size
                )
            offset += size
        return slots


def packed_slot(weight: PackedWeight, *, offset: int = 0, size: int | None = None) -> WeightSlot:
    """Slot of rows ``[offset, offset + size)`` of a packed weight (all of them by default)."""

    def write(rows: Tensor, start: int) -> None:
        pack_rows_(weight, rows, start=offset + start)

    return WeightSlot(shape=(weight.n if size is None else size, weight.k), write=write)
