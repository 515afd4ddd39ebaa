"""Counts the kernels that Triton makes in this process. Knows no kernel.

Made means compiled, or found in the disk cache and loaded: what one machine finds another compiles.
"""

from __future__ import annotations

import functools
from typing import Any

import triton


class _Listener:
    """What Triton tells of every kernel it makes; whoever listened before is told too."""

    def __init__(self) -> None:
        self.num_heard = 0
        self._before = triton.knobs.compilation.listener
        triton.knobs.compilation.listener = self

    def __call__(self, **news: Any) -> None:
        self.num_heard += 1
        if self._before is not None:
            self._before(**news)


# One for the process, like Triton's own; never taken out, as others may listen on top of it.
_listener = functools.cache(_Listener)


def num_compiled() -> int:
    """Kernels made since the first call, which begins to count. Interpreted ones are not made."""
    return _listener().num_heard
