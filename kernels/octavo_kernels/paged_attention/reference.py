"""Paged attention in plain torch, in the dtype of q. Knows nothing of tiles, threads or speed."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_cache(cache: Tensor, table: Tensor, num_tokens: int, *, is_key: bool) -> Tensor:
    """The first `num_tokens` keys or values of a block table as [num_tokens, K, H]."""
    blocks = cache[table.long()]  # [blocks, K, H, BLOCK] or [blocks, K, BLOCK, H]
    if is_key:
        blocks = blocks.transpose(2, 3)
    num_blocks, num_heads, block_size, head_dim = blocks.shape
    flat = blocks.transpose(1, 2).reshape(num_blocks * block_size, num_heads, head_dim)
    return flat[:num_tokens]


def paged_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    block_tables: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    sliding_window: int = 0,
) -> Tensor:
    """See `paged_attention`; computes in q's dtype, so float64 q gives a float64 result."""
    num_tokens, num_heads, head_dim = q.shape
    block_size = k_cache.shape[3]
    out = torch.zeros(num_tokens, num_heads * head_dim, dtype=q.dtype)
    starts = query_start_loc.tolist()
    for request, seq_len in enumerate(seq_lens.tolist()):
        begin, end = starts[request], starts[request + 1]
        if begin == end:
            continue
        table = block_tables[request, : -(-seq_len // block_size)]
        k = gather_cache(k_cache, table, seq_len, is_key=True).to(q.dtype)
        v = gather_cache(v_cache, table, seq_len, is_key=False).to(q.dtype)
        group = num_heads // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        position = torch.arange(seq_len - (end - begin), seq_len)[:, None]
        key = torch.arange(seq_len)[None, :]
        visible = key <= position
        if sliding_window > 0:
            visible &= key > position - sliding_window
        logits = torch.einsum("qnh,knh->nqk", q[begin:end], k) * scale
        weights = logits.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        out[begin:end] = torch.einsum("nqk,knh->qnh", weights, v).reshape(end - begin, -1)
    return out
