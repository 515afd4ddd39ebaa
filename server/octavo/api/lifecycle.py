"""Where the server stands between start and end, and how many requests it is answering.

Knows states and counts; nothing of HTTP or the engine. Used on one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum


class State(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class Lifecycle:
    """``starting -> ready -> draining``. New work is taken only when ready."""

    def __init__(
        self, state: State = State.STARTING, *, on_active: Callable[[int], None] = lambda num: None
    ) -> None:
        """``on_active`` hears of every change of ``num_active``."""
        self.state = state
        self.num_active = 0
        self._on_active = on_active
        self._idle = asyncio.Event()
        self._idle.set()

    def ready(self) -> None:
        """The first token is possible. No effect once draining."""
        if self.state is State.STARTING:
            self.state = State.READY

    def drain(self) -> None:
        """Takes no new work from now on; what runs goes on."""
        self.state = State.DRAINING

    @contextmanager
    def active(self) -> Iterator[None]:
        """One generation is being answered."""
        self.num_active += 1
        self._on_active(self.num_active)
        self._idle.clear()
        try:
            yield
        finally:
            self.num_active -= 1
            self._on_active(self.num_active)
            if not self.num_active:
                self._idle.set()

    async def wait_idle(self, timeout: float) -> bool:
        """Waits up to ``timeout`` seconds for the last answer; whether it came."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True
