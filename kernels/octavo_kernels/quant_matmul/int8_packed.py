"""An int8 weight in the CPU kernels' panels and ways in and out of it; knows no arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo_kernels.matmul.packed import weight_zeros
from octavo_kernels.quant_matmul.cpu_dot import PATHS, CpuPath, host_path
from octavo_kernels.quant_matmul.cpu_int8_tile import PANEL_WIDTH

# Products of codes up to 127 * 128 stay within int32 up to here.
MAX_K = 131_072
_ROWS_AT_ONCE = 4096  # quantised together: bounds the temporaries of a large head


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

        Raises ValueError for sizes below 1, k above MAX_K or an odd n where gated.
        """
        path = path or host_path()
        if n < 1 or not 1 <= k <= MAX_K or (is_gated and n % 2):
            raise ValueError(
                f"an int8 weight needs n >= 1 (even where gated) and k in 1..{MAX_K}, got n={n},"
                f" k={k}"
            )
        if path not in PATHS:
            raise ValueError(f"the path is one of {', '.join(PATHS)}, got {path!r}")
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

    def _views(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Codes [P, Q, width, 4], scales and sums [P, width] of each matrix."""
        parts = (self.data, self.scale, self.base)
        if not self.is_gated:
            return [parts]
        gate, up = ([part[half::2] for part in parts] for half in (0, 1))
        return [(gate[0], gate[1], gate[2]), (up[0], up[1], up[2])]


def quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n, K] of any float dtype -> codes [n, K] int8 in -127..127 and scales [n] float32.

    Symmetric: the largest magnitude of a row becomes 127. Raises ValueError for NaN and infinity.
    """
    wide = rows.to(torch.float32)
    biggest = torch.maximum(wide.amax(1), -wide.amin(1))
    if not bool(biggest.isfinite().all()):
        row = int((~biggest.isfinite()).nonzero()[0])
        raise ValueError(f"a weight to quantise must be finite, row {row} is not")
    # A row of zeros, or all but, keeps codes of zero and a scale that can be inverted.
    scale = (biggest / torch.full_like(biggest, 127.0)).clamp(min=1e-36)
    return (wide / scale[:, None]).round_().to(torch.int8), scale


def write_rows(
    weight: Int8Weight, rows: Tensor, *, start: int, scale: Tensor | None = None
) -> None:
    """Writes rows [n', K] as rows start..start + n' of the weight; any start is allowed.

    Rows are floats of any type, quantised here, or int8 codes with scales [n'] of any float type.
    Raises ValueError for other shapes or types.
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
        part = rows[first : first + _ROWS_AT_ONCE]
        if scale is None:
            codes, scales = quantise_rows(part)
        else:
            codes, scales = part, scale[first : first + _ROWS_AT_ONCE].to(torch.float32)
        _write_codes(weight, codes, scales, start + first)


def _write_codes(weight: Int8Weight, codes: Tensor, scales: Tensor, start: int) -> None:
    quads = weight.data.shape[1]
    whole = torch.nn.functional.pad(codes, (0, 4 * quads - weight.k))
    whole = whole.view(-1, quads, 4)
    sums = codes.sum(1, dtype=torch.int32)
    views, width = weight._views(), weight.data.shape[2]
    for half, panels, columns, done in _runs(weight, start, codes.shape[0]):
        data, scale, base = views[half]
        size = len(range(weight.data.shape[0])[panels]) * len(range(width)[columns])
        took = slice(done, done + size)
        shape = (-1, len(range(width)[columns]))
        data[panels, :, columns] = whole[took].view(*shape, quads, 4).transpose(1, 2)
        scale[panels, columns] = scales[took].view(shape)
        base[panels, columns] = sums[took].view(shape) * -128


def _runs(weight: Int8Weight, start: int, count: int) -> Iterator[tuple[int, slice, slice, int]]:
    """Rows start..start + count as (matrix, its panels, their columns, rows before these)."""
    width, done = weight.data.shape[2], 0
    rows_each = weight.n // 2 if weight.is_gated else weight.n
    while done < count:
        half, row = divmod(start + done, rows_each)
        panel, column = divmod(row, width)
        left = min(count - done, rows_each - row)
        if column == 0 and left >= width:
            panels = left // width
            yield half, slice(panel, panel + panels), slice(0, width), done
            done += panels * width
        else:
            size = min(width - column, left)
            yield half, slice(panel, panel + 1), slice(column, column + size), done
            done += size


def codes_of(weight: Int8Weight) -> tuple[Tensor, Tensor]:
    """Codes [N, K] int8 and scales [N] float32, as they were written."""
    rows_each = weight.n // 2 if weight.is_gated else weight.n
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
