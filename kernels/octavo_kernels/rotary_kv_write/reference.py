"""QK-norm, rotary embedding and cache write in plain torch. Know nothing of threads or vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def rotary_kv_write_reference(
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
) -> Tensor:
    """See `rotary_kv_write`; leaves qkv as it is."""
    heads = qkv.reshape(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    q, k = heads[:, :num_heads], heads[:, num_heads : num_heads + num_kv_heads]
    v = heads[:, num_heads + num_kv_heads :]
    cos, sin = cos[positions.long()].to(qkv.dtype), sin[positions.long()].to(qkv.dtype)
    q, k = _rotate(_norm(q, q_norm, eps), cos, sin), _rotate(_norm(k, k_norm, eps), cos, sin)
    block_size = k_cache.shape[3]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, block_size)
            k_cache[block, :, :, offset] = k[token].to(k_cache.dtype)
            v_cache[block, :, offset] = v[token].to(v_cache.dtype)
    return q
