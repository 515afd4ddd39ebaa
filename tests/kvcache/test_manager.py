"""Tables: growth, prefix hits, forks, and a checker that sees every kind of corruption."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from octavo.kvcache import invariants
from octavo.kvcache.invariants import InvariantError
from octavo.kvcache.manager import BlockTable, KVCacheManager
from octavo.types import BlockCopy


def make_kv(num_blocks: int = 8, *, caching: bool = True) -> KVCacheManager:
    return KVCacheManager(num_blocks, block_size=4, enable_prefix_caching=caching)


def fill(kv: KVCacheManager, tokens: list[int], *, cache_salt: str | None = None) -> BlockTable:
    """A table that holds all of ``tokens``, registered, as after a step that computed them."""
    table = kv.new_table(tokens, cache_salt=cache_salt)
    kv.attach(table, kv.find_hits(table, token_ids=tokens, max_tokens=len(tokens) - 1))
    assert kv.grow(table, num_tokens=len(tokens)) is not None
    kv.register(table, token_ids=tokens, num_tokens=len(tokens))
    return table


def hits(kv: KVCacheManager, tokens: list[int], *, cache_salt: str | None = None) -> int:
    table = kv.new_table(tokens, cache_salt=cache_salt)
    return len(kv.find_hits(table, token_ids=tokens, max_tokens=len(tokens) - 1))


def test_sizes_must_be_positive() -> None:
    with pytest.raises(ValueError, match="got 0 and 16"):
        KVCacheManager(0, block_size=16)


def test_grow_appends_only_what_is_lacking() -> None:
    kv = make_kv()
    table = kv.new_table([])
    assert kv.grow(table, num_tokens=5) == [0, 1]
    assert kv.grow(table, num_tokens=8) == []
    assert kv.grow(table, num_tokens=9) == [2]
    assert kv.grow(table, num_tokens=99) is None
    assert table.block_ids == [0, 1, 2]
    assert kv.num_available == 5


def test_only_full_blocks_are_found_and_never_the_last_token() -> None:
    kv = make_kv()
    tokens = list(range(8))
    kv.free(fill(kv, tokens))
    assert hits(kv, tokens) == 1  # token 7 is to be computed, so its block is not taken
    assert hits(kv, [*tokens, 9]) == 2
    assert hits(kv, [*tokens[:6], 99, 98, 97]) == 1
    assert hits(kv, [99, *tokens]) == 0


def test_salt_separates_equal_prompts() -> None:
    kv = make_kv()
    tokens = list(range(9))
    kv.free(fill(kv, tokens, cache_salt="alice"))
    assert hits(kv, tokens, cache_salt="alice") == 2
    assert hits(kv, tokens, cache_salt="bob") == 0
    assert hits(kv, tokens) == 0


def test_generated_tokens_extend_the_keys() -> None:
    kv = make_kv()
    table = fill(kv, [1, 2, 3, 4, 5])
    kv.grow(table, num_tokens=8)
    kv.register(table, token_ids=[1, 2, 3, 4, 5, 6, 7, 8], num_tokens=8)
    assert hits(kv, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == 2


def test_without_caching_nothing_is_found() -> None:
    kv = make_kv(caching=False)
    kv.free(fill(kv, list(range(9))))
    assert hits(kv, list(range(9))) == 0
    assert kv.pool.num_cached == 0


def test_hits_are_shared_and_counted_as_taken_when_they_were_free() -> None:
    kv = make_kv()
    tokens = list(range(9))
    first = fill(kv, tokens)
    second = kv.new_table(tokens)
    found = kv.find_hits(second, token_ids=tokens, max_tokens=8)
    assert kv.num_blocks_missing(found, num_tokens=9) == 1
    kv.free(first)
    assert kv.num_blocks_missing(found, num_tokens=9) == 3
    kv.attach(second, found)
    assert second.block_ids == [0, 1]
    assert kv.num_available == 6


def test_beginnings_outlive_ends_under_pressure() -> None:
    kv = make_kv(4)
    tokens = list(range(16))
    kv.free(fill(kv, tokens))
    taker = kv.new_table([])
    kv.grow(taker, num_tokens=8)
    assert hits(kv, [*tokens, 1]) == 2


@pytest.mark.parametrize("num_prompt", [2, 5, 8, 9])
def test_fork_shares_full_blocks_and_copies_the_partial_one(num_prompt: int) -> None:
    kv = make_kv()
    tokens = list(range(num_prompt))
    parent = fill(kv, tokens)
    child = kv.new_table(tokens, like=parent)
    copy = kv.fork(child, parent=parent, num_tokens=num_prompt - 1)
    num_full, num_rest = divmod(num_prompt - 1, 4)
    assert child.block_ids[:num_full] == parent.block_ids[:num_full]
    assert all(kv.pool.refs[block] == 2 for block in parent.block_ids[:num_full])
    if num_rest:
        assert copy == BlockCopy(src=parent.block_ids[num_full], dst=child.block_ids[-1])
        assert kv.pool.refs[copy.src] == kv.pool.refs[copy.dst] == 1
    else:
        assert copy is None
    kv.grow(child, num_tokens=num_prompt)
    tables = {"parent": (parent, num_prompt), "child": (child, num_prompt)}
    invariants.check(kv, tables=tables)
    kv.free(parent)
    kv.free(child)
    invariants.check(kv, tables={})
    assert kv.num_available == 8


def test_forgotten_blocks_serve_no_hit_and_owners_keep_them() -> None:
    kv = make_kv()
    tokens = list(range(9))
    table = fill(kv, tokens)
    kv.forget(table.keys[1:])
    assert hits(kv, tokens) == 1
    invariants.check(kv, tables={"a": (table, 9)})
    kv.reset_prefix_cache()
    assert hits(kv, tokens) == 0
    invariants.check(kv, tables={"a": (table, 9)})
    kv.free(table)
    assert kv.pool.num_cached == 0


def _lose(kv: KVCacheManager, table: BlockTable) -> None:
    table.block_ids.pop()


def _leak(kv: KVCacheManager, table: BlockTable) -> None:
    kv.pool.allocate(1)


def _own_twice(kv: KVCacheManager, table: BlockTable) -> None:
    table.block_ids[1] = table.block_ids[0]


def _free_owned(kv: KVCacheManager, table: BlockTable) -> None:
    kv.pool.release(table.block_ids[:1])


def _rename(kv: KVCacheManager, table: BlockTable) -> None:
    kv.forget(table.keys[:1])
    kv.pool.cache.insert(b"wrong", table.block_ids[0])


def _publish_partial(kv: KVCacheManager, table: BlockTable) -> None:
    kv.pool.cache.insert(b"early", table.block_ids[-1])


def _drop_index(kv: KVCacheManager, table: BlockTable) -> None:
    kv.pool.cache.index.popitem()


def _miscount(kv: KVCacheManager, table: BlockTable) -> None:
    kv.pool.num_cached += 1


@pytest.mark.parametrize(
    "corrupt",
    [
        _lose,
        _leak,
        _own_twice,
        _free_owned,
        _rename,
        _publish_partial,
        _drop_index,
        _miscount,
    ],
)
def test_checker_sees_corruption(corrupt: Callable[[KVCacheManager, BlockTable], None]) -> None:
    kv = make_kv()
    table = fill(kv, list(range(10)))
    invariants.check(kv, tables={"a": (table, 10)})
    corrupt(kv, table)
    with pytest.raises(InvariantError):
        invariants.check(kv, tables={"a": (table, 10)})
