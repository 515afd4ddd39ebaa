"""PyTorch's caching allocator in numbers: what it would reserve of a device. Allocates nothing.

Sizes and rules are those of `c10/cuda/CUDACachingAllocator` without expandable segments: blocks are
multiples of 512 bytes; those up to 1 MiB come from segments of 2 MiB, larger ones from segments of
20 MiB, or of their own size in steps of 2 MiB from 10 MiB on. Segments are never given back here,
as they are while a server runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_MIB = 1 << 20
_UNIT = 512
_SMALL = _MIB  # blocks up to this come from small segments
_SMALL_SEGMENT = 2 * _MIB
_LARGE_SEGMENT = 20 * _MIB
_OWN_SEGMENT = 10 * _MIB  # from here on a block may have a segment of its own
_STEP = 2 * _MIB


class _Block:
    """A stretch of a segment, in use or free, between its neighbours."""

    __slots__ = ("is_free", "next", "previous", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.is_free = False
        self.previous: _Block | None = None
        self.next: _Block | None = None


class CachingAllocator:
    """Blocks of segments; best fit, split, and merged again when freed."""

    def __init__(self) -> None:
        self.reserved = 0  # bytes of all segments
        self.allocated = 0  # bytes in use, rounded to blocks
        self.peak = 0  # the most that was in use
        self._free: dict[bool, list[_Block]] = {True: [], False: []}  # by whether they are small

    def allocate(self, num_bytes: int) -> Callable[[], None]:
        """Takes a block; what is returned gives it back."""
        size = max(_UNIT, -(-num_bytes // _UNIT) * _UNIT)
        is_small = size <= _SMALL
        fitting = [block for block in self._free[is_small] if block.size >= size]
        if fitting:
            block = min(fitting, key=lambda block: block.size)
            self._free[is_small].remove(block)
        else:
            block = _Block(_segment(size))
            self.reserved += block.size
        left = block.size - size
        if left >= _UNIT if is_small else left > _SMALL:
            self._split(block, left, is_small)
        block.is_free = False
        self.allocated += block.size
        self.peak = max(self.peak, self.allocated)
        return lambda: self._give_back(block, is_small)

    def _split(self, block: _Block, left: int, is_small: bool) -> None:
        rest = _Block(left)
        rest.is_free, rest.previous, rest.next = True, block, block.next
        if rest.next is not None:
            rest.next.previous = rest
        block.next = rest
        block.size -= left
        self._free[is_small].append(rest)

    def _give_back(self, block: _Block, is_small: bool) -> None:
        assert not block.is_free, "freed twice"
        self.allocated -= block.size
        free = self._free[is_small]
        if block.next is not None and block.next.is_free:
            free.remove(block.next)
            self._absorb(block)
        if block.previous is not None and block.previous.is_free:
            block = block.previous
            free.remove(block)
            self._absorb(block)
        block.is_free = True
        free.append(block)

    @staticmethod
    def _absorb(block: _Block) -> None:
        """Makes a block and the one behind it one."""
        gone = block.next
        assert gone is not None
        block.size += gone.size
        block.next = gone.next
        if block.next is not None:
            block.next.previous = block


def _segment(size: int) -> int:
    if size <= _SMALL:
        return _SMALL_SEGMENT
    return _LARGE_SEGMENT if size < _OWN_SEGMENT else -(-size // _STEP) * _STEP


def _empty_like(x: Tensor, **_: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _cat(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return torch.empty(shape, dtype=parts[0].dtype, device=parts[0].device)


def _mm_out(x: Tensor, y: Tensor, *, out: Tensor) -> Tensor:
    return out


# What torch does in Python on "meta", for which it imports its compiler: two seconds.
_QUICK: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.empty_like.default: _empty_like,
    torch.ops.aten.cat.default: _cat,
    torch.ops.aten.mm.out: _mm_out,
}


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    found = [leaf.untyped_storage() for leaf in tree_leaves(tree) if _is_meta(leaf)]
    return {storage._cdata: storage for storage in found}


def _is_meta(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type == "meta"


class Tally(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, tensors of the device "meta" take memory of an allocator as real ones would."""

    @property
    def asked(self) -> int:
        return sum(self.sizes)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and asking dynamo not to takes it a second

    def __init__(self, allocator: CachingAllocator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[int] = []  # bytes of all that was asked for, given back or not
        self._allocator = allocator
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = _storages((args, kwargs))
        out = _QUICK.get(func, func)(*args, **(kwargs or {}))
        for key, storage in _storages(out).items():
            if key not in given:  # else a view
                self._note(key, storage)
        return out

    def _note(self, key: int, storage: torch.UntypedStorage) -> None:
        if key in self._seen:
            return
        self._seen.add(key)
        self.sizes.append(storage.nbytes())
        free = self._allocator.allocate(storage.nbytes())

        def end() -> None:
            self._seen.discard(key)
            free()

        weakref.finalize(storage, end).atexit = False
