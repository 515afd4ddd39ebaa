"""Attention's loops over a tile of an int8 cache, as LLVM IR, and how such a cache is laid out.

A token's key (or value) of one head is codes -127..127 and one float32 scale. 16 neighbouring
tokens lie together, (H + 4) * 16 bytes: keys as [H / 2][16][2] codes, values as [8][H][2] where
the last index is the token's parity, then 16 scales. Query rows and softmax weights are rounded to
int16, products are summed in int32: exact, so no order of theirs matters. Knows no request.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic as _numba_intrinsic

from octavo_kernels.paged_attention.tile_ir import (
    F32,
    FETCHING_ROWS,
    I32,
    I64,
    MAGIC,
    SUBS,
    TILE,
    VEC,
    VEC_I32,
    Loop,
    addresses,
    const,
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
from octavo_kernels.quant_matmul.cpu_dot import host_path
from octavo_kernels.simd import LANES, call_llvm, emit_splat

intrinsic: Any = _numba_intrinsic

SCALE_BYTES = 4  # per token and head, beside its codes
CODE_LIMIT = 127.0  # of a cached code
_FINE_LIMIT = 32767.0  # of a query's or a weight's code: 2**15 * 2**7 * 256 is below 2**31
_TINIEST = 1e-30  # a row whose greatest element is below this is stored as zeros
# Polynomial of 2**f on [-0.5, 0.5] that is 1 at 0, relative error 3e-6: weights have 15 bits.
_EXP2 = (
    1.0,
    0.6931241933737909,
    0.2402409861247365,
    0.055906424936811305,
    0.00958285307731605,
)
# Adding it rounds a float to the nearest integer and leaves 2's exponent for it in the low bits.
_EXPONENT = MAGIC + 127.0
_I1, _I8, _I16 = ir.IntType(1), ir.IntType(8), ir.IntType(16)
_BYTES, _HALVES = ir.VectorType(_I8, 2 * LANES), ir.VectorType(_I16, 2 * LANES)
# Bytes from a row of 64 weights (int16) to the float32 that they are multiples of.
_WEIGHT_SCALE = 2 * TILE


def _has_vnni() -> bool:
    return host_path() == "avx512_vnni"


def _widen(builder: Any, address: Any) -> Any:
    """32 codes as 16 pairs of int16."""
    codes = load(builder, address, _BYTES, 1)
    return builder.bitcast(builder.sext(codes, _HALVES), VEC_I32)


def _dot_pairs(builder: Any, total: Any, pairs: Any, others: Any) -> Any:
    """total + the sum of two int16 products in each int32 lane."""
    if _has_vnni():
        # No total reaches int32's bounds. The saturating form, as LLVM splits the other one up
        # into two instructions where it thinks that they end earlier.
        return call_llvm(builder, "llvm.x86.avx512.vpdpwssds.512", VEC_I32, [total, pairs, others])
    sixteen = ir.Constant(VEC_I32, [16] * LANES)

    def halves(x: Any) -> list[Any]:
        return [builder.ashr(builder.shl(x, sixteen), sixteen), builder.ashr(x, sixteen)]

    for a, b in zip(halves(pairs), halves(others), strict=True):
        total = builder.add(total, builder.mul(a, b))
    return total


def _prefetch_half(builder: Any, ahead: Any, turn: Any, shift: Any) -> None:
    """Ask for one line of two of the four groups at `ahead`; the next turn, of the others."""
    which = builder.mul(builder.and_(turn, I64(1)), I64(16))
    line = builder.mul(builder.lshr(turn, I64(1)), I64(64))
    line = builder.add(line, shift)
    for other in (0, 8):
        at = builder.add(ahead, offset(builder, which, other))
        prefetch(builder, builder.add(load(builder, at, I64, 8), line))


def emit_scores(builder: Any, args: list[Any]) -> None:
    """`microkernels.scores`: q rows are int16 codes and their scale, 4 * dim bytes apart."""
    rows_, q_, keys_, ahead_, out_, dim_, _ = args
    bases = addresses(builder, keys_)
    scales_at = builder.mul(dim_, I64(LANES))
    together = vectors_per_loop()

    def tile(count: int, first: int) -> None:
        rows_at = [builder.add(q_, builder.mul(dim_, I64(4 * r))) for r in range(count)]
        mine = bases[first : first + together]
        zero = ir.Constant(VEC_I32, None)
        # One pair a turn: two products added to one total in a turn are split up again by LLVM.
        pairs = builder.lshr(dim_, I64(1))
        loop = Loop(builder, I64(0), pairs, [zero] * (count * len(mine)))
        pair = loop.index
        if count <= FETCHING_ROWS:
            _prefetch_half(builder, ahead_, pair, I64(0))
        shift = builder.mul(pair, I64(2 * LANES))
        k = [_widen(builder, builder.add(base, shift)) for base in mine]
        totals = list(loop.carried)
        for r in range(count):
            at = builder.add(rows_at[r], builder.mul(pair, I64(4)))
            codes = emit_splat(builder, load(builder, at, I32))
            for s in range(len(mine)):
                i = r * len(mine) + s
                totals[i] = _dot_pairs(builder, totals[i], k[s], codes)
        totals = loop.close(totals)
        scales = [load(builder, builder.add(base, scales_at)) for base in mine]
        for i, total in enumerate(totals):
            r, s = divmod(i, len(mine))
            at = builder.add(rows_at[r], builder.mul(dim_, I64(2)))
            factor = emit_splat(builder, load(builder, at, F32))
            score = builder.fmul(builder.fmul(builder.sitofp(total, VEC), scales[s]), factor)
            store(builder, score, offset(builder, out_, 4 * (r * TILE + (first + s) * LANES)))

    def emit(count: int) -> None:
        for first in range(0, SUBS, together):
            tile(count, first)

    for_each_row_count(builder, rows_, emit)


def _scale(builder: Any, is_nan: Any, largest: Any, limit: float) -> tuple[Any, Any]:
    """(scale, its inverse) of values whose greatest is `largest`; NaN where one is NaN."""
    tiny = builder.fcmp_ordered("<", largest, F32(_TINIEST))
    scale = builder.select(tiny, F32(0.0), builder.fmul(largest, F32(1.0 / limit)))
    inverse = builder.select(tiny, F32(0.0), builder.fdiv(F32(limit), largest))
    return builder.select(is_nan, F32(float("nan")), scale), inverse


def _any_lane(builder: Any, mask: Any) -> Any:
    bits = builder.bitcast(mask, ir.IntType(LANES))
    return builder.icmp_unsigned("!=", bits, ir.IntType(LANES)(0))


def emit_exp2(builder: Any, x: Any) -> Any:
    """`tile_ir.emit_exp2` with as many bits as weights have."""
    low = builder.fcmp_ordered("<", x, const(-127.0))
    x = builder.select(low, const(-127.0), x)
    shifted = builder.fadd(x, const(_EXPONENT))
    f = builder.fsub(x, builder.fsub(shifted, const(_EXPONENT)))
    y = const(_EXP2[-1])
    for c in reversed(_EXP2[:-1]):
        y = fma(builder, y, f, const(c))
    exponent = builder.shl(builder.bitcast(shifted, VEC_I32), ir.Constant(VEC_I32, [23] * LANES))
    return builder.fmul(y, builder.bitcast(exponent, VEC))


def _code(builder: Any, x: Any, factor: Any, kind: Any) -> Any:
    """The 16 integers nearest to x * factor, as `kind`."""
    shifted = fma(builder, x, factor, const(MAGIC))
    return builder.trunc(builder.bitcast(shifted, VEC_I32), ir.VectorType(kind, LANES))


@intrinsic
def value_scales(typingctx, tag, values, dim, lo, hi, out):
    """V's scales of keys [lo, hi) of a tile as [64] multiples of a float, then that float.

    Keys outside count as 0. A weight is at most 1, so no code of one passes int16's range. Other
    caches have none.
    """
    sig = types.void(tag, *([types.int64] * 5))

    def codegen(context, builder, signature, args):
        if signature.args[0] != types.int8:
            return context.get_dummy_value()
        _, values_, dim_, lo_, hi_, out_ = args
        scales_at = builder.mul(dim_, I64(LANES))
        scales, is_nan = [], None
        masks = tile_masks(builder, lo_, hi_)
        for base, mask in zip(addresses(builder, values_), masks, strict=True):
            scale = load(builder, builder.add(base, scales_at))
            scales.append(builder.select(mask, scale, const(0.0)))
            nan = builder.fcmp_unordered("uno", scales[-1], scales[-1])
            is_nan = nan if is_nan is None else builder.or_(is_nan, nan)
        top = emit_max(builder, emit_max(builder, *scales[:2]), emit_max(builder, *scales[2:]))
        largest = reduce_max(builder, top)
        unit, inverse = _scale(builder, _any_lane(builder, is_nan), largest, _FINE_LIMIT)
        every = emit_splat(builder, inverse)
        for s, scale in enumerate(scales):
            store(builder, builder.fmul(scale, every), offset(builder, out_, 4 * s * LANES))
        store(builder, unit, offset(builder, out_, 4 * TILE))
        return context.get_dummy_value()

    return sig, codegen


def store_weights(builder: Any, row: Any, p: list[Any], scales: Any) -> None:
    """A row's 64 probabilities times `value_scales` as int16, then what they are multiples of."""
    low_halves = ir.Constant(ir.VectorType(I32, 2 * LANES), list(range(0, 4 * LANES, 2)))
    for s in range(0, SUBS, 2):
        shifted = []
        for t in (s, s + 1):
            scale = load(builder, offset(builder, scales, 4 * t * LANES))
            shifted.append(builder.bitcast(fma(builder, p[t], scale, const(MAGIC)), _HALVES))
        codes = builder.shuffle_vector(*shifted, low_halves)
        store(builder, codes, offset(builder, row, 2 * s * LANES))
    unit = load(builder, offset(builder, scales, 4 * TILE), F32)
    store(builder, unit, offset(builder, row, _WEIGHT_SCALE))


@intrinsic
def clear_weights(typingctx, tag, row):
    """A row of an int8 cache that sees no key of a tile gets weights of 0; other caches' none."""
    sig = types.void(tag, types.int64)

    def codegen(context, builder, signature, args):
        if signature.args[0] == types.int8:
            for s in range(SUBS // 2):
                store(builder, const(0.0), offset(builder, args[1], 4 * s * LANES))
            store(builder, F32(0.0), offset(builder, args[1], _WEIGHT_SCALE))
        return context.get_dummy_value()

    return sig, codegen


def emit_weigh(builder: Any, args: list[Any], vectors: int) -> None:
    """`microkernels.weigh_*` over rows that `store_weights` made; codes outside [lo, hi) are 0."""
    rows_, p_, factors_, values_, ahead_, column_, acc_, dim_, lo_, hi_, _ = args
    together = min(vectors, vectors_per_loop())

    def tile(count: int, first: int) -> None:
        column = builder.add(column_, I64(first * LANES))
        zero = ir.Constant(VEC_I32, None)
        stop = builder.lshr(builder.add(hi_, I64(1)), I64(1))
        loop = Loop(builder, builder.lshr(lo_, I64(1)), stop, [zero] * (count * together))
        pair = loop.index
        sub = builder.mul(builder.lshr(pair, I64(3)), I64(8))
        if count <= FETCHING_ROWS:
            _prefetch_half(builder, ahead_, pair, builder.mul(column, I64(LANES)))
        base = load(builder, builder.add(values_, sub), I64, 8)
        row = builder.mul(builder.and_(pair, I64(7)), dim_)
        base = builder.add(base, builder.mul(builder.add(row, column), I64(2)))
        v = [_widen(builder, offset(builder, base, 2 * LANES * c)) for c in range(together)]
        totals = list(loop.carried)
        at = builder.add(p_, builder.mul(pair, I64(4)))
        for r in range(count):
            weight = emit_splat(builder, load(builder, offset(builder, at, 4 * TILE * r), I32))
            for c in range(together):
                i = r * together + c
                totals[i] = _dot_pairs(builder, totals[i], v[c], weight)
        totals = loop.close(totals)
        for r in range(count):
            factor = emit_splat(builder, load(builder, offset(builder, factors_, 4 * r), F32))
            where = offset(builder, p_, 4 * TILE * r + _WEIGHT_SCALE)
            scale = emit_splat(builder, load(builder, where, F32))
            # A row that sees nothing of this tile keeps its bits, a zero's sign among them.
            none = builder.fcmp_ordered("==", scale, const(0.0))
            place = builder.add(column, builder.mul(dim_, I64(r)))
            place = builder.add(acc_, builder.mul(place, I64(4)))
            for c in range(together):
                to = offset(builder, place, 4 * LANES * c)
                old = builder.fmul(load(builder, to), factor)
                total = builder.sitofp(totals[r * together + c], VEC)
                store(builder, builder.select(none, old, fma(builder, total, scale, old)), to)

    def emit(count: int) -> None:
        for first in range(0, vectors, together):
            tile(count, first)

    for_each_row_count(builder, rows_, emit)


def _emit_codes(builder: Any, x: Any, dim: Any, limit: float, kind: Any, to: Any) -> Any:
    """Codes of dim floats at x, consecutive at `to` (which may be x); returns their scale."""
    magnitude = ir.Constant(VEC_I32, [0x7FFFFFFF] * LANES)
    steps = builder.lshr(dim, I64(4))
    no_nan = ir.Constant(ir.VectorType(_I1, LANES), None)
    loop = Loop(builder, I64(0), steps, [const(0.0), no_nan])
    at = builder.add(x, builder.mul(loop.index, I64(4 * LANES)))
    value = load(builder, at)
    size = builder.bitcast(builder.and_(builder.bitcast(value, VEC_I32), magnitude), VEC)
    nan = builder.fcmp_unordered("uno", value, value)
    top = emit_max(builder, size, loop.carried[0])
    top, is_nan = loop.close([top, builder.or_(nan, loop.carried[1])])
    largest = reduce_max(builder, top)
    scale, inverse = _scale(builder, _any_lane(builder, is_nan), largest, limit)
    loop = Loop(builder, I64(0), steps, [])
    at = builder.add(x, builder.mul(loop.index, I64(4 * LANES)))
    target = builder.add(to, builder.mul(loop.index, I64(LANES * kind.width // 8)))
    codes = _code(builder, load(builder, at), emit_splat(builder, inverse), kind)
    builder.store(codes, builder.inttoptr(target, codes.type.as_pointer()), align=1)
    loop.close([])
    return scale


@intrinsic
def fine_codes(typingctx, x, dim, to):
    """int16 codes of dim floats (a multiple of 16) at `to`; returns the float they multiply."""
    sig = types.float32(*([types.int64] * 3))

    def codegen(context, builder, signature, args):
        return _emit_codes(builder, args[0], args[1], _FINE_LIMIT, _I16, args[2])

    return sig, codegen


@intrinsic
def cache_codes(typingctx, x, dim, to):
    """int8 codes of dim floats (a multiple of 16) at `to`; returns the float they multiply."""
    sig = types.float32(*([types.int64] * 3))

    def codegen(context, builder, signature, args):
        return _emit_codes(builder, args[0], args[1], CODE_LIMIT, _I8, args[2])

    return sig, codegen
