"""Emits dot products of four bytes into int32 lanes for each kind of CPU; knows no layout.

Every path gives the same integers: none uses `vpmaddubsw`, which saturates.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, get_args

import llvmlite.binding
from llvmlite import ir

from octavo_kernels.vectors import I32, I64, call_llvm

CpuPath = Literal["avx512_vnni", "avx_vnni", "avx2", "generic"]
PATHS: tuple[CpuPath, ...] = get_args(CpuPath)
# int32 lanes of one register of the path (LLVM splits the generic path's as it must).
CHUNK_LANES: dict[CpuPath, int] = {"avx512_vnni": 16, "avx_vnni": 8, "avx2": 8, "generic": 16}


@lru_cache(maxsize=1)
def _features() -> dict[str, bool]:
    try:
        return dict(llvmlite.binding.get_host_cpu_features())
    except RuntimeError:  # LLVM cannot tell on this system
        return {}


@lru_cache(maxsize=1)
def supported_paths() -> tuple[CpuPath, ...]:
    """What this machine can run, the fastest first."""
    have = {name for name, is_there in _features().items() if is_there}
    is_evex = {"avx512vnni", "avx512vl", "avx512bw", "avx512dq"} <= have
    able: dict[CpuPath, bool] = {
        "avx512_vnni": is_evex,
        "avx_vnni": "avxvnni" in have or is_evex,
        "avx2": "avx2" in have,
        "generic": True,
    }
    return tuple(path for path in PATHS if able[path])


def host_path() -> CpuPath:
    """The fastest path of this machine."""
    return supported_paths()[0]


def splat_i32(b: Any, scalar: Any, lanes: int) -> Any:
    """LLVM: `lanes` copies of a scalar."""
    kind = ir.VectorType(scalar.type, lanes)
    first = b.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
    zeros = ir.Constant(ir.VectorType(I32, lanes), None)
    return b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)


def lanes_below(b: Any, count: Any, lanes: int) -> Any:
    """LLVM: mask of the lanes below an i64 count."""
    ids = ir.Constant(ir.VectorType(I64, lanes), list(range(lanes)))
    return b.icmp_signed("<", ids, splat_i32(b, count, lanes))


def emit_dot(b: Any, path: CpuPath, total: Any, unsigned: Any, signed: Any) -> Any:
    """LLVM: total + u0 s0 + u1 s1 + u2 s2 + u3 s3 per int32 lane, wrapping.

    All three are vectors of CHUNK_LANES[path] int32; a lane of `unsigned` is four bytes 0..255, a
    lane of `signed` four bytes -128..127, lowest first.
    """
    lanes = CHUNK_LANES[path]
    kind = ir.VectorType(I32, lanes)
    if path in ("avx512_vnni", "avx_vnni"):
        name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
        return call_llvm(b, name, kind, [total, unsigned, signed])
    if path == "avx2":
        return _emit_pairs(b, total, unsigned, signed)
    for byte in range(4):
        up, down = _same(kind, 24 - 8 * byte), _same(kind, 24)
        left = b.and_(b.lshr(unsigned, _same(kind, 8 * byte)), _same(kind, 255))
        total = b.add(total, b.mul(left, b.ashr(b.shl(signed, up), down)))
    return total


def _same(kind: ir.VectorType, value: int) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def _emit_pairs(b: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """Even bytes and odd bytes as int16, whose products `vpmaddwd` adds in pairs exactly."""
    words, halves = ir.VectorType(I32, 8), ir.VectorType(ir.IntType(16), 16)
    low = _same(words, 0x00FF00FF)
    lefts = [b.and_(unsigned, low), b.and_(b.lshr(unsigned, _same(words, 8)), low)]
    both, by = b.bitcast(signed, halves), _same(halves, 8)
    rights = [b.ashr(b.shl(both, by), by), b.ashr(both, by)]
    for left, right in zip(lefts, rights, strict=True):
        values = [b.bitcast(left, halves), right]
        total = b.add(total, call_llvm(b, "llvm.x86.avx2.pmadd.wd", words, values))
    return total
