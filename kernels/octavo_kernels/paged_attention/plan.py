"""One step's attention on the CPU, divided into work once for all layers; knows no keys."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo_kernels import memory, parallel
from octavo_kernels.paged_attention import cpu_plan
from octavo_kernels.paged_attention.cpu import WORK_FLOATS
from octavo_kernels.simd import LANES

_MAX_PARTIAL_FLOATS = 1 << 24  # 64 MB; a split that needs more is not made


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionPlan:
    """How the items of a step are cut, in memory that only kernels write.

    The tensors must stay where they are, but may hold another batch whenever the plan's kernel
    runs again: nothing else of it is decided on the host.
    """

    sizes: tuple[int, ...]  # T, N, K, H, block size, blocks, window
    block_tables: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    num_requests: Tensor | None
    record: Tensor  # [PLAN_WORDS] int64
    scratch: Tensor  # float32

    @property
    def address(self) -> int:
        return self.record.data_ptr()

    @property
    def attend_parts(self) -> int:
        """Address of the number of parts of the first phase."""
        return self.record.data_ptr() + 8 * cpu_plan.ATTEND_PARTS

    @property
    def merge_parts(self) -> int:
        """Address of the number of parts of the second phase."""
        return self.record.data_ptr() + 8 * cpu_plan.MERGE_PARTS

    @property
    def status(self) -> Tensor:
        """[1] int64, zero at the step's start: for ops that write the keys this plan reads."""
        return self.record[cpu_plan.OTHER_STATUS : cpu_plan.OTHER_STATUS + 1]

    def check(self) -> None:
        """Raises ValueError for what the kernels found wrong since the plan was last made."""
        # Read by address: this runs after every step, where slicing a tensor costs 20 us.
        status = ctypes.c_int64.from_address(self.address + 8 * cpu_plan.STATUS).value
        if status == 0:
            return
        culprit = int(self.record[cpu_plan.CULPRIT])
        num_tokens, _, _, _, block_size, num_blocks, _ = self.sizes
        if status == cpu_plan.BAD_BLOCK:
            raise ValueError(
                f"block_tables names block {culprit}, allowed are 0 to {num_blocks - 1}"
            )
        if status == cpu_plan.BAD_LENGTH:
            raise ValueError(
                f"seq_lens[{culprit}] must be at least its query length and at most "
                f"{self.block_tables.shape[1] * block_size}, got {int(self.seq_lens[culprit])}"
            )
        if status == cpu_plan.BAD_START:
            raise ValueError(
                f"query_start_loc must ascend from 0 to {num_tokens}, "
                f"got {self.query_start_loc.tolist()}"
            )


def plan_attention(
    block_tables: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    *,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    num_blocks: int,
    sliding_window: int = 0,
    num_requests: Tensor | None = None,
) -> AttentionPlan:
    """Divides a step's attention; layers of these sizes and of one window share the plan.

    block_tables, query_start_loc, seq_lens: as of `paged_attention`, for R requests; their
    `num_tokens` tokens are packed. num_requests: [1] int64, the requests that there are, at most R:
    rows after them are not read, nor are starts after theirs. None: R.
    Raises ValueError for tensors that do not fit each other. What is wrong with their contents,
    `AttentionPlan.check` tells; kernels of such a plan touch no memory that is not theirs.
    """
    _check_tables(block_tables, query_start_loc, seq_lens, num_requests)
    if sliding_window < 0:
        raise ValueError(f"sliding_window must be at least 0, got {sliding_window}")
    group, threads = num_heads // num_kv_heads, parallel.num_threads()
    max_keys = block_tables.shape[1] * block_size
    max_chunk = min(max(num_tokens, 1), max(1, cpu_plan.CHUNK_ROWS // group))
    max_rows = max(max_chunk * group, min(num_tokens * num_heads, cpu_plan.CHUNK_ROWS))
    part_floats = WORK_FLOATS + max_rows * (3 * head_dim + LANES + 3)
    part_floats = -(-part_floats // LANES) * LANES
    # A split has at most this many items before it, and so many partitions of each.
    slots = min(2 * threads - 1, num_tokens * num_kv_heads) * (max_keys // cpu_plan.PARTITION + 1)
    partial_floats = slots * max_chunk * group * (head_dim + LANES + 1)
    partial_floats = min(partial_floats, _MAX_PARTIAL_FLOATS) if threads > 1 else 0
    record = memory.empty((cpu_plan.PLAN_WORDS,), torch.int64)
    scratch = memory.empty((threads * part_floats + partial_floats,))
    cpu_plan.make_plan(
        1, record.data_ptr(), query_start_loc.data_ptr(), seq_lens.data_ptr(),
        0 if num_requests is None else num_requests.data_ptr(), block_tables.shape[0], num_tokens,
        block_tables.data_ptr(), block_tables.stride(0), max_keys, num_kv_heads, group, head_dim,
        block_size, num_blocks, sliding_window, threads, scratch.data_ptr(), 4 * part_floats,
        scratch.data_ptr() + 4 * threads * part_floats, partial_floats,
    )  # fmt: skip
    sizes = (num_tokens, num_heads, num_kv_heads, head_dim, block_size, num_blocks, sliding_window)
    return AttentionPlan(
        sizes=sizes,
        block_tables=block_tables,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        num_requests=num_requests,
        record=record,
        scratch=scratch,
    )


def _check_tables(
    block_tables: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    num_requests: Tensor | None,
) -> None:
    rows = block_tables.shape[0]
    if query_start_loc.shape[0] != rows + 1 or seq_lens.shape[0] != rows:
        raise ValueError(
            f"{rows} block tables need {rows + 1} starts and {rows} lengths, "
            f"got {query_start_loc.shape[0]} and {seq_lens.shape[0]}"
        )
    if not block_tables.dtype == query_start_loc.dtype == seq_lens.dtype == torch.int32:
        raise ValueError("block_tables, query_start_loc and seq_lens must be int32")
    if block_tables.stride(1) != 1 or not (
        query_start_loc.is_contiguous() and seq_lens.is_contiguous()
    ):
        raise ValueError("block_tables rows, query_start_loc and seq_lens must be dense")
    if num_requests is not None and (num_requests.dtype, num_requests.numel()) != (torch.int64, 1):
        raise ValueError("num_requests must be one int64")
