"""Linear maps of stacked checkpoint tensors. Knows weights, no kernel; nothing of models."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from octavo.layers.slot import WeightSlot, vector_slot
from octavo.platforms.base import Platform, Weight


class Linear:
    """``y = x W^T + b`` whose rows are several checkpoint tensors stacked: q, k and v, say.

    ``parts``: checkpoint name -> output features, in order of the output; in the checkpoint the
    names stand behind ``prefix``.
    """

    def __init__(
        self,
        in_features: int,
        *,
        prefix: str,
        parts: Mapping[str, int],
        bias: bool,
        platform: Platform,
        dtype: torch.dtype,
    ) -> None:
        self.in_features = in_features
        self.parts = {f"{prefix}{name}": size for name, size in parts.items()}
        out_features = sum(self.parts.values())
        self.weight = platform.weight(
            out_features,
            in_features,
            dtype=dtype,
            names=[f"{name}.weight" for name in self.parts],
        )
        self.bias = platform.vector(out_features, dtype=dtype) if bias else None

    def __call__(self, x_TD: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """[T, D] -> [T, out], plus ``residual`` [T, out]."""
        return self.weight.linear(x_TD, bias=self.bias, residual=residual)

    def gated_then(self, down: Linear, x_TD: Tensor, *, residual: Tensor) -> Tensor:
        """``down`` of `gated`, plus ``residual`` [T, down's out]."""
        return self.weight.gated_then(
            down.weight, x_TD, bias=self.bias, down_bias=down.bias, residual=residual
        )

    def gated(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, out / 2]: silu of the first half of the map times the second."""
        return self.weight.gated(x_TD, bias=self.bias)

    @property
    def num_bytes(self) -> int:
        return self.weight.num_bytes + (0 if self.bias is None else self.bias.nbytes)

    def slots(self) -> dict[str, WeightSlot]:
        """Checkpoint name -> slot, as ``{prefix}{part}.weight`` and ``.bias``."""
        slots: dict[str, WeightSlot] = {}
        offset = 0
        for name, size in self.parts.items():
            slots[f"{name}.weight"] = matrix_slot(self.weight, offset=offset, size=size)
            if self.bias is not None:
                slots[f"{name}.bias"] = vector_slot(
                    self.bias, kind="bias", offset=offset, size=size
                )
            offset += size
        return slots


def matrix_slot(weight: Weight, *, offset: int = 0, size: int | None = None) -> WeightSlot:
    """Slot of rows ``[offset, offset + size)`` of a weight (all of them by default)."""

    def write(rows: Tensor, start: int) -> None:
        weight.write(rows, offset + start)

    shape = (weight.n if size is None else size, weight.k)
    return WeightSlot(shape=shape, write=write, block_kinds=weight.block_kinds)
