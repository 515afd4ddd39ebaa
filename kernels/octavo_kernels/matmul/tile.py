"""Emits the register tile of the CPU matmul; knows one tile's loop, no panels or tensors."""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba.core import types

from octavo_kernels.parallel import device, intrinsic
from octavo_kernels.vectors import (
    LANES,
    call_llvm,
    emit_first_lanes,
    emit_load,
    emit_splat,
    pointer,
)

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_UNROLL = 4
# Tiles of fewer rows compute for less time than their weights take to arrive: asking ahead, they
# would only wait for other lines (measured: 10 % slower at one row).
_AHEAD_ROWS = 5

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VF32 = ir.VectorType(_F32, LANES)
_ZERO = ir.Constant(_VF32, None)


@cache
def make_tile(rows: int, vectors: int, dtype: str) -> Any:
    """Intrinsic for a tile of rows x (16 * vectors) outputs, all held in registers.

    tile(x, x_stride, w, k, out, out_stride, columns, resume, ahead): addresses and strides in
    bytes; only the first `columns` of the tile exist in `out`. While it computes, half as many
    bytes as w has are fetched from `ahead` into the second-level cache.
    x is [rows, k] float32 with row stride x_stride; w is [k, 16 * vectors] of dtype, dense.
    Each output is one chain of fused multiply-adds over k ascending, from 0, or from what `out`
    holds when resume != 0: splitting k between calls changes no bit.
    """

    def tile(  # type: ignore[no-untyped-def]
        typingctx, x, x_stride, w, k, out, out_stride, columns, resume, ahead
    ):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit_tile(builder, args, rows, vectors, dtype)
            return context.get_dummy_value()

        return types.void(*([types.int64] * 9)), codegen

    tile.__name__ = f"tile_{rows}x{vectors}_{dtype}"
    return intrinsic(tile)


def _emit_tile(b: Any, args: Any, rows: int, vectors: int, dtype: str) -> None:
    x, x_stride, w, k, out, out_stride, columns, resume, ahead = args
    row_x = [b.add(x, b.mul(x_stride, _I64(r))) for r in range(rows)]
    spots = [
        pointer(b, b.add(b.add(out, b.mul(out_stride, _I64(r))), _I64(64 * v)), _VF32)
        for r in range(rows)
        for v in range(vectors)
    ]
    masks = [emit_first_lanes(b, b.sub(columns, _I64(LANES * v))) for v in range(vectors)] * rows
    from_zero = b.block
    load = b.append_basic_block("resume")
    start = b.append_basic_block("start")
    b.cbranch(b.icmp_signed("!=", resume, _I64(0)), load, start)
    b.position_at_end(load)
    loaded = [
        call_llvm(b, "llvm.masked.load.v16f32.p0", _VF32, [spot, _I32(4), mask, _ZERO])
        for spot, mask in zip(spots, masks, strict=True)
    ]
    b.branch(start)
    b.position_at_end(start)
    sums = []
    for value in loaded:
        phi = b.phi(_VF32)
        phi.add_incoming(_ZERO, from_zero)
        phi.add_incoming(value, load)
        sums.append(phi)
    whole = b.and_(k, _I64(-_UNROLL))
    sums = _emit_loop(b, sums, row_x, w, _I64(0), whole, _UNROLL, vectors, dtype, ahead=ahead)
    sums = _emit_loop(b, sums, row_x, w, whole, k, 1, vectors, dtype)
    with b.if_else(b.icmp_signed(">=", columns, _I64(LANES * vectors))) as (inside, edge):
        with inside:
            for spot, value in zip(spots, sums, strict=True):
                b.store(value, spot, align=4)
        with edge:
            for spot, value, mask in zip(spots, sums, masks, strict=True):
                values = [value, spot, _I32(4), mask]
                call_llvm(b, "llvm.masked.store.v16f32.p0", ir.VoidType(), values)


def _emit_loop(
    b: Any,
    sums: list[Any],
    row_x: list[Any],
    w: Any,
    first: Any,
    end: Any,
    unroll: int,
    vectors: int,
    dtype: str,
    *,
    ahead: Any = None,
) -> list[Any]:
    """`for i in range(first, end, unroll)` with the sums carried in phis; returns the last sums."""
    before = b.block
    loop, after = b.append_basic_block("k_loop"), b.append_basic_block("k_done")
    b.cbranch(b.icmp_signed("<", first, end), loop, after)
    b.position_at_end(loop)
    index = b.phi(_I64)
    index.add_incoming(first, before)
    carried = [b.phi(_VF32) for _ in sums]
    for phi, value in zip(carried, sums, strict=True):
        phi.add_incoming(value, before)
    now: list[Any] = list(carried)
    step_bytes = LANES * vectors * ITEM_BYTES[dtype]
    w_row = b.add(w, b.mul(index, _I64(step_bytes)))
    offset = b.mul(index, _I64(4))
    if ahead is not None and len(row_x) >= _AHEAD_ROWS:
        _emit_prefetches(b, ahead, index, step_bytes * unroll // 2, unroll)
    for u in range(unroll):
        at = b.add(w_row, _I64(u * step_bytes))
        lanes = LANES * ITEM_BYTES[dtype]
        columns = [emit_load(b, b.add(at, _I64(lanes * v)), dtype) for v in range(vectors)]
        for r, base in enumerate(row_x):
            address = b.add(b.add(base, offset), _I64(4 * u))
            left = emit_splat(b, b.load(pointer(b, address, _F32), align=4))
            for v, column in enumerate(columns):
                spot = r * vectors + v
                now[spot] = call_llvm(b, "llvm.fma.v16f32", _VF32, [left, column, now[spot]])
    following = b.add(index, _I64(unroll))
    index.add_incoming(following, b.block)
    for phi, value in zip(carried, now, strict=True):
        phi.add_incoming(value, b.block)
    b.cbranch(b.icmp_signed("<", following, end), loop, after)
    b.position_at_end(after)
    done = []
    for value, last in zip(sums, now, strict=True):
        phi = b.phi(_VF32)
        phi.add_incoming(value, before)
        phi.add_incoming(last, loop)
        done.append(phi)
    return done


def _emit_prefetches(b: Any, ahead: Any, index: Any, num_bytes: int, unroll: int) -> None:
    """Asks for the next `num_bytes` behind `ahead`, in order as the loop goes."""
    begin = b.add(ahead, b.mul(index, _I64(num_bytes // unroll)))
    for at in range(0, num_bytes, 64):
        where = pointer(b, b.add(begin, _I64(at)), _I32)
        call_llvm(b, "llvm.prefetch.p0", ir.VoidType(), [where, _I32(0), _I32(2), _I32(1)])


@cache
def make_tiles(max_rows: int, vectors: int, dtype: str) -> Any:
    """Device function run(rows, *tile arguments) that picks the tile of 1..max_rows rows."""
    names = "x, x_stride, w, k, out, out_stride, columns, resume, ahead"
    lines = [f"def run(rows, {names}):"]
    for rows in range(1, max_rows + 1):
        lines += [f"    if rows == {rows}:", f"        tile_{rows}({names})"]
    scope: dict[str, Any] = {
        f"tile_{rows}": make_tile(rows, vectors, dtype) for rows in range(1, max_rows + 1)
    }
    scope["__name__"] = __name__
    exec("\n".join(lines), scope)
    run = scope["run"]
    run.__qualname__ = f"run_{max_rows}x{vectors}_{dtype}"
    return device(run)
