"""Draws the next token of each row of logits. Knows rows and parameters, not requests' ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.sampling.logprobs import score_rows
from octavo.types import TokenLogprobs
from octavo_kernels import sampling as ops
from octavo_kernels.sampling import LogitParams, SamplingColumns, Workspace

NON_FINITE_MESSAGE = "the model produced non-finite logits"
STATUS_MESSAGES = {
    ops.NON_FINITE: NON_FINITE_MESSAGE,
    ops.ALL_FORBIDDEN: (
        "no token can be sampled: allowed_token_ids, bad_words, logit_bias and min_tokens "
        "together forbid every token"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingBatch:
    """Parameters of S rows; row s belongs to row ``slots[s]`` of the request table."""

    slots: npt.NDArray[np.int32]
    columns: SamplingColumns  # of all slots
    positions: npt.NDArray[np.int64]  # index of the token to draw in its request
    has_params: npt.NDArray[np.bool_]  # rows that `params` changes
    params: LogitParams | None = None  # None: no row has any
    num_logprobs: Sequence[int | None] = ()  # per row; () = nobody asks
    num_drafts: npt.NDArray[np.int32] | None = None  # [S] behind the slot's tokens; None: no row's


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What S rows yielded. Tokens of rows in ``errors`` mean nothing."""

    token_ids: list[int]
    errors: Mapping[int, str] = field(default_factory=dict)  # row -> what the client is told
    logprobs: Mapping[int, TokenLogprobs] = field(default_factory=dict)  # rows that asked


class Sampler:
    """Row-wise: what one row draws does not depend on the others or on their number."""

    def __init__(self, vocab_size: int) -> None:
        self._workspace = Workspace.create(vocab_size)

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Sampled:
        """Draws one token per row of logits [S, V] float32, which are changed in place.

        Log-probabilities are those of the logits as given.
        """
        asking = [row for row, n in enumerate(batch.num_logprobs) if n is not None]
        raw = logits
        if batch.params is not None:
            listed = np.flatnonzero(batch.has_params)
            if asking:
                raw = logits[asking]  # a copy
            ops.apply_logit_params(
                logits,
                params=batch.params,
                rows=torch.from_numpy(listed.astype(np.int32)),
                slots=torch.from_numpy(batch.slots[listed]),
                num_drafts=(
                    None if batch.num_drafts is None else torch.from_numpy(batch.num_drafts[listed])
                ),
                workspace=self._workspace,
            )
        elif 0 < len(asking) < len(logits):
            raw = logits[asking]
        tokens, status = ops.sample_slots(
            logits,
            columns=batch.columns,
            slots=batch.slots,
            positions=batch.positions,
            workspace=self._workspace,
        )
        token_ids: list[int] = tokens.tolist()
        errors = {row: STATUS_MESSAGES[status[row]] for row in np.flatnonzero(status).tolist()}
        logprobs: dict[int, TokenLogprobs] = {}
        if asking:
            scores = score_rows(
                raw,
                chosen=[max(token_ids[row], 0) for row in asking],
                num_best=[batch.num_logprobs[row] or 0 for row in asking],
            )
            for row, score in zip(asking, scores, strict=True):
                if score is None:
                    errors[row] = NON_FINITE_MESSAGE
                else:
                    logprobs[row] = score
        return Sampled(token_ids=token_ids, errors=errors, logprobs=logprobs)
