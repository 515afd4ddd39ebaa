"""Packed attention in plain torch, in the dtype of q. Knows nothing of tiles or speed."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_attention_reference(
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
) -> Tensor:
    """See `packed_attention`; float64 q gives a float64 result."""
    num_tokens, num_heads, head_dim = q.shape
    group = num_heads // k.shape[1]
    out = torch.zeros(num_tokens, num_heads, head_dim, dtype=q.dtype, device=q.device)
    starts, key_starts = query_start_loc.tolist(), key_start_loc.tolist()
    for request in range(len(starts) - 1):
        begin, end = starts[request : request + 2]
        key_begin, key_end = key_starts[request : request + 2]
        assert end - begin <= max_query_len
        count = key_end - key_begin
        keys, values = k[key_begin:key_end].to(q.dtype), v[key_begin:key_end].to(q.dtype)
        if k_scale is not None:
            keys = keys * k_scale.to(q.dtype)[:, None]
        if v_scale is not None:
            values = values * v_scale.to(q.dtype)[:, None]
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        logits = torch.einsum("qnh,knh->nqk", q[begin:end], keys) * scale
        if soft_cap > 0:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        position = torch.arange(count - (end - begin), count, device=q.device)[:, None]
        distance = torch.arange(count, device=q.device)[None, :] - position
        if alibi_slopes is not None:
            logits = logits + alibi_slopes.to(q.dtype)[:, None, None] * distance
        if rel_bias is not None:
            span = (rel_bias.shape[1] + 1) // 2
            logits = logits + rel_bias.to(q.dtype)[:, distance.clamp(1 - span, span - 1) + span - 1]
        visible = torch.ones_like(distance, dtype=torch.bool)
        if is_causal:
            visible &= distance <= 0
        if sliding_window > 0:
            visible &= distance.abs() < sliding_window
        logits = logits.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            sink = sinks.to(q.dtype)[:, None, None].expand(-1, end - begin, 1)
            logits = torch.cat([logits, sink], dim=2)
        # a row that sees nothing is NaN here and 0 by definition
        weights = logits.softmax(dim=-1).nan_to_num(0.0)[:, :, :count]
        out[begin:end] = torch.einsum("nqk,knh->qnh", weights, values)
    return out
