"""Moves K/V blocks between the cache and the host tier, and checks what comes back. Decides
nothing; which request a block belongs to it does not know.

A copy is checked twice over: the sum of its bits (`octavo_kernels.block_move`) and the tag, which
stands for the tokens whose K/V it is, are kept as one number when a block is saved, and must come
to the same when it is loaded. So neither flipped bits nor a slot of other contents is served.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import torch

from octavo.attention.base import KVLayer
from octavo.config import CacheConfig
from octavo.types import BlockMove, SchedulerOutput
from octavo_kernels import block_move

GIB = 1 << 30
_log = logging.getLogger(__name__)


class Loads(Protocol):
    """What a step loads from the host tier."""

    def damaged(self) -> tuple[int, ...]:
        """Blocks whose copy was not what had been saved; to be asked once, when all work of the
        step is known to be done."""


class KVTransfer(Protocol):
    """Executes a step's saves and loads."""

    def apply(self, step: SchedulerOutput) -> Loads:
        """To be called in the order of steps, before anything of the step writes K/V, block copies
        included."""


class Checked:
    """Loads that have been checked."""

    def __init__(self, damaged: tuple[int, ...] = ()) -> None:
        self._damaged = damaged

    def damaged(self) -> tuple[int, ...]:
        return self._damaged


NO_LOADS = Checked()


class NoTransfer:
    """`KVTransfer` without a host tier."""

    def apply(self, step: SchedulerOutput) -> Loads:
        assert not step.saves and not step.loads, "moves without a host tier"
        return NO_LOADS


NO_TRANSFER = NoTransfer()


class CPUTransfer:
    """`KVTransfer` of a CPU, whose host tier is memory beside the cache: reserved, not filled.

    Loading pays here too (measured: 49 blocks of SmolLM2-135M come back, while as many are saved,
    in 0.12 s of processor time; computing their 784 tokens takes 2.1 s).
    """

    def __init__(self, layers: Sequence[KVLayer], *, num_slots: int) -> None:
        self._caches = [cache for layer in layers for cache in layer]
        num_words = block_move.slot_words(self._caches)
        self.slots = torch.empty(num_slots, num_words, dtype=torch.int64)
        self._marks = [0] * num_slots  # sum plus tag of what was saved
        block_move.warm()

    def apply(self, step: SchedulerOutput) -> Loads:
        if step.saves:
            marks = self._move(step.saves, to_slots=True)
            for move, mark in zip(step.saves, marks, strict=True):
                self._marks[move.slot] = mark
        if not step.loads:
            return NO_LOADS
        marks = self._move(step.loads, to_slots=False)
        damaged = [
            move.block
            for move, mark in zip(step.loads, marks, strict=True)
            if mark != self._marks[move.slot]
        ]
        tell_damaged(damaged)
        return Checked(tuple(damaged))

    def _move(self, moves: Sequence[BlockMove], *, to_slots: bool) -> list[int]:
        numbers = torch.tensor([(move.block, move.slot, move.tag) for move in moves])
        sums = block_move.block_move(
            self._caches, slots=self.slots, moves=numbers, to_slots=to_slots
        )
        return sums.tolist()


def tell_damaged(blocks: Sequence[int]) -> None:
    if blocks:
        _log.error(
            "%d K/V blocks came back damaged from host memory; their requests are computed anew",
            len(blocks),
        )


def plan_host_slots(cache: CacheConfig, *, block_bytes: int, available_bytes: int) -> int:
    """Blocks of the host tier that ``kv_offloading_size`` asks for.

    ``block_bytes``: one block over all layers; ``available_bytes``: free memory of the host. Raises
    ValueError for a size that is too small for a block, or larger than what is free.
    """
    if not cache.kv_offloading_size:
        return 0
    wanted = int(cache.kv_offloading_size * GIB)
    num_slots = wanted // block_bytes
    if num_slots < 1:
        raise ValueError(
            f"kv_offloading_size is {cache.kv_offloading_size} GiB, too little for one K/V block "
            f"of {block_bytes / 2**20:.2f} MiB"
        )
    if wanted > available_bytes:
        raise ValueError(
            f"kv_offloading_size is {cache.kv_offloading_size} GiB, more than the "
            f"{available_bytes / GIB:.2f} GiB of free host memory"
        )
    return num_slots
