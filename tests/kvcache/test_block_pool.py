"""The pool against a plain model of it: counts in a dict, the free list in a list."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.kvcache.block_pool import BlockPool
from octavo.kvcache.prefix_cache import PrefixCache


def make_pool(num_blocks: int) -> BlockPool:
    return BlockPool(num_blocks, cache=PrefixCache(num_blocks))


def test_blocks_come_in_order_and_are_owned_once() -> None:
    pool = make_pool(4)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.refs == [1, 1, 1, 0]
    assert pool.num_unowned == 1


def test_allocating_more_than_there_is_is_a_bug() -> None:
    pool = make_pool(2)
    with pytest.raises(AssertionError):
        pool.allocate(3)


def test_least_recently_freed_is_evicted_first_and_tails_before_heads() -> None:
    pool = make_pool(4)
    first, second = pool.allocate(2), pool.allocate(2)
    for block in (*first, *second):
        pool.cache.insert(bytes([block]), block)
    pool.release(second)
    pool.release(first)
    assert pool.free_list() == [second[1], second[0], first[1], first[0]]
    assert pool.num_cached == 4


def test_blocks_nobody_can_find_are_reused_before_cached_ones() -> None:
    pool = make_pool(4)
    blocks = pool.allocate(4)
    pool.cache.insert(b"a", blocks[0])
    pool.release(blocks)
    assert pool.free_list()[-1] == blocks[0]
    pool.allocate(3)
    assert pool.cache.find([b"a"]) == [blocks[0]]
    pool.allocate(1)
    assert pool.cache.find([b"a"]) == []


def test_sharing_revives_a_cached_block_out_of_the_middle() -> None:
    pool = make_pool(3)
    blocks = pool.allocate(3)
    for block in blocks:
        pool.cache.insert(bytes([block]), block)
    pool.release(blocks)
    pool.share([1])
    assert pool.free_list() == [2, 0]
    pool.share([1])
    pool.release([1])
    assert pool.refs[1] == 1


def test_forgetting_moves_an_unowned_block_to_the_front() -> None:
    pool = make_pool(3)
    blocks = pool.allocate(3)
    for block in blocks:
        pool.cache.insert(bytes([block]), block)
    pool.release(blocks)
    pool.forget(0)
    assert pool.free_list() == [0, 2, 1]
    assert pool.num_cached == 2


def test_memory_grows_only_when_no_used_block_is_free() -> None:
    pool = make_pool(6)
    named, nameless = pool.allocate(2), pool.allocate(1)
    for block in named:
        pool.cache.insert(bytes([block]), block)
    pool.release(nameless)
    pool.release(named)
    assert pool.free_list() == [*nameless, 3, 4, 5, 1, 0]
    pool.forget_all()
    assert pool.free_list() == [1, 0, *nameless, 3, 4, 5]
    assert pool.num_cached == 0 and pool.num_unowned == 6


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pool_agrees_with_a_plain_model(data: st.DataObject) -> None:
    num_blocks = data.draw(st.integers(1, 8))
    pool = make_pool(num_blocks)
    owners: list[list[int]] = []
    free = list(range(num_blocks))  # front first
    keys: dict[int, bytes] = {}
    for step in range(data.draw(st.integers(0, 40))):
        action = data.draw(st.sampled_from(["allocate", "release", "share", "name"]))
        if action == "allocate":
            count = data.draw(st.integers(0, len(free)))
            expected, free = free[:count], free[count:]
            assert pool.allocate(count) == expected
            for block in expected:
                keys.pop(block, None)
            owners.append(expected)
        elif action == "release" and owners:
            blocks = owners.pop(data.draw(st.integers(0, len(owners) - 1)))
            pool.release(blocks)
            for block in reversed(blocks):
                if not any(block in other for other in owners):
                    free.insert(len(free) if block in keys else 0, block)
        elif action == "share" and keys:
            block = data.draw(st.sampled_from(sorted(keys)))
            pool.share([block])
            owners.append([block])
            free = [other for other in free if other != block]
        elif action == "name":
            owned = sorted({block for blocks in owners for block in blocks} - set(keys))
            if owned:
                block = data.draw(st.sampled_from(owned))
                keys[block] = b"%d" % step
                assert pool.cache.insert(keys[block], block)
        assert pool.free_list() == free
        assert pool.num_unowned == len(free)
        assert pool.num_cached == sum(1 for block in free if block in keys)
