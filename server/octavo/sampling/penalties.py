"""Keeps the parameters that change logits, per row of the request table. Knows no logits.

A row's lists are packed behind one another only when a row with such lists comes or goes, so a
step with unchanged requests does no work here.
"""

from __future__ import annotations

import numpy as np
import torch

from octavo.sampling.token_lists import NO_LISTS, Ints, TokenLists, pack
from octavo.types import SamplingParams
from octavo_kernels.sampling import LogitParams


def has_penalty(params: SamplingParams) -> bool:
    """Whether what was seen or drawn before changes the request's logits."""
    return (
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
    )


class LogitParamsTable:
    """Penalties, biases and bans of all rows; ``is_active`` [N] says which rows have any.

    token_ids: [N, L] int32 and num_prompt_tokens, num_tokens: [N] int32 are the request table's
    own arrays, read by the kernel when it runs.
    """

    def __init__(self, token_ids: Ints, *, num_prompt_tokens: Ints, num_tokens: Ints) -> None:
        num_rows = len(token_ids)
        self.is_active = np.zeros(num_rows, np.bool_)
        self._token_ids = torch.from_numpy(token_ids)
        self._num_prompt_tokens = torch.from_numpy(num_prompt_tokens)
        self._num_tokens = torch.from_numpy(num_tokens)
        self._repetition = np.ones(num_rows, np.float32)
        self._frequency = np.zeros(num_rows, np.float32)
        self._presence = np.zeros(num_rows, np.float32)
        self._min_tokens = np.zeros(num_rows, np.int32)
        self._lists = [NO_LISTS] * num_rows
        self._packed: LogitParams | None = None

    def set(self, row: int, params: SamplingParams) -> None:
        """Takes over the parameters of the request that now owns ``row``."""
        self._repetition[row] = params.repetition_penalty
        self._frequency[row] = params.frequency_penalty
        self._presence[row] = params.presence_penalty
        self._min_tokens[row] = params.min_tokens
        lists = TokenLists.of(params)
        self.is_active[row] = has_penalty(params) or lists is not NO_LISTS
        self._set_lists(row, lists)

    def clear(self, row: int) -> None:
        """Forgets the row's request."""
        self.is_active[row] = False
        self._set_lists(row, NO_LISTS)

    def _set_lists(self, row: int, lists: TokenLists) -> None:
        if lists is not self._lists[row]:
            self._lists[row] = lists
            self._packed = None

    def packed(self) -> LogitParams:
        """All rows' parameters as the kernel reads them."""
        if self._packed is None:
            lists = {name: torch.from_numpy(x) for name, x in pack(self._lists).items()}
            self._packed = LogitParams(
                token_ids=self._token_ids,
                num_prompt_tokens=self._num_prompt_tokens,
                num_tokens=self._num_tokens,
                repetition_penalty=torch.from_numpy(self._repetition),
                frequency_penalty=torch.from_numpy(self._frequency),
                presence_penalty=torch.from_numpy(self._presence),
                min_tokens=torch.from_numpy(self._min_tokens),
                **lists,
            )
        return self._packed
