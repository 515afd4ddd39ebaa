"""Copies equal-sized blocks between places of one buffer. Knows nothing of what they hold."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from octavo_kernels.parallel import kernel
from octavo_kernels.simd import copy_bytes, get_i64


@kernel
def copy_blocks(part, num_parts, base, block_bytes, src, dst, count):
    """Parts share each block, so that one long copy uses all threads and order is kept per byte."""
    grain = 64
    lines = (block_bytes + grain - 1) // grain
    begin = min(block_bytes, part * lines // num_parts * grain)
    end = min(block_bytes, (part + 1) * lines // num_parts * grain)
    for i in range(count):
        source, target = get_i64(src + 8 * i), get_i64(dst + 8 * i)
        if source != target:
            copy_bytes(
                base + target * block_bytes + begin,
                base + source * block_bytes + begin,
                end - begin,
            )
