"""LLVM's 16-lane vectors as numba types, and the emission that kernels share; no kernel here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.datamodel import models
from numba.extending import register_model

from octavo_kernels.parallel import declare, intrinsic

LANES = 16

F32, F16, I1 = ir.FloatType(), ir.HalfType(), ir.IntType(1)
I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
VF32, VI32, VI1 = (ir.VectorType(t, LANES) for t in (F32, I32, I1))
VF16, VI16 = ir.VectorType(F16, LANES), ir.VectorType(I16, LANES)


class VectorType(types.Type):
    """The numba type of a 16-lane vector: element name and LLVM type."""

    def __init__(self, element: str, llvm: ir.VectorType) -> None:
        self.llvm = llvm
        super().__init__(name=f"{element}x{LANES}")


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: VectorType) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)  # type: ignore[no-untyped-call]


f32x16 = VectorType("f32", VF32)
i32x16 = VectorType("i32", VI32)
mask16 = VectorType("i1", VI1)

Emit = Callable[[Any, Any], Any]  # (builder, [LLVM values]) -> LLVM value or None


def vector_op(result: Any, *arguments: Any) -> Callable[[Emit], Any]:
    """Decorator: turns an emitter into a numba intrinsic of the given, fixed types."""

    def make(emit: Emit) -> Any:
        names = ", ".join(f"a{i}" for i in range(len(arguments)))

        def typer(*_: Any) -> Any:
            def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
                value = emit(builder, args)
                return context.get_dummy_value() if value is None else value

            return result(*arguments), codegen

        # numba reads the number of arguments off the signature, so it needs one with names.
        scope: dict[str, Any] = {"typer": typer}
        call = f"typer(context{', ' if names else ''}{names})"
        exec(f"def {emit.__name__}(context{', ' if names else ''}{names}): return {call}", scope)
        typed = scope[emit.__name__]
        typed.__module__, typed.__doc__ = emit.__module__, emit.__doc__
        return intrinsic(typed)

    return make


def pointer(builder: Any, address: Any, type_: Any) -> Any:
    """LLVM pointer of an integer address."""
    return builder.inttoptr(address, type_.as_pointer())


def call_llvm(builder: Any, name: str, result: Any, values: list[Any]) -> Any:
    """Calls an LLVM intrinsic such as `llvm.fma.v16f32`."""
    kind = ir.FunctionType(result, [value.type for value in values])
    return builder.call(declare(builder.module, kind, name), values)


def emit_splat(builder: Any, scalar: Any) -> Any:
    """LLVM: all lanes equal to scalar."""
    kind = ir.VectorType(scalar.type, LANES)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
    zeros = ir.Constant(ir.VectorType(I32, LANES), None)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)


def emit_load(builder: Any, address: Any, dtype: str) -> Any:
    """LLVM: 16 floats widened from `float32`, `bfloat16` or `float16` memory."""
    if dtype == "float32":
        return builder.load(pointer(builder, address, VF32), align=4)
    if dtype == "float16":
        return builder.fpext(builder.load(pointer(builder, address, VF16), align=2), VF32)
    assert dtype == "bfloat16", dtype
    bits = builder.zext(builder.load(pointer(builder, address, VI16), align=2), VI32)
    return builder.bitcast(builder.shl(bits, ir.Constant(VI32, [16] * LANES)), VF32)


def emit_first_lanes(builder: Any, count: Any) -> Any:
    """LLVM: mask of the lanes below an i64 count."""
    ids = ir.Constant(ir.VectorType(I64, LANES), list(range(LANES)))
    return builder.icmp_signed("<", ids, emit_splat(builder, count))
