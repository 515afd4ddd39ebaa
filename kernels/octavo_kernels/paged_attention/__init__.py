"""Causal attention of packed query tokens over a paged cache. Knows shapes, not models."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from octavo_kernels import memory, parallel
from octavo_kernels.op import require_device
from octavo_kernels.paged_attention import cpu
from octavo_kernels.paged_attention.cpu_merge import merge
from octavo_kernels.paged_attention.cpu_plan import make_plan
from octavo_kernels.paged_attention.int8_tiles import SCALE_BYTES
from octavo_kernels.paged_attention.plan import AttentionPlan, plan_attention
from octavo_kernels.paged_attention.reference import paged_attention_reference

__all__ = [
    "AttentionPlan",
    "kernels",
    "kv_cache_shapes",
    "paged_attention",
    "paged_attention_reference",
    "plan_attention",
    "warm",
]

BLOCK_SIZES = (16, 32, 64, 128)
MAX_HEAD_DIM = 256
_ATTEND = {
    torch.float32: cpu.attend_float32,
    torch.bfloat16: cpu.attend_bfloat16,
    torch.float16: cpu.attend_float16,
    torch.int8: cpu.attend_int8,
}
_LOG2_E = 1.4426950408889634  # the kernels' logits are base 2


def kv_cache_shapes(
    num_blocks: int,
    *,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Shapes of one layer's key and value cache: K [B, K, H, BLOCK] and V [B, K, BLOCK, H].

    Keys lie transposed inside a block, so that 16 neighbouring tokens' keys are one vector. int8
    caches have H + 4 in place of H: the bytes of codes and scales, as `int8_tiles` lays them out.
    Raises ValueError for a block size or head size the kernels cannot read.
    """
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size}")
    if head_dim % 16 or not 16 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim must be a multiple of 16 between 16 and {MAX_HEAD_DIM}, got {head_dim}"
        )
    width = head_dim + (SCALE_BYTES if dtype == torch.int8 else 0)
    k_shape = (num_blocks, num_kv_heads, width, block_size)
    return k_shape, (num_blocks, num_kv_heads, block_size, width)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    block_tables: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    sliding_window: int = 0,
    out: Tensor | None = None,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """Attention of every query token to its request's keys up to and including itself.

    q: [T, N, H] float32; the rows of T may be strided (a view of qkv), [N, H] is dense.
    k_cache, v_cache: `kv_cache_shapes`, float32, bfloat16 or float16, widened when read, or int8,
    which `rotary_kv_write` fills; q and the softmax's weights are then rounded to 15 bits.
    block_tables: [R, max_blocks] int32, dense in its last dimension; query_start_loc: [R + 1] int32
    with last entry T; seq_lens: [R] int32, tokens present in the cache, this step's included.
    Query i of request r stands at position seq_lens[r] - query_len[r] + i.
    sliding_window: 0, or the number of newest positions a token sees, itself included.
    Returns out [T, N * H] float32. A row's bits depend on its own query and keys alone, not on the
    batch, the chunking or the number of threads; slots it does not see are never part of it.
    plan: what `plan_attention` made of these tables, for the layers of one step to share. The
    call then only starts kernels; whether tables, starts and lengths fit is `plan.check()`'s to
    say, once the step has run.
    Raises ValueError for shapes, dtypes or tables the kernel cannot take.
    On a GPU: 16-bit and float32 q, both caches [B, K, BLOCK, H]. See
    `octavo_kernels.paged_attention.gpu`, which has more options and a plan that layers share.
    """
    if q.is_cuda:
        assert plan is None, "a GPU's plan is another: see gpu.paged_attention"
        return _on_gpu(
            q, k_cache, v_cache, block_tables=block_tables, query_start_loc=query_start_loc,
            seq_lens=seq_lens, scale=scale, sliding_window=sliding_window, out=out,
        )  # fmt: skip
    require_device("paged_attention", q, have=("cpu", "cuda"))
    num_tokens, num_heads, head_dim = q.shape
    num_blocks, num_kv_heads, _, block_size = k_cache.shape
    attend = _check(
        num_heads, head_dim, k_cache.shape, v_cache.shape, q.dtype, k_cache.dtype, v_cache.dtype
    )
    _check_strides(q, k_cache, v_cache)
    if out is None:
        out = memory.empty((num_tokens, num_heads * head_dim))
    elif out.shape != (num_tokens, num_heads * head_dim) or not out.is_contiguous():
        raise ValueError(f"out must be contiguous [{num_tokens}, {num_heads * head_dim}]")
    sizes = (num_tokens, num_heads, num_kv_heads, head_dim, block_size, num_blocks, sliding_window)
    is_alone = plan is None
    if plan is None:
        plan = plan_attention(
            block_tables, query_start_loc, seq_lens, num_tokens=num_tokens, num_heads=num_heads,
            num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size,
            num_blocks=num_blocks, sliding_window=sliding_window,
        )  # fmt: skip
        plan.check()
    elif plan.sizes != sizes or plan.block_tables is not block_tables:
        raise ValueError(f"the plan is for {plan.sizes} and tables of its own, got {sizes}")
    attend.launch_at(
        plan.attend_parts, plan.address, q.data_ptr(), 4 * q.stride(0), k_cache.data_ptr(),
        v_cache.data_ptr(), out.data_ptr(), scale * _LOG2_E,
    )  # fmt: skip
    merge.launch_at(plan.merge_parts, plan.address, out.data_ptr())
    if is_alone:
        plan.check()
    return out


def _on_gpu(q: Tensor, k_cache: Tensor, v_cache: Tensor, **options: Any) -> Tensor:
    from octavo_kernels.paged_attention import gpu  # here: a CPU installation has no Triton

    return gpu.paged_attention(q, k_cache, v_cache, **options)


@functools.lru_cache(maxsize=256)
def _check(
    num_heads: int,
    head_dim: int,
    k_shape: torch.Size,
    v_shape: torch.Size,
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
    v_dtype: torch.dtype,
) -> parallel.Kernel:
    """The kernel for these sizes and dtypes; a model asks the same question in every layer."""
    num_blocks, num_kv_heads, _, block_size = k_shape
    shapes = kv_cache_shapes(
        num_blocks,
        block_size=block_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=k_dtype,
    )
    if (k_shape, v_shape) != shapes:
        raise ValueError(
            f"caches must be {shapes[0]} and {shapes[1]} for head_dim {head_dim}, "
            f"got {tuple(k_shape)} and {tuple(v_shape)}"
        )
    if q_dtype != torch.float32:
        raise ValueError(f"q must be float32, got {q_dtype}")
    if num_heads % num_kv_heads:
        raise ValueError(f"query heads must be a multiple of {num_kv_heads}, got {num_heads}")
    attend = _ATTEND.get(k_dtype)
    if attend is None or v_dtype != k_dtype:
        raise ValueError(
            f"cache dtype must be one of {[str(d) for d in _ATTEND]}, got {k_dtype} and {v_dtype}"
        )
    return attend


def _check_strides(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    _, between_heads, between_dims = q.stride()
    if between_dims != 1 or between_heads != q.shape[2]:
        raise ValueError(f"q must have dense heads, got strides {q.stride()}")
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("k_cache and v_cache must be contiguous")


def kernels(*, cache_dtype: torch.dtype) -> tuple[parallel.Kernel, ...]:
    """What a server calls with this cache dtype."""
    return (make_plan, _ATTEND[cache_dtype], merge)


def warm(*, cache_dtype: torch.dtype) -> None:
    """Compile, or load from disk, every kernel a server with this cache dtype calls."""
    for kernel in kernels(cache_dtype=cache_dtype):
        assert kernel.address
