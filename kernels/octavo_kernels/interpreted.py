"""Mends Triton's interpreter where it is wrong on current NumPy; imported for its effect by launch.

Loop bounds read from tensors: its scalars are arrays of one element, which NumPy >= 2.4 takes for
no integer. Products of bfloat16: it multiplies the bit patterns; widened first, exactly, it is
right. Comparisons of scalars: spread over a block they become integers, which are no mask.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from triton import language as tl
from triton.runtime import interpreter

# None where a later Triton has rebuilt this, hopefully right.
_patch_tensor: Any = getattr(interpreter, "_patch_lang_tensor", None)
_dot = interpreter.InterpreterBuilder.create_dot
_splat = interpreter.InterpreterBuilder.create_splat


def _patch_tensor_and_index(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16 or handle.data.dtype != np.uint16:
        return handle
    wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(wide, tl.float32)


def _dot_of_widened(self: Any, a: Any, b: Any, *rest: Any, **named: Any) -> Any:
    return _dot(self, _widened(a), _widened(b), *rest, **named)


def _splat_of_truth(self: Any, ret_ty: Any, arg: Any) -> Any:
    if arg.data.dtype != np.bool_:
        return _splat(self, ret_ty, arg)
    return interpreter.TensorHandle(np.full(ret_ty.shape, arg.data), tl.int1)


if _patch_tensor is not None:
    interpreter._patch_lang_tensor = _patch_tensor_and_index
interpreter.InterpreterBuilder.create_dot = _dot_of_widened
interpreter.InterpreterBuilder.create_splat = _splat_of_truth
