"""Block copies in plain torch. Know nothing of threads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def block_copy_reference(caches: Sequence[Tensor], *, src: Tensor, dst: Tensor) -> None:
    """See `block_copy`."""
    for cache in caches:
        for source, target in zip(src.tolist(), dst.tolist(), strict=True):
            cache[target] = cache[source].clone()
