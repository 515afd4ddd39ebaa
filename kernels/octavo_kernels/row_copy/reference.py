"""Row copies in plain torch. Know nothing of threads."""

from __future__ import annotations

from torch import Tensor


def row_copy_reference(x: Tensor, *, out: Tensor) -> Tensor:
    """See `row_copy`."""
    return out.copy_(x)
