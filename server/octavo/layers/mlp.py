"""The gated feed-forward network of one decoder layer. Knows its kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.layers.linear import Linear
from octavo.layers.slot import WeightSlot
from octavo_kernels.silu_mul import silu_mul


class GatedMLP:
    """``down(silu(gate(x)) * up(x))`` with gate and up in one projection."""

    def __init__(
        self, hidden_size: int, *, intermediate_size: int, bias: bool, dtype: torch.dtype
    ) -> None:
        self.gate_up = Linear(
            hidden_size,
            parts={"gate_proj": intermediate_size, "up_proj": intermediate_size},
            bias=bias,
            dtype=dtype,
        )
        self.down = Linear(
            intermediate_size, parts={"down_proj": hidden_size}, bias=bias, dtype=dtype
        )

    def __call__(self, x_TD: Tensor, *, residual: Tensor) -> Tensor:
        """[T, D] float32 -> residual + the network's output, [T, D] float32."""
        return self.down(silu_mul(self.gate_up(x_TD)), residual=residual)

    def slots(self, prefix: str) -> dict[str, WeightSlot]:
        return {**self.gate_up.slots(prefix), **self.down.slots(prefix)}
