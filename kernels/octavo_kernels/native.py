"""What numba cannot say: atomics, calls and arguments by address. Knows no pool and no kernel."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic as _numba_intrinsic


def intrinsic(typer: Callable[..., Any]) -> Any:
    """numba's intrinsic, typed for callers: kernels call it with values, without a context."""
    return _numba_intrinsic(typer)


_I64 = ir.IntType(64)


declare: Any = cgutils.get_or_insert_function


def _pointer(builder: Any, address: Any, type_: Any) -> Any:
    return builder.inttoptr(address, type_.as_pointer())


@intrinsic
def atomic_load(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0], _I64), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def atomic_store(typingctx: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _pointer(builder, args[0], _I64), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def atomic_add(typingctx: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, args[0], _I64), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_swap_if(typingctx: Any, address: Any, expected: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pair = builder.cmpxchg(
            _pointer(builder, args[0], _I64), args[1], args[2], "seq_cst", "seq_cst"
        )
        return builder.extract_value(pair, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def pause(typingctx: Any) -> Any:
    """Tells the core that this is a spin loop."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # Not inline assembly: numba sets up no assembly parser.
        machine, void = platform.machine().lower(), ir.VoidType()
        if machine in ("x86_64", "amd64"):
            kind = ir.FunctionType(void, [])
            name, values = "llvm.x86.sse2.pause", []
        elif machine in ("aarch64", "arm64"):
            kind = ir.FunctionType(void, [ir.IntType(32)])
            name, values = "llvm.aarch64.hint", [ir.IntType(32)(1)]
        else:
            return context.get_dummy_value()
        builder.call(declare(builder.module, kind, name), values)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def call_task(typingctx: Any, task: Any, part: Any, num_parts: Any, args_address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I64, _I64, _I64])
        builder.call(_pointer(builder, args[0], kind), args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def arg_int(typingctx: Any, args_address: Any, index: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = _pointer(builder, args[0], _I64)
        return builder.load(builder.gep(base, [args[1]]))

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def arg_float(typingctx: Any, args_address: Any, index: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = _pointer(builder, args[0], ir.DoubleType())
        return builder.load(builder.gep(base, [args[1]]))

    return types.float64(types.int64, types.int64), codegen
