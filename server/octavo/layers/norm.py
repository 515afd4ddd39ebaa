"""Root-mean-square normalisation. Knows its weight; the platform computes."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.layers.slot import WeightSlot, vector_slot
from octavo.platforms.base import Platform


class RMSNorm:
    """``x / rms(x) * weight`` over the last dimension; the weight is [D]."""

    def __init__(self, size: int, *, eps: float, platform: Platform, dtype: torch.dtype) -> None:
        self.weight = platform.vector(size, dtype=dtype, value=1.0)
        self.eps = eps
        self._run = platform.rms_norm

    def __call__(self, x_TD: Tensor, *, out: Tensor | None = None) -> Tensor:
        """[T, D] -> [T, D], into out if given."""
        return self._run(x_TD, self.weight, eps=self.eps, out=out)

    @property
    def num_bytes(self) -> int:
        return self.weight.nbytes

    def slots(self, name: str) -> dict[str, WeightSlot]:
        return {f"{name}.weight": vector_slot(self.weight, kind="norm")}
