"""What a step reads, made from persistent tables: on a GPU `step_inputs.gpu`, on a CPU here."""

from __future__ import annotations

from octavo_kernels import parallel
from octavo_kernels.step_inputs.cpu import BAD_COUNT, NO_BLOCK, fill_step

__all__ = ["BAD_COUNT", "NO_BLOCK", "fill_step", "kernels"]


def kernels() -> tuple[parallel.Kernel, ...]:
    """What a server on a CPU calls."""
    return (fill_step,)
