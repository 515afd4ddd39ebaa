"""What the current GPU can do; an H100's answers where there is none. Knows no kernel.

A process works with GPUs of one kind: answers are kept.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

_H100 = (9, 0)
# KiB of a multiprocessor, less the one that each program takes, by compute capability.
_SHARED_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
_LEAST_SHARED_KIB = 99  # 8.6, 8.9, 12.x
_pretended: list[tuple[int, int]] = []  # the last one counts


@contextlib.contextmanager
def pretending(capability: tuple[int, int]) -> Iterator[None]:
    """Inside, answers are those of a GPU of this compute capability, whatever this machine has.

    For listing what would be launched there. Launch choices that were made outside are not asked
    for again: enter it in a process of its own, or with kernels that it has not launched.
    """
    _pretended.append(capability)
    _forget()
    try:
        yield
    finally:
        _pretended.pop()
        _forget()


def _forget() -> None:
    for answer in (capability, is_hopper, can_overlap, shared_bytes, num_multiprocessors):
        answer.cache_clear()


def is_pretended() -> bool:
    return bool(_pretended)


def is_present() -> bool:
    """Whether there is a GPU, or one is pretended."""
    return is_pretended() or torch.cuda.is_available()


@functools.cache
def capability() -> tuple[int, int]:
    """Compute capability, (9, 0) for Hopper."""
    if _pretended:
        return _pretended[-1]
    if not torch.cuda.is_available():
        return _H100
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
def shared_bytes() -> int:
    """Shared memory that a program may take."""
    return shared_bytes_of(capability())


def shared_bytes_of(capability: tuple[int, int]) -> int:
    """The same of any GPU; a new one is taken for one that has little."""
    return _SHARED_KIB.get(capability, _LEAST_SHARED_KIB) << 10


@functools.cache
def num_multiprocessors() -> int:
    if _pretended or not torch.cuda.is_available():
        return 132
    return int(torch.cuda.get_device_properties().multi_processor_count)
