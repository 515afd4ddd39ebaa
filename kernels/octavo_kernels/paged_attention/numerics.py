"""The arithmetic of GPU attention, shared by every kernel so that all of them give a row's bits.

A row (one query head of one token) is defined by positions alone, whatever kernel computes it:

- Keys are taken in tiles of `tile_size(H)` positions, tile j = positions [j * TILE, (j+1) * TILE).
- Tiles form partitions of PARTITION positions. Within a partition tiles go in ascending order
  through `softmax_tile`, starting from (m, l, acc) = (-inf, 0, 0); partitions are folded in
  ascending order with `merge`, starting from (-inf, 0, 0) as well. A sink is folded last.
- A tile or partition that a row does not see at all changes none of its bits, so tiles of rows that
  see different positions can be computed together.
- Scores and values are multiplied by the tensor cores in ascending order with float32 sums; every
  row lies whole in one warp (BLOCK_M = 16 * warps * n), so that row sums have one order.

m and l belong to logits in base 2: probability = 2 ** (logit * log2(e) - m) / l.
Products and sums are never contracted by the compiler (`launch` sees to it); `fma` says where.
"""

from __future__ import annotations

import triton
import triton.language as tl

PARTITION = 1024  # positions; a multiple of every tile and block size
LOG2_E = 1.4426950408889634


def tile_size(head_dim: int) -> int:
    """Key positions of a softmax tile: decides bits, so it depends on the head size alone."""
    return 128 if head_dim <= 128 else 64


@triton.jit
def softmax_tile(s, m, l, scale):
    """One tile's probabilities: s [M, TILE] float32 logits (-inf = not seen), m, l [M].

    scale > 0 turns logits to base 2. Returns p [M, TILE] float32, the new m and l, and alpha [M],
    by which the accumulator is multiplied before p @ v is added.
    """
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(tl.fma(s, scale, -m_safe[:, None]))
    alpha = tl.exp2(m - m_safe)
    l_new = tl.fma(l, alpha, tl.sum(p, 1))
    return p, m_new, l_new, alpha


@triton.jit
def merge(m_a, l_a, acc_a, m_b, l_b, acc_b):
    """Folds partition b after everything before it: m, l [M], acc [M, H] float32."""
    m = tl.maximum(m_a, m_b)
    m_safe = tl.where(m == float("-inf"), 0.0, m)
    a = tl.exp2(m_a - m_safe)
    b = tl.exp2(m_b - m_safe)
    l = tl.fma(l_a, a, l_b * b)
    acc = tl.fma(acc_a, a[:, None], acc_b * b[:, None])
    return m, l, acc


@triton.jit
def fold_sink(m, l, acc, sink):
    """Folds an attention sink [M] (a logit in base 2 with no value) after all partitions."""
    m_new = tl.maximum(m, sink)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    a = tl.exp2(m - m_safe)
    return m_new, tl.fma(l, a, tl.exp2(sink - m_safe)), acc * a[:, None]


@triton.jit
def normalise(l, acc):
    """acc * (1 / l), and 0 for a row that sees nothing."""
    return acc * (1.0 / tl.where(l == 0.0, 1.0, l))[:, None]
