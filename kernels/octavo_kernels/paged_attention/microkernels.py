"""Vector loops of attention over one tile of 64 keys, as LLVM IR. Know addresses, not requests.

Every loop keeps one chain of fused multiply-adds per (row, key) or (row, value column), so the
number of rows handled together never changes a bit of any row. Addresses are int64; strides are
bytes.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic as _numba_intrinsic

from octavo_kernels.paged_attention import int8_tiles
from octavo_kernels.paged_attention.tile_ir import (
    F32,
    FETCHING_ROWS,
    I32,
    I64,
    SUBS,
    TILE,
    Loop,
    addresses,
    const,
    emit_exp2,
    emit_max,
    fma,
    for_each_row_count,
    load,
    offset,
    prefetch,
    reduce_max,
    store,
    tile_masks,
    vectors_per_loop,
)
from octavo_kernels.simd import LANES, emit_load, emit_splat, pointer

intrinsic: Any = _numba_intrinsic

# A value of one of these types tells the loops how the cache is stored; int8 has its own loops.
_STORAGE = {types.float32: "float32", types.uint16: "bfloat16", types.int16: "float16"}


@intrinsic
def scores(typingctx, tag, rows, q, keys, ahead, out, dim, key_stride):
    """out[row, key] = sum over h ascending of q[row, h] * K[h, key], for `rows` rows and 64 keys.

    q addresses packed float32 rows of `dim`; keys addresses 4 int64 addresses, each of 16
    neighbouring keys at h = 0; key_stride is the distance between two h. ahead addresses 4
    addresses, each of 16 * dim elements that are wanted next: blocks lie scattered, so the core
    cannot foresee them.
    """
    sig = types.void(tag, *([types.int64] * 7))
    step = 4 if tag == types.float32 else 2

    def tile(builder, count, q_, bases, next_at, out_, dim_, stride):
        rows_at = [builder.add(q_, builder.mul(dim_, I64(4 * r))) for r in range(count)]
        loop = Loop(builder, I64(0), dim_, [const(0.0)] * (count * len(bases)))
        if count <= FETCHING_ROWS:
            line = builder.mul(loop.index, I64(LANES * step))
            for where in next_at:
                prefetch(builder, builder.add(where, line))
        shift = builder.mul(loop.index, stride)
        k = [emit_load(builder, builder.add(base, shift), _STORAGE[tag]) for base in bases]
        at = builder.mul(loop.index, I64(4))
        updated = []
        for r in range(count):
            value = emit_splat(builder, load(builder, builder.add(rows_at[r], at), F32))
            for s in range(len(bases)):
                updated.append(fma(builder, value, k[s], loop.carried[r * len(bases) + s]))
        for i, total in enumerate(loop.close(updated)):
            r, s = divmod(i, len(bases))
            store(builder, total, offset(builder, out_, 4 * (r * TILE + s * LANES)))

    def codegen(context, builder, signature, args):
        if signature.args[0] == types.int8:
            int8_tiles.emit_scores(builder, args[1:])
            return context.get_dummy_value()
        _, rows_, q_, keys_, ahead_, out_, dim_, stride = args
        bases, next_at = addresses(builder, keys_), addresses(builder, ahead_)
        together = vectors_per_loop()

        def emit(count):
            for first in range(0, SUBS, together):
                part = slice(first, first + together)
                at = offset(builder, out_, 4 * LANES * first)
                tile(builder, count, q_, bases[part], next_at[part], at, dim_, stride)

        for_each_row_count(builder, rows_, emit)
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def softmax_step(typingctx, tag, row, max_at, sum_at, scales, lo, hi):
    """Turn a row of 64 scores (base-2 logits) into weights in place; update max and sums.

    Keys outside [lo, hi) count as -inf whatever their score holds. Returns the factor by which the
    row's accumulator is to be multiplied. `sum_at` addresses 16 lane sums. A weight is the
    probability; of an int8 cache times V's scale as in `value_scales`, and int16.
    """
    sig = types.float32(tag, *([types.int64] * 6))

    def codegen(context, builder, signature, args):
        _, row_, max_, sum_, scales_, lo_, hi_ = args
        values = []
        for s, inside in enumerate(tile_masks(builder, lo_, hi_)):
            value = load(builder, offset(builder, row_, 4 * s * LANES))
            values.append(builder.select(inside, value, const(float("-inf"))))
        top = emit_max(builder, emit_max(builder, *values[:2]), emit_max(builder, *values[2:]))
        old = load(builder, max_, F32)
        new = emit_max(builder, reduce_max(builder, top), old)
        new_all = emit_splat(builder, new)
        is_int8 = signature.args[0] == types.int8
        power = int8_tiles.emit_exp2 if is_int8 else emit_exp2
        p = [power(builder, builder.fsub(v, new_all)) for v in values]
        if is_int8:
            int8_tiles.store_weights(builder, row_, p, scales_)
        else:
            for s in range(SUBS):
                store(builder, p[s], offset(builder, row_, 4 * s * LANES))
        factor = power(builder, builder.fsub(emit_splat(builder, old), new_all))
        tile_sum = builder.fadd(builder.fadd(p[0], p[1]), builder.fadd(p[2], p[3]))
        store(builder, fma(builder, load(builder, sum_), factor, tile_sum), sum_)
        store(builder, new, max_)
        return builder.extract_element(factor, I32(0))

    return sig, codegen


def _make_weigh(vectors: int) -> Any:
    """`weigh` for a width of 16 * vectors columns."""

    @intrinsic
    def weigh(
        typingctx, tag, rows, p, factors, values, ahead, column, acc, dim, lo, hi, key_stride
    ):
        """acc[row, c] = acc[row, c] * factors[row] + sum of p[row, key] * V[key, c].

        The sum runs over keys lo to hi - 1 ascending.
        The columns c begin at `column`. values addresses 4 int64 addresses, each of the first of 16
        neighbouring keys' rows; keys outside [lo, hi) are not read. ahead addresses the 4 key
        addresses of the tile wanted next: a full tile's loop asks for as many of their `dim` rows,
        `key_stride` apart, as it has columns.
        """
        sig = types.void(tag, *([types.int64] * 11))
        step = 4 if tag == types.float32 else 2

        def tile(builder, count, first, together, next_at, args):
            p_, factors_, values_, column_, acc_, dim_, lo_, hi_, key_stride_ = args
            column_ = builder.add(column_, I64(first * LANES))
            places, initial = [], []
            for r in range(count):
                factor = emit_splat(builder, load(builder, offset(builder, factors_, 4 * r), F32))
                row = builder.add(column_, builder.mul(dim_, I64(r)))
                row = builder.add(acc_, builder.mul(row, I64(4)))
                for c in range(together):
                    places.append(offset(builder, row, 4 * LANES * c))
                    initial.append(builder.fmul(load(builder, places[-1]), factor))
            stride = builder.mul(dim_, I64(step))
            shift = builder.mul(column_, I64(step))
            loop = Loop(builder, lo_, hi_, initial)
            if count <= FETCHING_ROWS:
                row = builder.lshr(builder.mul(loop.index, I64(together)), I64(2))
                row = builder.mul(builder.add(row, column_), key_stride_)
                for where in next_at:
                    prefetch(builder, builder.add(where, row))
            sub = builder.mul(builder.lshr(loop.index, I64(4)), I64(8))
            base = builder.add(load(builder, builder.add(values_, sub), I64, 8), shift)
            within = builder.and_(loop.index, I64(LANES - 1))
            base = builder.add(base, builder.mul(within, stride))
            v = [
                emit_load(builder, offset(builder, base, step * LANES * c), _STORAGE[tag])
                for c in range(together)
            ]
            at = builder.add(p_, builder.mul(loop.index, I64(4)))
            updated = []
            for r in range(count):
                weight = load(builder, offset(builder, at, 4 * TILE * r), F32)
                weight = emit_splat(builder, weight)
                for c in range(together):
                    updated.append(fma(builder, weight, v[c], loop.carried[r * together + c]))
            for place, value in zip(places, loop.close(updated), strict=True):
                store(builder, value, place)

        def codegen(context, builder, signature, args):
            if signature.args[0] == types.int8:
                int8_tiles.emit_weigh(builder, args[1:], vectors)
                return context.get_dummy_value()
            _, rows_, p_, factors_, values_, ahead_, *rest = args
            next_at = addresses(builder, ahead_)
            together = min(vectors, vectors_per_loop())

            def emit(count):
                for first in range(0, vectors, together):
                    given = (p_, factors_, values_, *rest)
                    tile(builder, count, first, together, next_at, given)

            for_each_row_count(builder, rows_, emit)
            return context.get_dummy_value()

        return sig, codegen

    return weigh


weigh_64, weigh_16 = _make_weigh(4), _make_weigh(1)


@intrinsic
def exp2(typingctx, x):
    """2**x of one float x <= 0, by the same polynomial as the tiles."""

    def codegen(context, builder, signature, args):
        return builder.extract_element(emit_exp2(builder, emit_splat(builder, args[0])), I32(0))

    return types.float32(types.float32), codegen


@intrinsic
def claim(typingctx, counter):
    """Fetch and increment the int64 at `counter`; every thread gets another number."""

    def codegen(context, builder, signature, args):
        where = pointer(builder, args[0], I64)
        return builder.atomic_rmw("add", where, I64(1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic
def is_coded(typingctx, tag):
    """Whether the cache holds int8 codes: a constant, so that LLVM drops the other branch."""

    def codegen(context, builder, signature, args):
        return ir.IntType(1)(int(signature.args[0] == types.int8))

    return types.boolean(tag), codegen
