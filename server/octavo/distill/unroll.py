"""Drafting several tokens in a row, at all places of a text at once. Knows the head, no loss.

While it serves, a head sees the target's hidden states up to the last accepted token and its own
outputs after that. Training on that (EAGLE-3's "training-time test"): depth 0 runs on the
target's states; depth j at place p on the head's output of depth j - 1 at place p - 1. It sees the
keys of depth 0 up to place p - j, and of each depth i in between the one at place p - j + i: the
chain that led to it.

Layout of a batch of texts: C places of context, then R of the answer ([B, C + R]); the context is
padded on the left, the answer on the right. Drafts begin in the answer alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from octavo.distill.head import DraftHead


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What the head sees of a batch of B texts."""

    taps: Tensor  # [B, C + R, 3H] the target's hidden states
    embedded: Tensor  # [B, C + R, H] vectors of each place's next token
    is_text: Tensor  # [B, C + R] bool, False where padded
    num_context: int  # C


def unroll(head: DraftHead, batch: Features, *, depth: int) -> Iterator[Tensor]:
    """Outputs after the head's norm, [B, R, H] of each depth; places r < depth j mean nothing."""
    num_context, window = batch.num_context, head.config.window
    places = torch.arange(batch.taps.shape[1], device=batch.taps.device)
    answer = places[num_context:]
    feature = head.dropout(head.fc(batch.taps))
    x = head.inputs(batch.embedded, feature)
    k0, v0 = head.keys_values(x, places=places)
    x, feature = x[:, num_context:], feature[:, num_context:]
    embedded = batch.embedded[:, num_context:]
    chain: list[tuple[Tensor, Tensor]] = []
    for step in range(depth):
        if step:
            feature = _later(feature, 1, dim=1)
            x = head.inputs(embedded, feature)
            chain.append(head.keys_values(x, places=answer))
        mask = _visible(answer, places, step=step, window=window) & batch.is_text[:, None, :]
        q = head.queries(x, places=answer)
        context = _attend(q, k0, v0, mask=mask, chain=chain)
        feature = head.finish(context, feature)
        yield head.norm(feature)


def _later(x: Tensor, count: int, *, dim: int) -> Tensor:
    """x of ``count`` places before, zeros where there is none."""
    if not count:
        return x
    kept = x.narrow(dim, 0, max(x.shape[dim] - count, 0))
    pad = [0, 0] * (x.dim() - 1 - dim) + [x.shape[dim] - kept.shape[dim], 0]
    return F.pad(kept, pad)


def _visible(answer: Tensor, places: Tensor, *, step: int, window: int) -> Tensor:
    """[R, C + R] bool: which keys of depth 0 a place of depth ``step`` sees."""
    distance = answer[:, None] - places[None, :]
    seen = distance >= step
    return seen & (distance < window) if window else seen


def _attend(
    q: Tensor, k0: Tensor, v0: Tensor, *, mask: Tensor, chain: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Attention [B, N, R, h] over depth 0's keys (mask [B, R, C + R]) and those of the chain.

    ``chain[i - 1]`` are keys and values of depth i by place; of the last every place sees its own,
    of the one before the place before, and so on.
    """
    num_kv, size = k0.shape[1], q.shape[-1]
    q = q.view(len(q), num_kv, -1, *q.shape[2:]) * size**-0.5  # [B, K, G, R, h]
    scores = torch.matmul(q, k0[:, :, None].transpose(-1, -2)).float()
    scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    links = [
        (_later(k, len(chain) - i, dim=2)[:, :, None], _later(v, len(chain) - i, dim=2)[:, :, None])
        for i, (k, v) in enumerate(chain, 1)
    ]
    own = [(q * k).sum(-1, keepdim=True).float() for k, _ in links]
    # A padded place sees nothing: its weights must not be NaN, for 0 * NaN is NaN.
    floor = scores.new_full((), -1e30)
    weights = torch.cat([torch.maximum(scores, floor), *own], dim=-1).softmax(-1).to(v0.dtype)
    num_keys = k0.shape[2]
    context = torch.matmul(weights[..., :num_keys], v0[:, :, None])
    for i, (_, v) in enumerate(links):
        context = context + weights[..., num_keys + i, None] * v
    return context.flatten(1, 2)
