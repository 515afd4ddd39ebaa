"""Log-probabilities found on a GPU, brought to the host without a wait. Knows rows of logits, not
whose they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.models.base import Model
from octavo.sampling.logprobs import token_logprobs
from octavo.types import TokenLogprobs
from octavo.worker.gpu.landing import Landings
from octavo.worker.gpu.runtime import Runtime
from octavo_kernels.sampling import TopLogprobs
from octavo_kernels.sampling.gpu import topn_logprobs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PendingScores:
    """Scores of S rows on their way to the host, to be read once."""

    words: Tensor  # of the host; the first ones are the scores'
    num_best: Sequence[int]  # likeliest tokens that each row is to have; more may be there
    num_listed: int  # likeliest tokens of each row


def launch_scores(
    logits: Tensor, *, chosen: Tensor, num_best: Sequence[int], landings: Landings
) -> PendingScores:
    """Scores of rows [S, V] of logits: of chosen [S] int64 and of num_best[row] tokens each."""
    listed = min(max(num_best), logits.shape[1])
    found = topn_logprobs(logits, chosen=chosen, num_best=listed)
    return _fetch([(chosen, found)], num_best, landings)


def read_scores(pending: PendingScores, landings: Landings) -> list[TokenLogprobs | None]:
    """Each row's scores; None for one that is not finite. The copy has come to its end before."""
    rows, listed = len(pending.num_best), pending.num_listed
    sizes = [rows, rows, rows, rows, rows * listed, rows * listed]
    chosen, ranks, status, logprobs, ids, best = torch.split(pending.words[: sum(sizes)], sizes)
    scores = token_logprobs(
        chosen.tolist(),
        pending.num_best,
        logprobs=logprobs.view(torch.float32).tolist(),
        ranks=ranks.tolist(),
        top_ids=ids.view(rows, listed).tolist(),
        top_logprobs=best.view(torch.float32).view(rows, listed).tolist(),
        status=status.tolist(),
    )
    landings.give_back(pending.words)
    return scores


class PromptScorer:
    """Scores prompts' tokens by the hidden rows before them.

    token_table: [N, L] int32, the arena's. logits: [G, V] float32 to work in, so many rows at a
    time; nobody may need what is in them.
    """

    def __init__(self, token_table: Tensor, *, logits: Tensor, runtime: Runtime) -> None:
        self._token_table = token_table
        self._logits = logits
        self._landings = Landings(runtime)

    def launch(
        self, model: Model, hidden: Tensor, *, row: int, start: int, num_best: int
    ) -> PendingScores:
        """Scores tokens [start, start + S) of a row, each following the token of its hidden row
        [S, D]."""
        vocab_size = self._logits.shape[1]
        num_rows = hidden.shape[0]
        chosen = self._token_table[row, start : start + num_rows]
        parts = []
        for first in range(0, num_rows, self._logits.shape[0]):
            group = hidden[first : first + self._logits.shape[0]]
            logits = self._logits[: group.shape[0]]
            model.compute_logits(group, out=logits)
            # A copy of the group's own: kernels want addresses to be multiples of 16.
            tokens = chosen[first : first + group.shape[0]].to(torch.int64)
            listed = min(num_best, vocab_size)
            parts.append((tokens, topn_logprobs(logits, chosen=tokens, num_best=listed)))
        return _fetch(parts, [num_best] * num_rows, self._landings)

    def read(self, pending: PendingScores) -> list[TokenLogprobs | None]:
        """One for each token; None where the logits were not finite."""
        return read_scores(pending, self._landings)


def _fetch(
    parts: Sequence[tuple[Tensor, TopLogprobs]], num_best: Sequence[int], landings: Landings
) -> PendingScores:
    """One copy for all: every field of all parts, then the next field."""
    fields = [
        [chosen.to(torch.int32) for chosen, _ in parts],
        [found.ranks for _, found in parts],
        [found.status for _, found in parts],
        [found.chosen.view(torch.int32) for _, found in parts],
        [found.ids.flatten() for _, found in parts],
        [found.logprobs.view(torch.int32).flatten() for _, found in parts],
    ]
    return PendingScores(
        words=landings.fetch(torch.cat([part for field in fields for part in field])),
        num_best=num_best,
        num_listed=parts[0][1].ids.shape[1],
    )
