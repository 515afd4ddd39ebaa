"""The CPU: packed weights and float32 activations. Knows its kernels, no layer.

Every method is one call of a kernel: a decode step makes hundreds of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.attention.cpu import CPUAttention
from octavo.platforms.base import Weight
from octavo.platforms.quantization import Quantization
from octavo_kernels import memory
from octavo_kernels.matmul import PackedWeight, gather_rows, matmul, pack_rows_
from octavo_kernels.quant_matmul.block_packed import BlockWeight, write_blocks, write_rows
from octavo_kernels.quant_matmul.blocks import Kind, gated_blocks, gated_rows, matmul_blocks
from octavo_kernels.quant_matmul.blocks import gather_rows as gather_block_rows
from octavo_kernels.quant_matmul.cpu_blocks_tile import FILED
from octavo_kernels.rms_norm import rms_norm
from octavo_kernels.row_copy import row_copy
from octavo_kernels.silu_mul import silu_mul


class CPUWeight:
    """`Weight` as panels; activations are float32 whatever its dtype."""

    block_kinds: tuple[str, ...] = ()

    def __init__(self, packed: PackedWeight) -> None:
        self._packed = packed
        self.n, self.k, self.num_bytes = packed.n, packed.k, packed.num_bytes

    def write(self, rows: Tensor, start: int) -> None:
        pack_rows_(self._packed, rows, start=start)

    def linear(
        self, x: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        return matmul(x, self._packed, bias=bias, residual=residual)

    def gated(self, x: Tensor, *, bias: Tensor | None = None) -> Tensor:
        return silu_mul(matmul(x, self._packed, bias=bias))

    def gated_then(
        self,
        down: Weight,
        x: Tensor,
        *,
        bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        hidden = self.gated(x, bias=bias)
        return down.linear(hidden, bias=down_bias, residual=residual)

    def logits(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        return matmul(x, self._packed, out=out)

    def rows(self, ids: Tensor) -> Tensor:
        return gather_rows(self._packed, ids)


class CPUBlockWeight:
    """`Weight` as codes of 4 or 8 bits with a scale for every 32 or 64 of a row; activations get 8
    bits likewise on their way in. (One scale a row, and one a token, cost SmolLM2 3 % of
    perplexity; one a row alone 0.6 %, mostly of `down`.)
    """

    def __init__(self, packed: BlockWeight) -> None:
        self._packed = packed
        self.n, self.k, self.num_bytes = packed.n, packed.k, packed.num_bytes
        self.block_kinds = FILED if packed.kind == "q8_64" else (packed.kind,)

    def write(self, rows: Tensor, start: int) -> None:
        write = write_blocks if rows.dtype == torch.uint8 else write_rows
        write(self._packed, rows, start=start)

    def linear(
        self, x: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        return matmul_blocks(x, self._packed, bias=bias, residual=residual)

    def gated(self, x: Tensor, *, bias: Tensor | None = None) -> Tensor:
        if bias is not None:
            return silu_mul(matmul_blocks(x, self._packed, bias=bias))
        return gated_blocks(x, self._packed)

    def gated_then(
        self,
        down: Weight,
        x: Tensor,
        *,
        bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        if bias is None and isinstance(down, CPUBlockWeight):
            packed = down._packed
            rows = gated_rows(x, self._packed, kind=packed.kind)
            return matmul_blocks(rows, packed, bias=down_bias, residual=residual)
        hidden = self.gated(x, bias=bias)
        return down.linear(hidden, bias=down_bias, residual=residual)

    def logits(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        return matmul_blocks(x, self._packed, out=out)

    def rows(self, ids: Tensor) -> Tensor:
        return gather_block_rows(self._packed, ids)


class CPUPlatform:
    """`Platform` of the CPU. A row's bits depend on that row alone.

    ``quantization`` says which matrices are blocks: those it does not quantise have their dtype.
    """

    def __init__(self, quantization: Quantization | None = None) -> None:
        self.device = torch.device("cpu")
        self.attention = CPUAttention()
        self._quantization = quantization or Quantization()
        self._kinds: dict[Kind, None] = {}
        self._changed: list[str] = []

    @property
    def block_kinds(self) -> tuple[Kind, ...]:
        """Of the matrices made so far."""
        return tuple(self._kinds)

    @property
    def changed(self) -> tuple[str, ...]:
        """Matrices made so far that could not be kept as their file has them: ``name (type)``."""
        return tuple(self._changed)

    def weight(
        self, n: int, k: int, *, dtype: torch.dtype, names: Sequence[str] = ()
    ) -> CPUWeight | CPUBlockWeight:
        return self._matrix(n, k, dtype=dtype, names=names)

    def table(
        self, n: int, k: int, *, dtype: torch.dtype, names: Sequence[str] = ()
    ) -> CPUWeight | CPUBlockWeight:
        return self._matrix(n, k, dtype=dtype, names=names, is_table=True)

    def _matrix(
        self,
        n: int,
        k: int,
        *,
        dtype: torch.dtype,
        names: Sequence[str],
        is_table: bool = False,
    ) -> CPUWeight | CPUBlockWeight:
        kind = self._quantization.kind(names, is_table=is_table)
        if kind is None:
            return CPUWeight(PackedWeight.empty(n, k, dtype=dtype))
        self._kinds[kind] = None
        self._changed += self._quantization.changed(names, kind=kind)
        return CPUBlockWeight(BlockWeight.empty(kind, n, k))

    def vector(self, size: int, *, dtype: torch.dtype, value: float = 0.0) -> Tensor:
        """float32, as the activations are."""
        return torch.full((size,), value)

    def rms_norm(
        self, x: Tensor, weight: Tensor, *, eps: float, out: Tensor | None = None
    ) -> Tensor:
        return rms_norm(x, weight, eps=eps, out=out)

    def copy_rows(self, x: Tensor, *, out: Tensor) -> None:
        row_copy(x, out=out)

    def side_by_side(self, a: Tensor, b: Tensor) -> Tensor:
        (num_rows, size), other = a.shape, b.shape[1]
        both = memory.empty((num_rows, size + other))
        row_copy(a, out=both[:, :size])
        row_copy(b, out=both[:, size:])
        return both
