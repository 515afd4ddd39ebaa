"""The gated feed-forward network of one decoder layer. Knows its projections."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.layers.linear import Linear
from octavo.layers.slot import WeightSlot
from octavo.platforms.base import Platform


class GatedMLP:
    """``down(silu(gate(x)) * up(x))`` with gate and up in one projection."""

    def __init__(
        self,
        hidden_size: int,
        *,
        prefix: str,
        intermediate_size: int,
        bias: bool,
        platform: Platform,
        dtype: torch.dtype,
    ) -> None:
        self.gate_up = Linear(
            hidden_size,
            prefix=prefix,
            parts={"gate_proj": intermediate_size, "up_proj": intermediate_size},
            bias=bias,
            platform=platform,
            dtype=dtype,
        )
        self.down = Linear(
            intermediate_size,
            prefix=prefix,
            parts={"down_proj": hidden_size},
            bias=bias,
            platform=platform,
            dtype=dtype,
        )

    def __call__(self, x_TD: Tensor, *, residual: Tensor) -> Tensor:
        """[T, D] -> residual + the network's output, [T, D]."""
        return self.gate_up.gated_then(self.down, x_TD, residual=residual)

    @property
    def num_bytes(self) -> int:
        return self.gate_up.num_bytes + self.down.num_bytes

    def slots(self) -> dict[str, WeightSlot]:
        return {**self.gate_up.slots(), **self.down.slots()}
