"""Attention of packed sequences without a cache: encoders, cross attention. Knows no model."""

from __future__ import annotations

from torch import Tensor

from octavo_kernels.op import no_kernel
from octavo_kernels.packed_attention.reference import packed_attention_reference

__all__ = ["packed_attention", "packed_attention_reference"]


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
) -> Tensor:
    """Attention of every query token to the keys of its sequence.

    q: [T, N, H] float16, bfloat16 or float32; k, v: [S, K, H] of q's dtype, or float8_e4m3fn and
    then multiplied by k_scale, v_scale [K] float32 (default 1). Their rows may be strided (views of
    qkv), [N, H] and [K, H] are dense; N is a multiple of K, H of 16, at most 256.
    query_start_loc, key_start_loc: [R + 1] int32; sequence r has the query rows from
    query_start_loc[r] and the key rows from key_start_loc[r], to where the next one's begin.
    max_query_len: a bound on the queries of one sequence; later ones are not computed.
    Query i of a sequence stands at key position keys - queries + i. It sees every key; with
    is_causal the keys up to its position; with sliding_window W those less than W positions away.
    Logits are scale * q.k, then soft_cap * tanh(logit / soft_cap), + alibi_slopes[n] * (key
    position - query position), + rel_bias[n, clamp(key - query, 1 - span, span - 1) + span - 1]
    (rel_bias [N, 2 * span - 1]); sinks [N] are logits that have no value. All float32.
    Returns out [T, N, H] in q's dtype. A row's bits depend on its own query and keys alone; a
    sequence without keys gives zeros. Raises ValueError for shapes, dtypes or strides it cannot
    take; values of the start locations are clamped to the tensors, not checked.
    """
    if not (q.is_cuda or q.is_meta):
        raise no_kernel("packed_attention", q, have=("cuda",))
    from octavo_kernels.packed_attention import gpu  # needs triton, absent without a GPU

    return gpu.packed_attention(
        q,
        k,
        v,
        query_start_loc=query_start_loc,
        key_start_loc=key_start_loc,
        max_query_len=max_query_len,
        scale=scale,
        is_causal=is_causal,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        rel_bias=rel_bias,
        k_scale=k_scale,
        v_scale=v_scale,
        out=out,
    )
