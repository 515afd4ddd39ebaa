"""Vector loops of attention over one tile of 64 keys, as LLVM IR. Know addresses, not requests.

Every loop keeps one chain of fused multiply-adds per (row, key) or (row, value column), so the
number of rows handled together never changes a bit of any row. Addresses are int64; strides are
bytes.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import struct
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic as _numba_intrinsic

from octavo_kernels.simd import LANES, call_llvm, emit_load, emit_splat, pointer

intrinsic: Any = _numba_intrinsic

TILE = 64  # keys; a tile starts at a multiple of TILE
SUBS = TILE // LANES
MAX_ROWS = 6  # rows of the widest register tile: 6 x 4 accumulators of 16 lanes fill AVX-512
# Tiles of more rows compute longer than memory takes, and asking ahead would only cost them time.
_FETCHING_ROWS = 4

F32 = ir.FloatType()
I32 = ir.IntType(32)
I64 = ir.IntType(64)
VEC = ir.VectorType(F32, LANES)
VEC_I32 = ir.VectorType(I32, LANES)

# A value of one of these types tells the loops how the cache is stored.
_STORAGE = {types.float32: "float32", types.uint16: "bfloat16", types.int16: "float16"}
# Minimax polynomial of 2**f on [-0.5, 0.5] (Lawson fit), relative error 2e-9 before rounding.
_EXP2 = (
    1.0,
    0.6931472028552508,
    0.24022647913611017,
    0.055503324707023925,
    0.009618437358500537,
    0.0013398874588408567,
    0.00015353362059506692,
)
_MAGIC = 12582912.0  # 1.5 * 2**23: adding it rounds a float to the nearest integer


def _const(value: float) -> Any:
    rounded = struct.unpack("f", struct.pack("f", value))[0]
    return ir.Constant(VEC, [ir.Constant(F32, rounded)] * LANES)


def _vectors_per_loop() -> int:
    """Key or column vectors of one register tile: 32 wide registers hold four, others one."""
    return SUBS if binding.get_host_cpu_features().get("avx512f", False) else 1


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call_llvm(builder, "llvm.fma.v16f32", VEC, [a, b, c])


def _load(builder: Any, address: Any, kind: Any = VEC, align: int = 4) -> Any:
    return builder.load(pointer(builder, address, kind), align=align)


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, pointer(builder, address, value.type), align=4)


def _offset(builder: Any, address: Any, nbytes: int) -> Any:
    return builder.add(address, I64(nbytes)) if nbytes else address


def _exp2(builder: Any, x: Any) -> Any:
    """2**x for x <= 0, exactly 0 below -126.5 and for -inf; NaN stays NaN."""
    low = builder.fcmp_ordered("<", x, _const(-127.0))
    x = builder.select(low, _const(-127.0), x)
    shifted = builder.fadd(x, _const(_MAGIC))
    f = builder.fsub(x, builder.fsub(shifted, _const(_MAGIC)))
    y = _const(_EXP2[6])
    for c in reversed(_EXP2[:6]):
        y = _fma(builder, y, f, _const(c))
    n = builder.add(builder.bitcast(shifted, VEC_I32), ir.Constant(VEC_I32, [127] * LANES))
    scale = builder.bitcast(builder.shl(n, ir.Constant(VEC_I32, [23] * LANES)), VEC)
    return builder.fmul(y, scale)


def _max(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _reduce_max(builder: Any, x: Any) -> Any:
    width = LANES
    while width > 1:
        width //= 2
        lanes = [i + width if i < width else i for i in range(LANES)]
        x = _max(builder, x, builder.shuffle_vector(x, x, ir.Constant(VEC_I32, lanes)))
    return builder.extract_element(x, I32(0))


def _prefetch(builder: Any, address: Any) -> None:
    where = pointer(builder, address, ir.IntType(8))
    call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), [where, I32(0), I32(3), I32(1)])


class _Loop:
    """`for i in range(start, stop)` with carried vectors; `index`, `carried` are valid inside."""

    def __init__(self, builder: Any, start: Any, stop: Any, initial: list[Any]) -> None:
        self._builder = builder
        before = builder.block
        self._head = builder.append_basic_block("tile.head")
        self._exit = builder.append_basic_block("tile.exit")
        body = builder.append_basic_block("tile.body")
        builder.branch(self._head)
        builder.position_at_end(self._head)
        self.index = builder.phi(I64)
        self.index.add_incoming(start, before)
        self.carried = []
        for value in initial:
            phi = builder.phi(value.type)
            phi.add_incoming(value, before)
            self.carried.append(phi)
        builder.cbranch(builder.icmp_signed("<", self.index, stop), body, self._exit)
        builder.position_at_end(body)

    def close(self, updated: list[Any]) -> list[Any]:
        builder = self._builder
        self.index.add_incoming(builder.add(self.index, I64(1)), builder.block)
        for phi, value in zip(self.carried, updated, strict=True):
            phi.add_incoming(value, builder.block)
        builder.branch(self._head)
        builder.position_at_end(self._exit)
        return list(self.carried)


def _for_each_row_count(builder: Any, rows: Any, emit: Any) -> None:
    """Branch on the runtime `rows`, 1 to MAX_ROWS, to `emit(count)`: a count known is registers."""
    done = builder.append_basic_block("rows.done")
    blocks = [builder.append_basic_block(f"rows.{count}") for count in range(1, MAX_ROWS + 1)]
    switch = builder.switch(rows, blocks[0])
    for count, block in enumerate(blocks, start=1):
        if count > 1:
            switch.add_case(I64(count), block)
        builder.position_at_end(block)
        emit(count)
        builder.branch(done)
    builder.position_at_end(done)


def _addresses(builder: Any, table: Any) -> list[Any]:
    return [_load(builder, _offset(builder, table, 8 * s), I64, 8) for s in range(SUBS)]


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
        loop = _Loop(builder, I64(0), dim_, [_const(0.0)] * (count * len(bases)))
        if count <= _FETCHING_ROWS:
            line = builder.mul(loop.index, I64(LANES * step))
            for where in next_at:
                _prefetch(builder, builder.add(where, line))
        shift = builder.mul(loop.index, stride)
        k = [emit_load(builder, builder.add(base, shift), _STORAGE[tag]) for base in bases]
        at = builder.mul(loop.index, I64(4))
        updated = []
        for r in range(count):
            value = emit_splat(builder, _load(builder, builder.add(rows_at[r], at), F32))
            for s in range(len(bases)):
                updated.append(_fma(builder, value, k[s], loop.carried[r * len(bases) + s]))
        for i, total in enumerate(loop.close(updated)):
            r, s = divmod(i, len(bases))
            _store(builder, total, _offset(builder, out_, 4 * (r * TILE + s * LANES)))

    def codegen(context, builder, signature, args):
        _, rows_, q_, keys_, ahead_, out_, dim_, stride = args
        bases, next_at = _addresses(builder, keys_), _addresses(builder, ahead_)
        together = _vectors_per_loop()

        def emit(count):
            for first in range(0, SUBS, together):
                part = slice(first, first + together)
                at = _offset(builder, out_, 4 * LANES * first)
                tile(builder, count, q_, bases[part], next_at[part], at, dim_, stride)

        _for_each_row_count(builder, rows_, emit)
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def softmax_step(typingctx, row, max_at, sum_at, lo, hi):
    """Turn a row of 64 scores (base-2 logits) into probabilities in place; update max and sums.

    Keys outside [lo, hi) count as -inf whatever their score holds. Returns the factor by which the
    row's accumulator is to be multiplied. `sum_at` addresses 16 lane sums.
    """
    sig = types.float32(*([types.int64] * 5))

    def codegen(context, builder, signature, args):
        row_, max_, sum_, lo_, hi_ = args
        low = emit_splat(builder, builder.trunc(lo_, I32))
        high = emit_splat(builder, builder.trunc(hi_, I32))
        values = []
        for s in range(SUBS):
            lane = ir.Constant(VEC_I32, list(range(s * LANES, (s + 1) * LANES)))
            inside = builder.and_(
                builder.icmp_signed(">=", lane, low), builder.icmp_signed("<", lane, high)
            )
            value = _load(builder, _offset(builder, row_, 4 * s * LANES))
            values.append(builder.select(inside, value, _const(float("-inf"))))
        top = _max(
            builder, _max(builder, values[0], values[1]), _max(builder, values[2], values[3])
        )
        old = _load(builder, max_, F32)
        new = _max(builder, _reduce_max(builder, top), old)
        new_all = emit_splat(builder, new)
        p = [_exp2(builder, builder.fsub(v, new_all)) for v in values]
        for s in range(SUBS):
            _store(builder, p[s], _offset(builder, row_, 4 * s * LANES))
        factor = _exp2(builder, builder.fsub(emit_splat(builder, old), new_all))
        tile_sum = builder.fadd(builder.fadd(p[0], p[1]), builder.fadd(p[2], p[3]))
        _store(builder, _fma(builder, _load(builder, sum_), factor, tile_sum), sum_)
        _store(builder, new, max_)
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
                factor = emit_splat(builder, _load(builder, _offset(builder, factors_, 4 * r), F32))
                row = builder.add(column_, builder.mul(dim_, I64(r)))
                row = builder.add(acc_, builder.mul(row, I64(4)))
                for c in range(together):
                    places.append(_offset(builder, row, 4 * LANES * c))
                    initial.append(builder.fmul(_load(builder, places[-1]), factor))
            stride = builder.mul(dim_, I64(step))
            shift = builder.mul(column_, I64(step))
            loop = _Loop(builder, lo_, hi_, initial)
            if count <= _FETCHING_ROWS:
                row = builder.lshr(builder.mul(loop.index, I64(together)), I64(2))
                row = builder.mul(builder.add(row, column_), key_stride_)
                for where in next_at:
                    _prefetch(builder, builder.add(where, row))
            sub = builder.mul(builder.lshr(loop.index, I64(4)), I64(8))
            base = builder.add(_load(builder, builder.add(values_, sub), I64, 8), shift)
            within = builder.and_(loop.index, I64(LANES - 1))
            base = builder.add(base, builder.mul(within, stride))
            v = [
                emit_load(builder, _offset(builder, base, step * LANES * c), _STORAGE[tag])
                for c in range(together)
            ]
            at = builder.add(p_, builder.mul(loop.index, I64(4)))
            updated = []
            for r in range(count):
                weight = _load(builder, _offset(builder, at, 4 * TILE * r), F32)
                weight = emit_splat(builder, weight)
                for c in range(together):
                    updated.append(_fma(builder, weight, v[c], loop.carried[r * together + c]))
            for place, value in zip(places, loop.close(updated), strict=True):
                _store(builder, value, place)

        def codegen(context, builder, signature, args):
            _, rows_, p_, factors_, values_, ahead_, *rest = args
            next_at = _addresses(builder, ahead_)
            together = min(vectors, _vectors_per_loop())

            def emit(count):
                for first in range(0, vectors, together):
                    given = (p_, factors_, values_, *rest)
                    tile(builder, count, first, together, next_at, given)

            _for_each_row_count(builder, rows_, emit)
            return context.get_dummy_value()

        return sig, codegen

    return weigh


weigh_64, weigh_16 = _make_weigh(4), _make_weigh(1)


@intrinsic
def exp2(typingctx, x):
    """2**x of one float x <= 0, by the same polynomial as the tiles."""

    def codegen(context, builder, signature, args):
        return builder.extract_element(_exp2(builder, emit_splat(builder, args[0])), I32(0))

    return types.float32(types.float32), codegen


@intrinsic
def claim(typingctx, counter):
    """Fetch and increment the int64 at `counter`; every thread gets another number."""

    def codegen(context, builder, signature, args):
        where = pointer(builder, args[0], I64)
        return builder.atomic_rmw("add", where, I64(1), "monotonic")

    return types.int64(types.int64), codegen
