"""Requests that begin with the same blocks: found at every depth, shared as deep as pays."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from octavo.worker.gpu.prefix_groups import PrefixGroups, PrefixNames, find_groups

BLOCKS = 4  # of a partition
MOST = 6  # partitions that have names


def tables_of(prompts: list[list[int]]) -> np.ndarray:
    """A row for each request, given by its partitions: equal ones after equal ones are the same."""
    ids: dict[tuple[int, ...], np.ndarray] = {}
    tables = np.full((len(prompts), 40), 10**6, np.int32)
    for row, prompt in enumerate(prompts):
        for depth in range(len(prompt)):
            name = tuple(prompt[: depth + 1])
            ids.setdefault(name, BLOCKS * len(ids) + np.arange(BLOCKS))
            tables[row, depth * BLOCKS : (depth + 1) * BLOCKS] = ids[name]
    return tables


def find(prompts: list[list[int]], **changes: Any) -> PrefixGroups | None:
    """Groups of these requests, whose rows are in another order."""
    order = np.array(random.Random(1).sample(range(len(prompts)), len(prompts)), np.int64)
    tables = np.empty((len(prompts), 40), np.int32)
    tables[order] = tables_of(prompts)
    depths = np.array([min(len(prompt), MOST) for prompt in prompts], np.int64)
    names = PrefixNames(tables, partition_blocks=BLOCKS, max_partitions=MOST)
    found = names.of(order, serials=np.arange(len(prompts)), depths=depths)
    return find_groups(found, depths=depths, **{"max_groups": 16, "min_saved": 1, **changes})


def as_sets(groups: PrefixGroups | None) -> dict[tuple[int, ...], int]:
    """Members -> partitions shared; checks that the arrays agree with each other."""
    if groups is None:
        return {}
    found = {}
    want = np.zeros_like(groups.request_partitions)
    for group, partitions in enumerate(groups.partitions.tolist()):
        members = groups.members[groups.starts[group] : groups.starts[group + 1]].tolist()
        assert len(members) > 1 and partitions > 0
        want[members] = partitions
        found[tuple(sorted(members))] = partitions
    assert groups.starts[0] == 0 and groups.starts[-1] == len(groups.members)
    assert len(set(groups.members.tolist())) == len(groups.members)
    np.testing.assert_array_equal(groups.request_partitions, want)
    for array in (groups.request_partitions, groups.members, groups.starts, groups.partitions):
        assert array.dtype == np.int32
    return found


def test_nothing_in_common_is_no_group() -> None:
    assert find([[1], [2], [3]]) is None
    assert find([]) is None and find([[1]]) is None and find([[], []]) is None


def test_a_common_prompt_is_one_group() -> None:
    assert as_sets(find([[1, 2], [9], [1, 2], [1, 2, 3]])) == {(0, 2, 3): 2}


def test_a_group_is_as_deep_as_saves_most() -> None:
    # Two documents behind one instruction: two groups of three save more than one of six.
    documents = [[1, 2, 3], [1, 4, 5]] * 3
    assert as_sets(find(documents)) == {(0, 2, 4): 3, (1, 3, 5): 3}
    # One pair goes on together for one partition; the instruction of all saves more.
    assert as_sets(find([[1, 2], [1, 2], [1, 3], [1, 4]])) == {(0, 1, 2, 3): 1}


def test_names_follow_rows_from_holder_to_holder() -> None:
    tables = tables_of([[1, 2], [1, 3], [1, 2]])
    names = PrefixNames(tables, partition_blocks=BLOCKS, max_partitions=MOST)
    rows = np.arange(3)

    def of(serials: list[int], depths: list[int]) -> np.ndarray:
        return names.of(rows, serials=np.array(serials), depths=np.array(depths))

    first = of([0, 1, 2], [1, 0, 1])
    assert first[0, 0] == first[2, 0]
    second = of([0, 1, 2], [2, 2, 2])
    assert (second[:, 0] == first[0, 0]).all()
    assert second[0, 1] == second[2, 1] != second[1, 1]
    tables[2] = tables_of([[7], [8]])[1]
    assert (of([0, 1, 2], [2, 2, 2])[:, :2] == second[:, :2]).all()
    third = of([0, 1, 3], [2, 2, 1])
    assert (third[:2, :2] == second[:2, :2]).all() and third[2, 0] not in second[:, :2]


def test_a_partition_is_the_same_in_all_its_blocks() -> None:
    """Tables whose partitions end alike and begin otherwise, which no prefix cache hands out."""
    tables = np.array([[1, 2, 3, 4], [9, 2, 3, 4], [1, 2, 3, 4]], np.int32)
    names = PrefixNames(tables, partition_blocks=4, max_partitions=1)
    found = names.of(np.arange(3), serials=np.arange(3), depths=np.ones(3, np.int64))[:, 0]
    assert found[0] == found[2] != found[1]


def test_names_of_the_gone_are_forgotten() -> None:
    tables = np.zeros((2, BLOCKS), np.int32)
    names = PrefixNames(tables, partition_blocks=BLOCKS, max_partitions=1)
    for serial in range(0, 100, 2):
        tables[0], tables[1] = serial, serial + serial % 4
        serials, depths = np.array([serial, serial + 1]), np.ones(2, np.int64)
        found = names.of(np.arange(2), serials=serials, depths=depths)[:, 0]
        assert (found[0] == found[1]) == (serial % 4 == 0)
    assert len(names._name_of) < 20


def test_bounds_leave_the_best() -> None:
    prompts = [[1], [1], [2, 3], [2, 3], [4], [4], [4], [4]]
    assert as_sets(find(prompts)) == {(0, 1): 1, (2, 3): 2, (4, 5, 6, 7): 1}
    assert as_sets(find(prompts, max_groups=2)) == {(2, 3): 2, (4, 5, 6, 7): 1}
    assert as_sets(find(prompts, max_groups=1)) == {(4, 5, 6, 7): 1}
    assert as_sets(find([[1] * 9] * 2)) == {(0, 1): MOST}
    assert find(prompts, min_saved=6) is not None
    assert find(prompts, min_saved=7) is None


@pytest.mark.parametrize("seed", range(20))
def test_no_other_grouping_saves_more(seed: int) -> None:
    source = random.Random(seed)
    prompts = [
        [source.randint(0, 1) for _ in range(source.randint(0, 4))]
        for _ in range(source.randint(2, 40))
    ]

    def best(depth: int, requests: list[list[int]]) -> int:
        if len(requests) < 2:
            return 0
        deeper = [[p for p in requests if p[depth : depth + 1] == [name]] for name in (0, 1)]
        parts = sum(best(depth + 1, part) for part in deeper)
        return max((len(requests) - 1) * depth, parts)

    groups = find(prompts, max_groups=40)
    for members, partitions in as_sets(groups).items():
        assert len({tuple(prompts[m][:partitions]) for m in members}) == 1
        assert all(len(prompts[m]) >= partitions for m in members)
    assert (groups.num_saved if groups else 0) == best(0, prompts)
