"""The CPU matmul over panels of 4- and 8-bit blocks: which tile runs where.

Knows addresses, no tensors. Activations are records (`cpu_records`); a part of the matmul is a run
of pairs of panels, each of which meets every chunk of rows before the next one does.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types

from octavo_kernels.matmul.cpu import read_id, refuse_row
from octavo_kernels.parallel import Kernel, device, kernel
from octavo_kernels.quant_matmul.cpu_blocks_tile import (
    FORMATS,
    PANEL_SUMS_BYTES,
    SUM_BYTES,
    Kind,
    make_tiles,
    tile_height,
)
from octavo_kernels.quant_matmul.cpu_dot import CpuPath
from octavo_kernels.quant_matmul.cpu_records import (
    block_quantiser,
    chunk_height,
    chunk_start,
    num_chunks,
    record_bytes,
    row_quantiser,
    stack_bytes,
)
from octavo_kernels.silu_mul.cpu import gate_gelu, gate_silu
from octavo_kernels.simd import (
    LANES,
    add,
    first_lanes,
    get_f16,
    get_i32,
    load_f32,
    load_f32_masked,
    put_f32,
    store_f32,
    store_f32_masked,
)
from octavo_kernels.vectors import F32, I32, call_llvm, pointer, vector_op

# The gate a matmul may end with; 0 is none.
SILU, GELU = 1, 2
# Chunks of rows that meet a unit's panels one after the other before their sums are used.
_GROUP_CHUNKS = 3
_TILE_BYTES = 2 * PANEL_SUMS_BYTES  # of a tile's sums, and of the panels that gate others
# Of the sums of as many panels as a record takes.
_CHUNK_BYTES = max(form.block for form in FORMATS.values()) // LANES * _TILE_BYTES
_scratch = stack_bytes(_GROUP_CHUNKS * _CHUNK_BYTES)
_quantise_32, _quantise_64 = block_quantiser(32), block_quantiser(64)


@vector_op(types.float32, types.int64)
def _to_f32(b: Any, a: Any) -> Any:
    return b.sitofp(a[0], F32)


@vector_op(types.float32, types.float32, types.float32, types.float32)
def _times_plus(b: Any, a: Any) -> Any:
    # The product of a half and a code of 8 bits is exact: fused or not is the same.
    return b.fadd(b.fmul(a[0], a[1]), a[2])


@device
def _rows_of_tile(left: int, most: int) -> int:
    """Of the next tile of a chunk with that many rows left, as even as can be."""
    return left if left <= most else left // ((left + most - 1) // most)


@device
def _gate(sums: int, panels: int, rows: int, gate: int) -> None:
    """sums = act(sums) * ups for some panels of a chunk; each is followed by its ups."""
    for panel in range(sums, sums + panels * _TILE_BYTES, _TILE_BYTES):
        for at in range(panel, panel + rows * SUM_BYTES, SUM_BYTES):
            value, up = load_f32(at), load_f32(at + PANEL_SUMS_BYTES)
            store_f32(at, gate_silu(value, up) if gate == SILU else gate_gelu(value, up))


@vector_op(types.void, types.int64)
def _fetch_to_write(b: Any, a: Any) -> Any:
    """Asks for a line of memory for this core alone."""
    values = [pointer(b, a[0], I32), I32(1), I32(3), I32(1)]
    call_llvm(b, "llvm.prefetch.p0", ir.VoidType(), values)


@device
def _expect(out, row, rows, column):
    """Asks for where `_put` will read and write: waiting for that took a seventh of a matmul."""
    for at in range(4 * (row * out.n + column), 4 * ((row + rows) * out.n + column), 4 * out.n):
        _fetch_to_write(out.at + at)
        _fetch_to_write(out.at + at + SUM_BYTES)
        if out.residual != 0:
            _fetch_to_write(out.residual + at)
            _fetch_to_write(out.residual + at + SUM_BYTES)


@device
def _put(
    sums: int, rows: int, row: int, column: int, n: int, out: int, bias: int, more: int
) -> None:
    """out = (sums + bias) + more over a panel; either may be absent (address 0)."""
    shift, end = 4 * (row * n + column), sums + rows * SUM_BYTES
    if n - column >= LANES:
        for at in range(sums, end, SUM_BYTES):
            value = load_f32(at)
            if bias != 0:
                value = add(value, load_f32(bias + 4 * column))
            if more != 0:
                value = add(value, load_f32(more + shift))
            store_f32(out + shift, value)
            shift += 4 * n
        return
    mask = first_lanes(n - column)
    for at in range(sums, end, SUM_BYTES):
        value = load_f32(at)
        if bias != 0:
            value = add(value, load_f32_masked(bias + 4 * column, mask))
        if more != 0:
            value = add(value, load_f32_masked(more + shift, mask))
        store_f32_masked(out + shift, value, mask)
        shift += 4 * n


@device
def _put_records(sums: int, rows: int, out: int, place: int, block: int, zero: int) -> None:
    """Quantises a chunk's sums, those of a block, into records place.. of out."""
    to = out + place * (block + 8)
    for at in range(sums, sums + rows * SUM_BYTES, SUM_BYTES):
        if block == 32:
            _quantise_32(at, _TILE_BYTES, to, zero)
        else:
            _quantise_64(at, _TILE_BYTES, to, zero)
        to += block + 8


class _Out(NamedTuple):
    """What becomes of sums: as `matmul_kernel` has it."""

    at: int
    bias: int
    residual: int
    n: int
    gate: int
    next_block: int
    next_zero: int


@device
def _panels_of_unit(out):
    """(pairs of a unit, panels of out that each has). The second panel of a pair gates the first,
    or is the one behind it."""
    return 1 if out.next_block == 0 else out.next_block // LANES, 1 if out.gate != 0 else 2


@device
def _finish(out, sums, unit, row, rows):
    """Gates, quantises or puts out a chunk's sums of a unit."""
    step, width = _panels_of_unit(out)
    if out.gate != 0:
        _gate(sums, step, rows, out.gate)
    if out.next_block != 0:
        place = row * (out.n // out.next_block) + unit * rows
        _put_records(sums, rows, out.at, place, out.next_block, out.next_zero)
        return
    for panel in range(width):
        column = (unit * width + panel) * LANES
        if column < out.n:
            _put(sums + panel * PANEL_SUMS_BYTES, rows, row, column, out.n, out.at, out.bias,
                 out.residual)  # fmt: skip


class _Pair(NamedTuple):
    """Two panels that meet rows together, and of which each tile asks for a share of the next."""

    w: int
    v: int  # 0 where there is only one
    fetch_w: int
    fetch_v: int
    span: int  # bytes that a tile asks for with each block; 0: none
    shift: int  # bytes between two tiles' shares


@cache
def _chunk_runner(kind: Kind, path: CpuPath) -> Any:
    """Device function for the tiles of a chunk's rows and two panels."""
    run_tile, tile_rows = make_tiles(kind, path), tile_height(path)
    size = record_bytes(FORMATS[kind].block)

    def run_chunk(pair: Any, rows: int, chunk: int, records: int, blocks: int, sums: int) -> None:
        row, shift = 0, chunk * pair.shift
        while row < rows:
            height = _rows_of_tile(rows - row, tile_rows)
            run_tile(height, records + row * size, rows * size, pair.w, pair.v, blocks,
                     sums + row * SUM_BYTES, pair.fetch_w + shift, pair.fetch_v + shift,
                     pair.span if row == 0 else 0)  # fmt: skip
            row += height

    run_chunk.__qualname__ = f"run_chunk_{kind}_{path}"
    return device(run_chunk)


@device
def _pair_at(
    w: int, v: int, next_w: int, next_v: int, num_rows: int, blocks: int, size: int
) -> Any:
    """A pair whose following one is at next_w and next_v (0: none); a block of a panel has `size`
    bytes."""
    if next_w == 0:
        return _Pair(w, v, w, w, 0, 0)
    chunks = num_chunks(num_rows)
    span = (size + chunks - 1) // chunks
    return _Pair(w, v, next_w, next_v, span, span * blocks)


@cache
def _unit_runner(kind: Kind, path: CpuPath) -> Any:
    """Device function for all rows and a unit of panels, those that a record of out takes.

    Asks for the panels before `end` that come next.
    """
    run_chunk, piece_bytes = _chunk_runner(kind, path), FORMATS[kind].panel_bytes
    size = record_bytes(FORMATS[kind].block)

    def run_unit(out, w, records, num_rows, blocks, unit, end, sums):
        num_panels, panel_bytes = (out.n + LANES - 1) // LANES, blocks * piece_bytes
        chunks, (step, width) = num_chunks(num_rows), _panels_of_unit(out)
        second = (num_panels if out.gate != 0 else 1) * panel_bytes
        for group in range(0, chunks, _GROUP_CHUNKS):
            last = min(chunks, group + _GROUP_CHUNKS)
            for index in range(step):
                panel = (unit * step + index) * width
                first = w + panel * panel_bytes
                other = first + second if out.gate != 0 or panel + 1 < num_panels else 0
                after = first + width * panel_bytes if panel + width < end * step * width else 0
                pair = _pair_at(first, other, after, after + second, num_rows, blocks, piece_bytes)
                for chunk in range(group, last):
                    row, rows = chunk_start(chunk, num_rows), chunk_height(chunk, num_rows)
                    if out.gate == 0:
                        _expect(out, row, rows, panel * LANES)
                    at = sums + (chunk - group) * _CHUNK_BYTES + index * _TILE_BYTES
                    run_chunk(pair, rows, chunk, records + row * blocks * size, blocks, at)
            for chunk in range(group, last):
                row, rows = chunk_start(chunk, num_rows), chunk_height(chunk, num_rows)
                _finish(out, sums + (chunk - group) * _CHUNK_BYTES, unit, row, rows)

    run_unit.__qualname__ = f"run_unit_{kind}_{path}"
    return device(run_unit)


@cache
def matmul_kernel(kind: Kind, path: CpuPath) -> Kernel:
    """The matmul of records with panels of one kind, on one path; gated or not.

    With x (address 0 if records are ready) every part first makes records of its own, one behind
    the other: shorter than a launch that does it for all, where rows are few.
    With a gate (SILU or GELU, else 0) the panels hold G and then U, [n, K] each with n % 16 == 0,
    and out is act(x @ G^T) * (x @ U^T). With a gate and a next_block (else 0), n % next_block == 0
    and out are records of that, for weights of such blocks and of next_zero.
    """
    run_unit, zero, block = _unit_runner(kind, path), FORMATS[kind].zero, FORMATS[kind].block
    quantise_rows, size = row_quantiser(block), record_bytes(block)

    def body(
        part: int,
        num_parts: int,
        x: int,
        records: int,
        w: int,
        out: int,
        bias: int,
        residual: int,
        num_rows: int,
        n: int,
        k: int,
        gate: int,
        next_block: int,
        next_zero: int,
    ) -> None:
        blocks = (k + block - 1) // block
        if x != 0:
            records += part * num_rows * blocks * size
            quantise_rows(x, records, num_rows, k, zero, 0, num_rows)
        target, sums = _Out(out, bias, residual, n, gate, next_block, next_zero), _scratch()
        step, width = _panels_of_unit(target)
        units = (n + step * width * LANES - 1) // (step * width * LANES)
        end = (part + 1) * units // num_parts
        for unit in range(part * units // num_parts, end):
            run_unit(target, w, records, num_rows, blocks, unit, end, sums)

    body.__name__ = f"matmul_blocks_{kind}_{path}"
    return kernel(body)


@cache
def gather_kernel(kind: Kind) -> Kernel:
    """The kernel that reads rows back out of panels, exactly."""
    form = FORMATS[kind]
    code_bytes, piece_bytes, zero = form.code_bytes, form.panel_bytes, form.zero
    bits, has_min, block = form.bits, form.has_min, form.block
    codes_per_word, code_mask = 32 // bits, (1 << bits) - 1

    def body(
        part: int,
        num_parts: int,
        w: int,
        ids: int,
        id_stride: int,
        id_bytes: int,
        out: int,
        num_rows: int,
        n: int,
        k: int,
        status: int,
    ) -> None:
        blocks = (k + block - 1) // block
        for row in range(part * num_rows // num_parts, (part + 1) * num_rows // num_parts):
            wanted = read_id(ids + id_stride * row, id_bytes, n)
            if wanted < 0:
                refuse_row(out + 4 * row * k, k, status)
                continue
            source = w + wanted // LANES * blocks * piece_bytes
            lane = wanted % LANES
            for index in range(blocks):
                piece = source + index * piece_bytes
                scale = get_f16(piece + code_bytes + 2 * lane)
                least = np.float32(0.0)
                if has_min:
                    least = get_f16(piece + code_bytes + 2 * LANES + 2 * lane)
                left = min(block, k - index * block)
                at = out + 4 * (row * k + index * block)
                for word_index in range(block // codes_per_word):
                    word = get_i32(piece + 64 * word_index + 4 * lane)
                    for byte in range(4):
                        code = (word >> (8 * byte)) & code_mask
                        i = 4 * word_index + byte
                        if i < left:
                            value = _times_plus(scale, _to_f32(code - zero), least)
                            put_f32(at + 4 * i, value)
                        if bits == 4 and i + block // 2 < left:
                            code = (word >> (8 * byte + 4)) & code_mask
                            value = _times_plus(scale, _to_f32(code - zero), least)
                            put_f32(at + 4 * i + 2 * block, value)

    body.__name__ = f"gather_blocks_{kind}"
    return kernel(body)
