"""An int8 weight in the CPU kernels' panels and ways in and out of it; knows no arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo_kernels.matmul.packed import weight_zeros
from octavo_kernels.parallel import num_threads
from octavo_kernels.quant_matmul.cpu_dot import CpuPath, host_path, supported_paths
from octavo_kernels.quant_matmul.cpu_int8 import row_bytes
from octavo_kernels.quant_matmul.cpu_int8_tile import PANEL_WIDTH
from octavo_kernels.quant_matmul.cpu_int8_write import write_codes, write_floats

# Products of codes up to 127 * 128 stay within int32 up to here.
MAX_K = 131_072
_ROWS_AT_ONCE = 1024  # widened together: bounds the temporaries of a large head
_ALONE = 30_000  # elements below which another thread is not worth waking


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Int8Weight:
    """A weight W [n, k]: w[r, i] = code * scale of the row, in panels of `width` rows.

    data[p, q, j, b] is the code of row `p * width + j` at k = 4 * q + b. A gated weight is two
    matrices of n / 2 rows, gate and up, whose panels take turns: gate 0, up 0, gate 1, ...
    Codes past n or k are zero.
    """

    data: Tensor  # [P, ceil(K / 4), width, 4] int8
    scale: Tensor  # [P, width] float32
    base: Tensor  # [P, width] int32: -128 * sum of the row's codes, since activations are + 128
    n: int
    k: int
    path: CpuPath
    is_gated: bool

    @staticmethod
    def empty(n: int, k: int, *, is_gated: bool = False, path: CpuPath | None = None) -> Int8Weight:
        """A weight of zeros, to be filled with `write_rows`; `path` is this machine's by default.

        Raises ValueError for sizes below 1, k above MAX_K, an odd n where gated or a path that
        this machine does not have.
        """
        path = path or host_path()
        if n < 1 or not 1 <= k <= MAX_K or (is_gated and n % 2):
            raise ValueError(
                f"an int8 weight needs n >= 1 (even where gated) and k in 1..{MAX_K}, got n={n},"
                f" k={k}"
            )
        if path not in supported_paths():
            have = ", ".join(supported_paths())
            raise ValueError(f"this machine's paths are {have}, got {path!r}")
        width, halves = PANEL_WIDTH[path], 2 if is_gated else 1
        panels = halves * -(-(n // halves) // width)
        return Int8Weight(
            data=weight_zeros((panels, -(-k // 4), width, 4), torch.int8),
            scale=torch.zeros(panels, width),
            base=torch.zeros(panels, width, dtype=torch.int32),
            n=n,
            k=k,
            path=path,
            is_gated=is_gated,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of codes, scales and sums."""
        return sum(part.nbytes for part in (self.data, self.scale, self.base))

    @property
    def rows_each(self) -> int:
        """Rows of each of its matrices."""
        return self.n // 2 if self.is_gated else self.n

    def _views(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Codes [P, Q, width, 4], scales and sums [P, width] of each matrix."""
        parts = (self.data, self.scale, self.base)
        if not self.is_gated:
            return [parts]
        gate, up = ([part[half::2] for part in parts] for half in (0, 1))
        return [(gate[0], gate[1], gate[2]), (up[0], up[1], up[2])]


def write_rows(
    weight: Int8Weight, rows: Tensor, *, start: int, scale: Tensor | None = None
) -> None:
    """Writes rows [n', K] as rows start..start + n' of the weight; any start is allowed.

    Rows are floats of any type, quantised symmetrically so that the largest magnitude of a row is
    127, or int8 codes with scales [n'] of any float type. Raises ValueError for other shapes or
    types, and for rows or scales that are not finite (which then are in the weight).
    """
    if rows.dim() != 2 or rows.shape[1] != weight.k:
        raise ValueError(f"rows to write must be [n, {weight.k}], got {list(rows.shape)}")
    count = rows.shape[0]
    if start < 0 or start + count > weight.n:
        raise ValueError(f"rows {start}..{start + count} do not fit a weight of {weight.n} rows")
    are_codes = rows.dtype == torch.int8
    if not (are_codes or rows.is_floating_point()) or are_codes != (scale is not None):
        raise ValueError(
            "rows to write are floats without scale or int8 with one, got"
            f" {rows.dtype} {'without' if scale is None else 'with'} scale"
        )
    if scale is not None and scale.shape != (count,):
        raise ValueError(f"scales of {count} rows must be [{count}], got {list(scale.shape)}")
    for first in range(0, count, _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        _write(weight, rows[part], None if scale is None else scale[part], start + first)
    _refuse_nan(weight, start, count)


def _refuse_nan(weight: Int8Weight, start: int, count: int) -> None:
    found = torch.cat([scale.reshape(-1)[: weight.rows_each] for _, scale, _ in weight._views()])
    finite = found[start : start + count].isfinite()
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise ValueError(f"a weight to write must be finite, row {row} of these is not")


def _write(weight: Int8Weight, rows: Tensor, scale: Tensor | None, start: int) -> None:
    count, k, width = rows.shape[0], weight.k, weight.data.shape[2]
    halves = 2 if weight.is_gated else 1
    parts = min(num_threads(), -(-count * k // _ALONE))
    scratch = torch.empty(parts * row_bytes(k), dtype=torch.uint8)
    places = [part.data_ptr() for part in (scratch, weight.data, weight.scale, weight.base)]
    sizes = (count, start, k, width, weight.rows_each, halves)
    if scale is not None:
        rows, scale = rows.contiguous(), scale.to(torch.float32).contiguous()
        write_codes(parts, rows.data_ptr(), scale.data_ptr(), *places, *sizes)
        return
    rows = rows.to(torch.float32).contiguous()
    write_floats(parts, rows.data_ptr(), *places, *sizes)


def codes_of(weight: Int8Weight) -> tuple[Tensor, Tensor]:
    """Codes [N, K] int8 and scales [N] float32, as they were written."""
    rows_each = weight.rows_each
    codes, scales = [], []
    for data, scale, _ in weight._views():
        flat = data.transpose(1, 2).reshape(scale.numel(), -1)
        codes.append(flat[:rows_each, : weight.k])
        scales.append(scale.reshape(-1)[:rows_each])
    return torch.cat(codes), torch.cat(scales)


def unpack(weight: Int8Weight) -> Tensor:
    """The weight the codes stand for, [N, K] float32."""
    codes, scale = codes_of(weight)
    return codes * scale[:, None]
