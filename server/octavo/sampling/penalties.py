"""Keeps the parameters that change logits, per row of the request table. Knows no logits.

A row's lists are packed behind one another only when a row with such lists comes or goes, so a
step with unchanged requests does no work here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.types import SamplingParams
from octavo_kernels.sampling import LogitParams

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class _Lists:
    """One row's token lists; arrays, as packing a few long ones must not hold up a step."""

    bias_ids: Ints
    bias_values: npt.NDArray[np.float32]
    allowed: Ints
    word_sizes: Ints  # of each bad word, in tokens
    bad_ids: Ints
    stop: Ints  # not to be drawn while the output is too short

    @classmethod
    def of(cls, params: SamplingParams) -> _Lists:
        """Of a request; `_NO_LISTS` itself if it has none."""
        words = [word for word in params.bad_words_token_ids if word]
        stop = (*params.eos_token_ids, *params.stop_token_ids) if params.min_tokens else ()
        if not (params.logit_bias or params.allowed_token_ids or words or stop):
            return _NO_LISTS
        return cls(
            bias_ids=_ints(token for token, _ in params.logit_bias),
            bias_values=np.fromiter((bias for _, bias in params.logit_bias), np.float32),
            allowed=_ints(params.allowed_token_ids or ()),
            word_sizes=_ints(map(len, words)),
            bad_ids=_ints(chain.from_iterable(words)),
            stop=_ints(stop),
        )


def _ints(values: Iterable[int]) -> Ints:
    return np.fromiter(values, np.int32)


_NO_LISTS = _Lists(
    bias_ids=_ints(()),
    bias_values=np.zeros(0, np.float32),
    allowed=_ints(()),
    word_sizes=_ints(()),
    bad_ids=_ints(()),
    stop=_ints(()),
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
        self._lists = [_NO_LISTS] * num_rows
        self._packed: LogitParams | None = None

    def set(self, row: int, params: SamplingParams) -> None:
        """Takes over the parameters of the request that now owns ``row``."""
        self._repetition[row] = params.repetition_penalty
        self._frequency[row] = params.frequency_penalty
        self._presence[row] = params.presence_penalty
        self._min_tokens[row] = params.min_tokens
        lists = _Lists.of(params)
        has_penalty = (
            params.repetition_penalty != 1.0
            or params.frequency_penalty != 0.0
            or params.presence_penalty != 0.0
        )
        self.is_active[row] = has_penalty or lists is not _NO_LISTS
        self._set_lists(row, lists)

    def clear(self, row: int) -> None:
        """Forgets the row's request."""
        self.is_active[row] = False
        self._set_lists(row, _NO_LISTS)

    def _set_lists(self, row: int, lists: _Lists) -> None:
        if lists is not self._lists[row]:
            self._lists[row] = lists
            self._packed = None

    def packed(self) -> LogitParams:
        """All rows' parameters as the kernel reads them."""
        if self._packed is None:
            word_sizes = [lists.word_sizes for lists in self._lists]
            self._packed = LogitParams(
                token_ids=self._token_ids,
                num_prompt_tokens=self._num_prompt_tokens,
                num_tokens=self._num_tokens,
                repetition_penalty=torch.from_numpy(self._repetition),
                frequency_penalty=torch.from_numpy(self._frequency),
                presence_penalty=torch.from_numpy(self._presence),
                min_tokens=torch.from_numpy(self._min_tokens),
                bias_starts=self._starts("bias_ids"),
                bias_ids=self._joined("bias_ids"),
                bias_values=self._joined("bias_values"),
                allowed_starts=self._starts("allowed"),
                allowed_ids=self._joined("allowed"),
                bad_starts=self._starts("word_sizes"),
                word_starts=_running_sums(np.concatenate(word_sizes)),
                bad_ids=self._joined("bad_ids"),
                stop_starts=self._starts("stop"),
                stop_ids=self._joined("stop"),
            )
        return self._packed

    def _starts(self, name: str) -> Tensor:
        return _running_sums(np.array([len(getattr(lists, name)) for lists in self._lists]))

    def _joined(self, name: str) -> Tensor:
        parts: list[npt.NDArray[Any]] = [getattr(lists, name) for lists in self._lists]
        return torch.from_numpy(np.concatenate(parts))


def _running_sums(sizes: npt.NDArray[Any]) -> Tensor:
    sums = np.zeros(len(sizes) + 1, np.int32)
    np.cumsum(sizes, out=sums[1:])
    return torch.from_numpy(sums)
