"""Attention to a prefix that several requests of a step hold, its keys and values read once.

Partitions of keys begin at fixed positions, so those that lie wholly inside a common prefix can be
computed for all its requests together and folded where their own would have been: same bits.

    groups = group_prefixes(plan, group_start_loc, members, group_partitions, ...)  # once a step
    attend_shared_prefix(q, k_cache, v_cache, plan=plan, groups=groups, ...)  # each layer, first
    paged_attention(q, k_cache, v_cache, plan=plan, ...)  # computes the rest, folds all

where plan is `make_plan(..., shared_partitions=...)` with every member's group_partitions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo_kernels.launch import launch
from octavo_kernels.paged_attention import numerics, prefill, shared_prefix_kernel
from octavo_kernels.paged_attention.gpu_plan import DECODE_ROWS, AttentionPlan, padded
from octavo_kernels.tuning import Choice, choose

_BLOCK_M = 128
_CHUNK = 64  # tiles and members that one program lists


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixGroups:
    """Which requests share which prefix; all tensors on the device, sizes bound by the host."""

    group_start_loc: Tensor  # [NG + 1] int32
    members: Tensor  # [NM] int32, requests, a group's side by side
    group_partitions: Tensor  # [NG] int32
    member_rows: Tensor  # [NM] int32: row of the plan's requests, -1 = not decoded
    tiles: Tensor  # [C, 2] int32: group (-1 = none), first slot of its members' rows
    max_partitions: int
    max_query_len: int  # rows kept for a member: this many tokens


def group_prefixes(
    plan: AttentionPlan,
    *,
    group_start_loc: Tensor,
    members: Tensor,
    group_partitions: Tensor,
    max_partitions: int,
    max_query_len: int | None = None,
) -> PrefixGroups:
    """Lists the tiles of rows; one launch, nothing is read back.

    group_start_loc [NG + 1], members [NM] (requests of the plan, each in one group at most) and
    group_partitions [NG], all int32: the leading partitions (`plan.partition` keys) of a group lie
    wholly inside its prefix, and the block table of its first member holds their blocks.
    shared_partitions [R] of `make_plan` must have been the same numbers, request by request (0
    outside the groups); wrong numbers give wrong results, within bounds. max_partitions bounds
    group_partitions, max_query_len (default: the plan's) the query tokens of a member; members
    that were not decoded are left out, they need nothing.
    """
    num_groups, num_members = group_partitions.shape[0], members.shape[0]
    for name, tensor in (
        ("group_start_loc", group_start_loc),
        ("members", members),
        ("group_partitions", group_partitions),
    ):
        if tensor.dtype != torch.int32 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous int32 of one dimension, got {tensor.dtype}"
            )
    if group_start_loc.shape[0] != num_groups + 1:
        raise ValueError(
            f"{num_groups} groups need {num_groups + 1} starts, got {group_start_loc.shape[0]}"
        )
    group = plan.num_heads // plan.num_kv_heads
    tokens = plan.max_query_len if max_query_len is None else max_query_len
    tokens = max(1, min(tokens, plan.max_query_len, DECODE_ROWS // group))
    capacity = -(-num_members * tokens * group // _BLOCK_M) + num_groups
    if not plan.is_split or num_members == 0:
        capacity = 0
    groups = PrefixGroups(
        group_start_loc=group_start_loc,
        members=members,
        group_partitions=group_partitions,
        member_rows=members.new_empty(members.shape),
        tiles=members.new_empty(capacity, 2),
        max_partitions=max_partitions,
        max_query_len=tokens,
    )
    if capacity:
        launch(
            shared_prefix_kernel.list_tiles,
            (-(-max(num_members, capacity) // _CHUNK),),
            group_start_loc, members, group_partitions, plan.requests, plan.num_decoded,
            groups.member_rows, groups.tiles, num_groups, num_members, plan.num_requests, capacity,
            tokens * group, plan.num_requests.bit_length() + 1,
            BLOCK_M=_BLOCK_M, CHUNK=_CHUNK, num_warps=4,
        )  # fmt: skip
    return groups


def attend_shared_prefix(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    plan: AttentionPlan,
    groups: PrefixGroups,
    block_tables: Tensor,
    scale: float,
    soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    rel_bias: Tensor | None = None,
    is_causal: bool = True,
    k_scale: Tensor | None = None,
    choice: Choice | None = None,
) -> None:
    """Writes the members' partials over their shared partitions into the plan's workspace.

    Arguments as `paged_attention`, which must follow on the same stream and checks them; sinks and
    v_scale are its affair alone.
    """
    head_dim, num_kv_heads = plan.head_dim, plan.num_kv_heads
    if choice is None:
        name = prefill.key(head_dim, q.dtype, k_cache.dtype)
        choice = choose("shared_prefix", name, default(head_dim, q.dtype))
    launch(
        shared_prefix_kernel.attend_shared,
        (groups.tiles.shape[0], num_kv_heads, groups.max_partitions),
        q, k_cache, v_cache, block_tables, groups.group_start_loc, groups.members,
        groups.group_partitions, groups.member_rows, groups.tiles, plan.requests, plan.partials_m,
        plan.partials_l, plan.partials, alibi_slopes, rel_bias, k_scale,
        scale, 0 if rel_bias is None else (rel_bias.shape[1] + 1) // 2,
        block_tables.stride(0), block_tables.shape[1], k_cache.shape[0], block_tables.shape[0],
        groups.members.shape[0],
        groups.max_query_len * (plan.num_heads // num_kv_heads),
        N=plan.num_heads, K=num_kv_heads, H=head_dim, HP=padded(head_dim), Q_STRIDE=q.stride(0),
        BLOCK=k_cache.shape[2], BLOCK_M=_BLOCK_M, TILE=numerics.tile_size(head_dim),
        PARTITION=plan.partition, CAUSAL=is_causal, WINDOW=plan.sliding_window, SOFT_CAP=soft_cap,
        num_warps=choice["num_warps"], num_stages=choice["num_stages"],
    )  # fmt: skip


def default(head_dim: int, dtype: torch.dtype) -> Choice:
    """Choices where nothing was measured."""
    return candidates(head_dim, dtype)[0]


def candidates(head_dim: int, dtype: torch.dtype) -> tuple[Choice, ...]:
    """Choices with the same bits: every row lies whole in one warp."""
    if dtype == torch.float32:
        return ({"num_warps": 16, "num_stages": 1},)
    return tuple({"num_warps": 8, "num_stages": s} for s in ((2, 3) if head_dim <= 128 else (2,)))
