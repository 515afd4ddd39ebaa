"""Starts the Hopper decode kernel over a plan's units. Knows what it takes; checks no inputs.

Same bits as `decode_kernel.decode`, which takes everything else.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo_kernels import device
from octavo_kernels.launch import launch
from octavo_kernels.paged_attention import decode_hopper_kernel, decode_kernel, numerics
from octavo_kernels.paged_attention.gpu_plan import DECODE_ROWS, AttentionPlan, decode_key
from octavo_kernels.tuning import Choice, choose

FP8 = torch.float8_e4m3fn
_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, FP8: gl.float8e4nv}
_Q_DTYPES = (torch.float16, torch.bfloat16)
TUNED_AS = "paged_attention_decode_hopper"
HEAD_DIMS = (64, 128)
BLOCK_SIZES = (16, 32, 64, 128)
_COMBINE_VALUES = 1024  # accumulator values that `combine` folds at a time


def supports(
    q: Tensor,
    k_cache: Tensor,
    *,
    plan: AttentionPlan,
    is_causal: bool = True,
    soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    rel_bias: Tensor | None = None,
) -> bool:
    """Whether `attend_decode_hopper` computes these inputs, on a GPU that has what it needs."""
    shaped = soft_cap > 0.0 or alibi_slopes is not None or rel_bias is not None
    return (
        q.dtype in _Q_DTYPES
        and k_cache.dtype in (q.dtype, FP8)
        and plan.head_dim in HEAD_DIMS
        and (is_causal or plan.sliding_window == 0)
        and k_cache.shape[2] in BLOCK_SIZES
        and k_cache.shape[:3].numel() < 2**31
        and q.stride(0) % 8 == 0
        and q.storage_offset() % 8 == 0
        and not shaped
    )


def decode_hopper_candidates(head_dim: int, itemsize: int) -> tuple[Choice, ...]:
    """Launch choices that fit shared memory, which decide no bits; the default first.

    stages: tiles of K, and of V, on their way or in use; k_wide, v_wide: tiles of an 8-bit cache
    that are kept widened (the consumer holds one tile of K and two of V at a time); fused: whether
    the last program of a (request, kv head) folds its partials, or a kernel of its own does.
    """
    stages: dict[tuple[int, int], tuple[tuple[int, int, int], ...]] = {
        (128, 2): ((3, 0, 0), (2, 0, 0)),
        (64, 2): ((6, 0, 0), (5, 0, 0), (4, 0, 0), (3, 0, 0)),
        (128, 1): ((3, 1, 2), (2, 1, 2), (2, 2, 2)),
        (64, 1): ((8, 2, 2), (6, 2, 2), (6, 2, 4), (4, 4, 4)),
    }
    return tuple(
        {"stages": s, "k_wide": k, "v_wide": v, "fused": fused}
        for s, k, v in stages[head_dim, itemsize]
        for fused in (1, 0)
    )


def attend_decode_hopper(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    *,
    plan: AttentionPlan,
    block_tables: Tensor,
    scale: float,
    sinks: Tensor | None = None,
    is_causal: bool = True,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    choice: Choice | None = None,
) -> None:
    """Writes out [T, N, H] (contiguous) for the tokens of plan.requests; see `gpu.attend_decode`.

    For what `supports` says. A block number beyond the cache reads as zeros or as another block.
    """
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    num_heads = plan.num_heads
    if choice is None:
        size = k_cache.dtype.itemsize
        default = decode_hopper_candidates(head_dim, size)[0]
        choice = choose(TUNED_AS, decode_key(head_dim, size), default)
    is_fused = plan.is_split and bool(choice["fused"])
    # The rings fill a multiprocessor: one program does what the plan gave to several.
    step = -(-plan.num_programs // device.num_multiprocessors())
    launch(
        decode_hopper_kernel.decode_hopper,
        (-(-plan.num_programs // step),),
        q, _descriptor(k_cache), _descriptor(v_cache), out, block_tables, plan.requests,
        plan.programs, plan.arrivals, plan.partials_m, plan.partials_l, plan.partials, sinks,
        k_scale, v_scale, scale, block_tables.stride(0), step, plan.num_programs,
        N=num_heads, K=num_kv_heads, H=head_dim, Q_STRIDE=q.stride(0), BLOCK=block_size,
        TILE=numerics.tile_size(head_dim), PARTITION=plan.partition, CAUSAL=is_causal,
        WINDOW=plan.sliding_window, FUSED=is_fused,
        HALF=plan.max_query_len * num_heads <= 8 * num_kv_heads, STAGES=choice["stages"],
        WIDE=(choice["k_wide"], choice["v_wide"]), num_warps=4,
    )  # fmt: skip
    if plan.is_split and not is_fused:
        launch(
            decode_kernel.combine,
            (plan.num_requests, num_kv_heads),
            out, plan.requests, plan.num_decoded, plan.partials_m, plan.partials_l, plan.partials,
            sinks, v_scale,
            N=num_heads, K=num_kv_heads, H=head_dim, HP=head_dim,
            ROWS=combined_rows(plan), num_warps=4,
        )  # fmt: skip


def combined_rows(plan: AttentionPlan) -> int:
    """Rows that `combine` folds at a time."""
    rows = min(plan.max_query_len * plan.num_heads // plan.num_kv_heads, DECODE_ROWS)
    return int(min(_COMBINE_VALUES // plan.head_dim, 1 << (rows - 1).bit_length()))


def _descriptor(cache: Tensor) -> TensorDescriptor:
    """A cache [B, K, BLOCK, H] as rows, copied into shared memory a block at a time."""
    blocks, heads, block_size, head_dim = cache.shape
    layout = _box_layout(block_size, head_dim, cache.dtype)
    shape = [blocks * heads * block_size, head_dim]
    return TensorDescriptor(cache, shape, [head_dim, 1], [block_size, head_dim], layout)


@functools.cache
def _box_layout(block_size: int, head_dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([block_size, head_dim], _DTYPES[dtype])


assert decode_hopper_kernel.ROWS.value == DECODE_ROWS
