"""Rows of values that contain every pair of values of every two parameters. Knows names alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence

Row = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]  # (parameter, value), by parameter's name
_TRIES = 8  # rows of which the one with most new pairs is taken


def pairs_of(row: Mapping[str, str]) -> set[Pair]:
    """All pairs that a row contains."""
    return set(itertools.combinations(sorted(row.items()), 2))


def all_pairs(parameters: Mapping[str, Iterable[str]]) -> set[Pair]:
    """All pairs that there are."""
    found: set[Pair] = set()
    for a, b in itertools.combinations(sorted(parameters), 2):
        found |= {((a, x), (b, y)) for x in parameters[a] for y in parameters[b]}
    return found


def covering_rows(parameters: Mapping[str, Sequence[str]], *, seed: int = 0) -> list[Row]:
    """Few rows that contain every pair: each takes, parameter by parameter in some order, the
    value that makes most new pairs with those before it."""
    rng = random.Random(seed)
    missing = all_pairs(parameters)
    rows: list[Row] = []
    while missing:
        start = min(missing)
        tries = [_row(parameters, missing, start, rng) for _ in range(_TRIES)]
        best = max(tries, key=lambda row: len(pairs_of(row) & missing))
        rows.append(best)
        missing -= pairs_of(best)
    return rows


def _row(
    parameters: Mapping[str, Sequence[str]], missing: set[Pair], start: Pair, rng: random.Random
) -> Row:
    row = dict(start)
    others = [name for name in parameters if name not in row]
    rng.shuffle(others)
    for name in others:

        def num_new(value: str, name: str = name) -> int:
            new = (name, value)
            return sum((min(new, old), max(new, old)) in missing for old in row.items())

        values = list(parameters[name])
        rng.shuffle(values)
        row[name] = max(values, key=num_new)
    return {name: row[name] for name in parameters}
