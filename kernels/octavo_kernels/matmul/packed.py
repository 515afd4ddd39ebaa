"""The panel layout of a weight and ways in and out of it; knows no arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import llvmlite.binding
import torch
from torch import Tensor

from octavo_kernels import huge_pages

PACKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@lru_cache(maxsize=1)
def panel_width() -> int:
    """Outputs per panel for this machine's vector registers: 48 with AVX-512, else 16."""
    try:
        features = llvmlite.binding.get_host_cpu_features()
    except RuntimeError:  # LLVM cannot tell on this system
        return 16
    return 48 if features.get("avx512f", False) else 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A weight W [n, k] as panels: data[p, i, j] = W[p * NR + j, i]; rows past n are zero."""

    data: Tensor  # [P, K, NR], float32, bfloat16 or float16
    n: int
    k: int

    @staticmethod
    def empty(n: int, k: int, *, dtype: torch.dtype) -> PackedWeight:
        """A weight of zeros, to be filled with `pack_rows_`.

        Raises ValueError for sizes below 1 or a dtype that has no panels.
        """
        if n < 1 or k < 1:
            raise ValueError(f"a packed weight needs n >= 1 and k >= 1, got n={n}, k={k}")
        if dtype not in PACKED_DTYPES:
            raise ValueError(f"a packed weight is one of {PACKED_DTYPES}, got {dtype}")
        width = panel_width()
        return PackedWeight(data=huge_pages.zeros((-(-n // width), k, width), dtype), n=n, k=k)

    @property
    def num_bytes(self) -> int:
        """Bytes the panels take."""
        return self.data.numel() * self.data.element_size()


def pack_rows_(packed: PackedWeight, weight_rows: Tensor, *, start: int) -> None:
    """Writes weight_rows [n', K], any float dtype, as rows start..start+n' of the weight.

    Any start is allowed, so that q, k and v (or gate and up) are packed one after the other. Works
    panel by panel: the temporary is one panel, and one transpose per run of whole panels.
    """
    rows, width = weight_rows.shape[0], packed.data.shape[2]
    if weight_rows.dim() != 2 or weight_rows.shape[1] != packed.k:
        raise ValueError(f"rows to pack must be [n, {packed.k}], got {tuple(weight_rows.shape)}")
    if start < 0 or start + rows > packed.n:
        raise ValueError(f"rows {start}..{start + rows} do not fit a weight of {packed.n} rows")
    done = 0
    while done < rows:
        panel, column = divmod(start + done, width)
        if column == 0 and rows - done >= width:
            panels = (rows - done) // width
            whole = weight_rows[done : done + panels * width].view(panels, width, packed.k)
            packed.data[panel : panel + panels].copy_(whole.transpose(1, 2))
            done += panels * width
        else:
            count = min(width - column, rows - done)
            packed.data[panel, :, column : column + count].copy_(weight_rows[done : done + count].T)
            done += count


def unpack(packed: PackedWeight) -> Tensor:
    """The weight [N, K] as float32."""
    panels, k, width = packed.data.shape
    flat = packed.data.transpose(1, 2).reshape(panels * width, k)
    return flat[: packed.n].to(torch.float32)
