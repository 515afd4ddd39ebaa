"""A place in a layer that one checkpoint tensor fills. Knows shapes, not names or files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSlot:
    """Filled by rows, in any order, so that a tensor need never be whole in memory.

    ``write(rows, start)`` takes ``[n, *shape[1:]]`` of any float dtype for rows ``start`` on, from
    the CPU or the platform's device. It also takes a GGUF file's rows of blocks of
    ``block_kinds``, such as q4_1, as they are: uint8.
    """

    shape: tuple[int, ...]
    write: Callable[[Tensor, int], None]
    kind: str = "weight"  # "weight", "bias" or "norm": what random weights should look like
    block_kinds: tuple[str, ...] = ()


def vector_slot(
    target: Tensor, *, kind: str, offset: int = 0, size: int | None = None
) -> WeightSlot:
    """Slot of ``target[offset : offset + size]`` (all of it by default)."""
    size = target.shape[0] if size is None else size

    def write(rows: Tensor, start: int) -> None:
        target[offset + start : offset + start + rows.shape[0]].copy_(rows)

    return WeightSlot(shape=(size,), write=write, kind=kind)
