"""Packed attention on a GPU: checks and launches. Shares the prefill kernel of paged attention."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo_kernels.launch import launch
from octavo_kernels.paged_attention import numerics, prefill, prefill_kernel
from octavo_kernels.paged_attention.gpu_plan import padded
from octavo_kernels.tuning import Choice, choose

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8 = torch.float8_e4m3fn
MAX_HEAD_DIM = 256
MAX_GROUP = 64  # query heads of a kv head


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_start_loc: Tensor,
    key_start_loc: Tensor,
    max_query_len: int,
    scale: float,
    is_causal: bool = False,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    rel_bias: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
    choice: Choice | None = None,
) -> Tensor:
    """See `octavo_kernels.packed_attention`; nothing is read back from the device.

    choice: launch choices to try instead of the measured ones.
    """
    _check_tokens(q, k, v, k_scale, v_scale)
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    _check_starts(query_start_loc, key_start_loc)
    _check_options(
        num_heads, num_kv_heads, scale, sliding_window, soft_cap,
        sinks=sinks, alibi_slopes=alibi_slopes, rel_bias=rel_bias, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    if out is None:
        out = torch.empty(num_tokens, num_heads, head_dim, dtype=q.dtype, device=q.device)
    elif out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous {q.dtype} {tuple(q.shape)}, got {out.dtype} {tuple(out.shape)}"
        )
    if choice is None:
        name = prefill.key(head_dim, q.dtype, k.dtype)
        choice = choose("packed_attention", name, prefill.default(head_dim, q.dtype))
    block_m = choice["block_m"]
    block_q = block_m // (num_heads // num_kv_heads)
    launch(
        prefill_kernel.attend,
        (-(-max_query_len // block_q), num_kv_heads, query_start_loc.shape[0] - 1),
        q, k, v, out, None, query_start_loc, key_start_loc, None, None,
        sinks, alibi_slopes, rel_bias, k_scale, v_scale,
        scale, 0 if rel_bias is None else (rel_bias.shape[1] + 1) // 2,
        num_tokens, k.shape[0], 0, 0,
        N=num_heads, K=num_kv_heads, H=head_dim, HP=padded(head_dim), Q_STRIDE=q.stride(0),
        KV_STRIDE=k.stride(0), BLOCK=0, TILE_Q=block_q, BLOCK_M=block_m,
        TILE=numerics.tile_size(head_dim), PARTITION=numerics.PARTITION,
        CAUSAL=is_causal, WINDOW=sliding_window, SOFT_CAP=soft_cap,
        num_warps=choice["num_warps"], num_stages=choice["num_stages"],
    )  # fmt: skip
    return out


def _check_tokens(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q [T, N, H] and k, v [S, K, H] must agree, got {tuple(q.shape)}, {tuple(k.shape)} "
            f"and {tuple(v.shape)}"
        )
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k.shape[1]
    if (
        num_kv_heads < 1
        or num_heads % num_kv_heads
        or not 1 <= num_heads <= MAX_GROUP * num_kv_heads
    ):
        raise ValueError(
            f"query heads must be 1 to {MAX_GROUP} times the {num_kv_heads} kv heads, got "
            f"{num_heads}"
        )
    if head_dim % 16 or not 16 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim must be a multiple of 16 between 16 and {MAX_HEAD_DIM}, got {head_dim}"
        )
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be one of {[str(d) for d in DTYPES]}, got {q.dtype}")
    if k.dtype != v.dtype or k.dtype not in (q.dtype, FP8):
        raise ValueError(f"k and v must be {q.dtype} like q or {FP8}, got {k.dtype} and {v.dtype}")
    if k.dtype != FP8 and (k_scale is not None or v_scale is not None):
        raise ValueError(f"k_scale and v_scale need {FP8} keys and values, got {k.dtype}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(2) != 1 or (tensor.shape[1] > 1 and tensor.stride(1) != head_dim):
            raise ValueError(f"{name} must have dense heads, got strides {tensor.stride()}")
    if k.stride(0) != v.stride(0):
        raise ValueError(f"k and v need one row stride, got {k.stride(0)} and {v.stride(0)}")


def _check_starts(query_start_loc: Tensor, key_start_loc: Tensor) -> None:
    for name, tensor in (("query_start_loc", query_start_loc), ("key_start_loc", key_start_loc)):
        if tensor.dtype != torch.int32 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous int32 [R + 1], got {tensor.dtype}")
    if query_start_loc.shape != key_start_loc.shape or query_start_loc.shape[0] < 1:
        raise ValueError(
            f"query_start_loc and key_start_loc must be [R + 1], got "
            f"{tuple(query_start_loc.shape)} and {tuple(key_start_loc.shape)}"
        )


def _check_options(
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    sliding_window: int,
    soft_cap: float,
    **tensors: Tensor | None,
) -> None:
    if not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}")
    if sliding_window < 0 or soft_cap < 0:
        raise ValueError(
            f"sliding_window and soft_cap must be at least 0, got {sliding_window} and {soft_cap}"
        )
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        rows = num_kv_heads if name in ("k_scale", "v_scale") else num_heads
        odd = tensor.dim() == 2 and tensor.shape[1] % 2 == 1
        fits = odd if name == "rel_bias" else tensor.dim() == 1
        if tensor.dtype != torch.float32 or not fits or tensor.shape[0] != rows:
            want = f"[{rows}, 2 * span - 1]" if name == "rel_bias" else f"[{rows}]"
            raise ValueError(
                f"{name} must be float32 {want}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
