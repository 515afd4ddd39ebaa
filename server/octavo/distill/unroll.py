"""Drafting several tokens in a row, at all places of texts at once. Knows the head, no loss.

While it serves, a head sees the target's hidden states up to the last accepted token and its own
outputs after that. Training on that (EAGLE-3's "training-time test"): depth 0 runs on the
target's states; depth j at place p on the head's output of depth j - 1 at place p - 1. It sees the
keys of depth 0 up to place p - j, and of each depth i in between the one at place p - j + i: the
chain that led to it.

A parallel head sees, in place of tokens that are not known and of its own outputs, the same at
every place: its chains hang together by their keys alone.

A draft matters only where all before it were right, as serving drafts no further than that: the
caller says after each depth which chains go on.

Layout of a batch of texts: C places of context, then R of the answer ([B, C + R]); the context is
padded on the left, the answer on the right. Drafts begin in the answer alone.
"""

from __future__ import annotations

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
    is_answer: Tensor  # [B, R] bool, False where padded: M places in all
    unknown: Tensor | None = None  # [H] the vector of a parallel head's token for unknown ones


class Chains:
    """The chains of drafts that begin at each of the M places of the answers.

    ``at``: [m] of those that go on, the number in 0 .. M - 1 of the place they have come to.
    """

    def __init__(self, head: DraftHead, batch: Features) -> None:
        self._head, self._batch = head, batch
        num_context, answer = batch.num_context, batch.is_answer
        self._text, column = answer.nonzero().T
        self._place = column + num_context
        self._is_last = torch.ones(len(column), dtype=torch.bool, device=column.device)
        self._is_last[:-1] = self._text[1:] != self._text[:-1]
        self.at = torch.arange(len(column), device=column.device)
        places = torch.arange(batch.taps.shape[1], device=column.device)
        feature = head.dropout(head.fc(batch.taps))
        x = head.inputs(batch.embedded, feature)
        self._keys, self._values = head.keys_values(x, places=places)
        self._chain: list[tuple[Tensor, Tensor]] = []
        q = head.queries(x[:, num_context:], places=places[num_context:])
        context = self._first_attention(q, places)
        self._feature = head.finish(context[answer], feature[:, num_context:][answer])

    @property
    def outputs(self) -> Tensor:
        """[m, H] after the head's norm, at the places of ``at``."""
        found: Tensor = self._head.norm(self._feature)
        return found

    def go_on(self, kept: Tensor) -> None:
        """Drafts one token more on the chains of ``kept``, [m] bool, that have a place left."""
        head = self._head
        kept = kept & ~self._is_last[self.at]
        self._chain = [(k[kept], v[kept]) for k, v in self._chain]
        self.at = self.at[kept] + 1
        text, place = self._text[self.at], self._place[self.at]
        if head.mask_hidden is None:
            embedded, feature = self._batch.embedded[text, place], self._feature[kept]
        else:
            assert self._batch.unknown is not None
            embedded = self._batch.unknown.expand(len(place), -1)
            feature = head.dropout(head.fc(head.mask_hidden)).expand(len(place), -1)
        # One text of m places, as far as the head can tell.
        x = head.inputs(embedded, feature)[None]
        k, v = head.keys_values(x, places=place)
        self._chain.append((k[0].transpose(0, 1), v[0].transpose(0, 1)))
        q = head.queries(x, places=place)[0].transpose(0, 1)
        self._feature = head.finish(self._chained_attention(q, text, place), feature)

    def _first_attention(self, q: Tensor, places: Tensor) -> Tensor:
        """[B, N, R, h] over the keys [B, K, C + R, h] -> [B, R, N, h]."""
        batch = self._batch
        seen = self._visible(places[batch.num_context :], places, distance=0)
        # A padded place sees itself: over no key at all attention is not a number.
        own = places[batch.num_context :, None] == places[None, :]
        mask = (seen & batch.is_text[:, None, :] | own)[:, None]
        group = q.shape[1] // self._keys.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (self._keys, self._values))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    def _visible(self, at: Tensor, places: Tensor, *, distance: int) -> Tensor:
        """[m, C + R] bool: which keys of depth 0 a chain of this length at places [m] sees."""
        window = self._head.config.window
        apart = at[:, None] - places[None, :]
        seen = apart >= distance
        return seen & (apart < window) if window else seen

    def _chained_attention(self, q: Tensor, text: Tensor, place: Tensor) -> Tensor:
        """Queries [m, N, h] over depth 0's keys of their texts and their own chains, as q."""
        size, num_kv = q.shape[-1], self._keys.shape[1]
        q = q.view(len(q), num_kv, q.shape[1] // num_kv, size) * size**-0.5  # [m, K, G, h]
        own = [(q * k[:, :, None]).sum(-1) for k, _ in self._chain]
        linked = torch.stack(own, dim=-1).float()  # [m, K, G, j]
        counts = torch.bincount(text, minlength=len(self._keys)).tolist()
        places = torch.arange(self._keys.shape[2], device=q.device)
        parts = []
        for row, (some, ends, links) in enumerate(
            zip(*(torch.split(x, counts) for x in (q, place, linked)), strict=True)
        ):
            seen = self._visible(ends, places, distance=len(self._chain))
            seen = seen & self._batch.is_text[row]
            scores = torch.einsum("mkgh,kth->mkgt", some, self._keys[row]).float()
            scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
            parts.append(torch.cat([scores, links], dim=-1).softmax(-1))
        weights = torch.cat(parts).to(q.dtype)
        num_keys = len(places)
        context = torch.cat(
            [
                torch.einsum("mkgt,kth->mkgh", part[..., :num_keys], self._values[row])
                for row, part in enumerate(torch.split(weights, counts))
            ]
        )
        for i, (_, v) in enumerate(self._chain):
            context = context + weights[..., num_keys + i, None] * v[:, :, None]
        return context.flatten(1, 2)
