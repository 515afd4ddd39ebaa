"""What the sampling ops compute, in plain torch and numpy. Knows nothing of tiles or keys."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def philox_reference(counter: Sequence[int], key: Sequence[int]) -> tuple[int, ...]:
    """Philox4x32-10 of four counter words and two key words (Salmon et al., SC 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (p1 >> 32) ^ c[1] ^ k[0],
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ c[3] ^ k[1],
            p0 & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return tuple(c)


def draws_reference(vocab_size: int, *, seed: int, position: int) -> Tensor:
    """[V] float64 exponential draws of every token at a position."""
    low, high = position & 0xFFFFFFFF, position >> 32
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    words = [
        philox_reference((256 * (t >> 10) + (t & 255), 0, low, high), key)[(t >> 8) & 3]
        for t in range(vocab_size)
    ]
    return torch.from_numpy(-np.log((np.array(words, np.float64) + 0.5) / 2.0**32))


def filtered_probs_reference(
    logits: Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """[V] float64 probabilities after temperature, min_p, top_k, top_p; ties stay together."""
    z = (logits.double() - logits.double().max()) / temperature
    stays = z.exp() >= min_p
    if 0 < top_k < len(z):
        kept = torch.where(stays, z, -torch.inf)
        stays &= z >= kept.topk(top_k).values[-1]
    probs = torch.where(stays, z, -torch.inf).softmax(0)
    if top_p < 1.0:
        values, order = z.sort(descending=True)
        reached = probs[order].cumsum(0) >= top_p
        threshold = values[int(reached.int().argmax())] if bool(reached.any()) else values[-1]
        probs = torch.where(z >= threshold, probs, 0.0)
    return probs / probs.sum()


def sample_reference(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """[S] int64 tokens: the least exponential draw divided by probability wins."""
    tokens = []
    for row in range(len(logits)):
        x = logits[row].double()
        if temperature[row] == 0:
            tokens.append(int(x.argmax()))
            continue
        probs = filtered_probs_reference(
            x,
            temperature=float(temperature[row]),
            top_k=int(top_k[row]),
            top_p=float(top_p[row]),
            min_p=float(min_p[row]),
        )
        draws = draws_reference(len(x), seed=int(seeds[row]), position=int(positions[row]))
        tokens.append(int((probs / draws).argmax()))
    return torch.tensor(tokens, dtype=torch.int64)


def topn_logprobs_reference(
    logits: Tensor, *, chosen: Tensor, num_best: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(chosen logprobs [S], ranks [S], best ids [S, n], best logprobs [S, n])."""
    logprobs = logits.double().log_softmax(1)
    mine = logprobs.gather(1, chosen[:, None])
    ranks = 1 + (logits > logits.gather(1, chosen[:, None])).sum(1)
    order = logits.sort(dim=1, descending=True, stable=True).indices[:, :num_best]
    return mine[:, 0], ranks.int(), order.int(), logprobs.gather(1, order)
