"""What the head is to match: the target's distribution at every place, over the draft vocabulary.

Two terms. The cross-entropy to the target's probabilities (the KL divergence but for a constant),
and the chance that a draft drawn from the head is rejected: 1 - sum(min(p, q)), the total
variation distance. Of a place's probabilities the largest are kept. They add up to less than 1:
what is lacking, and what the draft vocabulary lacks, weighs nothing and counts as rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ROWS = 256  # at a time: their logits are gone from the caches before more would pay


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """The target's distributions at M places: the k likeliest tokens of the draft vocabulary."""

    ids: Tensor  # [M, k] int64 into the draft vocabulary, the likeliest first
    probs: Tensor  # [M, k] float32

    def at(self, places: Tensor) -> Labels:
        """Those of places [m], numbers."""
        return Labels(ids=self.ids[places], probs=self.probs[places])

    def to(self, device: torch.device) -> Labels:
        return Labels(ids=self.ids.to(device), probs=self.probs.to(device))

    def split(self, counts: list[int]) -> list[Labels]:
        parts = zip(torch.split(self.ids, counts), torch.split(self.probs, counts), strict=True)
        return [Labels(ids=ids, probs=probs) for ids, probs in parts]

    @staticmethod
    def joined(parts: Sequence[Labels]) -> Labels:
        ids, probs = torch.cat([p.ids for p in parts]), torch.cat([p.probs for p in parts])
        return Labels(ids=ids, probs=probs)


def target_labels(
    hidden: Tensor, log_norm: Tensor, *, rows: Tensor, top_k: int, temperature: float = 1.0
) -> Labels:
    """Of hidden states [M, H] after the final norm, and the log of the softmax's denominator at
    this temperature over the whole vocabulary [M]; rows [Vd, H] are the draft vocabulary's."""
    ids, probs = [], []
    for part, norm in zip(torch.split(hidden, _ROWS), torch.split(log_norm, _ROWS), strict=True):
        logits = torch.matmul(part, rows.T)
        best, where = logits.topk(min(top_k, len(rows)), dim=-1)
        ids.append(where)
        probs.append((best / temperature - norm[:, None]).exp_())
    found = torch.cat(probs)
    # The denominator is rounded otherwise than these logits: never more than everything.
    found /= found.sum(-1, keepdim=True).clamp(min=1.0)
    return Labels(ids=torch.cat(ids), probs=found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """How the head's distributions fit the labels of M places."""

    loss: Tensor  # the sum
    sums: Tensor  # [3] cross-entropy, chance of acceptance, places with the same likeliest token
    is_right: Tensor  # [M] bool, whether the likeliest token is the text's


def match_loss(
    outputs: Tensor, labels: Labels, *, true_ids: Tensor, rows: Tensor, acceptance_weight: float
) -> Match:
    """Of head outputs [M, H]; true_ids [M] is what follows in the text, as a number of the draft
    vocabulary, -1 for none. Only ``loss`` has a gradient."""
    loss, sums, is_right = _MatchLoss.apply(  # type: ignore[no-untyped-call]
        outputs, labels, true_ids, rows, acceptance_weight
    )
    return Match(loss=loss, sums=sums, is_right=is_right)


class _MatchLoss(torch.autograd.Function):
    """The gradient is computed on the way: logits of all places are never there at once, and the
    output matrix, which is frozen, is read twice instead of three times."""

    @staticmethod
    def forward(
        ctx: Any,
        outputs: Tensor,
        labels: Labels,
        true_ids: Tensor,
        rows: Tensor,
        acceptance_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = rows.dtype
        if torch.is_autocast_enabled(outputs.device.type):
            dtype = torch.get_autocast_dtype(outputs.device.type)
        matrix = rows.to(dtype)
        grad = torch.empty_like(outputs)
        sums = torch.zeros(3, device=outputs.device)
        is_right = torch.empty(len(outputs), dtype=torch.bool, device=outputs.device)
        for start in range(0, len(outputs), _ROWS):
            part = slice(start, start + _ROWS)
            ids, p = labels.ids[part], labels.probs[part]
            q = torch.matmul(outputs[part].to(dtype), matrix.T).float().softmax(-1)
            best = q.amax(-1)
            known = q.gather(-1, ids)
            sums[0] -= (p * known.clamp(min=1e-38).log()).sum()
            sums[1] += torch.minimum(p, known).sum()
            sums[2] += (known[:, 0] == best).sum()
            true = true_ids[part]
            is_right[part] = (q.gather(-1, true.clamp(min=0)[:, None])[:, 0] == best) & (true >= 0)
            # d(-sum min(p, q)) / dq is -1 where q is the smaller; softmax takes it to the logits.
            lacking = torch.where(known < p, known, 0.0)
            share = p.sum(-1) + acceptance_weight * lacking.sum(-1)
            d_logits = q.mul_(share[:, None])
            d_logits.scatter_add_(-1, ids, -(p + acceptance_weight * lacking))
            grad[part] = torch.matmul(d_logits.to(dtype), matrix).to(grad.dtype)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(sums, is_right)
        return sums[0] + acceptance_weight * (len(outputs) - sums[1]), sums, is_right

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None, None, None, None
