"""Finds blocks by what they hold: chained hashes of full blocks. Knows no owner and no order.

A block's key covers its tokens, every token before them, and the request's cache salt, so equal
keys mean equal K/V. SHA-256 makes an accidental or forged collision infeasible: a wrong hit would
hand one user the context of another.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import sha256

_TOKEN_BYTES = array("I").itemsize


def root_key(cache_salt: str | None) -> bytes:
    """The parent of a request's first block. No salt and an empty salt are different roots."""
    salted = b"" if cache_salt is None else b"+" + cache_salt.encode("utf-8", "surrogatepass")
    return sha256(b"octavo.kv" + salted).digest()


def chain_keys(parent: bytes, token_ids: Sequence[int], *, block_size: int) -> list[bytes]:
    """Keys of the full blocks in ``token_ids``, which follow the block whose key is ``parent``."""
    data = memoryview(array("I", token_ids).tobytes())
    stride = block_size * _TOKEN_BYTES
    keys = []
    for start in range(0, len(data) - stride + 1, stride):
        digest = sha256(parent)
        digest.update(data[start : start + stride])
        parent = digest.digest()
        keys.append(parent)
    return keys


class PrefixCache:
    """A two-way index between keys and blocks; a block has one key at most and vice versa."""

    __slots__ = ("block_keys", "index")

    def __init__(self, num_blocks: int) -> None:
        self.index: dict[bytes, int] = {}
        self.block_keys: list[bytes | None] = [None] * num_blocks

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks of the longest known beginning of ``keys``."""
        index = self.index
        found = []
        for key in keys:
            block = index.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def insert(self, key: bytes, block: int) -> bool:
        """Makes ``block`` findable. False when another block already holds the same tokens."""
        if self.index.setdefault(key, block) != block:
            return False
        self.block_keys[block] = key
        return True

    def remove(self, block: int) -> None:
        """Makes ``block`` unfindable; it must have a key."""
        key = self.block_keys[block]
        assert key is not None, f"block {block} has no key"
        self.block_keys[block] = None
        del self.index[key]

    def clear(self) -> None:
        self.block_keys = [None] * len(self.block_keys)
        self.index.clear()
