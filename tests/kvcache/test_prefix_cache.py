"""Keys of blocks: what they tell apart, and what they do not."""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.kvcache.prefix_cache import PrefixCache, chain_keys, root_key

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=20)


def reference_keys(parent: bytes, token_ids: list[int], block_size: int) -> list[bytes]:
    keys = []
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        block = token_ids[start : start + block_size]
        parent = hashlib.sha256(parent + struct.pack(f"={block_size}I", *block)).digest()
        keys.append(parent)
    return keys


@given(TOKENS, st.integers(1, 5))
def test_keys_are_sha256_of_parent_and_packed_tokens(tokens: list[int], size: int) -> None:
    root = root_key(None)
    assert chain_keys(root, tokens, block_size=size) == reference_keys(root, tokens, size)


@given(TOKENS, TOKENS)
def test_a_key_covers_everything_before_it(one: list[int], two: list[int]) -> None:
    root = root_key(None)
    keys_one, keys_two = (chain_keys(root, tokens, block_size=2) for tokens in (one, two))
    num_equal = 0
    while num_equal < min(len(one), len(two)) and one[num_equal] == two[num_equal]:
        num_equal += 1
    num_blocks = num_equal // 2
    assert keys_one[:num_blocks] == keys_two[:num_blocks]
    assert not set(keys_one[num_blocks:]) & set(keys_two[num_blocks:])


def test_keys_can_be_extended_block_by_block() -> None:
    tokens = list(range(100, 113))
    whole = chain_keys(root_key("s"), tokens, block_size=4)
    first = chain_keys(root_key("s"), tokens[:8], block_size=4)
    assert first + chain_keys(first[-1], tokens[8:], block_size=4) == whole


def test_salts_are_worlds_apart() -> None:
    assert len({root_key(salt) for salt in (None, "", "a", "b", "+", "\ud800")}) == 6


def test_a_token_id_out_of_32_bits_is_an_error_not_a_collision() -> None:
    with pytest.raises(OverflowError):
        chain_keys(root_key(None), [2**32], block_size=1)


def test_the_first_block_with_a_key_keeps_it() -> None:
    cache = PrefixCache(3)
    assert cache.insert(b"a", 0)
    assert not cache.insert(b"a", 1)
    assert cache.block_keys == [b"a", None, None]
    cache.remove(0)
    assert cache.insert(b"a", 1)


def test_find_stops_at_the_first_gap() -> None:
    cache = PrefixCache(3)
    cache.insert(b"a", 2)
    cache.insert(b"c", 1)
    assert cache.find([b"a", b"b", b"c"]) == [2]
