"""Where evicted K/V blocks go: which slot of host memory holds which contents. Knows no bytes.

Moves are decided here and in `KVCacheManager`, and executed by the worker in the order of steps;
within a step all saves, then all loads, in any order among themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from octavo.types import BlockMove


def tag_of(key: bytes) -> int:
    """The int64 under which the contents of this key are saved and loaded."""
    return int.from_bytes(key[:8], "little", signed=True)


@dataclass(slots=True)
class Moves:
    """What a step moves between the cache and the host tier, by the contents' key."""

    saves: dict[bytes, BlockMove] = field(default_factory=dict)
    loads: dict[bytes, BlockMove] = field(default_factory=dict)


class HostTier:
    """Copies of evicted blocks, found by the same keys as the blocks themselves.

    A copy stays when it is loaded: the next eviction of that block then moves nothing. The least
    recently used copy gives way, but never to a save of the very step that saves or loads it:
    until `take_moves` it is pinned, as the moves of a step come in no order.

    Args:
        num_slots: blocks that fit; 0 = no tier.
    """

    __slots__ = ("_pinned", "_unused", "num_slots", "pending", "slots")

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.slots: dict[bytes, int] = {}  # from the least to the most recently used
        self.pending = Moves()
        self._unused = list(range(num_slots - 1, -1, -1))
        self._pinned: set[bytes] = set()  # all at the end of `slots`, but for used ones in between

    def __contains__(self, key: bytes) -> bool:
        return key in self.slots

    def __len__(self) -> int:
        return len(self.slots)

    def save(self, key: bytes, block: int) -> None:
        """``block`` holds what ``key`` stands for, and is about to be overwritten.

        Nothing is saved when a copy is there already, or when every slot is pinned.
        """
        if key in self.slots:
            self._use(key)
            return
        if self._unused:
            slot = self._unused.pop()
        else:
            oldest = next(iter(self.slots), None)
            if oldest is None or oldest in self._pinned:
                return
            slot = self.slots.pop(oldest)
        self.slots[key] = slot
        self._pinned.add(key)
        self.pending.saves[key] = BlockMove(block=block, slot=slot, tag=tag_of(key))

    def pin(self, keys: Iterable[bytes]) -> None:
        """Keeps the copies of these keys, which the step being planned is to load."""
        for key in keys:
            self._use(key)
            self._pinned.add(key)

    def load(self, key: bytes, block: int) -> None:
        """Brings the copy of a pinned key back into ``block``."""
        assert key in self._pinned and key not in self.pending.loads
        self.pending.loads[key] = BlockMove(block=block, slot=self.slots[key], tag=tag_of(key))

    def take_moves(self) -> Moves:
        """What is to be moved by the step just planned."""
        moves, self.pending = self.pending, Moves()
        self._pinned.clear()
        return moves

    def drop(self, key: bytes) -> None:
        """The copy of ``key``, if there is one, is not to be found again."""
        slot = self.slots.pop(key, None)
        if slot is not None:
            assert key not in self.pending.loads, "the copy is about to be loaded"
            self.pending.saves.pop(key, None)
            self._pinned.discard(key)
            self._unused.append(slot)

    def clear(self) -> None:
        for key in list(self.slots):
            self.drop(key)

    def unused_slots(self) -> list[int]:
        """For checks only."""
        return list(self._unused)

    def _use(self, key: bytes) -> None:
        self.slots[key] = self.slots.pop(key)
