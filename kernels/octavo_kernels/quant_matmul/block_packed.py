"""Panels of 4- and 8-bit blocks, as GGUF files have them or not, and ways in and out.

Knows no arithmetic beyond what makes codes of floats. The panel's layout is told in
`cpu_blocks_tile`. Formats: `q4_0` (w = d (q - 8)), `q4_1` (w = d q + m) and `q8_0` (w = d q), in
blocks of 32 that files have too, and `q8_64` (w = d q) in blocks of 64; d and m are float16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo_kernels import huge_pages
from octavo_kernels.quant_matmul.cpu_blocks_tile import FILED, FILED_BLOCK, FORMATS, Kind
from octavo_kernels.quant_matmul.cpu_requantise import Source, requantise_kernel
from octavo_kernels.simd import LANES

_ROWS_AT_ONCE = 1024  # that are quantised together: bounds the temporaries
_HALF_MAX = 65504.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockWeight:
    """A weight W [n, k] in panels of 16 outputs; outputs past n and elements past k are zero.

    data: [ceil(n / 16), blocks of k, bytes of a block for 16 outputs] uint8.
    """

    kind: Kind
    data: Tensor
    n: int
    k: int

    @staticmethod
    def empty(kind: Kind, n: int, k: int) -> BlockWeight:
        """A weight of zeros, to be filled with `write_blocks` or `write_rows`.

        Raises ValueError for sizes below 1 or an unknown kind.
        """
        if kind not in FORMATS:
            raise ValueError(f"a weight of blocks is one of {', '.join(FORMATS)}, got {kind!r}")
        if n < 1 or k < 1:
            raise ValueError(f"a weight of blocks needs n >= 1 and k >= 1, got n={n}, k={k}")
        form = FORMATS[kind]
        shape = (-(-n // LANES), -(-k // form.block), form.panel_bytes)
        return BlockWeight(kind=kind, data=huge_pages.zeros(shape, torch.uint8), n=n, k=k)

    @property
    def num_bytes(self) -> int:
        """Bytes of codes, scales and minima."""
        return self.data.numel()


def write_blocks(weight: BlockWeight, rows: Tensor, *, start: int) -> None:
    """Writes a GGUF file's rows [n', bytes of a row] uint8 as rows start..start+n'.

    Lossless where the file's kind is the weight's; a weight of `q8_64` takes every kind of a file.
    Raises ValueError where a row is not whole blocks of a kind it takes, or rows do not fit.
    """
    blocks, left = divmod(weight.k, FILED_BLOCK)
    sizes = {blocks * FORMATS[kind].file_bytes: kind for kind in FILED}
    source = sizes.get(rows.shape[-1]) if rows.dim() == 2 and not left else None
    if rows.dtype != torch.uint8 or source is None or weight.kind not in (source, "q8_64"):
        takes = FILED if weight.kind == "q8_64" else (weight.kind,)
        most = f"{weight.k / FILED_BLOCK:g}"
        raise ValueError(
            f"{weight.kind} rows of {weight.k} elements are [n, {most} blocks of"
            f" {' or '.join(str(FORMATS[kind].file_bytes) for kind in takes)}] uint8, got"
            f" {rows.dtype} {list(rows.shape)}"
        )
    if weight.kind != source:
        _requantise(weight, rows, source, start)
        return
    form = FORMATS[source]
    pieces = rows.reshape(rows.shape[0], blocks, form.file_bytes)
    head = 2 * (1 + form.has_min)
    codes = pieces[:, :, head:].contiguous().view(torch.int32)
    if form.bits == 8:
        codes = codes ^ -0x7F7F7F80  # 0x80808080: int8 to codes + 128
    _place(weight, codes, pieces[:, :, :head].contiguous().view(torch.int16), start)


def _requantise(weight: BlockWeight, rows: Tensor, source: Source, start: int) -> None:
    """Rows of floats or of a file's blocks for a weight of `q8_64`."""
    _require_fit(weight, rows.shape[0], start)
    kept = rows.contiguous()
    # As one part: whoever loads a model does so in threads of its own.
    requantise_kernel(source)(
        1, kept.data_ptr(), weight.data.data_ptr(), start, kept.shape[0], weight.k
    )


def write_rows(weight: BlockWeight, rows: Tensor, *, start: int) -> None:
    """Quantises rows [n', K] of any float type as rows start..start+n' of the weight.

    Codes are nearest to the weights for the float16 scale (and minimum) that are kept. A block
    with a NaN or an infinity, or beyond float16, becomes NaN. Raises ValueError for a wrong shape.
    """
    if rows.dim() != 2 or rows.shape[1] != weight.k or not rows.is_floating_point():
        raise ValueError(
            f"rows to quantise must be [n, {weight.k}] floats, got {rows.dtype} {list(rows.shape)}"
        )
    _require_fit(weight, rows.shape[0], start)
    for first in range(0, rows.shape[0], _ROWS_AT_ONCE):
        wide = rows[first : first + _ROWS_AT_ONCE].float()
        if weight.kind == "q8_64":
            _requantise(weight, wide, "float32", start + first)
            continue
        block = FORMATS[weight.kind].block
        wide = torch.nn.functional.pad(wide, (0, -weight.k % block))
        codes, halves = _quantise(weight.kind, wide.view(wide.shape[0], -1, block))
        _place(weight, _words(weight.kind, codes), halves.view(torch.int16), start + first)


def _quantise(kind: Kind, parts: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks [R, B, block] -> codes [R, B, block] uint8 and d (and m) [R, B, 1 or 2] float16."""
    form = FORMATS[kind]
    low, high = parts.amin(2), parts.amax(2)
    zero = float(form.zero)
    if form.has_min:
        least = low.half()
        scale = ((high - least.float()) / 15).half()
        halves, shift = torch.stack((scale, least), 2), -least.float()
    else:
        # Signed, so that the largest magnitude has the code -8, which positive ones lack.
        extreme = torch.where(high > -low, high, low)
        scale = (extreme / -8 if form.bits == 4 else extreme.abs() / 127).half()
        halves, shift = scale.unsqueeze(2), torch.zeros_like(low)
    step = scale.float()
    inverse = torch.where(step == 0, 0.0, 1 / step).unsqueeze(2)
    is_bad = ~(parts.isfinite().all(2) & halves.isfinite().all(2))
    codes = ((parts + shift.unsqueeze(2)) * inverse).round() + zero
    codes = codes.nan_to_num(zero).clamp(0, (1 << form.bits) - 1).to(torch.uint8)
    return codes, halves.masked_fill(is_bad.unsqueeze(2), float("nan"))


def _words(kind: Kind, codes: Tensor) -> Tensor:
    """Codes [R, B, block] -> words [R, B, 4, 8 or 16] int32."""
    if FORMATS[kind].bits == 4:
        half = codes.shape[2] // 2
        codes = codes[..., :half] | codes[..., half:] << 4
    return codes.contiguous().view(torch.int32)


def _require_fit(weight: BlockWeight, count: int, start: int) -> None:
    if start < 0 or start + count > weight.n:
        raise ValueError(f"rows {start}..{start + count} do not fit a weight of {weight.n} rows")


def _views(weight: BlockWeight) -> tuple[Tensor, Tensor]:
    """The codes [P, 16, B, words] int32 and the halves [P, 16, B, 1 or 2] int16, in place."""
    form, data = FORMATS[weight.kind], weight.data
    shape = (*data.shape[:2], -1, LANES)
    words = data.view(torch.int32)[..., : form.code_bytes // 4].view(shape)
    halves = data.view(torch.int16)[..., form.code_bytes // 2 :].view(shape)
    return words.permute(0, 3, 1, 2), halves.permute(0, 3, 1, 2)


def _place(weight: BlockWeight, words: Tensor, halves: Tensor, start: int) -> None:
    """Writes rows [R, B, words] int32 and [R, B, 1 or 2] int16, whole panels at a time."""
    count, done = words.shape[0], 0
    _require_fit(weight, count, start)
    while done < count:
        panel, lane = divmod(start + done, LANES)
        panels = (count - done) // LANES if lane == 0 else 0
        step = panels * LANES or min(LANES - lane, count - done)
        for place, rows in zip(_views(weight), (words, halves), strict=True):
            some = rows[done : done + step]
            if panels:
                place[panel : panel + panels].copy_(some.view(panels, LANES, *some.shape[1:]))
            else:
                place[panel, lane : lane + step].copy_(some)
        done += step


def dequantise(weight: BlockWeight) -> Tensor:
    """The weight [N, K] as float32: d (q - zero) exactly, d q + m rounded once."""
    form = FORMATS[weight.kind]
    words, halves = _views(weight)
    codes = words.contiguous().view(torch.uint8)
    if form.bits == 4:
        codes = torch.cat((codes & 15, codes >> 4), 3)
    scales = halves.contiguous().view(torch.float16).float()
    wide = (codes.float() - form.zero) * scales[..., :1]
    if form.has_min:
        wide = wide + scales[..., 1:]
    return wide.flatten(2).flatten(0, 1)[: weight.n, : weight.k].contiguous()
