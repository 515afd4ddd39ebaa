"""Finds requests of a step that begin with the same blocks. Knows block ids, no token or kernel.

What several requests hold in common is read once for all of them, in whole partitions of keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Places = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixGroups:
    """G groups of R requests; M requests are in one of them, a group's side by side."""

    request_partitions: Ints  # [R] leading partitions shared, 0 = in no group
    members: Ints  # [M] places in [0, R)
    starts: Ints  # [G + 1] of the groups in members
    partitions: Ints  # [G] leading partitions that a group shares

    @property
    def num_saved(self) -> int:
        """Partitions that need not be read."""
        return int(((np.diff(self.starts) - 1) * self.partitions).sum())


class PrefixNames:
    """Names what rows begin with: rows have equal names at a depth if their blocks up to there are
    the same ones. A name is made once, when its partition of blocks is full."""

    def __init__(self, block_tables: Ints, *, partition_blocks: int, max_partitions: int) -> None:
        """block_tables [N, MB] by row, which may change behind a request's full partitions."""
        num_rows = len(block_tables)
        self._tables = block_tables
        self._blocks = partition_blocks
        self._names = np.zeros((num_rows, max_partitions), np.int64)
        self._serials = np.full(num_rows, -1, np.int64)
        self._known = np.zeros(num_rows, np.int64)  # partitions of a row that have names
        self._name_of: dict[tuple[int, bytes], int] = {}  # of what comes before, and the blocks
        self._most = 4 * num_rows * max_partitions
        self._last = 0

    def of(self, rows: Places, *, serials: Places, depths: Places) -> Places:
        """[R, max_partitions] names, depths[r] of them for each request; what follows is void.

        serials tell one holder of a row from the next.
        """
        fresh = rows[self._serials[rows] != serials]
        self._known[fresh] = 0
        self._serials[rows] = serials
        missing = np.flatnonzero(self._known[rows] < depths)
        if len(self._name_of) > self._most:  # most of them are of requests long gone
            self._name_of.clear()
            self._known[:] = 0
            missing = np.flatnonzero(depths > 0)
        for place in missing.tolist():
            self._name(int(rows[place]), int(depths[place]))
        return self._names[rows]

    def _name(self, row: int, depth: int) -> None:
        known = int(self._known[row])
        before = int(self._names[row, known - 1]) if known else 0
        for at in range(known, depth):
            blocks = self._tables[row, at * self._blocks : (at + 1) * self._blocks].tobytes()
            name = self._name_of.get((before, blocks))
            if name is None:
                name = self._last = self._last + 1
                self._name_of[before, blocks] = name
            self._names[row, at] = before = name
        self._known[row] = depth


@dataclass(frozen=True, slots=True, kw_only=True)
class _Level:
    """Requests that share their first partitions with others, as many as the level's number."""

    places: Places  # [n] in [0, R)
    clusters: Places  # [n] of [0, C)
    sizes: Places  # [C]
    parents: Places  # [C] clusters of the level before


def find_groups(
    names: Places, *, depths: Places, max_groups: int, min_saved: int
) -> PrefixGroups | None:
    """Groups of R requests by their names [R, P] and how many of them count, depths [R].

    Of all ways to group by depth, the one that saves most reads; of its groups, the max_groups
    best. None where these save less than min_saved partitions.
    """
    levels = _levels(names, depths)
    if not levels:
        return None
    request_group, group_depths, sizes = _best(levels, len(names))
    saved = (sizes - 1) * group_depths
    kept = np.argsort(-saved, kind="stable")[:max_groups]
    kept = kept[saved[kept] > 0]
    if saved[kept].sum() < max(min_saved, 1):
        return None
    place_of = np.full(len(sizes) + 1, -1)
    place_of[kept] = np.arange(len(kept))
    group = place_of[request_group]  # -1 stays: the entry past the last group
    inside = np.flatnonzero(group >= 0)
    members = inside[np.argsort(group[inside], kind="stable")]
    partitions = np.zeros(len(names), np.int32)
    partitions[members] = group_depths[kept][group[members]]
    return PrefixGroups(
        request_partitions=partitions,
        members=members.astype(np.int32),
        starts=np.concatenate([[0], np.cumsum(sizes[kept])]).astype(np.int32),
        partitions=group_depths[kept].astype(np.int32),
    )


def _levels(names: Places, depths: Places) -> list[_Level]:
    """Clusters of two requests and more, by the first partition, then by two, and so on."""
    levels: list[_Level] = []
    places = np.flatnonzero(depths > 0)
    parents = np.zeros(len(places), np.int64)
    while len(places) > 1:
        name = names[places, len(levels)]
        order = np.argsort(name)
        name = name[order]
        ends = (name[1:] != name[:-1]).nonzero()[0] + 1
        edges = np.concatenate([[0], ends, [len(name)]])
        sizes = edges[1:] - edges[:-1]
        is_shared = sizes > 1
        if not is_shared.any():
            break
        order = order[np.repeat(is_shared, sizes)]
        sizes = sizes[is_shared]
        places, parents = places[order], parents[order]
        clusters = np.repeat(np.arange(len(sizes)), sizes)
        first = np.cumsum(sizes) - sizes
        levels.append(_Level(places=places, clusters=clusters, sizes=sizes, parents=parents[first]))
        deeper = depths[places] > len(levels)
        places, parents = places[deeper], clusters[deeper]
    return levels


def _best(levels: list[_Level], num_requests: int) -> tuple[Places, Places, Places]:
    """Group of each request (-1: none), depth and size of each group; some groups are unused.

    From the deepest level up: a cluster stays whole where that saves as much as its parts do.
    """
    group = np.full(num_requests, -1)
    depths: list[Places] = []
    num_groups = 0
    below = np.zeros(0, np.int64)  # what the clusters of the level below save at best
    for depth, level in zip(range(len(levels), 0, -1), reversed(levels), strict=True):
        own = (level.sizes - 1) * depth
        parts = np.zeros_like(own)
        if depth < len(levels):
            np.add.at(parts, levels[depth].parents, below)
        taken = (own >= parts)[level.clusters]
        group[level.places[taken]] = num_groups + level.clusters[taken]
        depths.append(np.full(len(own), depth))
        num_groups += len(own)
        below = np.maximum(own, parts)
    # Groups whose members went to a larger one are left with none.
    sizes = np.bincount(group[group >= 0], minlength=num_groups)
    return group, np.concatenate(depths), sizes
