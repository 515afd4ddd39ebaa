"""What this CPU allows: reading speed, and arithmetic in registers alone. Knows no op of ours.

python -m benchmarks.cpu_limits
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from llvmlite import ir
from numba.core import types

from octavo_kernels import num_threads, set_num_threads
from octavo_kernels.parallel import Kernel, kernel
from octavo_kernels.quant_matmul.cpu_dot import CHUNK_LANES, CpuPath, emit_dot, host_path
from octavo_kernels.vectors import F32, I32, I64, LANES, VF32, VI32, call_llvm, pointer, vector_op

READ_BYTES = 256 << 20
_UNROLL = 8  # vectors that are read a turn
_PARTS_PER_THREAD = 16  # so that a thread that is held up leaves its share to the others


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Best of some runs. A multiplication and its addition are two operations."""

    threads: int
    read_gb_s: float
    read_one_gb_s: float  # of one thread
    int8_gop_s: float
    fp32_gop_s: float
    path: str

    def best_of(self, other: Limits) -> Limits:
        """The faster of two probes of one machine, rate by rate."""
        return dataclasses.replace(
            self,
            **{
                name: max(getattr(self, name), getattr(other, name))
                for name in ("read_gb_s", "read_one_gb_s", "int8_gop_s", "fp32_gop_s")
            },
        )

    def least_ms(self, num_bytes: float, num_ops: float, *, is_int8: bool) -> float:
        """What reading the bytes takes, or the arithmetic, whichever is longer."""
        rate = self.int8_gop_s if is_int8 else self.fp32_gop_s
        return max(num_bytes / self.read_gb_s, num_ops / rate) / 1e6


def _looped(
    b: Any, count: Any, starts: list[Any], turn: Callable[[Any, list[Any]], list[Any]]
) -> list[Any]:
    """LLVM: `count` (at least 1) turns over values that stay in registers; what they end as."""
    before, loop = b.block, b.append_basic_block("loop")
    b.branch(loop)
    b.position_at_end(loop)
    number = b.phi(I64)
    number.add_incoming(I64(0), before)
    values = []
    for start in starts:
        value = b.phi(start.type)
        value.add_incoming(start, before)
        values.append(value)
    found = turn(number, values)
    after = b.add(number, I64(1))
    number.add_incoming(after, b.block)
    for value, new in zip(values, found, strict=True):
        value.add_incoming(new, b.block)
    done = b.append_basic_block("done")
    b.cbranch(b.icmp_signed("<", after, count), loop, done)
    b.position_at_end(done)
    return found


def _folded(b: Any, values: list[Any]) -> Any:
    """One i64 that depends on every integer vector."""
    total = values[0]
    for value in values[1:]:
        total = b.xor(total, value)
    lanes = [b.extract_element(total, I32(i)) for i in range(total.type.count)]
    last = lanes[0]
    for each in lanes[1:]:
        last = b.xor(last, each)
    return b.zext(last, I64)


def _spread(b: Any, kind: ir.VectorType, scalar: Any) -> Any:
    value = ir.Constant(kind, ir.Undefined)
    for i in range(kind.count):
        value = b.insert_element(value, scalar, I32(i))
    return value


@vector_op(types.int64, types.int64, types.int64)
def _read_all(b: Any, a: Any) -> Any:
    """Reads `a[1]` times _UNROLL vectors from an address on."""

    def turn(number: Any, values: list[Any]) -> list[Any]:
        start = b.add(a[0], b.mul(number, I64(4 * LANES * _UNROLL)))
        news = []
        for i, value in enumerate(values):
            at = pointer(b, b.add(start, I64(4 * LANES * i)), VI32)
            news.append(b.xor(value, b.load(at, align=4)))
        return news

    return _folded(b, _looped(b, a[1], [ir.Constant(VI32, None)] * _UNROLL, turn))


def _chains(path: CpuPath) -> int:
    """Sums that are under way at once: enough to hide a latency, few enough for the registers."""
    return {"avx512_vnni": 16, "avx_vnni": 10, "avx2": 5, "generic": 4}[path]


def _dot_loop(path: CpuPath) -> Any:
    @vector_op(types.int64, types.int64)
    def dots(b: Any, a: Any) -> Any:
        """`a[0]` turns of dot products of bytes, `_chains` vectors a turn."""
        kind = ir.VectorType(I32, CHUNK_LANES[path])
        # Not constants, or there would be nothing left to compute.
        left, right = (_spread(b, kind, b.trunc(b.add(a[0], I64(i)), I32)) for i in (3, 5))

        def turn(number: Any, values: list[Any]) -> list[Any]:
            return [emit_dot(b, path, value, left, right) for value in values]

        starts = [ir.Constant(kind, [i] * kind.count) for i in range(_chains(path))]
        return _folded(b, _looped(b, a[0], starts, turn))

    return dots


def _fma_loop(path: CpuPath) -> Any:
    @vector_op(types.int64, types.int64)
    def fmas(b: Any, a: Any) -> Any:
        """`a[0]` turns of fused multiply-adds of 16 floats, `_chains` vectors a turn."""
        left = _spread(b, VF32, b.fdiv(b.sitofp(a[0], F32), b.sitofp(b.add(a[0], I64(1)), F32)))

        def turn(number: Any, values: list[Any]) -> list[Any]:
            return [call_llvm(b, "llvm.fma.v16f32", VF32, [v, left, left]) for v in values]

        starts = [ir.Constant(VF32, [float(i)] * LANES) for i in range(_chains(path))]
        found = _looped(b, a[0], starts, turn)
        return _folded(b, [b.bitcast(value, VI32) for value in found])

    return fmas


@kernel
def read_kernel(part: int, num_parts: int, address: int, turns: int, out: int) -> None:
    """Reads `turns` times _UNROLL vectors a part."""
    start = address + part * turns * 64 * _UNROLL
    _keep(out + 8 * part, _read_all(start, turns))


def _arithmetic(loop: Any, name: str) -> Kernel:
    def body(part: int, num_parts: int, turns: int, out: int) -> None:
        _keep(out + 8 * part, loop(turns))

    body.__name__ = body.__qualname__ = name
    return kernel(body)


@vector_op(types.void, types.int64, types.int64)
def _keep(b: Any, a: Any) -> Any:
    """Stores one int64, so that what it came from is computed."""
    b.store(a[1], pointer(b, a[0], I64), align=8)


def _best_s(call: Callable[[], None], times: int) -> float:
    call()
    best = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best


def _read_gb_s(threads: int, data: torch.Tensor, times: int) -> float:
    set_num_threads(threads)
    parts = threads * _PARTS_PER_THREAD
    out = torch.zeros(parts, dtype=torch.int64)
    turns = data.nbytes // parts // (64 * _UNROLL)
    seconds = _best_s(lambda: read_kernel(parts, data.data_ptr(), turns, out.data_ptr()), times)
    return parts * turns * 64 * _UNROLL / seconds / 1e9


def _rate(body: Kernel, threads: int, ops_per_turn: int, times: int) -> float:
    parts, turns = threads * _PARTS_PER_THREAD, 100_000
    out = torch.zeros(parts, dtype=torch.int64)
    seconds = _best_s(lambda: body(parts, turns, out.data_ptr()), times)
    return parts * turns * ops_per_turn / seconds / 1e9


def measure(*, threads: int, times: int = 7, read_bytes: int = READ_BYTES) -> Limits:
    """Probes the machine with 1 thread and with ``threads``, which stays set. Takes a second."""
    path = host_path()
    data = torch.ones(read_bytes // 8, dtype=torch.int64)  # written, or no page of it exists
    one = _read_gb_s(1, data, times)
    every = _read_gb_s(threads, data, times) if threads > 1 else one
    chains = _chains(path)
    dots = _arithmetic(_dot_loop(path), f"dots_{path}")
    fmas = _arithmetic(_fma_loop(path), f"fmas_{path}")
    return Limits(
        threads=threads,
        read_gb_s=round(every, 2),
        read_one_gb_s=round(one, 2),
        int8_gop_s=round(_rate(dots, threads, 8 * CHUNK_LANES[path] * chains, times), 1),
        fp32_gop_s=round(_rate(fmas, threads, 2 * LANES * chains, times), 1),
        path=path,
    )


if __name__ == "__main__":
    print(measure(threads=num_threads()))
