"""Proves that no K/V block is lost, doubly owned or wrongly findable. Changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from octavo.kvcache.manager import BlockTable, KVCacheManager
from octavo.kvcache.tiers import tag_of


class InvariantError(AssertionError):
    """The block bookkeeping contradicts itself: a bug in Octavo."""


def check(
    kv: KVCacheManager, *, tables: Mapping[str, tuple[BlockTable, int]], slack: int = 0
) -> None:
    """Raises `InvariantError` naming what is wrong. O(blocks + tables).

    Args:
        tables: request id -> its table and the number of its tokens computed so far.
        slack: tokens beyond those for which a table may have kept blocks.
    """
    pool, cache = kv.pool, kv.pool.cache
    owners: Counter[int] = Counter()
    for request_id, (table, num_computed) in tables.items():
        _check_table(kv, request_id, table, num_computed, slack)
        owners.update(table.block_ids)

    free_list = pool.free_list()
    unowned = set(free_list)
    _require(len(unowned) == len(free_list), "a block is on the free list twice")
    _require(len(free_list) == pool.num_unowned, "num_unowned is not the free list's length")
    for block in range(kv.num_blocks):
        refs = pool.refs[block]
        _require(refs == owners[block], f"block {block}: {refs} refs, {owners[block]} owners")
        _require((refs == 0) == (block in unowned), f"block {block}: lost, or owned and free")
    num_cached = sum(1 for block in free_list if cache.block_keys[block] is not None)
    _require(num_cached == pool.num_cached, "num_cached is not the count of cached blocks")

    keyed = {key: block for block, key in enumerate(cache.block_keys) if key is not None}
    _require(keyed == cache.index, "the hash index and the blocks' keys disagree")
    _require(kv.enable_prefix_caching or not keyed, "keys exist though caching is off")
    _check_tier(kv)


def _check_tier(kv: KVCacheManager) -> None:
    tier = kv.tier
    slots = [*tier.slots.values(), *tier.unused_slots()]
    _require(sorted(slots) == list(range(tier.num_slots)), "a host slot is lost or used twice")
    saves, loads = tier.pending.saves, tier.pending.loads
    for moves in (saves, loads):
        blocks = [move.block for move in moves.values()]
        _require(len(set(blocks)) == len(blocks), "a block is moved twice the same way")
        for key, move in moves.items():
            _require(tier.slots.get(key) == move.slot, f"slot {move.slot} is planned for two keys")
            _require(tag_of(key) == move.tag, f"slot {move.slot} is moved under a wrong tag")
    for key, move in loads.items():
        holder = kv.pool.cache.index.get(key)
        _require(holder == move.block, f"block {move.block} is loaded, and not found by its key")


def _check_table(
    kv: KVCacheManager, request_id: str, table: BlockTable, num_computed: int, slack: int
) -> None:
    blocks, size = table.block_ids, kv.block_size
    _require(len(set(blocks)) == len(blocks), f"{request_id}: a block occurs twice")
    _require(
        kv.blocks_for(num_computed) <= len(blocks) <= kv.blocks_for(num_computed + slack),
        f"{request_id}: {len(blocks)} blocks for {num_computed} tokens, waste of a block or more",
    )
    _require(table.num_registered <= len(blocks), f"{request_id}: registered beyond its blocks")
    # What is not full will be written: by this request alone, findable never.
    for open_block in blocks[num_computed // size :]:
        _require(kv.pool.refs[open_block] == 1, f"{request_id}: block {open_block} has two writers")
        _require(
            kv.pool.cache.block_keys[open_block] is None,
            f"{request_id}: block {open_block} is findable and still to be written",
        )
    for i, block in enumerate(blocks[: len(table.keys)]):
        key = kv.pool.cache.block_keys[block]
        _require(
            key is None or key == table.keys[i], f"{request_id}: block {block} under a wrong key"
        )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InvariantError(message)
