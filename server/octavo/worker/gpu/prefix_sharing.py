"""Tells attention which requests of a step begin alike, on the device. Knows rows and blocks.

What a step's requests share seldom changes from one step to the next, so it lies in the arena and
is uploaded when it did change.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from octavo.attention.base import KVCacheSpec, SharedPrefixes
from octavo.worker.gpu.arena import RequestArena
from octavo.worker.gpu.buffers import StepSizes
from octavo.worker.gpu.prefix_groups import PrefixGroups, PrefixNames, find_groups
from octavo.worker.gpu.table import GpuRequestTable, StepBatch
from octavo.worker.gpu.upload import Upload
from octavo_kernels.paged_attention import numerics

# What a captured graph has room for: programs without work cost little, but not nothing.
_MAX_GROUPS = 16
_MAX_PARTITIONS = 32
# A launch more in every layer, of as long as it takes to read about this much.
_PAYS_BYTES = 64 << 20


def min_saved_partitions(spec: KVCacheSpec) -> int:
    """Partitions of keys that must not be read for sharing to pay, in each layer."""
    token_bytes = 2 * spec.num_kv_heads * spec.head_dim * spec.dtype.itemsize
    return -(-_PAYS_BYTES // (token_bytes * numerics.PARTITION))


class PrefixSharing:
    """Follows the batches of one engine; for the thread that launches its steps."""

    def __init__(
        self, arena: RequestArena, *, table: GpuRequestTable, sizes: StepSizes, min_saved: int
    ) -> None:
        self._partition = int(numerics.PARTITION)
        self._max_groups = min(_MAX_GROUPS, sizes.max_num_seqs // 2)
        self._max_partitions = min(_MAX_PARTITIONS, sizes.max_model_len // self._partition)
        self._min_saved = min_saved
        self._names = PrefixNames(
            table.block_tables,
            partition_blocks=self._partition // sizes.block_size,
            max_partitions=self._max_partitions,
        )
        self._request_partitions = arena.view("prefix_request_partitions")
        self._members = arena.view("prefix_members")
        self._starts = arena.view("prefix_starts")[: self._max_groups + 1]
        self._partitions = arena.view("prefix_partitions")[: self._max_groups]
        # Of the last step that had two requests of a whole partition.
        self._serials: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._depths: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._is_shared = False

    def stage(self, batch: StepBatch, upload: Upload) -> bool:
        """Stages what the batch's requests share; whether that is enough to pay."""
        if not self._max_groups or not self._max_partitions or len(batch.rows) < 2:
            return False
        if batch.least_lens.max() <= self._partition:
            return False
        # Whole partitions before the last token, wherever that is, of requests that decode. Those
        # that verify drafts read theirs themselves.
        depths = np.minimum((batch.least_lens - 1) // self._partition, self._max_partitions)
        depths = np.where(batch.seq_lens - batch.starts == 1, depths, 0).astype(np.int64)
        if np.count_nonzero(depths) < 2:
            return False
        is_same = batch.serials is self._serials or np.array_equal(batch.serials, self._serials)
        if is_same and np.array_equal(depths, self._depths):
            return self._is_shared
        self._serials, self._depths = batch.serials, depths
        groups = find_groups(
            self._names.of(batch.rows, serials=batch.serials, depths=depths),
            depths=depths,
            max_groups=self._max_groups,
            min_saved=self._min_saved,
        )
        self._is_shared = groups is not None
        if groups is not None:
            self._put(groups, upload)
        return self._is_shared

    def views(self, num_requests: int) -> SharedPrefixes:
        """Of a step of so many requests; the same memory at every call."""
        return SharedPrefixes(
            request_partitions=self._request_partitions[:num_requests],
            group_start_loc=self._starts,
            members=self._members[:num_requests],
            group_partitions=self._partitions,
            max_partitions=self._max_partitions,
        )

    def _put(self, groups: PrefixGroups, upload: Upload) -> None:
        """Whole columns: places of padding share nothing."""
        rows = np.zeros(len(self._request_partitions), np.int32)
        rows[: len(groups.request_partitions)] = groups.request_partitions
        starts = np.full(self._max_groups + 1, len(groups.members), np.int32)
        starts[: len(groups.starts)] = groups.starts
        partitions = np.zeros(self._max_groups, np.int32)
        partitions[: len(groups.partitions)] = groups.partitions
        upload.put("prefix_request_partitions", 0, rows)
        upload.put("prefix_members", 0, groups.members)
        upload.put("prefix_starts", 0, starts)
        upload.put("prefix_partitions", 0, partitions)
