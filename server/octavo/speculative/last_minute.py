"""What speculation gained or lost over the last minute of steps. Knows seconds; decides nothing."""

from __future__ import annotations

from collections import deque

WINDOW = 60.0
_LEAST = 20.0  # less is taken for as much: the first seconds tell little
_PIECE = 1.0


class LastMinute:
    """Time of steps, and how much of it speculation saved. It stands still while nothing runs."""

    def __init__(self) -> None:
        self._pieces: deque[tuple[float, float]] = deque()  # (seconds, saved), a second each
        self._open = self._open_saved = 0.0  # of the piece that is not full yet
        self._seconds = self._saved = 0.0  # of all, the open one included

    def add(self, seconds: float, saved: float) -> bool:
        """A step took so long, and would have taken ``saved`` longer. Whether that filled a
        second: often enough to tell anyone."""
        self._open += seconds
        self._open_saved += saved
        self._seconds += seconds
        self._saved += saved
        if self._open < _PIECE:
            return False
        self._pieces.append((self._open, self._open_saved))
        self._open = self._open_saved = 0.0
        while self._seconds - self._pieces[0][0] >= WINDOW:
            oldest, oldest_saved = self._pieces.popleft()
            self._seconds -= oldest
            self._saved -= oldest_saved
        return True

    @property
    def gain(self) -> float:
        """Throughput beside that without speculation, less 1: -0.03 is 3 % lost."""
        return self._saved / max(self._seconds, _LEAST)
