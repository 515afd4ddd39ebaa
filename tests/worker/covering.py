"""Rows of values that contain every pair of values of every two parameters. Knows names alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterable, Mapping, Sequence

Row = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]  # (parameter, value), by parameter's name
_TRIES = 8  # rows of which the one with most new pairs is taken


def pairs_of(row: Mapping[str, str]) -> set[Pair]:
    """All pairs that a row contains."""
    return set(itertools.combinations(sorted(row.items()), 2))


def pair(first: tuple[str, str], second: tuple[str, str]) -> Pair:
    """Two values of two parameters."""
    return (first, second) if first < second else (second, first)


def all_pairs(
    parameters: Mapping[str, Iterable[str]], *, impossible: Collection[Pair] = ()
) -> set[Pair]:
    """All pairs that there are, less such as cannot be."""
    found: set[Pair] = set()
    for a, b in itertools.combinations(sorted(parameters), 2):
        found |= {((a, x), (b, y)) for x in parameters[a] for y in parameters[b]}
    return found - set(impossible)


def covering_rows(
    parameters: Mapping[str, Sequence[str]], *, seed: int = 0, impossible: Collection[Pair] = ()
) -> list[Row]:
    """Few rows that contain every pair: each takes, parameter by parameter in some order, the
    value that makes most new pairs with those before it. Whatever is chosen, each parameter must
    have a value that is ``impossible`` with nothing."""
    rng = random.Random(seed)
    missing = all_pairs(parameters, impossible=impossible)
    rows: list[Row] = []
    while missing:
        start = min(missing)
        tries = [_row(parameters, missing, start, rng, impossible) for _ in range(_TRIES)]
        best = max(tries, key=lambda row: len(pairs_of(row) & missing))
        rows.append(best)
        missing -= pairs_of(best)
    return rows


def _row(
    parameters: Mapping[str, Sequence[str]],
    missing: set[Pair],
    start: Pair,
    rng: random.Random,
    impossible: Collection[Pair],
) -> Row:
    row = dict(start)
    others = [name for name in parameters if name not in row]
    rng.shuffle(others)
    for name in others:

        def num_new(value: str, name: str = name) -> int:
            new = (name, value)
            return sum(pair(new, old) in missing for old in row.items())

        def may_be(value: str, name: str = name) -> bool:
            return not any(pair((name, value), old) in impossible for old in row.items())

        values = [value for value in parameters[name] if may_be(value)]
        rng.shuffle(values)
        row[name] = max(values, key=num_new)
    return {name: row[name] for name in parameters}
