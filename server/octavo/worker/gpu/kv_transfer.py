"""Moves K/V blocks between a GPU's cache and pinned host memory. Decides nothing.

All on the engine's one stream, by a kernel that reads and writes host memory across the bus: one
launch for a step's saves and one for its loads, with the sums of the bits (`worker.kv_transfer`
says what for) taken on the way, which costs the GPU next to nothing beside the bus. Nothing waits:
whether the loads were right is known when the step's other results are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.attention.base import KVLayer
from octavo.types import BlockMove, SchedulerOutput
from octavo.worker.gpu.landing import Landings
from octavo.worker.gpu.runtime import Runtime
from octavo.worker.kv_transfer import GIB, NO_LOADS, Loads, tell_damaged
from octavo_kernels.block_move import slot_words
from octavo_kernels.block_move.gpu import addresses_of, block_move

# Pinned memory comes in powers of two; in pieces of this size next to nothing is wasted.
_PIECE_BYTES = GIB
_MOVE_WORDS = 3  # block, slot, tag


class GpuTransfer:
    """`KVTransfer` of a GPU. Pins ``num_slots`` blocks of host memory at once.

    ``layers``: whose caches all have blocks of one size.
    """

    def __init__(self, layers: Sequence[KVLayer], *, num_slots: int, runtime: Runtime) -> None:
        assert num_slots > 0
        self._runtime = runtime
        self._caches = [cache for layer in layers for cache in layer]
        num_words = slot_words(self._caches)
        self.slots = _pinned_slots(num_slots, num_words, runtime)
        device = runtime.device
        self._cache_addresses = addresses_of(self._caches, device=device)
        self._slot_addresses = addresses_of(self.slots, device=device)
        self._marks = torch.zeros(num_slots, dtype=torch.int64, device=device)  # of what was saved
        self._landings = Landings(runtime)
        self._unused_words: list[Tensor] = []  # pinned, for moves on their way to the device
        self._try_out()

    def apply(self, step: SchedulerOutput) -> Loads:
        """As the protocol. ``damaged()`` of what is returned is to be asked, whatever the step
        moves, and not before an event recorded after this call has passed."""
        saves, loads = step.saves, step.loads
        if not saves and not loads:
            return NO_LOADS
        host, moves = self._uploaded((*saves, *loads))
        if saves:
            saved = moves[: len(saves)]
            marks = self._move(saved, to_slots=True)
            self._marks.index_copy_(0, saved[:, 1], marks)
        flags = None
        if loads:
            loaded = moves[len(saves) :]
            marks = self._move(loaded, to_slots=False)
            is_wrong = marks != self._marks.index_select(0, loaded[:, 1])
            flags = self._landings.fetch(is_wrong.to(torch.int32))
        return _Underway(self, blocks=[move.block for move in loads], words=host, flags=flags)

    def _try_out(self) -> None:
        """First use of everything, while nobody waits; of block 0, which holds nothing yet."""
        move = BlockMove(block=0, slot=0, tag=1)
        loads = self.apply(SchedulerOutput(step=0, saves=(move,), loads=(move,)))
        event = self._runtime.event()
        event.record()
        event.wait()
        if loads.damaged():
            raise RuntimeError("the GPU does not find in pinned host memory what it wrote there")

    def _uploaded(self, moves: Sequence[BlockMove]) -> tuple[Tensor, Tensor]:
        """[n, 3] int64 on the device, and the pinned words that they are copied from."""
        size = _MOVE_WORDS * len(moves)
        fitting = [words for words in self._unused_words if words.shape[0] >= size]
        if fitting:
            host = min(fitting, key=len)
            self._unused_words = [words for words in self._unused_words if words is not host]
        else:
            host = self._runtime.host_tensor(1 << (size - 1).bit_length(), torch.int64)
        host[:size] = torch.tensor([(m.block, m.slot, m.tag) for m in moves]).view(-1)
        device = torch.empty(size, dtype=torch.int64, device=self._runtime.device)
        device.copy_(host[:size], non_blocking=True)
        return host, device.view(-1, _MOVE_WORDS)

    def _move(self, moves: Tensor, *, to_slots: bool) -> Tensor:
        return block_move(
            self._caches,
            cache_addresses=self._cache_addresses,
            slot_addresses=self._slot_addresses,
            moves=moves,
            to_slots=to_slots,
        )

    def _finish(self, words: Tensor, flags: Tensor | None, blocks: Sequence[int]) -> list[int]:
        self._unused_words.append(words)
        if flags is None:
            return []
        are_wrong = flags[: len(blocks)].tolist()
        self._landings.give_back(flags)
        return [block for block, is_wrong in zip(blocks, are_wrong, strict=True) if is_wrong]


class _Underway:
    """Moves of a step in flight."""

    def __init__(
        self, transfer: GpuTransfer, *, blocks: Sequence[int], words: Tensor, flags: Tensor | None
    ) -> None:
        self._transfer = transfer
        self._blocks = blocks
        self._words = words
        self._flags = flags

    def damaged(self) -> tuple[int, ...]:
        found = self._transfer._finish(self._words, self._flags, self._blocks)
        tell_damaged(found)
        return tuple(found)


def _pinned_slots(num_slots: int, num_words: int, runtime: Runtime) -> list[Tensor]:
    """[num_words] int64 each, next to each other in pieces of at most `_PIECE_BYTES`."""
    per_piece = max(1, _PIECE_BYTES // (num_words * 8))
    slots: list[Tensor] = []
    while len(slots) < num_slots:
        count = min(per_piece, num_slots - len(slots))
        piece = runtime.host_tensor(count * num_words, torch.int64)
        slots += piece.view(count, num_words).unbind()
    return slots
