"""Turns logits into `TokenLogprobs`. Knows rows and token ids, not whose they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from octavo.types import TokenLogprobs
from octavo_kernels.sampling import OK, topn_logprobs

# Rows of logits that exist at a time: bounds memory whatever the length of a scored prompt.
ROW_GROUP = 32


def score_rows(
    logits: Tensor, *, chosen: Sequence[int], num_best: Sequence[int]
) -> list[TokenLogprobs | None]:
    """Raw log-probabilities of each row's chosen token and its num_best[row] likeliest tokens.

    logits: [S, V] float32, before any parameter was applied. None for a row that is not finite.
    """
    vocab_size = logits.shape[1]
    widest = min(max(num_best, default=0), vocab_size)
    tokens = torch.tensor(chosen, dtype=torch.int64)
    found = topn_logprobs(logits, chosen=tokens, num_best=widest)
    return token_logprobs(
        chosen,
        num_best,
        logprobs=found.chosen.tolist(),
        ranks=found.ranks.tolist(),
        top_ids=found.ids.tolist(),
        top_logprobs=found.logprobs.tolist(),
        status=found.status.tolist(),
    )


def token_logprobs(
    chosen: Sequence[int],
    num_best: Sequence[int],
    *,
    logprobs: Sequence[float],
    ranks: Sequence[int],
    top_ids: Sequence[Sequence[int]],
    top_logprobs: Sequence[Sequence[float]],
    status: Sequence[int],
) -> list[TokenLogprobs | None]:
    """What `topn_logprobs` found of rows, each with its num_best[row] likeliest tokens at most.

    None for a row whose status is not OK.
    """
    columns = zip(chosen, num_best, logprobs, ranks, top_ids, top_logprobs, status, strict=True)
    new = tuple.__new__  # of every token there is one: half the time of the type's own __new__
    return [
        new(TokenLogprobs, (token, logprob, rank, tuple(zip(ids[:best], scores, strict=False))))
        if code == OK
        else None
        for token, best, logprob, rank, ids, scores, code in columns
    ]


def score_hidden(
    hidden: Tensor,
    *,
    compute_logits: Callable[[Tensor], Tensor],
    chosen: Sequence[int],
    num_best: int,
) -> list[TokenLogprobs | None]:
    """`score_rows` of hidden rows [S, D], whose logits are made ROW_GROUP rows at a time."""
    scores: list[TokenLogprobs | None] = []
    for start in range(0, len(chosen), ROW_GROUP):
        tokens = chosen[start : start + ROW_GROUP]
        logits = compute_logits(hidden[start : start + ROW_GROUP])
        scores += score_rows(logits, chosen=tokens, num_best=[num_best] * len(tokens))
    return scores
