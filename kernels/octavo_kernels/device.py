"""What the current GPU can do; an H100's answers where there is none. Knows no kernel.

A process works with GPUs of one kind: answers are kept.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def capability() -> tuple[int, int]:
    """Compute capability, (9, 0) for Hopper."""
    if not torch.cuda.is_available():
        return 9, 0
    major, minor = torch.cuda.get_device_capability()
    return major, minor


@functools.cache
def is_hopper() -> bool:
    """Whether kernels written for Hopper run: WGMMA is of 9.x alone, not of what came later."""
    return capability()[0] == 9


@functools.cache
def can_overlap() -> bool:
    """Whether a launch may start while its predecessor still runs (dependent launches)."""
    return capability() >= (9, 0)


@functools.cache
def num_multiprocessors() -> int:
    if not torch.cuda.is_available():
        return 132
    return int(torch.cuda.get_device_properties().multi_processor_count)
