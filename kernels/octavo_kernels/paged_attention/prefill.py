"""Starts the prefill kernel over a plan's tiles. Knows launch choices; checks no inputs.

The kernel is for any GPU that Triton compiles for; `prefill_hopper` holds another one with the
same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo_kernels.launch import launch
from octavo_kernels.paged_attention import numerics, prefill_kernel
from octavo_kernels.paged_attention.gpu_plan import AttentionPlan, padded
from octavo_kernels.tuning import Choice, choose

_NAMES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "e4m3",
}


def attend_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    *,
    plan: AttentionPlan,
    block_tables: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    rel_bias: Tensor | None = None,
    is_causal: bool = True,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    choice: Choice | None = None,
) -> None:
    """Writes out [T, N, H] (contiguous) for the tokens of plan.tiles; see `paged_attention`.

    A sliding window is the plan's; without is_causal it reaches as far ahead as back: a token sees
    the keys less than sliding_window positions away. choice: launch choices to try instead of the
    measured ones (`candidates`).
    """
    capacity, num_heads, head_dim = plan.tiles.shape[0], plan.num_heads, plan.head_dim
    group = num_heads // plan.num_kv_heads
    if choice is None:
        name = key(head_dim, q.dtype, k_cache.dtype)
        choice = choose("paged_prefill", name, default(head_dim, q.dtype))
    block_m = choice["block_m"] if group <= choice["block_m"] else 128
    pieces = -(-plan.block_q // (block_m // group))
    launch(
        prefill_kernel.attend,
        (capacity * pieces * plan.num_kv_heads,),
        q, k_cache, v_cache, out, block_tables, query_start_loc, seq_lens, plan.tiles,
        plan.num_tiles, sinks, alibi_slopes, rel_bias, k_scale, v_scale,
        scale, 0 if rel_bias is None else (rel_bias.shape[1] + 1) // 2,
        q.shape[0], k_cache.shape[0], block_tables.stride(0), block_tables.shape[1],
        N=num_heads, K=plan.num_kv_heads, H=head_dim, HP=padded(head_dim), Q_STRIDE=q.stride(0),
        KV_STRIDE=head_dim, BLOCK=k_cache.shape[2], TILE_Q=plan.block_q, BLOCK_M=block_m,
        TILE=numerics.tile_size(head_dim), PARTITION=plan.partition,
        CAUSAL=is_causal, WINDOW=plan.sliding_window, SOFT_CAP=soft_cap,
        num_warps=choice["num_warps"], num_stages=choice["num_stages"],
    )  # fmt: skip


def key(head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> str:
    """What a measured choice depends on."""
    return f"h{head_dim}-{_NAMES[dtype]}-{_NAMES[cache_dtype]}"


def default(head_dim: int, dtype: torch.dtype) -> Choice:
    """Choices where nothing was measured."""
    return candidates(head_dim, dtype)[0]


def candidates(head_dim: int, dtype: torch.dtype) -> tuple[Choice, ...]:
    """Choices with the same bits: every row lies whole in one warp (16 rows a warp at least)."""
    if dtype == torch.float32:  # no tensor cores: few rows a warp, or compiling takes minutes
        return ({"block_m": 64, "num_warps": 16, "num_stages": 1},)
    return tuple(
        {"block_m": rows, "num_warps": warps, "num_stages": stages}
        for rows, warps in ((128, 8), (64, 4))
        for stages in ((2, 3) if head_dim <= 128 else (2,))  # what shared memory holds
    )
