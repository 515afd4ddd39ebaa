"""Hands out K/V blocks: reference counts and a free list in eviction order. Knows no request.

The free list is doubly linked through two arrays, so taking any block out of its middle (a prefix
hit) is O(1), whatever the cache's size. Its front is reused first: blocks that were used and that
nobody can find, as their memory exists already, then those that never were, then findable ones from
the least to the most recently freed. Those go to the host tier, if there is one.
"""

from __future__ import annotations

from collections.abc import Sequence

from octavo.kvcache.prefix_cache import PrefixCache
from octavo.kvcache.tiers import HostTier


class BlockPool:
    """Each block is free (no key), cached (unowned, has a key) or owned (``refs > 0``)."""

    __slots__ = (
        "_next",
        "_prev",
        "_tier",
        "cache",
        "num_blocks",
        "num_cached",
        "num_unowned",
        "refs",
    )

    def __init__(
        self, num_blocks: int, *, cache: PrefixCache, tier: HostTier | None = None
    ) -> None:
        self.num_blocks = num_blocks
        self.cache = cache
        self._tier = tier
        self.refs = [0] * num_blocks
        self.num_unowned = num_blocks  # free and cached
        self.num_cached = 0  # unowned blocks that a hit would revive
        # Entry num_blocks is the sentinel: its next is the front, its prev the back.
        self._next = [*range(1, num_blocks + 1), 0]
        self._prev = [num_blocks, *range(num_blocks)]

    def allocate(self, num_blocks: int) -> list[int]:
        """Takes blocks from the front, forgetting what they held (the host tier may still know it).
        The caller checks the count."""
        assert num_blocks <= self.num_unowned, "allocate() beyond num_unowned"
        following, refs, keys = self._next, self.refs, self.cache.block_keys
        sentinel = self.num_blocks
        block = following[sentinel]
        taken = []
        for _ in range(num_blocks):
            taken.append(block)
            refs[block] = 1
            key = keys[block]
            if key is not None:
                if self._tier is not None:
                    self._tier.save(key, block)
                self.cache.remove(block)
                self.num_cached -= 1
            block = following[block]
        following[sentinel] = block
        self._prev[block] = sentinel
        self.num_unowned -= num_blocks
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """One more owner for each block; cached ones leave the free list with their contents."""
        refs = self.refs
        for block in blocks:
            if refs[block] == 0:
                assert self.cache.block_keys[block] is not None, f"block {block} holds nothing"
                self._unlink(block)
                self.num_unowned -= 1
                self.num_cached -= 1
            refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One owner fewer for each, last block first, so that beginnings are evicted last."""
        refs, keys, sentinel = self.refs, self.cache.block_keys, self.num_blocks
        for block in reversed(blocks):
            refs[block] -= 1
            if refs[block] == 0:
                self.num_unowned += 1
                if keys[block] is None:
                    self._link_after(block, sentinel)
                else:
                    self.num_cached += 1
                    self._link_after(block, self._prev[sentinel])

    def forget(self, block: int) -> None:
        """Makes a findable block unfindable; an unowned one is then the next to be reused."""
        self.cache.remove(block)
        if self.refs[block] == 0:
            self.num_cached -= 1
            self._unlink(block)
            self._link_after(block, self.num_blocks)

    def forget_all(self) -> None:
        """Makes every block unfindable; unowned ones, whose memory exists, are then reused before
        blocks that were never used."""
        self.cache.clear()
        for _ in range(self.num_cached):  # they are the last of the free list
            block = self._prev[self.num_blocks]
            self._unlink(block)
            self._link_after(block, self.num_blocks)
        self.num_cached = 0

    def free_list(self) -> list[int]:
        """Unowned blocks in the order of reuse. O(num_blocks): for checks only."""
        order = []
        block = self._next[self.num_blocks]
        while block != self.num_blocks:
            assert self._prev[self._next[block]] == block, f"free list is torn at block {block}"
            order.append(block)
            assert len(order) <= self.num_blocks, "free list has a cycle"
            block = self._next[block]
        return order

    def _unlink(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before] = after
        self._prev[after] = before

    def _link_after(self, block: int, before: int) -> None:
        after = self._next[before]
        self._next[before] = block
        self._prev[block] = before
        self._next[block] = after
        self._prev[after] = block
