"""Emits the register tile of the CPU's int8 matmul; knows one tile's loop, no panels or tensors."""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba.core import types

from octavo_kernels.parallel import device, intrinsic
from octavo_kernels.quant_matmul.cpu_dot import (
    CHUNK_LANES,
    CpuPath,
    emit_dot,
    lanes_below,
    splat_i32,
)
from octavo_kernels.vectors import F32, I32, I64, call_llvm, pointer

# Of the largest tile. AVX-512: 8 x 3 sums, 3 weights and 1 activation in 32 registers. AVX2 in 16:
# 6 x 2, 2 and 1 with VNNI, else 4 x 2, 4 halves of weights and 2 of activations.
TILE_ROWS: dict[CpuPath, int] = {"avx512_vnni": 8, "avx_vnni": 6, "avx2": 4, "generic": 4}
PANEL_WIDTH: dict[CpuPath, int] = {"avx512_vnni": 48, "avx_vnni": 16, "avx2": 16, "generic": 16}
# Unrolled, a loop that needs all 16 registers has LLVM load ahead and spill.
_UNROLL: dict[CpuPath, int] = {"avx512_vnni": 4, "avx_vnni": 1, "avx2": 1, "generic": 1}
# Tiles of few rows wait for memory, not for arithmetic; asking ahead only helps the others.
_AHEAD_ROWS = 5
_NAMES = "codes, stride, scale_at, w, quads, base, w_scale, out, out_stride, columns, ahead"


@cache
def make_tile(rows: int, path: CpuPath) -> Any:
    """Intrinsic for a tile of rows x panel width outputs, all held in registers.

    tile(codes, stride, scale_at, w, quads, base, w_scale, out, out_stride, columns, ahead):
    addresses and strides in bytes. codes: [rows, 4 * quads] uint8 (code + 128) with the row's
    float32 scale `scale_at` bytes after its first code; w: [quads, width, 4] int8; base: [width]
    int32, -128 times the column's sum; w_scale: [width] float32.
    out[r, c] = float(base + sum of products) * (row's scale * column's scale) for c < columns.
    While it computes, as many bytes as w has, over all tiles of a panel, are fetched from `ahead`.
    """

    def tile(  # type: ignore[no-untyped-def]
        typingctx,
        codes,
        stride,
        scale_at,
        w,
        quads,
        base,
        w_scale,
        out,
        out_stride,
        columns,
        ahead,
    ):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit_tile(builder, args, rows, path)
            return context.get_dummy_value()

        return types.void(*([types.int64] * 11)), codegen

    tile.__name__ = f"tile_{rows}_{path}"
    return intrinsic(tile)


def _emit_tile(b: Any, args: Any, rows: int, path: CpuPath) -> None:
    codes, stride, scale_at, w, quads, base, w_scale, out, out_stride, columns, ahead = args
    lanes = CHUNK_LANES[path]
    chunks = range(PANEL_WIDTH[path] // lanes)
    integers, floats = ir.VectorType(I32, lanes), ir.VectorType(F32, lanes)

    def load(address: Any, kind: Any, chunk: int) -> Any:
        return b.load(pointer(b, b.add(address, I64(4 * lanes * chunk)), kind), align=4)

    row_codes = [b.add(codes, b.mul(stride, I64(r))) for r in range(rows)]
    sums = [load(base, integers, chunk) for chunk in chunks] * rows
    unroll = _UNROLL[path]
    whole = b.and_(quads, I64(-unroll))
    sums = _emit_loop(b, sums, row_codes, w, I64(0), whole, unroll, path, ahead=ahead)
    if unroll > 1:
        sums = _emit_loop(b, sums, row_codes, w, whole, quads, 1, path)

    spots, values = [], []
    column_scales = [load(w_scale, floats, chunk) for chunk in chunks]
    for r, row in enumerate(row_codes):
        row_scale = b.load(pointer(b, b.add(row, scale_at), F32), align=4)
        spread = splat_i32(b, row_scale, lanes)
        for chunk in chunks:
            at = b.add(b.add(out, b.mul(out_stride, I64(r))), I64(4 * lanes * chunk))
            spots.append(pointer(b, at, floats))
            total = b.sitofp(sums[r * len(chunks) + chunk], floats)
            values.append(b.fmul(total, b.fmul(spread, column_scales[chunk])))
    masks = [lanes_below(b, b.sub(columns, I64(lanes * chunk)), lanes) for chunk in chunks] * rows
    is_whole = b.icmp_signed(">=", columns, I64(PANEL_WIDTH[path]))
    with b.if_else(is_whole) as (inside, edge):
        with inside:
            for spot, value in zip(spots, values, strict=True):
                b.store(value, spot, align=4)
        with edge:
            for spot, value, mask in zip(spots, values, masks, strict=True):
                name = f"llvm.masked.store.v{lanes}f32.p0"
                call_llvm(b, name, ir.VoidType(), [value, spot, I32(4), mask])


def _emit_loop(
    b: Any,
    sums: list[Any],
    row_codes: list[Any],
    w: Any,
    first: Any,
    end: Any,
    unroll: int,
    path: CpuPath,
    *,
    ahead: Any = None,
) -> list[Any]:
    """`for quad in range(first, end, unroll)` with the sums carried in phis; the last sums."""
    lanes, width = CHUNK_LANES[path], PANEL_WIDTH[path]
    kind = ir.VectorType(I32, lanes)
    before = b.block
    loop, after = b.append_basic_block("quads"), b.append_basic_block("quads_done")
    b.cbranch(b.icmp_signed("<", first, end), loop, after)
    b.position_at_end(loop)
    index = b.phi(I64)
    index.add_incoming(first, before)
    carried = [b.phi(kind) for _ in sums]
    for phi, value in zip(carried, sums, strict=True):
        phi.add_incoming(value, before)
    now: list[Any] = list(carried)
    offset = b.mul(index, I64(4))
    w_row = b.add(w, b.mul(index, I64(4 * width)))
    if ahead is not None and len(row_codes) >= _AHEAD_ROWS:
        _emit_prefetches(b, ahead, index, 2 * width, unroll)
    for u in range(unroll):
        at = b.add(w_row, I64(4 * width * u))
        columns = [
            b.load(pointer(b, b.add(at, I64(4 * start)), kind), align=4)
            for start in range(0, width, lanes)
        ]
        for r, row in enumerate(row_codes):
            address = b.add(b.add(row, offset), I64(4 * u))
            four = splat_i32(b, b.load(pointer(b, address, I32), align=4), lanes)
            for c, column in enumerate(columns):
                spot = r * len(columns) + c
                now[spot] = emit_dot(b, path, now[spot], four, column)
    following = b.add(index, I64(unroll))
    index.add_incoming(following, b.block)
    for phi, value in zip(carried, now, strict=True):
        phi.add_incoming(value, b.block)
    b.cbranch(b.icmp_signed("<", following, end), loop, after)
    b.position_at_end(after)
    done = []
    for value, last in zip(sums, now, strict=True):
        phi = b.phi(kind)
        phi.add_incoming(value, before)
        phi.add_incoming(last, loop)
        done.append(phi)
    return done


def _emit_prefetches(b: Any, ahead: Any, index: Any, bytes_per_quad: int, unroll: int) -> None:
    """Asks for the next bytes behind `ahead`, in order as the loop goes."""
    begin = b.add(ahead, b.mul(index, I64(bytes_per_quad)))
    for at in range(0, bytes_per_quad * unroll, 64):
        where = pointer(b, b.add(begin, I64(at)), I32)
        call_llvm(b, "llvm.prefetch.p0", ir.VoidType(), [where, I32(0), I32(2), I32(1)])


@cache
def make_tiles(path: CpuPath) -> Any:
    """Device function run(rows, *tile arguments) that picks the tile of 1..TILE_ROWS rows."""
    sizes = range(1, TILE_ROWS[path] + 1)
    lines = [f"def run(rows, {_NAMES}):"]
    for rows in sizes:
        lines += [f"    if rows == {rows}:", f"        tile_{rows}({_NAMES})"]
    scope: dict[str, Any] = {f"tile_{rows}": make_tile(rows, path) for rows in sizes}
    scope["__name__"] = __name__
    exec("\n".join(lines), scope)
    run = scope["run"]
    run.__qualname__ = f"run_int8_{path}"
    return device(run)
