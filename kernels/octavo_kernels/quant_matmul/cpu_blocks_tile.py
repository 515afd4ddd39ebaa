"""Emits the register tile over blocks of 4- and 8-bit weights.

Knows one panel and one chunk of rows; no layout beyond, no tensors.

A block is 32 elements of K, of `q8_64` 64. Its weights are one piece of a panel of 16 outputs:
32-bit words of four k for each output, [4][16] words for 4 bits (word i holds quad i in its low
nibbles and quad 4 + i in its high ones) or [8][16] (`q8_64` [16][16]) for 8 bits (codes + 128),
then 16 float16 scales and, for `q4_1`, 16 float16 minima. Its activations are records
(`cpu_records`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

from llvmlite import ir
from numba.core import types

from octavo_kernels.native import intrinsic
from octavo_kernels.parallel import device
from octavo_kernels.quant_matmul.cpu_dot import (
    CHUNK_LANES,
    CpuPath,
    emit_dot,
    splat_i32,
)
from octavo_kernels.quant_matmul.cpu_records import record_bytes
from octavo_kernels.vectors import F16, F32, I32, I64, LANES, call_llvm, pointer

Kind = Literal["q4_0", "q4_1", "q8_0", "q8_64"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFormat:
    """How a kind of weight is stored, in panels and, where such exist, in GGUF files."""

    bits: int
    zero: int  # the code of weight 0; 0 where blocks have minima instead
    block: int = 32  # elements of K that share a scale

    @property
    def code_bytes(self) -> int:
        """Of a block's codes for 16 outputs."""
        return LANES * self.block * self.bits // 8

    @property
    def has_min(self) -> bool:
        """Whether w = d q + m rather than d (q - zero)."""
        return self.zero == 0

    @property
    def panel_bytes(self) -> int:
        """Of a block for 16 outputs."""
        return LANES * self.file_bytes

    @property
    def file_bytes(self) -> int:
        """Of a block of one output."""
        return self.block * self.bits // 8 + 2 * (1 + self.has_min)


FORMATS: dict[Kind, BlockFormat] = {
    "q4_0": BlockFormat(bits=4, zero=8),
    "q4_1": BlockFormat(bits=4, zero=0),
    "q8_0": BlockFormat(bits=8, zero=128),
    "q8_64": BlockFormat(bits=8, zero=128, block=64),
}
# What GGUF files have too, in blocks of that many elements.
FiledKind = Literal["q4_0", "q4_1", "q8_0"]
FILED: tuple[FiledKind, ...] = get_args(FiledKind)
FILED_BLOCK = 32

# Of the largest tile, which has an integer and a float sum for each row and spills nothing: 12
# rows fill 29 of AVX-512's 32 registers; of AVX2's 16, products without VNNI need more.
_TILE_ROWS: dict[CpuPath, int] = {"avx512_vnni": 12, "avx_vnni": 5, "avx2": 3, "generic": 2}
# With this many the float sums of a few live in the first-level cache, which costs less than
# unpacking 4-bit weights for two tiles; and blocks of 64 touch them half as often.
_TALL_ROWS = 16


def tile_height(kind: Kind, path: CpuPath) -> int:
    """Rows of the largest tile."""
    is_tall = path == "avx512_vnni" and kind != "q8_0"
    return _TALL_ROWS if is_tall else _TILE_ROWS[path]


class _Integers:
    """The integer sums of a tile's rows over one block, on one path."""

    def __init__(self, b: Any, path: CpuPath, form: BlockFormat) -> None:
        self._b, self._path, self._zero = b, path, form.zero
        self._offset_at = form.block + 4
        self._lanes = CHUNK_LANES[path]
        self.kind = ir.VectorType(I32, self._lanes)
        # Exact with 4 bits only: eight sums of two products of at most 15 * 127 are below 2**15.
        self._pairs = path == "avx2" and form.bits == 4
        self._halves = ir.VectorType(ir.IntType(16), 2 * self._lanes)

    def start(self, record: Any) -> Any:
        """The sum before the first quad."""
        return ir.Constant(self._halves, None) if self._pairs else self._offset(record)

    def _offset(self, record: Any) -> Any:
        return self._spread(record, self._offset_at) if self._zero else ir.Constant(self.kind, None)

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


class _Piece:
    """A block's weights for the path's lanes from the output `first` on."""

    def __init__(self, b: Any, at: Any, form: BlockFormat, path: CpuPath, first: int) -> None:
        self._b, self._at, self._form, self._path = b, at, form, path
        self._first, self._lanes = first, CHUNK_LANES[path]
        self._floats = ir.VectorType(F32, self._lanes)

    def _words(self, i: int, kind: ir.VectorType) -> list[tuple[int, Any]]:
        """The i-th words as codes, with the quads of K that they are for."""
        b, where = self._b, self._b.add(self._at, I64(64 * i + 4 * self._first))
        words = b.load(pointer(b, where, kind), align=4)
        if self._form.bits == 8:
            return [(i, words)]
        low = ir.Constant(kind, [0x0F0F0F0F] * self._lanes)
        high = b.lshr(words, ir.Constant(kind, [4] * self._lanes))
        return [(i, b.and_(words, low)), (i + 4, b.and_(high, low))]

    def _halves(self, offset: int) -> Any:
        b, kind = self._b, ir.VectorType(F16, self._lanes)
        where = b.add(self._at, I64(self._form.code_bytes + offset + 2 * self._first))
        return b.fpext(b.load(pointer(b, where, kind), align=2), self._floats)

    def _spread(self, record: Any, offset: int) -> Any:
        where = pointer(self._b, self._b.add(record, I64(offset)), F32)
        return splat_i32(self._b, self._b.load(where, align=4), self._lanes)

    def _fma(self, x: Any, y: Any, z: Any) -> Any:
        return call_llvm(self._b, f"llvm.fma.v{self._lanes}f32", self._floats, [x, y, z])

    def emit_sums(self, values: list[Any], records: list[Any]) -> list[Any]:
        """Emits the sums of some rows so far, plus this block."""
        b, integers = self._b, _Integers(self._b, self._path, self._form)
        totals = [integers.start(record) for record in records]
        for i in range(self._form.code_bytes // 64):
            for quad, codes in self._words(i, integers.kind):
                for r, record in enumerate(records):
                    totals[r] = integers.add(totals[r], codes, record, quad)
        scale = self._halves(0)
        least = self._halves(2 * LANES) if self._form.has_min else None
        done = []
        for total, record, value in zip(totals, records, values, strict=True):
            whole = b.sitofp(integers.finish(total, record), self._floats)
            # Scales first: a large activation's times a large sum might not be finite.
            step = b.fmul(scale, self._spread(record, self._form.block))
            value = self._fma(step, whole, value)
            if least is not None:
                value = self._fma(least, self._spread(record, self._form.block + 4), value)
            done.append(value)
        return done


@cache
def make_tile(rows: int, kind: Kind, path: CpuPath) -> Any:
    """Intrinsic for a tile of rows x 16 outputs over all of K.

    tile(x, x_stride, w, blocks, out, out_stride, ahead): addresses and byte counts. x is a row's
    records and x_stride from one block to the next, w the panel's blocks. Lines `ahead` bytes
    behind the block in work are asked for, with 0 none. Per output, over blocks ascending:
    sum = fma(d * scale_x, float(isum), sum), then with minima sum = fma(m, sum_x, sum).
    """

    def tile(typingctx, x, x_stride, w, blocks, out, out_stride, ahead):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            for first in range(0, LANES, CHUNK_LANES[path]):
                _emit_lanes(builder, args, rows, kind, path, first)
            return context.get_dummy_value()

        return types.void(*([types.int64] * 7)), codegen

    tile.__name__ = f"tile_{rows}_{kind}_{path}"
    return intrinsic(tile)


def _emit_lanes(b: Any, args: Any, rows: int, kind: Kind, path: CpuPath, first: int) -> None:
    """The tile's outputs first .. first + lanes."""
    x, x_stride, w, blocks, out, out_stride, ahead = args
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
    record = b.add(x, b.mul(index, x_stride))
    if first == 0:
        with b.if_then(b.icmp_signed("!=", ahead, I64(0))):
            _emit_prefetches(b, b.add(piece, ahead), form.panel_bytes)
    records = [b.add(record, I64(r * record_bytes(form.block))) for r in range(rows)]
    now = _Piece(b, piece, form, path, first).emit_sums(list(sums), records)
    following = b.add(index, I64(1))
    index.add_incoming(following, b.block)
    for phi, value in zip(sums, now, strict=True):
        phi.add_incoming(value, b.block)
    b.cbranch(b.icmp_signed("<", following, blocks), loop, after)
    b.position_at_end(after)
    for r, value in enumerate(now):
        at = b.add(b.add(out, b.mul(out_stride, I64(r))), I64(4 * first))
        b.store(value, pointer(b, at, floats), align=4)


def _emit_prefetches(b: Any, begin: Any, num_bytes: int) -> None:
    for at in range(0, num_bytes, 64):
        where = pointer(b, b.add(begin, I64(at)), I32)
        call_llvm(b, "llvm.prefetch.p0", ir.VoidType(), [where, I32(0), I32(3), I32(1)])


@cache
def make_tiles(kind: Kind, path: CpuPath) -> Any:
    """Device function run(rows, *tile arguments) that picks the tile of 1..tile_height rows."""
    names = "x, x_stride, w, blocks, out, out_stride, ahead"
    lines = [f"def run(rows, {names}):"]
    scope: dict[str, Any] = {"__name__": __name__}
    for rows in range(1, tile_height(kind, path) + 1):
        lines += [f"    if rows == {rows}:", f"        tile_{rows}({names})"]
        scope[f"tile_{rows}"] = make_tile(rows, kind, path)
    exec("\n".join(lines), scope)
    run = scope["run"]
    run.__qualname__ = f"run_{kind}_{path}"
    return device(run)
