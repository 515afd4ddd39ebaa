"""Block tables of requests: growing, sharing, freeing, finding. Knows no queue and no step.

A request's table holds the K/V of its tokens in order: token ``i`` is in slot ``i % block_size``
of ``block_ids[i // block_size]``. Tables share blocks only where no owner will write any more:
full blocks found by their key, and the full blocks of a forked parent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from octavo.kvcache.block_pool import BlockPool
from octavo.kvcache.prefix_cache import PrefixCache, chain_keys, root_key
from octavo.kvcache.tiers import HostTier
from octavo.types import BlockCopy

ON_HOST = -1  # in place of a block id: only the host tier has these contents


class BlockTable:
    """The blocks of one request, and the keys of its known full blocks."""

    __slots__ = ("block_ids", "keys", "num_registered", "root")

    def __init__(self, *, root: bytes, keys: list[bytes]) -> None:
        self.root = root
        self.keys = keys  # of full blocks whose tokens are known; may run ahead of block_ids
        self.block_ids: list[int] = []
        self.num_registered = 0  # leading blocks already offered to the prefix cache


class KVCacheManager:
    """Every block of the K/V cache, and the tables that own them.

    Args:
        num_blocks: blocks in the cache; ids are ``0 .. num_blocks - 1``.
        block_size: tokens per block.
        enable_prefix_caching: find and register full blocks; off, nothing outlives its owner.
        num_host_slots: blocks of the host tier, to which what is evicted from the prefix cache
            goes, and from where a hit brings it back.
        check_invariants: callers run `invariants.check` after each step.
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        block_size: int,
        enable_prefix_caching: bool = True,
        num_host_slots: int = 0,
        check_invariants: bool = False,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"num_blocks and block_size must be at least 1, got {num_blocks} and {block_size}"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.check_invariants = check_invariants
        self.tier = HostTier(num_host_slots)
        self.pool = BlockPool(
            num_blocks,
            cache=PrefixCache(num_blocks),
            tier=self.tier if num_host_slots else None,
        )

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now: never written, forgotten, or cached."""
        return self.pool.num_unowned

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def new_table(
        self,
        token_ids: Sequence[int],
        *,
        cache_salt: str | None = None,
        like: BlockTable | None = None,
    ) -> BlockTable:
        """An empty table for a prompt, its full blocks hashed once and for all.

        ``like``: the table of a request with the same prompt and salt, whose keys are taken over.
        """
        if not self.enable_prefix_caching:
            return BlockTable(root=b"", keys=[])
        if like is not None:
            return BlockTable(root=like.root, keys=like.keys[: len(token_ids) // self.block_size])
        root = root_key(cache_salt)
        return BlockTable(root=root, keys=chain_keys(root, token_ids, block_size=self.block_size))

    def find_hits(
        self, table: BlockTable, *, token_ids: Sequence[int], max_tokens: int
    ) -> list[int]:
        """Cached blocks that hold the beginning of ``token_ids``, ``max_tokens`` at most;
        `ON_HOST` for those that only the host tier holds."""
        if not self.enable_prefix_caching:
            return []
        self._extend_keys(table, token_ids)
        keys = table.keys[: max_tokens // self.block_size]
        found = self.pool.cache.find(keys)
        if self.tier.slots:
            index, slots = self.pool.cache.index, self.tier.slots
            for key in keys[len(found) :]:
                block = index.get(key, ON_HOST)
                if block == ON_HOST and key not in slots:
                    break
                found.append(block)
        return found

    def num_blocks_missing(self, hits: Sequence[int], *, num_tokens: int) -> int:
        """Available blocks it takes to hold ``num_tokens`` of which ``hits`` hold the first."""
        refs = self.pool.refs
        taken = sum(1 for block in hits if block == ON_HOST or refs[block] == 0)
        return self.blocks_for(num_tokens) - len(hits) + taken

    def attach(self, table: BlockTable, hits: Sequence[int]) -> list[tuple[int, bytes]]:
        """Makes an empty table an owner of the blocks `find_hits` found.

        What only the host tier holds is given blocks (the caller has made sure that they are
        available), to be loaded before the step's forward pass. Returns (block, key) of these.
        """
        assert not table.block_ids, "hits go to an empty table"
        cache, tier = self.pool.cache, self.tier
        self.pool.share([block for block in hits if block != ON_HOST])
        absent = [table.keys[i] for i, block in enumerate(hits) if block == ON_HOST]
        tier.pin(absent)  # before blocks are allocated, whose contents go to the tier too
        loaded = list(zip(self.pool.allocate(len(absent)), absent, strict=True))
        for block, key in loaded:
            tier.load(key, block)
            cache.insert(key, block)
        fresh = iter(loaded)
        table.block_ids.extend(next(fresh)[0] if block == ON_HOST else block for block in hits)
        table.num_registered = len(hits)
        return loaded

    def grow(self, table: BlockTable, *, num_tokens: int) -> list[int] | None:
        """Appends blocks until the table holds ``num_tokens``; returns them (maybe none).

        None, and nothing is changed, when too few blocks are available.
        """
        lacking = -(-num_tokens // self.block_size) - len(table.block_ids)
        if lacking <= 0:
            return []
        if lacking > self.pool.num_unowned:
            return None
        fresh = self.pool.allocate(lacking)
        table.block_ids.extend(fresh)
        return fresh

    def fork(self, child: BlockTable, *, parent: BlockTable, num_tokens: int) -> BlockCopy | None:
        """Gives ``child`` the first ``num_tokens`` tokens of ``parent``.

        Full blocks are shared. A block they fill in part is one both would write to: the child
        computes token ``num_tokens`` in the very step it is admitted, so its copy (which the
        caller has made sure a block is available for) is due at once and is returned.
        """
        assert not child.block_ids, "a fork starts from an empty table"
        num_full, num_rest = divmod(num_tokens, self.block_size)
        shared = parent.block_ids[:num_full]
        self.pool.share(shared)
        child.block_ids.extend(shared)
        child.num_registered = num_full
        if num_rest == 0:
            return None
        (fresh,) = self.pool.allocate(1)
        child.block_ids.append(fresh)
        return BlockCopy(src=parent.block_ids[num_full], dst=fresh)

    def register(
        self, table: BlockTable, *, token_ids: Sequence[int], num_tokens: int
    ) -> list[tuple[int, bytes]]:
        """Makes the full blocks among the first ``num_tokens`` tokens findable.

        Their K/V must be written, or be due in the step being planned. Returns (block, key) of
        those that became findable just now.
        """
        if not self.enable_prefix_caching:
            return []
        self._extend_keys(table, token_ids)
        fresh = []
        num_full = num_tokens // self.block_size
        for i in range(table.num_registered, num_full):
            block, key = table.block_ids[i], table.keys[i]
            if self.pool.cache.block_keys[block] is None and self.pool.cache.insert(key, block):
                fresh.append((block, key))
        table.num_registered = max(table.num_registered, num_full)
        return fresh

    def free(self, table: BlockTable) -> None:
        """Gives up every block of the table; registered ones stay findable until reused."""
        self.pool.release(table.block_ids)
        table.block_ids = []
        table.num_registered = 0

    def forget(self, keys: Iterable[bytes]) -> None:
        """What holds one of these keys, here or on the host, no longer serves hits; the owners of
        a block keep it."""
        index = self.pool.cache.index
        for key in keys:
            self.tier.drop(key)
            block = index.get(key)
            if block is not None:
                self.pool.forget(block)

    def reset_prefix_cache(self) -> None:
        """No block written so far serves hits any more; running requests are unharmed."""
        self.pool.forget_all()
        self.tier.clear()

    def _extend_keys(self, table: BlockTable, token_ids: Sequence[int]) -> None:
        num_hashed = len(table.keys) * self.block_size
        if len(token_ids) - num_hashed >= self.block_size:
            parent = table.keys[-1] if table.keys else table.root
            rest = token_ids[num_hashed:]
            table.keys += chain_keys(parent, rest, block_size=self.block_size)
