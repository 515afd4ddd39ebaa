"""Draws drafts from logits just as the target's tokens will be drawn. Knows no model.

A request's token at a position is drawn with a random key of that position. With the same key on
logits that are nearly the target's, what drafts draws the same token far more often than two
independent draws would agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from octavo.sampling import Sampler
from octavo.worker.drafting.base import Guesses, Job
from octavo.worker.drafting.places import MAX_JOBS
from octavo.worker.request_table import RequestTable
from octavo.worker.sampling_rows import sampling_batch
from octavo_kernels.likeliest import likeliest


class Drawer:
    """Draws with requests' own parameters and keys.

    ``token_ids`` [V']: the tokens that columns of logits stand for; None: each for itself.
    """

    def __init__(
        self, table: RequestTable, *, vocab_size: int, token_ids: Tensor | None = None
    ) -> None:
        self._table = table
        self._sampler = Sampler(vocab_size)
        is_whole = token_ids is None or len(token_ids) == vocab_size
        self._token_ids = None if is_whole else token_ids
        self._ids = None if self._token_ids is None else self._token_ids.numpy()
        self._places = torch.zeros(MAX_JOBS, dtype=torch.int32)
        self._probs = torch.zeros(MAX_JOBS)
        self._all = torch.empty(0 if is_whole else MAX_JOBS, vocab_size)

    def draw(self, guesses: Guesses, jobs: Sequence[Job]) -> list[bool]:
        """Appends to each job the draft that its row of logits gives, with the chance that they
        give it. Whether there was one. Changes the logits."""
        table = self._table
        rows = np.asarray([job.row for job in jobs], np.int64)
        depths = np.asarray([len(job.drafts) for job in jobs], np.int32)
        temperature = table.temperature[rows]
        if not temperature.any() and not table.logit_params.is_active[rows].any():
            return _take(*(guesses.best or self._best(guesses.logits)), jobs)
        logits = guesses.logits
        scale = np.where(temperature > 0, temperature, 1.0).astype(np.float32)
        totals = torch.logsumexp(logits / torch.from_numpy(scale)[:, None], dim=1).tolist()
        scores = self._spread(logits)
        raw = scores.clone() if table.logit_params.is_active[rows].any() else scores
        batch = sampling_batch(
            table, rows, depths=depths, has_drafts=bool(depths.any()), has_logprobs=False
        )
        if batch.params is not None:
            table.write_drafts({job.request_id: job.drafts for job in jobs})
        found = self._sampler.sample(scores, batch)
        has_one = []
        for index, (job, token) in enumerate(zip(jobs, found.token_ids, strict=True)):
            has_one.append(index not in found.errors)
            if has_one[-1]:
                score = float(raw[index, token]) / float(scale[index])
                job.drafts.append(token)
                job.probs.append(min(float(np.exp(score - totals[index])), 1.0))
        return has_one

    def _best(self, logits: Tensor) -> tuple[list[int], list[float]]:
        count = len(logits)
        places, probs = likeliest(logits, places=self._places[:count], probs=self._probs[:count])
        tokens = places.numpy() if self._ids is None else self._ids[places.numpy()]
        return tokens.tolist(), probs.tolist()

    def _spread(self, logits: Tensor) -> Tensor:
        """Logits of all tokens [S, V]."""
        if self._token_ids is None:
            return logits
        found = self._all[: len(logits)].fill_(-torch.inf)
        found[:, self._token_ids] = logits
        return found


def _take(tokens: Sequence[int], probs: Sequence[float], jobs: Sequence[Job]) -> list[bool]:
    has_one = []
    for job, token, prob in zip(jobs, tokens, probs, strict=True):
        has_one.append(prob == prob)  # else a logit is not finite
        if has_one[-1]:
            job.drafts.append(token)
            job.probs.append(prob)
    return has_one
