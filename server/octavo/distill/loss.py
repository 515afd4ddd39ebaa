"""What the head is to match: the target's distribution at every place, over the draft vocabulary.

Two terms. The cross-entropy to the target's probabilities (the KL divergence but for a constant),
and the chance that a draft drawn from the head is rejected: 1 - sum(min(p, q)), the total
variation distance. Target probabilities are of the whole vocabulary, so those of a draft
vocabulary add up to less than 1: what it lacks weighs nothing, and counts as rejected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ROWS = 256  # at a time: their logits are gone from the caches before more would pay


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """The target's distributions at M places."""

    probs: Tensor  # [M, Vd] float32
    best: Tensor  # [M] the most likely draft id
    mass: Tensor  # [M] sum of probs

    def at(self, picked: Tensor) -> Labels:
        """Those of the places that are picked, [M] bool."""
        return Labels(probs=self.probs[picked], best=self.best[picked], mass=self.mass[picked])


def target_labels(
    hidden: Tensor, log_norm: Tensor, *, rows: Tensor, temperature: float = 1.0
) -> Labels:
    """Of hidden states [M, H] after the final norm, and the log of the softmax's denominator at
    this temperature over the whole vocabulary [M]; rows [Vd, H] are the draft vocabulary's."""
    logits = torch.matmul(hidden, rows.T) / temperature
    probs = (logits - log_norm[:, None]).exp_().clamp_(max=1.0)
    mass = probs.sum(-1)
    # The cached denominator is rounded otherwise than these logits: never more than everything.
    probs /= mass.clamp(min=1.0)[:, None]
    return Labels(probs=probs, best=probs.argmax(-1), mass=mass.clamp(max=1.0))


def match_loss(
    outputs: Tensor, labels: Labels, *, rows: Tensor, acceptance_weight: float
) -> tuple[Tensor, Tensor]:
    """Sum over M places of the loss of head outputs [M, H], and [3] sums without gradient:
    cross-entropy, chance of acceptance, places where both find the same token likeliest."""
    loss, sums = _MatchLoss.apply(outputs, labels, rows, acceptance_weight)  # type: ignore[no-untyped-call]
    return loss, sums


class _MatchLoss(torch.autograd.Function):
    """The gradient is computed on the way: logits of all places are never there at once, and the
    output matrix, which is frozen, is read twice instead of three times."""

    @staticmethod
    def forward(
        ctx: Any, outputs: Tensor, labels: Labels, rows: Tensor, acceptance_weight: float
    ) -> tuple[Tensor, Tensor]:
        dtype = rows.dtype
        if torch.is_autocast_enabled(outputs.device.type):
            dtype = torch.get_autocast_dtype(outputs.device.type)
        matrix = rows.to(dtype)
        grad = torch.empty_like(outputs)
        sums = torch.zeros(3, device=outputs.device)
        for start in range(0, len(outputs), _ROWS):
            part = slice(start, start + _ROWS)
            p, mass = labels.probs[part], labels.mass[part]
            log_q = torch.matmul(outputs[part].to(dtype), matrix.T).float().log_softmax(-1)
            sums[0] -= (p * log_q).sum()
            sums[2] += (log_q.argmax(-1) == labels.best[part]).sum()
            q = log_q.exp_()
            sums[1] += torch.minimum(p, q).sum()
            # d(-sum min(p, q)) / dq is -1 where q is the smaller; softmax takes it to the logits.
            lacking = torch.where(q < p, q, 0.0)
            share = lacking.sum(-1, keepdim=True)
            d_logits = q * (mass[:, None] + acceptance_weight * share)
            d_logits -= p
            d_logits -= acceptance_weight * lacking
            grad[part] = torch.matmul(d_logits.to(dtype), matrix).to(grad.dtype)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(sums)
        return sums[0] + acceptance_weight * (len(outputs) - sums[1]), sums

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None, None, None
