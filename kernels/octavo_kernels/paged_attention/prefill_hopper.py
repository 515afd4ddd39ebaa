"""Starts the Hopper prefill kernel over a plan's tiles, or the plain one where it cannot run.

Both have the same bits. Knows what the Hopper kernel takes; checks no inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo_kernels import device
from octavo_kernels.launch import launch
from octavo_kernels.paged_attention import numerics, prefill_hopper_kernel
from octavo_kernels.paged_attention.gpu_plan import PREFILL_ROWS, AttentionPlan
from octavo_kernels.paged_attention.prefill import attend_prefill

_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
HEAD_DIMS = (64, 128)
BLOCK_SIZES = (16, 32, 64, 128)
_SHAPING = ("soft_cap", "alibi_slopes", "rel_bias", "k_scale", "v_scale")  # the plain kernel's


def supports(
    q: Tensor,
    k_cache: Tensor,
    *,
    plan: AttentionPlan,
    is_causal: bool = True,
    soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    rel_bias: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> bool:
    """Whether `attend_prefill_hopper` computes these inputs, on a GPU that has what it needs."""
    shaped = soft_cap > 0.0 or alibi_slopes is not None or rel_bias is not None
    return (
        q.dtype in _DTYPES
        and k_cache.dtype == q.dtype
        and plan.head_dim in HEAD_DIMS
        and (is_causal or plan.sliding_window == 0)
        and k_cache.shape[2] in BLOCK_SIZES
        and k_cache.shape[:3].numel() < 2**31
        and q.data_ptr() % 16 == 0  # copied 16 bytes at a time
        and q.stride(0) % 8 == 0
        and not shaped
        and k_scale is None
        and v_scale is None
    )


def is_hopper() -> bool:
    """Whether the current GPU can run the kernel (TMA, WGMMA: compute capability 9.x)."""
    return device.is_present() and device.is_hopper()


def attend_prefill_fastest(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    *,
    plan: AttentionPlan,
    block_tables: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    **options: Any,
) -> None:
    """`prefill.attend_prefill` with its arguments, by the Hopper kernel wherever that can run."""
    common: dict[str, Any] = {
        "plan": plan, "block_tables": block_tables, "query_start_loc": query_start_loc,
        "seq_lens": seq_lens,
    }  # fmt: skip
    asked: dict[str, Any] = {n: options[n] for n in _SHAPING if options.get(n) is not None}
    is_causal = options.get("is_causal", True)
    if is_hopper() and supports(q, k_cache, plan=plan, is_causal=is_causal, **asked):
        rest = {name: value for name, value in options.items() if name not in _SHAPING}
        attend_prefill_hopper(q, k_cache, v_cache, out, **common, **rest)
    else:
        attend_prefill(q, k_cache, v_cache, out, **common, **options)


def attend_prefill_hopper(
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
    sinks: Tensor | None = None,
    is_causal: bool = True,
) -> None:
    """Writes out [T, N, H] (contiguous) for the tokens of plan.tiles; see `prefill`.

    For what `supports` says. A block number beyond the cache reads as zeros or as another block.
    """
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    tile = numerics.tile_size(head_dim)
    launch(
        prefill_hopper_kernel.attend_hopper,
        (min(device.num_multiprocessors(), plan.tiles.shape[0] * num_kv_heads),),
        q, _descriptor(k_cache), _descriptor(v_cache), out, block_tables, query_start_loc,
        seq_lens, plan.tiles, plan.num_tiles, sinks,
        scale, block_tables.stride(0), block_tables.shape[1] * block_size, q.shape[0],
        N=plan.num_heads, K=num_kv_heads, H=head_dim, Q_STRIDE=q.stride(0), BLOCK=block_size,
        BLOCK_Q=plan.block_q, TILE=tile, PARTITION=plan.partition, CAUSAL=is_causal,
        WINDOW=plan.sliding_window, num_warps=4,
    )  # fmt: skip


def _descriptor(cache: Tensor) -> TensorDescriptor:
    """A cache [B, K, BLOCK, H] as rows, copied into shared memory a block at a time."""
    block_size, head_dim = cache.shape[2:]
    box = [block_size, head_dim]
    layout = gl.NVMMASharedLayout.get_default_for(box, _DTYPES[cache.dtype])
    rows = cache.shape[:3].numel()
    return TensorDescriptor(cache, [rows, head_dim], [head_dim, 1], box, layout)


assert prefill_hopper_kernel.GROUP_ROWS.value * prefill_hopper_kernel.GROUPS.value == PREFILL_ROWS
