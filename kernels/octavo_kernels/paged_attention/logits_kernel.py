"""What happens to scores before and to sums after the softmax, alike in every attention kernel.

Options that a launch does not use are None (pointers) or 0 (SOFT_CAP) and leave no code behind.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo_kernels.paged_attention.numerics import LOG2_E, fold_sink, normalise

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def logit_scale(scale, k_scale_ptr, kv_head):
    """The factor that turns scores to natural logits: scale, times the head's key scale."""
    if k_scale_ptr is not None:
        scale = scale * tl.load(k_scale_ptr + kv_head)
    return scale


@triton.jit
def softmax_scale(scale, slopes_ptr, rel_bias_ptr, SOFT_CAP: tl.constexpr):
    """`softmax_tile`'s factor for what `shape_logits` returns; scale as `logit_scale` gave it."""
    if SOFT_CAP > 0.0 or slopes_ptr is not None or rel_bias_ptr is not None:
        return _LOG2_E
    else:
        return scale * _LOG2_E


@triton.jit
def shape_logits(
    s,  # [M, TILE] float32 scores q @ k
    scale,  # as `logit_scale` gave it
    q_pos,  # [M] int32
    k_pos,  # [TILE] int32
    heads,  # [M] query heads
    slopes_ptr,  # [N] float32 or None (ALiBi): slope * (k_pos - q_pos) is added
    rel_bias_ptr,  # [N, 2 * span - 1] float32 or None: column clamp(k_pos - q_pos) + span - 1
    span,
    SOFT_CAP: tl.constexpr,  # 0, or cap: x -> cap * tanh(x / cap), before anything is added
):
    """Logits [M, TILE] in natural units; without any option the scores as they are.

    Plain attention so keeps its single fma, inside `softmax_tile`.
    """
    if not (SOFT_CAP > 0.0 or slopes_ptr is not None or rel_bias_ptr is not None):
        return s
    x = s * scale
    if SOFT_CAP > 0.0:
        # tanh(y) = sign(y) * (1 - t) / (1 + t), t = exp(-2 |y|): no overflow
        t = tl.exp2(tl.abs(x) * (-2.0 / SOFT_CAP * _LOG2_E))
        y = SOFT_CAP * ((1.0 - t) / (1.0 + t))
        x = tl.where(x < 0.0, -y, y)
    distance = k_pos[None, :] - q_pos[:, None]
    if slopes_ptr is not None:
        slopes = tl.load(slopes_ptr + heads)
        x = tl.fma(distance.to(tl.float32), slopes[:, None], x)
    if rel_bias_ptr is not None:
        column = tl.minimum(tl.maximum(distance, 1 - span), span - 1) + (span - 1)
        x += tl.load(rel_bias_ptr + heads[:, None] * (2 * span - 1) + column)
    return x


@triton.jit
def finish(m, l, acc, heads, kv_head, sinks_ptr, v_scale_ptr):
    """Rows [M, H] of the output, once all partitions are folded: the sink, 1 / l, value scale.

    sinks: [N] float32 natural logits, or None; v_scale: [K] float32, or None.
    """
    if sinks_ptr is not None:
        m, l, acc = fold_sink(m, l, acc, tl.load(sinks_ptr + heads) * _LOG2_E)
    rows = normalise(l, acc)
    if v_scale_ptr is not None:
        rows = rows * tl.load(v_scale_ptr + kv_head)
    return rows
