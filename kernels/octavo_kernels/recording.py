"""Records the kernel launches of some code and runs them in one native call, again and again.

What CUDA graphs are to a GPU: a decode step makes some 300 launches of a few microseconds each,
and Python takes longer than that to prepare one. Knows addresses and lifetimes, no kernel.

Recording runs no kernel. A replay runs them all with the arguments of the recording: what varies
must lie in memory that the code does not make. While recording, tensors come from `memory`, and a
torch operation that computes is refused, for a replay would leave it out. What Python reads of a
tensor is not noticed: the code must not decide by it.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import struct
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from octavo_kernels import memory, parallel
from octavo_kernels.parallel import ENTRY_HEAD

_ALIGN = 64
_HEAD = struct.Struct(f"={ENTRY_HEAD}q")


class UnrecordableError(RuntimeError):
    """The code does what a replay could not repeat."""


class Arena:
    """Memory that recordings share: only one runs at a time. Pages exist once they are used."""

    def __init__(self, num_bytes: int = 1 << 30) -> None:
        self._memory = mmap.mmap(-1, num_bytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._num_bytes = num_bytes
        self._generation = 0
        self._free: list[tuple[int, int]] = []

    def begin(self) -> None:
        """Everything is free again; tensors of earlier recordings must not be used any more."""
        self._generation += 1
        self._free = [(0, self._num_bytes)]

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor at the lowest place that is free; its place is free once its storage is gone.

        Raises UnrecordableError where there is none.
        """
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        size = -(-num_bytes // _ALIGN) * _ALIGN
        for index, (start, end) in enumerate(self._free):
            if end - start >= size:
                self._free[index : index + 1] = [(start + size, end)] if end - start > size else []
                break
        else:
            raise UnrecordableError(f"{num_bytes} bytes do not fit the arena")
        piece = (ctypes.c_char * num_bytes).from_address(self._base + start)
        # torch keeps the piece as long as the storage, whatever views of it there are.
        weakref.finalize(piece, self._release, self._generation, start, start + size).atexit = False
        return torch.frombuffer(piece, dtype=dtype).view(*shape)

    def _release(self, generation: int, start: int, end: int) -> None:
        if generation != self._generation:
            return
        at = bisect.bisect(self._free, (start, end))
        if at < len(self._free) and self._free[at][0] == end:
            end = self._free.pop(at)[1]
        if at and self._free[at - 1][1] == start:
            at -= 1
            start = self._free.pop(at)[0]
        self._free.insert(at, (start, end))


class Recording:
    """Launches, and the memory that Python prepared for them."""

    def __init__(self) -> None:
        self.num_launches = 0
        self._entries = bytearray()
        self._parts: list[int] = []  # offsets of entries whose number of parts is their own
        self._held: list[Tensor] = []
        self._range = (0, 0)
        self._buffer: Any = None

    @property
    def num_bytes(self) -> int:
        """That it keeps for itself."""
        return len(self._entries) + sum(tensor.nbytes for tensor in self._held)

    def add(self, task: int, parts_at: int, num_parts: int, args: bytes) -> None:
        """One more launch: of `num_parts`, or of what the int64 at `parts_at` says."""
        if not parts_at:
            self._parts.append(len(self._entries))
        size = _HEAD.size + len(args)
        self._entries += _HEAD.pack(task, parts_at, num_parts, size) + args
        self.num_launches += 1

    def hold(self, tensor: Tensor) -> None:
        self._held.append(tensor)

    def finish(self) -> None:
        """Gives the entries their place, after which they can be replayed."""
        self._buffer = (ctypes.c_char * len(self._entries)).from_buffer(self._entries)
        start = ctypes.addressof(self._buffer)
        for offset in self._parts:
            struct.pack_into("=q", self._entries, offset + 8, start + offset + 16)
        self._range = start, start + len(self._entries)

    def replay(self) -> None:
        """Runs all launches; returns when the last has ended."""
        assert self._buffer is not None, "a recording is replayed once it is finished"
        parallel.run_entries(*self._range)

    def replay_each(self, before: Callable[[int], None], after: Callable[[int], None]) -> None:
        """`replay`, launch by launch, with calls around each that get its task's address."""
        entry, end = self._range
        while entry < end:
            task, _, _, size = (ctypes.c_int64 * ENTRY_HEAD).from_address(entry)
            before(task)
            parallel.run_entries(entry, entry + 1)
            after(task)
            entry += size


class _Refuse(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises where torch computes; views and the like are of no concern to a replay."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch would import its compiler, 2 s and 100 MB, to keep it away from here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func is not torch.ops.aten.detach.default:
            raise UnrecordableError(f"torch computes {func} while launches are recorded")
        return func(*args, **(kwargs or {}))


class _Keeper:
    """`memory`'s keeper for one recording: other threads get memory as ever."""

    def __init__(self, arena: Arena, recording: Recording) -> None:
        self._arena, self._recording = arena, recording
        self._thread = threading.get_ident()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if threading.get_ident() != self._thread:
            return torch.empty(shape, dtype=dtype)
        return self._arena.empty(shape, dtype)

    def hold(self, tensor: Tensor) -> None:
        if threading.get_ident() == self._thread:
            self._recording.hold(tensor)

    def add(self, task: int, parts_at: int, num_parts: int, args: bytes) -> bool:
        if threading.get_ident() != self._thread:
            return False
        self._recording.add(task, parts_at, num_parts, args)
        return True


@contextmanager
def recording(arena: Arena) -> Iterator[Recording]:
    """Records the launches of the block, which are not run; `replay` runs them once it has ended.

    A tensor from the arena that outlives the block holds what a later replay computes. Raises
    UnrecordableError, out of the block, where a replay would not do all that the block does.
    """
    arena.begin()
    found = Recording()
    keeper = _Keeper(arena, found)
    memory.set_keeper(keeper)
    parallel.set_recorder(keeper.add)
    try:
        with _Refuse():  # type: ignore[no-untyped-call]
            yield found
    finally:
        parallel.set_recorder(None)
        memory.set_keeper(None)
    found.finish()
