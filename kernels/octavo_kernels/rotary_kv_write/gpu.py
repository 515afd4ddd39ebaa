"""Prepares packed q, k, v of new tokens on a GPU. Knows shapes and launches, not models."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from octavo_kernels.launch import launch
from octavo_kernels.rotary_kv_write.gpu_kernel import rotate_and_write
from octavo_kernels.row_tile import is_aligned

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FP8 = torch.float8_e4m3fn
_INDEX_DTYPES = (torch.int32, torch.int64)
_BLOCK_SIZES = (16, 32, 64, 128)
_MAX_HEAD_DIM = 512
_PROGRAM_ELEMENTS = 6144  # of a token's q, k and v: one token of N 32, K 8, H 128
_WARP_ELEMENTS = 1536


def rotary_kv_write(
    qkv: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    is_interleaved: bool = False,
    k_in_place: bool = False,
    q_out: Tensor | None = None,
    use_pdl: bool = False,
) -> Tensor:
    """Optional QK-norm, rotary embedding of q and k, and the write of k and v into the paged cache.

    qkv: [T, (N + 2K) * H] float32, bfloat16 or float16, rows [q heads | k heads | v heads].
    positions, slots: [T] int32 or int64; slot = block * block_size + offset, negative = do not
    write. cos, sin: [P, R / 2] float32, row p for position p; the first R of H dimensions turn in
    pairs (i, R / 2 + i), or (2i, 2i + 1) if is_interleaved; R = 0 turns none. q_norm, k_norm: [H]
    weights of an RMS norm over each head before it turns, to which weight_offset (0 or 1) is added.
    k_cache, v_cache: [B, K, BLOCK, H] of a dtype of qkv's, or float8_e4m3fn, which stores
    k / k_scale and v / v_scale saturated to +-448; k_scale, v_scale: [K] float32 (without them: 1).
    An encoder gives no slots and no caches, and k_in_place.

    q is overwritten in qkv, or written to q_out [T, N, H] if given; k likewise overwritten if
    k_in_place. Returns q [T, N, H], a view of qkv, or q_out. All is computed in float32 and rounded
    once on its way to each place. use_pdl (GPU only): starts while the kernel before it in the
    stream still runs. A token's bits depend on that token alone.

    Raises ValueError for shapes and dtypes that do not fit. Positions and slots stay on the device:
    a position outside the tables takes their nearest row, a slot outside the cache is not written.
    """
    _check_heads(num_heads, num_kv_heads, head_dim)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    _check_rows(qkv, width)
    if weight_offset not in (0.0, 1.0):
        raise ValueError(f"weight_offset must be 0 or 1, got {weight_offset}")
    _check_tables(qkv, head_dim=head_dim, cos=cos, sin=sin, q_norm=q_norm, k_norm=k_norm)
    _check_index("positions", positions, qkv)
    k_cache, v_cache, num_slots, block_size = _caches(
        qkv, num_kv_heads, head_dim, slots, k_cache, v_cache, k_scale, v_scale
    )
    q = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)[:, :num_heads]
    if q_out is not None:
        if (q_out.shape, q_out.dtype, q_out.device) != (q.shape, qkv.dtype, qkv.device):
            raise ValueError(
                f"q_out must be {qkv.dtype} {tuple(q.shape)} on {qkv.device}, got {q_out.dtype} "
                f"{tuple(q_out.shape)} on {q_out.device}"
            )
        q = q_out
    step = 16 // qkv.element_size() if head_dim * qkv.element_size() % 16 == 0 else 1
    _check_starts(step > 1, qkv=qkv, q_out=q_out)
    kv_heads, num_warps = program_size(num_heads, num_kv_heads, head_dim)
    has_pairs = cos.shape[1] > 0
    launch(
        rotate_and_write,
        (qkv.shape[0] * -(-num_kv_heads // kv_heads),),
        qkv,
        q_out,
        positions,
        cos if has_pairs else None,
        sin if has_pairs else None,
        slots,
        k_cache,
        v_cache,
        q_norm,
        k_norm,
        k_scale,
        v_scale,
        width // step,
        cos.shape[0],
        num_slots,
        eps,
        SIZES=(num_heads, num_kv_heads, head_dim, cos.shape[1], block_size),
        KV_HEADS=kv_heads,
        STEP=step,
        OFFSET=float(weight_offset),
        INTERLEAVED=is_interleaved,
        K_IN_PLACE=k_in_place,
        PDL=use_pdl,
        num_warps=num_warps,
        launch_pdl=use_pdl,
    )
    return q


@functools.lru_cache(maxsize=64)
def program_size(num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[int, int]:
    """kv heads and warps of a program. They shape the QK-norm's sums: the model alone decides."""
    elements = (num_heads // num_kv_heads + 2) * head_dim  # that come with one kv head
    parts = -(-num_kv_heads // max(_PROGRAM_ELEMENTS // elements, 1))
    kv_heads = -(-num_kv_heads // parts)
    warps = -(-kv_heads * elements // _WARP_ELEMENTS)
    return kv_heads, min(1 << (warps - 1).bit_length(), 8)


@functools.lru_cache(maxsize=64)
def _check_heads(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}"
        )
    if not 1 <= head_dim <= _MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be 1 to {_MAX_HEAD_DIM}, got {head_dim}")


def _check_rows(qkv: Tensor, width: int) -> None:
    if (
        qkv.dim() != 2
        or qkv.shape[1] != width
        or qkv.dtype not in _DTYPES
        or not qkv.is_contiguous()
    ):
        raise ValueError(
            f"qkv must be contiguous [T, {width}] of {', '.join(map(str, _DTYPES))}, got "
            f"{qkv.dtype} {tuple(qkv.shape)}"
        )


def _check_index(name: str, index: Tensor, qkv: Tensor) -> None:
    if (
        index.shape != qkv.shape[:1]
        or index.dtype not in _INDEX_DTYPES
        or index.device != qkv.device
        or not index.is_contiguous()
    ):
        raise ValueError(
            f"{name} must be contiguous [{qkv.shape[0]}] int32 or int64 on {qkv.device}, got "
            f"{tuple(index.shape)} {index.dtype} on {index.device}"
        )


def _check_starts(is_needed: bool, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
        if is_needed and not is_aligned(tensor):
            raise ValueError(f"{name} must start at a multiple of 16 bytes")


def _check_tables(
    qkv: Tensor,
    *,
    head_dim: int,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
) -> None:
    if cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > head_dim:
        raise ValueError(
            f"cos and sin must be [P, R / 2] with R at most {head_dim}, got {tuple(cos.shape)} "
            f"and {tuple(sin.shape)}"
        )
    if cos.shape[0] == 0:
        raise ValueError("cos and sin must have a row for position 0, got none")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32 or table.device != qkv.device:
            raise ValueError(
                f"{name} must be float32 on {qkv.device}, got {table.dtype} on {table.device}"
            )
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None and (
            weight.shape != (head_dim,)
            or weight.dtype not in _DTYPES
            or weight.device != qkv.device
        ):
            raise ValueError(
                f"{name} must be [{head_dim}] on {qkv.device}, got {weight.dtype} "
                f"{tuple(weight.shape)} on {weight.device}"
            )
    _check_starts(True, cos=cos, sin=sin, q_norm=q_norm, k_norm=k_norm)


def _caches(
    qkv: Tensor,
    num_kv_heads: int,
    head_dim: int,
    slots: Tensor | None,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """The caches as the kernel takes them, the number of slots and the block size, all checked."""
    if slots is None or k_cache is None or v_cache is None:
        given = (slots, k_cache, v_cache, k_scale, v_scale)
        if any(tensor is not None for tensor in given):
            raise ValueError("slots, k_cache and v_cache go together, and scales with them")
        return None, None, 0, _BLOCK_SIZES[0]
    _check_index("slots", slots, qkv)
    num_blocks, block_size = k_cache.shape[0], k_cache.shape[2] if k_cache.dim() == 4 else 0
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    if k_cache.shape != shape or v_cache.shape != shape or block_size not in _BLOCK_SIZES:
        raise ValueError(
            f"caches must both be [B, {num_kv_heads}, BLOCK, {head_dim}] with BLOCK one of "
            f"{_BLOCK_SIZES}, got {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    if k_cache.dtype not in (*_DTYPES, _FP8) or v_cache.dtype != k_cache.dtype:
        raise ValueError(
            f"cache dtype must be one of {', '.join(map(str, (*_DTYPES, _FP8)))}, got "
            f"{k_cache.dtype} and {v_cache.dtype}"
        )
    if not (k_cache.device == v_cache.device == qkv.device):
        raise ValueError(f"caches must be on {qkv.device}, got {k_cache.device}, {v_cache.device}")
    _check_starts(True, k_cache=k_cache, v_cache=v_cache)
    is_fp8 = k_cache.dtype == _FP8
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if not is_fp8 and scale is not None:
            raise ValueError(f"{name} needs a {_FP8} cache, got {k_cache.dtype}")
        if scale is not None and (
            scale.shape != (num_kv_heads,)
            or scale.dtype != torch.float32
            or scale.device != qkv.device
        ):
            raise ValueError(
                f"{name} must be [{num_kv_heads}] float32 on {qkv.device}, got {scale.dtype} "
                f"{tuple(scale.shape)} on {scale.device}"
            )
    if (k_scale is None) != (v_scale is None):
        raise ValueError("k_scale and v_scale go together, got one of them")
    _check_starts(True, k_scale=k_scale, v_scale=v_scale)
    if is_fp8:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    return k_cache, v_cache, num_blocks * block_size, block_size
