"""Copies rows of bytes. Knows nothing of what they hold."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from octavo_kernels.parallel import kernel
from octavo_kernels.simd import copy_bytes


@kernel
def copy_rows(part, num_parts, x, x_stride, out, out_stride, num_rows, row_bytes):
    """Strides in bytes; parts share the rows."""
    for row in range(part * num_rows // num_parts, (part + 1) * num_rows // num_parts):
        copy_bytes(out + row * out_stride, x + row * x_stride, row_bytes)
