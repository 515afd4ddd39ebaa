"""Pieces of LLVM IR that attention's tile loops are made of. Know no cache and no request."""
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import struct
from typing import Any

from llvmlite import binding, ir

from octavo_kernels.simd import LANES, call_llvm, pointer

TILE = 64  # keys; a tile starts at a multiple of TILE
SUBS = TILE // LANES
MAX_ROWS = 6  # rows of the widest register tile: 6 x 4 accumulators of 16 lanes fill AVX-512
# Tiles of more rows compute longer than memory takes, and asking ahead would only cost them time.
FETCHING_ROWS = 4

F32 = ir.FloatType()
I32 = ir.IntType(32)
I64 = ir.IntType(64)
VEC = ir.VectorType(F32, LANES)
VEC_I32 = ir.VectorType(I32, LANES)

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
MAGIC = 12582912.0  # 1.5 * 2**23: adding it rounds a float to the nearest integer


def const(value: float) -> Any:
    rounded = struct.unpack("f", struct.pack("f", value))[0]
    return ir.Constant(VEC, [ir.Constant(F32, rounded)] * LANES)


def vectors_per_loop() -> int:
    """Key or column vectors of one register tile: 32 wide registers hold four, others one."""
    return SUBS if binding.get_host_cpu_features().get("avx512f", False) else 1


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call_llvm(builder, "llvm.fma.v16f32", VEC, [a, b, c])


def load(builder: Any, address: Any, kind: Any = VEC, align: int = 4) -> Any:
    return builder.load(pointer(builder, address, kind), align=align)


def store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, pointer(builder, address, value.type), align=4)


def offset(builder: Any, address: Any, nbytes: int) -> Any:
    return builder.add(address, I64(nbytes)) if nbytes else address


def emit_exp2(builder: Any, x: Any) -> Any:
    """2**x for x <= 0, exactly 0 below -126.5 and for -inf; NaN stays NaN."""
    low = builder.fcmp_ordered("<", x, const(-127.0))
    x = builder.select(low, const(-127.0), x)
    shifted = builder.fadd(x, const(MAGIC))
    f = builder.fsub(x, builder.fsub(shifted, const(MAGIC)))
    y = const(_EXP2[6])
    for c in reversed(_EXP2[:6]):
        y = fma(builder, y, f, const(c))
    n = builder.add(builder.bitcast(shifted, VEC_I32), ir.Constant(VEC_I32, [127] * LANES))
    scale = builder.bitcast(builder.shl(n, ir.Constant(VEC_I32, [23] * LANES)), VEC)
    return builder.fmul(y, scale)


def emit_max(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def reduce_max(builder: Any, x: Any) -> Any:
    width = LANES
    while width > 1:
        width //= 2
        lanes = [i + width if i < width else i for i in range(LANES)]
        x = emit_max(builder, x, builder.shuffle_vector(x, x, ir.Constant(VEC_I32, lanes)))
    return builder.extract_element(x, I32(0))


def prefetch(builder: Any, address: Any) -> None:
    where = pointer(builder, address, ir.IntType(8))
    call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), [where, I32(0), I32(3), I32(1)])


class Loop:
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


def for_each_row_count(builder: Any, rows: Any, emit: Any) -> None:
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


def addresses(builder: Any, table: Any) -> list[Any]:
    return [load(builder, offset(builder, table, 8 * s), I64, 8) for s in range(SUBS)]


def tile_masks(builder: Any, lo: Any, hi: Any) -> list[Any]:
    """Which of a tile's 64 keys are in [lo, hi), as 4 masks; 0 <= lo < hi <= 64."""
    every, lanes = I64(-1), ir.IntType(LANES)
    below = builder.lshr(every, builder.sub(I64(TILE), hi))
    inside = builder.and_(below, builder.shl(every, lo))
    masks = []
    for s in range(SUBS):
        bits = builder.trunc(builder.lshr(inside, I64(s * LANES)), lanes)
        masks.append(builder.bitcast(bits, ir.VectorType(ir.IntType(1), LANES)))
    return masks
