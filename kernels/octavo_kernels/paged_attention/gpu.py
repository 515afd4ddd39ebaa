"""Attention of packed query tokens over a paged cache on a GPU. Knows shapes, not models."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from octavo_kernels import device
from octavo_kernels.launch import launch
from octavo_kernels.paged_attention import decode_kernel, numerics
from octavo_kernels.paged_attention.decode_hopper import attend_decode_hopper, supports
from octavo_kernels.paged_attention.gpu_plan import (
    DECODE_ROWS,
    AttentionPlan,
    check_lengths,
    decode_choice,
    make_plan,
    padded,
)
from octavo_kernels.paged_attention.prefill_hopper import attend_prefill_fastest, is_hopper
from octavo_kernels.tuning import Choice

__all__ = ["AttentionPlan", "kv_cache_shape", "make_plan", "paged_attention"]

BLOCK_SIZES = (16, 32, 64, 128)
MAX_HEAD_DIM = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8 = torch.float8_e4m3fn
_SHAPING = ("soft_cap", "alibi_slopes", "rel_bias")  # what the Hopper kernel does not do
_FOLD_VALUES = 1024  # accumulator values that are folded at a time


def kv_cache_shape(
    num_blocks: int, *, block_size: int, num_kv_heads: int, head_dim: int
) -> tuple[int, int, int, int]:
    """Shape of one layer's key and of its value cache: [B, K, BLOCK, H], contiguous.

    Raises ValueError for a block size or head size the kernels cannot read.
    """
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size}")
    if head_dim % 16 or not 16 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim must be a multiple of 16 between 16 and {MAX_HEAD_DIM}, got {head_dim}"
        )
    return num_blocks, num_kv_heads, block_size, head_dim


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    block_tables: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    max_query_len: int | None = None,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    rel_bias: Tensor | None = None,
    is_causal: bool = True,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    plan: AttentionPlan | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of every query token to its request's keys, by default those up to itself.

    q: [T, N, H] bfloat16, float16 or float32; the rows of T may be strided, [N, H] is dense.
    k_cache, v_cache: `kv_cache_shape`, of q's dtype or, with q of 16 bits, float8_e4m3fn, which
    holds keys and values divided by k_scale and v_scale, [K] float32 (without them: by 1).
    block_tables: [R, max_blocks] int32, dense in its last dimension; query_start_loc: [R + 1] int32
    with last entry T; seq_lens: [R] int32, tokens present in the cache, this step's included.
    Query i of request r stands at position seq_lens[r] - query_len[r] + i.
    max_query_len: the host's bound on query_len (default T). plan: `make_plan`'s for these tensors,
    shared by all layers of one window (default: made here).
    sliding_window: 0, or the number of newest positions a token sees, itself included; without
    is_causal it reaches as far ahead as back.
    A logit is q @ k * scale, then soft_cap * tanh(logit / soft_cap) where soft_cap > 0, then
    + alibi_slopes[n] * (key position - query position), then + rel_bias[n, distance], where
    rel_bias is [N, 2 * span - 1] float32 and distance key - query position, held to -(span - 1) to
    span - 1, counts from column 0. sinks: [N] float32 logits that take part in the softmax's sum
    and have no value. A token that sees nothing gets zeros.
    Returns out [T, N * H] in q's dtype ([T, N, H] if `out` is given so).

    A row's bits depend on its own query, keys and options alone: not on the batch, the chunking,
    the block size or the launch choices. Slots from a request's first token's window to its
    seq_len are read and must be finite; others are never part of a result. Nothing is read back to
    the host: wrong numbers in tables and lengths give wrong results, but nothing is read or
    written out of bounds. Raises ValueError for shapes and dtypes the kernels do not have.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    _check_caches(
        num_heads, head_dim, k_cache.shape, v_cache.shape, q.dtype, k_cache.dtype, v_cache.dtype
    )
    _check_strides(q, k_cache, v_cache)
    _check_options(
        scale, soft_cap, num_heads, num_kv_heads, sinks, alibi_slopes, rel_bias, k_scale, v_scale
    )
    num_requests, max_blocks = _check_tables(block_tables, query_start_loc, seq_lens)
    if (k_scale is not None or v_scale is not None) and k_cache.dtype != FP8:
        raise ValueError(f"k_scale and v_scale need a {FP8} cache, got {k_cache.dtype}")
    out = q.new_empty(num_tokens, num_heads * head_dim) if out is None else out
    _check_out(out, q)
    if 0 in (num_tokens, num_requests, max_blocks, k_cache.shape[0]):
        return out.zero_()
    if plan is None:
        bound = num_tokens if max_query_len is None else max_query_len
        plan = make_plan(
            query_start_loc, seq_lens, num_tokens=num_tokens, max_query_len=bound,
            max_seq_len=max_blocks * k_cache.shape[2], num_heads=num_heads, head_dim=head_dim,
            num_kv_heads=num_kv_heads, cache_dtype=k_cache.dtype, sliding_window=sliding_window,
        )  # fmt: skip
    else:
        _check_plan(plan, q, k_cache, block_tables, sliding_window)
    options: dict[str, Any] = {
        "scale": scale, "soft_cap": soft_cap, "sinks": sinks, "alibi_slopes": alibi_slopes,
        "rel_bias": rel_bias, "is_causal": is_causal, "k_scale": k_scale, "v_scale": v_scale,
    }  # fmt: skip
    if plan.num_programs:
        attend_decode_fastest(
            q, k_cache, v_cache, out, plan=plan, block_tables=block_tables, **options
        )
    if plan.tiles.shape[0]:
        attend_prefill_fastest(
            q, k_cache, v_cache, out, plan=plan, block_tables=block_tables,
            query_start_loc=query_start_loc, seq_lens=seq_lens, **options,
        )  # fmt: skip
    return out


def attend_decode_fastest(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    *,
    plan: AttentionPlan,
    block_tables: Tensor,
    **options: Any,
) -> None:
    """`attend_decode` with its arguments, by the Hopper kernel wherever that can run."""
    asked: dict[str, Any] = {n: options[n] for n in _SHAPING if options.get(n) is not None}
    is_causal = options.get("is_causal", True)
    if is_hopper() and supports(q, k_cache, plan=plan, is_causal=is_causal, **asked):
        rest = {name: value for name, value in options.items() if name not in _SHAPING}
        attend_decode_hopper(q, k_cache, v_cache, out, plan=plan, block_tables=block_tables, **rest)
    else:
        attend_decode(q, k_cache, v_cache, out, plan=plan, block_tables=block_tables, **options)


def attend_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    *,
    plan: AttentionPlan,
    block_tables: Tensor,
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
    """Writes out for the tokens of plan.requests; arguments as `paged_attention`, unchecked.

    choice: launch choices to try instead of the measured ones; its per_sm is the plan's.
    """
    num_heads, num_kv_heads, head_dim = plan.num_heads, plan.num_kv_heads, plan.head_dim
    if choice is None:
        choice = decode_choice(head_dim, k_cache.dtype)
    width = padded(head_dim)
    fold_rows = min(
        max(1, _FOLD_VALUES // width),
        1 << (min(plan.max_query_len * num_heads // num_kv_heads, DECODE_ROWS) - 1).bit_length(),
    )
    is_fused = plan.is_split and bool(choice["fused"])
    launch(
        decode_kernel.decode,
        (plan.num_programs,),
        q, k_cache, v_cache, out, block_tables, plan.requests, plan.programs, plan.arrivals,
        plan.partials_m, plan.partials_l, plan.partials, sinks, alibi_slopes, rel_bias, k_scale,
        v_scale, scale, 0 if rel_bias is None else (rel_bias.shape[1] + 1) // 2,
        block_tables.stride(0), block_tables.shape[1], k_cache.shape[0],
        N=num_heads, K=num_kv_heads, H=head_dim, HP=width, Q_STRIDE=q.stride(0),
        BLOCK=k_cache.shape[2], BLOCK_M=DECODE_ROWS, TILE=numerics.tile_size(head_dim),
        PARTITION=plan.partition, CAUSAL=is_causal, WINDOW=plan.sliding_window, SOFT_CAP=soft_cap,
        FOLD_ROWS=fold_rows if is_fused else 0, STAGES=choice["stages"],
        KEEP_Q=bool(choice["keep_q"]), num_warps=4,
        WIDENS=(k_cache.dtype, q.dtype) == (FP8, torch.bfloat16) and q.device.type != "cpu",
    )  # fmt: skip
    if plan.is_split and not is_fused:
        launch(
            decode_kernel.combine,
            (plan.num_requests, num_kv_heads),
            out, plan.requests, plan.num_decoded, plan.partials_m, plan.partials_l, plan.partials,
            sinks, v_scale,
            N=num_heads, K=num_kv_heads, H=head_dim, HP=width, ROWS=fold_rows, num_warps=4,
        )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _check_caches(
    num_heads: int,
    head_dim: int,
    k_shape: torch.Size,
    v_shape: torch.Size,
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
    v_dtype: torch.dtype,
) -> None:
    num_blocks, num_kv_heads, block_size, _ = k_shape
    shape = kv_cache_shape(
        num_blocks, block_size=block_size, num_kv_heads=num_kv_heads, head_dim=head_dim
    )
    if k_shape != shape or v_shape != shape:
        raise ValueError(
            f"caches must be {shape} for head_dim {head_dim}, got {tuple(k_shape)} and "
            f"{tuple(v_shape)}"
        )
    if q_dtype not in DTYPES:
        raise ValueError(f"q must be one of {DTYPES}, got {q_dtype}")
    allowed = (q_dtype,) if q_dtype == torch.float32 else (q_dtype, FP8)
    if k_dtype not in allowed or v_dtype != k_dtype:
        raise ValueError(
            f"caches of q {q_dtype} must be one of {allowed}, got {k_dtype} and {v_dtype}"
        )
    if k_dtype == FP8 and not _has_fp8():
        raise ValueError(f"a {FP8} cache needs a GPU of compute capability 8.9 or newer")
    if num_heads % num_kv_heads:
        raise ValueError(f"query heads must be a multiple of {num_kv_heads}, got {num_heads}")


def _has_fp8() -> bool:
    """Whether e4m3 can be converted here: by the current GPU, or by the interpreter."""
    return device.capability() >= (8, 9)


def _check_strides(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    _, between_heads, between_dims = q.stride()
    if between_dims != 1 or between_heads != q.shape[2]:
        raise ValueError(f"q must have dense heads, got strides {q.stride()}")
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("k_cache and v_cache must be contiguous")


def _check_out(out: Tensor, q: Tensor) -> None:
    flat = (q.shape[0], q.shape[1] * q.shape[2])
    if (
        tuple(out.shape) not in (flat, tuple(q.shape))
        or out.dtype != q.dtype
        or not out.is_contiguous()
    ):
        raise ValueError(
            f"out must be contiguous {q.dtype} {list(flat)}, got {out.dtype} {tuple(out.shape)}"
        )


def _check_plan(
    plan: AttentionPlan, q: Tensor, k_cache: Tensor, block_tables: Tensor, sliding_window: int
) -> None:
    num_requests, max_blocks = block_tables.shape
    made_for = (
        plan.num_requests,
        plan.num_heads,
        plan.num_kv_heads,
        plan.head_dim,
        plan.sliding_window,
        plan.cache_dtype,
    )
    called_for = (
        num_requests,
        q.shape[1],
        k_cache.shape[1],
        q.shape[2],
        sliding_window,
        k_cache.dtype,
    )
    positions = max_blocks * k_cache.shape[2]
    if made_for != called_for or plan.max_seq_len > positions or plan.num_tokens > q.shape[0]:
        raise ValueError(
            "the plan is for (requests, heads, kv heads, head size, window, cache) "
            f"{made_for}, {plan.num_tokens} tokens and {plan.max_seq_len} positions, the call for "
            f"{called_for}, {q.shape[0]} and {positions}"
        )


def _check_tables(
    block_tables: Tensor, query_start_loc: Tensor, seq_lens: Tensor
) -> tuple[int, int]:
    num_requests, max_blocks = block_tables.shape
    check_lengths(query_start_loc, seq_lens)
    if seq_lens.shape != (num_requests,):
        raise ValueError(
            f"{num_requests} block tables need as many seq_lens, got {tuple(seq_lens.shape)}"
        )
    if block_tables.dtype != torch.int32 or block_tables.stride(1) != 1:
        raise ValueError(
            f"block_tables must be int32 with dense rows, got {block_tables.dtype}, strides "
            f"{block_tables.stride()}"
        )
    return num_requests, max_blocks


def _check_options(
    scale: float,
    soft_cap: float,
    num_heads: int,
    num_kv_heads: int,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    rel_bias: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if soft_cap < 0:
        raise ValueError(f"soft_cap must be at least 0, got {soft_cap}")
    for name, tensor, size in (
        ("sinks", sinks, num_heads),
        ("alibi_slopes", alibi_slopes, num_heads),
        ("rel_bias", rel_bias, num_heads),
        ("k_scale", k_scale, num_kv_heads),
        ("v_scale", v_scale, num_kv_heads),
    ):
        if tensor is None:
            continue
        fits = tensor.shape[0] == size and tensor.dim() == (2 if name == "rel_bias" else 1)
        if not fits or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous float32 of {size} heads, got {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )
    if rel_bias is not None and rel_bias.shape[1] % 2 == 0:
        raise ValueError(f"rel_bias must have 2 * span - 1 columns, got {rel_bias.shape[1]}")
