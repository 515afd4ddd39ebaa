"""What a step has to read and compute at least, launch by launch. Knows shapes, times nothing.

A launch is a product with a weight when one of its arguments is an address inside that weight;
otherwise its op (the kernel's folder) says what it does.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from octavo.checkpoint import ModelSpec

_F32 = 4  # bytes of an activation


@dataclass(frozen=True, slots=True)
class Work:
    """Least bytes that are moved, operations (a multiply-add is two), and of which kind."""

    num_bytes: float = 0.0
    num_ops: float = 0.0
    is_int8: bool = False

    def __add__(self, other: Work) -> Work:
        return Work(
            self.num_bytes + other.num_bytes,
            self.num_ops + other.num_ops,
            self.is_int8 or other.is_int8,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One step: the number of new tokens of each request and its context after the step."""

    counts: tuple[int, ...]
    contexts: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)

    @property
    def num_keys(self) -> int:
        """Pairs of a new token and a token that it sees."""
        pairs = zip(self.counts, self.contexts, strict=True)
        return sum(count * (end - count) + count * (count + 1) // 2 for count, end in pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A weight of the model, and how many bytes a row takes."""

    role: str
    n: int
    k: int
    num_bytes: int

    @property
    def is_int8(self) -> bool:
        """Whether its products are of 8-bit integers: codes of 8 bits or less, with scales."""
        return self.num_bytes < 1.75 * self.n * self.k

    def product(self, num_rows: int, *, is_gated: bool) -> Work:
        """Of rows with it; a gated one writes half as much."""
        moved = num_rows * _F32 * (self.k + self.n // (2 if is_gated else 1))
        return Work(self.num_bytes + moved, 2.0 * num_rows * self.n * self.k, self.is_int8)

    def gather(self, num_rows: int) -> Work:
        return Work(num_rows * (self.num_bytes / self.n + _F32 * self.k))


class Matrices:
    """The weights of a model, found by any address inside them."""

    def __init__(self, model: object) -> None:
        found = [
            (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, matrix)
            for matrix, tensors in _matrices(model, "", set())
            for tensor in tensors
        ]
        found.sort(key=lambda item: item[0])
        self._found = found
        self._starts = [start for start, _, _ in found]

    @property
    def all(self) -> list[Matrix]:
        return list({id(matrix): matrix for _, _, matrix in self._found}.values())

    def at(self, args: Sequence[int | float]) -> Matrix | None:
        """The weight that one of the arguments points into."""
        for arg in args:
            place = bisect.bisect(self._starts, arg) - 1
            if place >= 0 and arg < self._found[place][1]:
                return self._found[place][2]
        return None


def _matrices(thing: object, role: str, seen: set[int]) -> Iterator[tuple[Matrix, list[Tensor]]]:
    """Every `Weight` below an object, with the tensors that it keeps."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, list | tuple):
        for each in thing:
            yield from _matrices(each, role, seen)
    elif isinstance(thing, dict):
        for each in thing.values():
            yield from _matrices(each, role, seen)
    elif all(hasattr(thing, name) for name in ("n", "k", "num_bytes", "linear")):
        weight: Any = thing
        matrix = Matrix(role=role, n=weight.n, k=weight.k, num_bytes=weight.num_bytes)
        yield matrix, list(_tensors(weight, set()))
    elif type(thing).__module__.startswith("octavo"):
        for name, value in _attributes(thing):
            is_own = name == "weight"  # of a layer that is one weight: the layer's name says more
            yield from _matrices(value, role if is_own else name, seen)


def _tensors(thing: object, seen: set[int]) -> Iterator[Tensor]:
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, list | tuple):
        for each in thing:
            yield from _tensors(each, seen)
    elif type(thing).__module__.startswith("octavo"):
        for _, value in _attributes(thing):
            yield from _tensors(value, seen)


def _attributes(thing: object) -> Iterator[tuple[str, Any]]:
    yield from getattr(thing, "__dict__", {}).items()
    for kind in type(thing).__mro__:
        slots = getattr(kind, "__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(thing, name):
                yield name, getattr(thing, name)


class StepWork:
    """Names launches of one step, and says what all launches of one name have to do."""

    def __init__(self, matrices: Matrices, spec: ModelSpec, *, cache_itemsize: int) -> None:
        self._matrices, self._spec, self._itemsize = matrices, spec, cache_itemsize

    def of(self, kernel: str, args: Sequence[int | float], shape: Shape) -> tuple[str, Work]:
        """The label of one launch (op or weight, then kernel), and its share of the work."""
        op, _, name = kernel.removeprefix("octavo_kernels.").partition(".")
        name = name.rpartition(".")[2]
        matrix = self._matrices.at(args)
        if matrix is None:
            return f"{op}: {name}", self._of_op(op, name, shape)
        is_table = matrix.n == self._spec.vocab_size
        if is_table and "gather" in name:
            return f"embedding: {name}", matrix.gather(shape.num_tokens)
        rows = len(shape.counts) if is_table else shape.num_tokens
        is_gated = matrix.n == 2 * self._spec.intermediate_size
        role = "head" if is_table else matrix.role
        return f"{role}: {name}", matrix.product(rows, is_gated=is_gated)

    def _of_op(self, op: str, name: str, shape: Shape) -> Work:
        """Of one launch; nothing where the op does not tell, as of a plan."""
        spec, tokens = self._spec, shape.num_tokens
        width = _F32 * tokens * spec.head_dim
        kv_heads = 2 * spec.num_kv_heads
        if op == "paged_attention" and "attend" in name:
            cached = sum(shape.contexts) * kv_heads * spec.head_dim * self._itemsize
            ops = 4.0 * spec.num_heads * spec.head_dim * shape.num_keys
            return Work(cached + 2 * width * spec.num_heads, ops)
        if op == "rotary_kv_write":
            kept = tokens * kv_heads * spec.head_dim * self._itemsize
            return Work(width * (2 * spec.num_heads + kv_heads) + kept)
        if op == "rms_norm":
            return Work(2.0 * _F32 * tokens * spec.hidden_size)
        if op == "sampling":
            return Work(float(_F32 * len(shape.counts) * spec.vocab_size))
        return Work()
