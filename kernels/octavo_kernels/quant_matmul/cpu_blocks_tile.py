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
from octavo_kernels.quant_matmul.cpu_records import CHUNK_ROWS, record_bytes
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

# Of the largest tile. With AVX-512 12 rows by two panels have their integer sums in 24 of 32
# registers and their float sums in the first-level cache. Of AVX2's 16 registers products without
# VNNI need more than those with it.
_TILE_ROWS: dict[CpuPath, int] = {"avx512_vnni": 12, "avx_vnni": 5, "avx2": 3, "generic": 2}
# Into the second-level cache, which holds far more than is under way.
_LEVEL = 2
SUM_BYTES = 4 * LANES  # of a row in a tile's sums of a panel
PANEL_SUMS_BYTES = CHUNK_ROWS * SUM_BYTES  # from a panel's sums to those of the tile's next panel


def tile_height(path: CpuPath) -> int:
    """Rows of the largest tile."""
    return _TILE_ROWS[path]


def tile_panels(path: CpuPath) -> int:
    """Panels that a tile takes at once: each broadcast of activations serves all."""
    return 2 if path == "avx512_vnni" else 1


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

    def quad(self, record: Any, quad: int) -> Any:
        """Four s8 codes of a record in every lane."""
        return self._spread(record, 4 * quad)

    def add(self, total: Any, words: Any, right: Any) -> Any:
        """total + four products a lane: words of u8 codes times a quad of s8 codes."""
        b = self._b
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

    def words(self, i: int, kind: ir.VectorType) -> list[tuple[int, Any]]:
        """The i-th words as codes, with the quads of K that they are for."""
        b, where = self._b, self._b.add(self._at, I64(64 * i + 4 * self._first))
        words = b.load(pointer(b, where, kind), align=4)
        if self._form.bits == 8:
            return [(i, words)]
        low = ir.Constant(kind, [0x0F0F0F0F] * self._lanes)
        high = b.lshr(words, ir.Constant(kind, [4] * self._lanes))
        return [(i, b.and_(words, low)), (i + 4, b.and_(high, low))]

    def halves(self, offset: int) -> Any:
        b, kind = self._b, ir.VectorType(F16, self._lanes)
        where = b.add(self._at, I64(self._form.code_bytes + offset + 2 * self._first))
        return b.fpext(b.load(pointer(b, where, kind), align=2), self._floats)


class _Tile:
    """A tile's loop over blocks, for the path's lanes from the output `first` on."""

    def __init__(
        self, b: Any, args: list[Any], rows: int, kind: Kind, path: CpuPath, first: int
    ) -> None:
        self._b, self._rows, self._path, self._first = b, rows, path, first
        self._form, self._lanes = FORMATS[kind], CHUNK_LANES[path]
        self._panels = tile_panels(path)
        self._floats = ir.VectorType(F32, self._lanes)
        self._x, self._x_stride, w, v, self._blocks, self._out, fetch_w, fetch_v, span = args
        self._weights, self._fetches = (w, v)[: self._panels], (fetch_w, fetch_v)[: self._panels]
        self._span = span
        # Else they would be spilled, and that of a register or two more than need be.
        self._in_memory = self._panels > 1

    def emit(self) -> None:
        """Emits all of it."""
        b, zero = self._b, ir.Constant(self._floats, None)
        places = [self._place(p, r) for p in range(self._panels) for r in range(self._rows)]
        for place in places if self._in_memory else ():
            b.store(zero, place, align=4)
        before, loop, after = b.block, b.append_basic_block("blocks"), b.append_basic_block("end")
        b.branch(loop)
        b.position_at_end(loop)
        index = b.phi(I64)
        index.add_incoming(I64(0), before)
        phis = [] if self._in_memory else [b.phi(self._floats) for _ in places]
        for phi in phis:
            phi.add_incoming(zero, before)
        if self._first == 0:
            self._emit_fetches(index)
        sums = self._emit_block(index, phis, places)
        following = b.add(index, I64(1))
        index.add_incoming(following, b.block)
        for phi, value in zip(phis, sums, strict=True):
            phi.add_incoming(value, b.block)
        b.cbranch(b.icmp_signed("<", following, self._blocks), loop, after)
        b.position_at_end(after)
        for value, place in zip(sums, places if phis else (), strict=True):
            b.store(value, place, align=4)

    def _place(self, panel: int, row: int) -> Any:
        at = panel * PANEL_SUMS_BYTES + row * SUM_BYTES + 4 * self._first
        return pointer(self._b, self._b.add(self._out, I64(at)), self._floats)

    def _spread(self, record: Any, offset: int) -> Any:
        where = pointer(self._b, self._b.add(record, I64(offset)), F32)
        return splat_i32(self._b, self._b.load(where, align=4), self._lanes)

    def _fma(self, x: Any, y: Any, z: Any) -> Any:
        return call_llvm(self._b, f"llvm.fma.v{self._lanes}f32", self._floats, [x, y, z])

    def _emit_fetches(self, index: Any) -> None:
        """Asks for the next `span` bytes of what each panel fetches, line by line."""
        b, done = self._b, self._b.mul(index, self._span)
        before, loop, after = b.block, b.append_basic_block("fetch"), b.append_basic_block("block")
        b.cbranch(b.icmp_signed(">", self._span, I64(0)), loop, after)
        b.position_at_end(loop)
        at = b.phi(I64)
        at.add_incoming(I64(0), before)
        for fetch in self._fetches:
            where = pointer(b, b.add(b.add(fetch, done), at), I32)
            call_llvm(b, "llvm.prefetch.p0", ir.VoidType(), [where, I32(0), I32(_LEVEL), I32(1)])
        following = b.add(at, I64(64))
        at.add_incoming(following, loop)
        b.cbranch(b.icmp_signed("<", following, self._span), loop, after)
        b.position_at_end(after)

    def _emit_block(self, index: Any, phis: list[Any], places: list[Any]) -> list[Any]:
        """Emits the sums so far plus a block: of phis, or where there are none at their places."""
        b, form, path, rows = self._b, self._form, self._path, range(self._rows)
        shift = b.mul(index, I64(form.panel_bytes))
        pieces = [_Piece(b, b.add(w, shift), form, path, self._first) for w in self._weights]
        record = b.add(self._x, b.mul(index, self._x_stride))
        records = [b.add(record, I64(r * record_bytes(form.block))) for r in rows]
        integers = _Integers(b, path, form)
        totals = [[integers.start(record) for record in records] for _ in pieces]
        for i in range(form.code_bytes // 64):
            for words in zip(*(piece.words(i, integers.kind) for piece in pieces), strict=True):
                quad = words[0][0]
                for r, record in enumerate(records):
                    right = integers.quad(record, quad)
                    for mine, (_, codes) in zip(totals, words, strict=True):
                        mine[r] = integers.add(mine[r], codes, right)
        scales = [piece.halves(0) for piece in pieces]
        least = [piece.halves(2 * LANES) for piece in pieces] if form.has_min else []
        sums = [None] * len(places)
        for r, record in enumerate(records):
            for p, mine in enumerate(totals):
                i = p * self._rows + r
                value = phis[i] if phis else b.load(places[i], align=4)
                whole = b.sitofp(integers.finish(mine[r], record), self._floats)
                # Scales first: a large activation's times a large sum might not be finite.
                step = b.fmul(scales[p], self._spread(record, form.block))
                value = self._fma(step, whole, value)
                if least:
                    value = self._fma(least[p], self._spread(record, form.block + 4), value)
                if not phis:
                    b.store(value, places[i], align=4)
                sums[i] = value
        return sums if phis else []


@cache
def make_tile(rows: int, kind: Kind, path: CpuPath) -> Any:
    """Intrinsic for a tile of rows x 16 or 32 outputs (`tile_panels`) over all of K.

    tile(x, x_stride, w, v, blocks, out, fetch_w, fetch_v, span): addresses and byte counts. x is a
    row's records and x_stride from one block to the next, w and v the panels' blocks, out the sums
    [panels][CHUNK_ROWS][16]. With each block the next `span` bytes from fetch_w and fetch_v on are
    asked for, with 0 none. Of one panel v and fetch_v are not looked at. Per output, over blocks
    ascending: sum = fma(d * scale_x, float(isum), sum), with minima then sum = fma(m, sum_x, sum).
    """

    def tile(typingctx, x, x_stride, w, v, blocks, out, fetch_w, fetch_v, span):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            for first in range(0, LANES, CHUNK_LANES[path]):
                _Tile(builder, list(args), rows, kind, path, first).emit()
            return context.get_dummy_value()

        return types.void(*([types.int64] * 9)), codegen

    tile.__name__ = f"tile_{rows}_{kind}_{path}"
    return intrinsic(tile)


@cache
def make_tiles(kind: Kind, path: CpuPath) -> Any:
    """Device function run(rows, *tile arguments) for two panels and 1..tile_height rows.

    Where a tile takes one panel it runs twice; v may be 0 where there is no second panel.
    """
    names = "x, x_stride, w, v, blocks, out, fetch_w, fetch_v, span"
    scope: dict[str, Any] = {"__name__": __name__}
    choices = []
    for rows in range(1, tile_height(path) + 1):
        scope[f"tile_{rows}"] = make_tile(rows, kind, path)
        choices += [f"if rows == {rows}:", f"    tile_{rows}({names})"]
    if tile_panels(path) == 2:
        body = ["v = v if v != 0 else w", *choices]
    else:  # One place that calls: tiles are long to compile.
        body = ["for _ in range(1 if v == 0 else 2):", *(f"    {line}" for line in choices)]
        body += [f"    w, fetch_w, out = v, fetch_v, out + {PANEL_SUMS_BYTES}"]
    lines = [f"def run(rows, {names}):", *(f"    {line}" for line in body)]
    exec("\n".join(lines), scope)
    run = scope["run"]
    run.__qualname__ = f"run_{kind}_{path}"
    return device(run)
