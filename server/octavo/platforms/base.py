"""What layers ask of the device they run on. Knows shapes; computes nothing.

A platform makes weights in the form its kernels read, and runs the few ops around them. Layers and
models are written once against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from octavo.attention.base import AttentionBackend


class Weight(Protocol):
    """A matrix [N, K] in the form one platform multiplies with. Filled by rows, in any order."""

    @property
    def n(self) -> int: ...

    @property
    def k(self) -> int: ...

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""

    @property
    def block_kinds(self) -> tuple[str, ...]:
        """The kinds of a GGUF file's blocks that `write` takes, such as q4_1."""

    def write(self, rows: Tensor, start: int) -> None:
        """Sets rows [start, start + len(rows)) from [n, K] of any float dtype, on the CPU or the
        platform's device, or from a file's blocks of its kinds, [n, bytes of a row] uint8.
        Threads may write different rows at once."""

    def linear(
        self, x: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """[T, K] -> [T, N] of x's dtype: x W^T + bias [N] + residual [T, N]."""

    def gated(self, x: Tensor, *, bias: Tensor | None = None) -> Tensor:
        """[T, K] -> [T, N / 2]: silu(first half of the product) * second half."""

    def gated_then(
        self,
        down: Weight,
        x: Tensor,
        *,
        bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """[T, K] -> [T, down.n]: ``down.linear`` of what `gated` gives, which need not be made."""

    def logits(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """[S, K] -> [S, N] float32. Of a `Platform.table` alone."""

    def rows(self, ids: Tensor) -> Tensor:
        """Rows ids [T] (int32 or int64), as activations: [T, K]. Of a `Platform.table` alone."""


class Platform(Protocol):
    """Kernels of one kind of device."""

    @property
    def device(self) -> torch.device: ...

    @property
    def attention(self) -> AttentionBackend: ...

    def weight(self, n: int, k: int, *, dtype: torch.dtype, names: Sequence[str] = ()) -> Weight:
        """A matrix, not filled, for linear and gated products.

        ``names``: the checkpoint's tensors that it stacks, for a platform that keeps some in a
        form of their own."""

    def table(self, n: int, k: int, *, dtype: torch.dtype, names: Sequence[str] = ()) -> Weight:
        """A matrix, not filled, of one row per token: read by id, or multiplied into logits."""

    def vector(self, size: int, *, dtype: torch.dtype, value: float = 0.0) -> Tensor:
        """A bias or norm weight [size] for activations that go with weights of dtype."""

    def rms_norm(
        self, x: Tensor, weight: Tensor, *, eps: float, out: Tensor | None = None
    ) -> Tensor:
        """x / rms(x) * weight over the last dimension, [T, D] -> [T, D], into out if given."""

    def copy_rows(self, x: Tensor, *, out: Tensor) -> None:
        """out = x, activations [T, D] to float32; rows of both may lie apart."""

    def side_by_side(self, a: Tensor, b: Tensor) -> Tensor:
        """Activations [T, D] and [T, E] -> [T, D + E]."""
