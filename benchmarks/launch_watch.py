"""Times the launches of kernels on the CPU, one by one, replayed ones too. Knows no model.

A recording is replayed launch by launch while `LaunchWatch.is_timing`, so what a launch costs is
seen; what replaying it in one native call saves is not.
"""

from __future__ import annotations

import struct
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from octavo_kernels.parallel import Kernel
from octavo_kernels.recording import Recording


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: the kernel's dotted name, the arguments as they were given, what it took."""

    name: str
    args: tuple[int | float, ...]
    seconds: float


@dataclass(slots=True)
class LaunchWatch:
    """The launches since the last `take`, while `is_timing`."""

    is_timing: bool = False
    _launches: list[Launch] = field(default_factory=list)
    _names: dict[int, str] = field(default_factory=dict)  # by address of the machine code
    _recorded: weakref.WeakKeyDictionary[Recording, list[tuple[int, ...]]] = field(
        default_factory=weakref.WeakKeyDictionary
    )

    def take(self) -> list[Launch]:
        """What was launched, in order; forgotten here."""
        found, self._launches = self._launches, []
        return found

    def saw(self, name: str, args: tuple[int | float, ...], began: float) -> None:
        self._launches.append(Launch(name, args, time.perf_counter() - began))

    def learn(self, kernel: Kernel) -> None:
        self._names[kernel.address] = kernel.name

    def remember(self, recording: Recording, args: bytes) -> None:
        words = struct.unpack(f"={len(args) // 8}q", args)
        self._recorded.setdefault(recording, []).append(words)

    def replay(self, recording: Recording) -> None:
        """Replays and times each launch."""
        args = iter(self._recorded[recording])
        began = 0.0

        def before(task: int) -> None:
            nonlocal began
            began = time.perf_counter()

        def after(task: int) -> None:
            self.saw(self._names[task], next(args), began)

        recording.replay_each(before, after)


@contextmanager
def watching() -> Iterator[LaunchWatch]:
    """Sees every launch of the block. Recordings that are to be timed must be made inside it."""
    watch = LaunchWatch()
    call, add, replay = Kernel.__call__, Recording.add, Recording.replay

    def watched_call(self: Kernel, num_parts: int, *args: int | float) -> None:
        watch.learn(self)
        began = time.perf_counter()
        call(self, num_parts, *args)
        if watch.is_timing:
            watch.saw(self.name, args, began)

    def watched_add(self: Recording, *args: Any) -> None:
        watch.remember(self, args[-1])
        add(self, *args)

    def watched_replay(self: Recording) -> None:
        if watch.is_timing:
            watch.replay(self)
        else:
            replay(self)

    with (
        mock.patch.object(Kernel, "__call__", watched_call),
        mock.patch.object(Recording, "add", watched_add),
        mock.patch.object(Recording, "replay", watched_replay),
    ):
        yield watch
