"""Root-mean-square normalisation. Knows its kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.layers.slot import WeightSlot, vector_slot
from octavo_kernels.rms_norm import rms_norm


class RMSNorm:
    """``x / rms(x) * weight`` over the last dimension; the weight [D] is float32."""

    def __init__(self, size: int, *, eps: float) -> None:
        self.weight = torch.ones(size)
        self.eps = eps

    def __call__(self, x_TD: Tensor) -> Tensor:
        return rms_norm(x_TD, self.weight, eps=self.eps)

    def slots(self, name: str) -> dict[str, WeightSlot]:
        return {f"{name}.weight": vector_slot(self.weight, kind="norm")}
