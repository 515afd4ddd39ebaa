"""The host tier by itself, and behind the cache: what is evicted, found, moved and dropped."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.kvcache import invariants
from octavo.kvcache.invariants import InvariantError
from octavo.kvcache.manager import ON_HOST, BlockTable, KVCacheManager
from octavo.kvcache.tiers import HostTier, tag_of
from octavo.types import BlockMove

SIZE = 4


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def test_a_copy_is_saved_once_and_stays_when_it_is_loaded() -> None:
    tier = HostTier(2)
    tier.save(key(7), 3)
    tier.save(key(7), 3)
    (saved,) = tier.take_moves().saves.values()
    assert (saved.block, saved.tag) == (3, 7)
    tier.pin([key(7)])
    tier.load(key(7), 5)
    moves = tier.take_moves()
    assert moves.loads == {key(7): BlockMove(block=5, slot=saved.slot, tag=7)}
    assert not moves.saves and key(7) in tier
    tier.save(key(7), 5)
    assert not tier.take_moves().saves


def test_tags_are_64_bits_with_a_sign() -> None:
    assert tag_of(b"\xff" * 32) == -1
    assert tag_of(b"\x00" * 7 + b"\x80" + b"\x01" * 24) == -(2**63)


def test_the_least_recently_used_copy_gives_way() -> None:
    tier = HostTier(2)
    for number in (1, 2):
        tier.save(key(number), number)
    tier.take_moves()
    tier.save(key(1), 9)  # used again
    tier.save(key(3), 3)
    assert (key(1) in tier, key(2) in tier, key(3) in tier) == (True, False, True)


def test_what_the_step_moves_does_not_give_way_in_it() -> None:
    tier = HostTier(2)
    tier.save(key(1), 1)
    tier.take_moves()
    tier.pin([key(1)])
    tier.save(key(2), 2)
    tier.save(key(3), 3)  # no slot for it
    tier.load(key(1), 4)
    assert key(3) not in tier
    moves = tier.take_moves()
    assert list(moves.saves) == [key(2)] and list(moves.loads) == [key(1)]
    tier.save(key(3), 3)
    assert key(3) in tier and key(2) in tier


def test_a_dropped_copy_frees_its_slot_and_is_not_saved_any_more() -> None:
    tier = HostTier(1)
    tier.save(key(1), 1)
    tier.drop(key(1))
    tier.drop(key(2))
    assert not tier.take_moves().saves and len(tier) == 0
    tier.save(key(2), 2)
    tier.clear()
    assert tier.unused_slots() == [0]


def test_without_slots_nothing_is_kept() -> None:
    tier = HostTier(0)
    tier.save(key(1), 1)
    assert len(tier) == 0 and not tier.take_moves().saves


@settings(max_examples=150, deadline=None)
@given(
    num_slots=st.integers(1, 4),
    actions=st.lists(
        st.tuples(st.sampled_from(["save", "load", "drop", "step"]), st.integers(0, 6)),
        max_size=60,
    ),
)
def test_a_slot_holds_what_its_key_says(num_slots: int, actions: list[tuple[str, int]]) -> None:
    """Moves done on a plain dict, in any order within a step: every load finds its contents."""
    tier = HostTier(num_slots)
    slots: dict[int, int] = {}
    for block, (action, number) in enumerate(actions):
        if action == "save":
            tier.save(key(number), block)
        elif action == "load" and key(number) in tier and key(number) not in tier.pending.loads:
            tier.pin([key(number)])
            tier.load(key(number), block)
        elif action == "drop" and key(number) not in tier.pending.loads:
            tier.drop(key(number))
        elif action == "step":
            moves = tier.take_moves()
            # A save dropped within its step is not made, so its slot may be another's save.
            assert len({move.slot for move in moves.saves.values()}) == len(moves.saves)
            for move in reversed(moves.saves.values()):
                slots[move.slot] = move.tag
            for move in moves.loads.values():
                assert slots[move.slot] == move.tag
        assert sorted([*tier.slots.values(), *tier.unused_slots()]) == list(range(num_slots))


# ---- behind the cache -------------------------------------------------------------------------


def make_kv(num_blocks: int = 4, *, num_host_slots: int = 8) -> KVCacheManager:
    return KVCacheManager(num_blocks, block_size=SIZE, num_host_slots=num_host_slots)


def hold(kv: KVCacheManager, tokens: list[int]) -> tuple[BlockTable, list[int]]:
    """A table of ``tokens``, all computed, and the hits it began with."""
    table = kv.new_table(tokens)
    hits = kv.find_hits(table, token_ids=tokens, max_tokens=len(tokens) - 1)
    kv.attach(table, hits)
    assert kv.grow(table, num_tokens=len(tokens)) is not None
    kv.register(table, token_ids=tokens, num_tokens=len(tokens))
    return table, hits


def run(kv: KVCacheManager, tokens: list[int]) -> list[int]:
    table, hits = hold(kv, tokens)
    kv.free(table)
    invariants.check(kv, tables={})
    return hits


def test_evicted_blocks_are_found_behind_those_still_cached() -> None:
    kv = make_kv()
    prompt = list(range(13))  # 3 full blocks and a token
    run(kv, prompt)
    kv.tier.take_moves()
    run(kv, [50, 51, 52, 53, 54])  # takes the last token's block and one full one: the end first
    (save,) = kv.tier.take_moves().saves.values()
    assert save.block == 2
    table, hits = hold(kv, prompt)
    assert hits == [0, 1, ON_HOST]
    moves = kv.tier.take_moves()
    (load,) = moves.loads.values()
    assert load == BlockMove(block=table.block_ids[2], slot=save.slot, tag=save.tag)
    assert len(set(table.block_ids)) == 4
    invariants.check(kv, tables={"a": (table, 13)})
    kv.free(table)


def test_hits_on_the_host_take_available_blocks() -> None:
    kv = make_kv(6)
    prompt = list(range(13))
    run(kv, prompt)
    run(kv, list(range(100, 124)))
    table = kv.new_table(prompt)
    hits = kv.find_hits(table, token_ids=prompt, max_tokens=12)
    assert hits == [ON_HOST] * 3
    assert kv.num_blocks_missing(hits, num_tokens=13) == 4


def test_a_cached_block_behind_one_on_the_host_is_found_too() -> None:
    kv = make_kv(6)
    prompt = list(range(13))
    run(kv, prompt)
    run(kv, list(range(100, 124)))
    first = kv.new_table(prompt[:5])
    kv.attach(first, kv.find_hits(first, token_ids=prompt[:5], max_tokens=4))
    table = kv.new_table(prompt)
    assert kv.find_hits(table, token_ids=prompt, max_tokens=12) == [
        first.block_ids[0],
        ON_HOST,
        ON_HOST,
    ]


def test_loading_does_not_push_out_what_it_loads() -> None:
    """A tier of three: the blocks that the loads take are saved only where there is room."""
    kv = make_kv(4, num_host_slots=3)
    prompt = list(range(13))
    run(kv, prompt)
    run(kv, list(range(100, 116)))
    kv.tier.take_moves()
    assert len(kv.tier) == 3
    table, hits = hold(kv, prompt)
    assert hits == [ON_HOST] * 3
    moves = kv.tier.take_moves()
    assert len(moves.loads) == 3 and not moves.saves
    kv.free(table)


def test_what_is_forgotten_is_forgotten_on_the_host_too() -> None:
    kv = make_kv(4)
    prompt = list(range(13))
    keys = kv.new_table(prompt).keys
    run(kv, prompt)
    run(kv, list(range(100, 116)))
    kv.forget(keys[1:2])
    assert keys[0] in kv.tier and keys[1] not in kv.tier
    table = kv.new_table(prompt)
    assert kv.find_hits(table, token_ids=prompt, max_tokens=12) == [ON_HOST]
    kv.reset_prefix_cache()
    assert len(kv.tier) == 0
    assert kv.find_hits(table, token_ids=prompt, max_tokens=12) == []


def _lose_a_slot(kv: KVCacheManager) -> None:
    kv.tier._unused.pop()


def _share_a_slot(kv: KVCacheManager) -> None:
    slots = kv.tier.slots
    first, second = list(slots)[:2]
    slots[first] = slots[second]


def _move_twice(kv: KVCacheManager) -> None:
    saves = kv.tier.pending.saves
    first, second = list(saves)[:2]
    move = saves[second]
    saves[second] = BlockMove(block=saves[first].block, slot=move.slot, tag=move.tag)


def _mistag(kv: KVCacheManager) -> None:
    saves = kv.tier.pending.saves
    first = next(iter(saves))
    saves[first] = BlockMove(block=saves[first].block, slot=saves[first].slot, tag=1)


def _load_elsewhere(kv: KVCacheManager) -> None:
    loads = kv.tier.pending.loads
    first = next(iter(loads))
    free = kv.pool.free_list()[0]
    loads[first] = BlockMove(block=free, slot=loads[first].slot, tag=loads[first].tag)


@pytest.mark.parametrize(
    "corrupt", [_lose_a_slot, _share_a_slot, _move_twice, _mistag, _load_elsewhere]
)
def test_the_checker_sees_corruption(corrupt: Callable[[KVCacheManager], None]) -> None:
    kv = make_kv(6)
    run(kv, list(range(9)))
    run(kv, list(range(100, 124)))
    kv.tier.take_moves()
    table, hits = hold(kv, list(range(9)))
    assert hits == [ON_HOST] * 2
    invariants.check(kv, tables={"a": (table, 9)})
    corrupt(kv)
    with pytest.raises(InvariantError):
        invariants.check(kv, tables={"a": (table, 9)})
