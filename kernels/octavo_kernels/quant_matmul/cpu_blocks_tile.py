"""Emits the register tile over blocks of 4- and 8-bit weights, and quantises activations for it.

Knows one tile's loop; no panels, no tensors.

A block is 32 elements of K. Its weights are one piece of a panel of 16 outputs: 32-bit words of
four k for each output, [4][16] words for 4 bits (word i holds quad i in its low nibbles and quad
4 + i in its high ones) or [8][16] for 8 bits (codes + 128), then 16 float16 scales and, for
`q4_1`, 16 float16 minima. Its activations are a record of 40 bytes: 32 int8 codes, the float32
scale, and the float32 sum of what the codes stand for (`q4_1`) or the int32 that takes the
weights' zero point off every sum (-8 or -128 times the sum of the codes).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

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
from octavo_kernels.vectors import (
    F16,
    F32,
    I32,
    I64,
    LANES,
    VF32,
    VI32,
    call_llvm,
    emit_splat,
    f32x16,
    pointer,
    vector_op,
)

Kind = Literal["q4_0", "q4_1", "q8_0"]

BLOCK = 32
RECORD_BYTES = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFormat:
    """How a kind of weight is stored, in a GGUF file and in panels."""

    file_bytes: int  # of a block of one output in a file
    bits: int
    zero: int  # the code of weight 0; 0 where blocks have minima instead

    @property
    def code_bytes(self) -> int:
        """Of a block's codes for 16 outputs."""
        return LANES * BLOCK * self.bits // 8

    @property
    def has_min(self) -> bool:
        """Whether w = d q + m rather than d (q - zero)."""
        return self.zero == 0

    @property
    def panel_bytes(self) -> int:
        """Of a block for 16 outputs."""
        return self.code_bytes + 2 * LANES * (1 + self.has_min)


FORMATS: dict[Kind, BlockFormat] = {
    "q4_0": BlockFormat(file_bytes=18, bits=4, zero=8),
    "q4_1": BlockFormat(file_bytes=20, bits=4, zero=0),
    "q8_0": BlockFormat(file_bytes=34, bits=8, zero=128),
}

# Of the largest tile, which has a float and an integer sum for each row and spills nothing: 12
# rows fill 29 of AVX-512's 32 registers; of AVX2's 16, products without VNNI need more.
TILE_ROWS: dict[CpuPath, int] = {"avx512_vnni": 12, "avx_vnni": 5, "avx2": 3, "generic": 2}


# ---- activations -----------------------------------------------------------------------------

_SMALLEST_BITS = 0x04000000  # 2**-119 = 1.5e-36, below which 127 / x would soon be infinite
_INF_BITS = 0x7F800000
_ROUNDER = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits
_ROUNDER_BITS = 0x4B400000


def _splat_int(value: int) -> Any:
    return ir.Constant(VI32, [value] * LANES)


def _fold(b: Any, vector: Any, combine: Any) -> Any:
    width = LANES
    while width > 1:
        width //= 2
        kind = ir.VectorType(I32, width)
        halves = [
            b.shuffle_vector(vector, vector, ir.Constant(kind, list(range(at, at + width))))
            for at in (0, width)
        ]
        vector = combine(*halves)
    return b.extract_element(vector, I32(0))


@cache
def make_quantiser(zero: int) -> Any:
    """Device function quantise(v0, v1, record): 32 floats to a record for weights of that zero.

    scale = amax / 127, code = round(x * (127 / amax)) to even; a NaN or an infinity makes the
    scale NaN, and magnitudes below 1.5e-36 count as zero.
    """

    @vector_op(types.void, f32x16, f32x16, types.int64)
    def quantise(b: Any, a: Any) -> Any:
        values = a[:2]
        sizes = [b.and_(b.bitcast(v, VI32), _splat_int(0x7FFFFFFF)) for v in values]

        def larger(x: Any, y: Any) -> Any:
            return b.select(b.icmp_signed(">", x, y), x, y)

        # Of magnitudes as integers: no order of comparing loses a NaN.
        top = _fold(b, larger(*sizes), larger)
        amax = b.bitcast(top, F32)
        is_finite = b.icmp_signed("<", top, I32(_INF_BITS))
        is_live = b.and_(is_finite, b.icmp_signed(">=", top, I32(_SMALLEST_BITS)))
        inverse = b.select(is_live, b.fdiv(F32(127.0), amax), F32(0.0))
        scale = b.select(is_live, b.fdiv(amax, F32(127.0)), F32(0.0))
        scale = b.select(is_finite, scale, F32(float("nan")))
        rounder = ir.Constant(VF32, [_ROUNDER] * LANES)
        codes = []
        for index, value in enumerate(values):
            shifted = b.fadd(b.fmul(value, emit_splat(b, inverse)), rounder)
            codes.append(b.sub(b.bitcast(shifted, VI32), _splat_int(_ROUNDER_BITS)))
            small = b.trunc(codes[-1], ir.VectorType(ir.IntType(8), LANES))
            b.store(small, pointer(b, b.add(a[2], I64(LANES * index)), small.type), align=1)
        total = _fold(b, b.add(*codes), b.add)
        b.store(scale, pointer(b, b.add(a[2], I64(32)), F32), align=4)
        last = b.mul(total, I32(-zero)) if zero else b.fmul(b.sitofp(total, F32), scale)
        b.store(last, pointer(b, b.add(a[2], I64(36)), last.type), align=4)

    return quantise


# ---- the tile --------------------------------------------------------------------------------


class _Integers:
    """The integer sums of a tile's rows over one block, on one path."""

    def __init__(self, b: Any, path: CpuPath, form: BlockFormat) -> None:
        self._b, self._path, self._zero = b, path, form.zero
        self._lanes = CHUNK_LANES[path]
        self.kind = ir.VectorType(I32, self._lanes)
        # Exact with 4 bits only: eight sums of two products of at most 15 * 127 are below 2**15.
        self._pairs = path == "avx2" and form.bits == 4
        self._halves = ir.VectorType(ir.IntType(16), 2 * self._lanes)

    def start(self, record: Any) -> Any:
        """The sum before the first quad."""
        return ir.Constant(self._halves, None) if self._pairs else self._offset(record)

    def _offset(self, record: Any) -> Any:
        return self._spread(record, 36) if self._zero else ir.Constant(self.kind, None)

    def _spread(self, record: Any, offset: int) -> Any:
        b = self._b
        word = b.load(pointer(b, b.add(record, I64(offset)), I32), align=4)
        return splat_i32(b, word, self._lanes)

    def add(self, total: Any, words: Any, record: Any, quad: int) -> Any:
        """total + four products a lane: words of u8 codes times a quad of s8 codes."""
        b, right = self._b, self._spread(record, 4 * quad)
        if not self._pairs:
            return emit_dot(b, self._path, total, words, right)
        octets = ir.VectorType(ir.IntType(8), 4 * self._lanes)
        values = [b.bitcast(words, octets), b.bitcast(right, octets)]
        return b.add(total, call_llvm(b, "llvm.x86.avx2.pmadd.ub.sw", self._halves, values))

    def finish(self, total: Any, record: Any) -> Any:
        """The sum after the last quad, as int32 lanes."""
        if not self._pairs:
            return total
        ones = ir.Constant(self._halves, [1] * self._halves.count)
        name = "llvm.x86.avx2.pmadd.wd"
        wide = call_llvm(self._b, name, self.kind, [total, ones])
        return self._b.add(wide, self._offset(record)) if self._zero else wide


@cache
def make_tile(rows: int, kind: Kind, path: CpuPath) -> Any:
    """Intrinsic for a tile of rows x 16 outputs over all of K.

    tile(x, w, blocks, out, out_stride, columns, ahead): addresses and byte counts. x is records
    [blocks, rows], w the panel's blocks; the first `columns` outputs of a row are stored. Lines
    `ahead` bytes behind the block in work are asked for. Per output, over blocks ascending:
    sum = fma(d * scale_x, float(isum), sum), then with minima sum = fma(m, sum_x, sum).
    """

    def tile(typingctx, x, w, blocks, out, out_stride, columns, ahead):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            for first in range(0, LANES, CHUNK_LANES[path]):
                _emit_lanes(builder, args, rows, kind, path, first)
            return context.get_dummy_value()

        return types.void(*([types.int64] * 7)), codegen

    tile.__name__ = f"tile_{rows}_{kind}_{path}"
    return intrinsic(tile)


def _emit_lanes(b: Any, args: Any, rows: int, kind: Kind, path: CpuPath, first: int) -> None:
    """The tile's outputs first .. first + lanes."""
    x, w, blocks, out, out_stride, columns, ahead = args
    lanes, form = CHUNK_LANES[path], FORMATS[kind]
    floats = ir.VectorType(F32, lanes)
    before, loop, after = b.block, b.append_basic_block("blocks"), b.append_basic_block("summed")
    b.branch(loop)
    b.position_at_end(loop)
    index = b.phi(I64)
    index.add_incoming(I64(0), before)
    sums = [b.phi(floats) for _ in range(rows)]
    for phi in sums:
        phi.add_incoming(ir.Constant(floats, None), before)
    piece = b.add(w, b.mul(index, I64(form.panel_bytes)))
    records = b.add(x, b.mul(index, I64(rows * RECORD_BYTES)))
    if first == 0:
        _emit_prefetches(b, b.add(piece, ahead), form.panel_bytes)
    row_records = [b.add(records, I64(r * RECORD_BYTES)) for r in range(rows)]
    now = _emit_block(b, list(sums), piece, row_records, form, path, first)
    following = b.add(index, I64(1))
    index.add_incoming(following, b.block)
    for phi, value in zip(sums, now, strict=True):
        phi.add_incoming(value, b.block)
    b.cbranch(b.icmp_signed("<", following, blocks), loop, after)
    b.position_at_end(after)
    mask = lanes_below(b, b.sub(columns, I64(first)), lanes)
    for r, value in enumerate(now):
        at = b.add(b.add(out, b.mul(out_stride, I64(r))), I64(4 * first))
        values = [value, pointer(b, at, floats), I32(4), mask]
        call_llvm(b, f"llvm.masked.store.v{lanes}f32.p0", ir.VoidType(), values)


def _emit_prefetches(b: Any, begin: Any, num_bytes: int) -> None:
    for at in range(0, num_bytes, 64):
        where = pointer(b, b.add(begin, I64(at)), I32)
        call_llvm(b, "llvm.prefetch.p0", ir.VoidType(), [where, I32(0), I32(3), I32(1)])


def _emit_block(
    b: Any,
    sums: list[Any],
    piece: Any,
    records: list[Any],
    form: BlockFormat,
    path: CpuPath,
    at: int,
) -> list[Any]:
    lanes = CHUNK_LANES[path]
    floats, halves = ir.VectorType(F32, lanes), ir.VectorType(F16, lanes)
    integers = _Integers(b, path, form)
    totals = [integers.start(record) for record in records]
    for i in range(form.code_bytes // 64):
        where = b.add(piece, I64(64 * i + 4 * at))
        words = b.load(pointer(b, where, integers.kind), align=4)
        quads = [(i, words)]
        if form.bits == 4:
            low = ir.Constant(integers.kind, [0x0F0F0F0F] * lanes)
            high = b.lshr(words, ir.Constant(integers.kind, [4] * lanes))
            quads = [(i, b.and_(words, low)), (i + 4, b.and_(high, low))]
        for quad, codes in quads:
            for r, record in enumerate(records):
                totals[r] = integers.add(totals[r], codes, record, quad)

    def load_halves(offset: int) -> Any:
        where = b.add(piece, I64(form.code_bytes + offset + 2 * at))
        return b.fpext(b.load(pointer(b, where, halves), align=2), floats)

    def spread(record: Any, offset: int) -> Any:
        where = pointer(b, b.add(record, I64(offset)), F32)
        return splat_i32(b, b.load(where, align=4), lanes)

    def fma(x: Any, y: Any, z: Any) -> Any:
        return call_llvm(b, f"llvm.fma.v{lanes}f32", floats, [x, y, z])

    scale = load_halves(0)
    least = load_halves(2 * LANES) if form.has_min else None
    done = []
    for total, record, value in zip(totals, records, sums, strict=True):
        whole = b.sitofp(integers.finish(total, record), floats)
        # Scales first: a large activation's times a large sum might not be finite.
        value = fma(b.fmul(scale, spread(record, 32)), whole, value)
        done.append(value if least is None else fma(least, spread(record, 36), value))
    return done


@cache
def make_tiles(kind: Kind, path: CpuPath) -> Any:
    """Device function run(rows, *tile arguments) that picks the tile of 1..TILE_ROWS rows."""
    names = "x, w, blocks, out, out_stride, columns, ahead"
    lines = [f"def run(rows, {names}):"]
    scope: dict[str, Any] = {"__name__": __name__}
    for rows in range(1, TILE_ROWS[path] + 1):
        lines += [f"    if rows == {rows}:", f"        tile_{rows}({names})"]
        scope[f"tile_{rows}"] = make_tile(rows, kind, path)
    exec("\n".join(lines), scope)
    run = scope["run"]
    run.__qualname__ = f"run_{kind}_{path}"
    return device(run)
