"""The generator of the matrix: every pair is there, in few rows, the same each time."""

from __future__ import annotations

import itertools

import pytest

from tests.worker.covering import all_pairs, covering_rows, pair, pairs_of


@pytest.mark.parametrize("sizes", [(2, 2), (2, 3, 4), (5, 5, 2, 2, 2, 2), (3,) * 13, (2,) * 30])
def test_every_pair_is_in_few_rows(sizes: tuple[int, ...]) -> None:
    parameters = {f"p{i}": [f"v{j}" for j in range(size)] for i, size in enumerate(sizes)}
    rows = covering_rows(parameters)
    seen = {
        (a, row[a], b, row[b]) for row in rows for a, b in itertools.permutations(parameters, 2)
    }
    for a, b in itertools.combinations(parameters, 2):
        for x, y in itertools.product(parameters[a], parameters[b]):
            assert (a, x, b, y) in seen
    assert all(list(row) == list(parameters) for row in rows)
    largest, second = sorted(sizes)[:-3:-1]
    assert largest * second <= len(rows) <= 2.3 * largest * second + 6
    assert rows == covering_rows(parameters)


def test_pairs_are_counted_once() -> None:
    assert len(all_pairs({"b": "xy", "a": "uvw"})) == 6
    assert pairs_of({"b": "x", "a": "u"}) == {(("a", "u"), ("b", "x"))}


def test_what_cannot_be_is_in_no_row_and_all_else_is() -> None:
    parameters = {"a": "xyz", "b": "xyz", "c": "xy"}
    impossible = {pair(("a", "x"), ("b", "y")), pair(("c", "y"), ("a", "z"))}
    rows = covering_rows(parameters, impossible=impossible)
    seen = set().union(*map(pairs_of, rows))
    assert seen == all_pairs(parameters, impossible=impossible)
    assert len(seen) == len(all_pairs(parameters)) - 2
