"""Prepares packed q, k, v of new tokens for attention. Knows the cache's layout, not its owner."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from octavo_kernels import parallel
from octavo_kernels.op import require_device
from octavo_kernels.paged_attention import kv_cache_shapes
from octavo_kernels.rotary_kv_write import cpu
from octavo_kernels.rotary_kv_write.reference import rotary_kv_write_reference

__all__ = [
    "check_status",
    "kernels",
    "rotary_kv_write",
    "rotary_kv_write_reference",
    "warm",
]

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
_INDEX_BYTES = {torch.int32: 4, torch.int64: 8}
_SERIAL_ELEMENTS = 1 << 13  # below this, one thread is done before a second has started


def rotary_kv_write(
    qkv: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    status: Tensor | None = None,
) -> Tensor:
    """Optional QK-norm, rotary embedding of q and k, and the write of k and v into the paged cache.

    qkv: [T, (N + 2K) * H] float32, rows [q heads | k heads | v heads]; all of it is overwritten.
    positions, slots: [T] int32 or int64; slot = block * block_size + offset, negative = do not
    write. cos, sin: [P, R / 2] float32, row p for position p; the first R of H dimensions turn in
    pairs (i, R / 2 + i), R = 0 turns none. q_norm, k_norm: [H] float32 weights of an RMS norm over
    each head, applied before the rotation. k_cache, v_cache: `kv_cache_shapes`; int8 ones get, of
    each head, codes -127 to 127 and what they are multiples of.
    Returns q [T, N, H], a view of qkv. A token's bits depend on that token alone.
    Raises ValueError for shapes, dtypes, positions or slots that do not fit; the cache may then
    hold some of the batch's tokens.
    status: [1] int64, zero at first: positions and slots that do not fit are noted there, for
    `check_status` to raise once for many calls.
    On a GPU: other dtypes and both caches [B, K, BLOCK, H]; what does not fit is not written. See
    `octavo_kernels.rotary_kv_write.gpu`, which also has FP8 caches, encoders and other pairs.
    """
    if qkv.is_cuda:
        from octavo_kernels.rotary_kv_write import gpu  # here: a CPU installation has no Triton

        return gpu.rotary_kv_write(
            qkv,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            positions=positions,
            cos=cos,
            sin=sin,
            slots=slots,
            k_cache=k_cache,
            v_cache=v_cache,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=eps,
        )
    require_device("rotary_kv_write", qkv, have=("cpu", "cuda"))
    num_tokens = qkv.shape[0]
    width = (num_heads + 2 * num_kv_heads) * head_dim
    if qkv.shape != (num_tokens, width) or qkv.dtype != torch.float32 or not qkv.is_contiguous():
        raise ValueError(
            f"qkv must be contiguous float32 [T, {width}], got {qkv.dtype} {tuple(qkv.shape)}"
        )
    q = qkv.view(num_tokens, num_heads + 2 * num_kv_heads, head_dim)[:, :num_heads]
    num_blocks, block_size = k_cache.shape[0], k_cache.shape[3]
    _check_cache(k_cache.shape, v_cache.shape, k_cache.dtype, v_cache.dtype, num_kv_heads, head_dim)
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("k_cache and v_cache must be contiguous")
    _check_tables(cos, sin, q_norm, k_norm, head_dim=head_dim)
    for name, index in (("positions", positions), ("slots", slots)):
        if index.shape != (num_tokens,) or index.dtype not in _INDEX_BYTES:
            raise ValueError(
                f"{name} must be [{num_tokens}] int32 or int64, got {tuple(index.shape)} "
                f"{index.dtype}"
            )
        if not index.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    if num_tokens == 0:
        return q
    found = torch.zeros(1, dtype=torch.int64) if status is None else status
    is_small = num_tokens * width < _SERIAL_ELEMENTS
    cpu.rotate_and_write(
        1 if is_small else min(num_tokens, parallel.num_threads()),
        _KINDS[k_cache.dtype],
        qkv.data_ptr(),
        num_tokens,
        num_heads,
        num_kv_heads,
        head_dim,
        positions.data_ptr(),
        _INDEX_BYTES[positions.dtype],
        cos.data_ptr(),
        sin.data_ptr(),
        cos.shape[1],
        cos.shape[0],
        slots.data_ptr(),
        _INDEX_BYTES[slots.dtype],
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        block_size,
        num_blocks,
        0 if q_norm is None else q_norm.data_ptr(),
        0 if k_norm is None else k_norm.data_ptr(),
        found.data_ptr(),
        eps,
    )
    if status is None:
        check_status(found, positions=positions, slots=slots, cos=cos, k_cache=k_cache)
    return q


def check_status(
    status: Tensor, *, positions: Tensor, slots: Tensor, cos: Tensor, k_cache: Tensor
) -> None:
    """Raises ValueError if calls of `rotary_kv_write` on these tensors met what does not fit."""
    code = ctypes.c_int64.from_address(status.data_ptr()).value  # cheaper than a tensor's look
    if code == cpu.BAD_POSITION:
        raise ValueError(
            f"positions must be 0 to {cos.shape[0] - 1}, got {int(positions.min())} to "
            f"{int(positions.max())}"
        )
    if code == cpu.BAD_SLOT:
        num_slots = k_cache.shape[0] * k_cache.shape[3]
        raise ValueError(f"slots must be below {num_slots}, got {int(slots.max())}")


@functools.lru_cache(maxsize=256)
def _check_cache(
    k_shape: torch.Size,
    v_shape: torch.Size,
    k_dtype: torch.dtype,
    v_dtype: torch.dtype,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    """Refuses what does not fit; a model asks the same question in every layer."""
    shapes = kv_cache_shapes(
        k_shape[0],
        block_size=k_shape[3],
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=k_dtype,
    )
    if (k_shape, v_shape) != shapes:
        raise ValueError(
            f"caches must be {shapes[0]} and {shapes[1]}, got {tuple(k_shape)} and {tuple(v_shape)}"
        )
    if k_dtype not in _KINDS or v_dtype != k_dtype:
        raise ValueError(
            f"cache dtype must be one of {[str(d) for d in _KINDS]}, got {k_dtype} and {v_dtype}"
        )


def _check_tables(
    cos: Tensor, sin: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, *, head_dim: int
) -> None:
    if cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > head_dim:
        raise ValueError(
            f"cos and sin must be [P, R / 2] with R at most {head_dim}, got {tuple(cos.shape)} "
            f"and {tuple(sin.shape)}"
        )
    for name, table in (("cos", cos), ("sin", sin), ("q_norm", q_norm), ("k_norm", k_norm)):
        if table is not None and (table.dtype != torch.float32 or not table.is_contiguous()):
            raise ValueError(f"{name} must be contiguous float32, got {table.dtype}")
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None and weight.shape != (head_dim,):
            raise ValueError(f"{name} must be [{head_dim}], got {tuple(weight.shape)}")


def kernels() -> tuple[parallel.Kernel, ...]:
    """What a server calls."""
    return (cpu.rotate_and_write,)


def warm() -> None:
    """Compile the kernel or load it from disk."""
    for kernel in kernels():
        assert kernel.address
