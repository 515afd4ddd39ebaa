"""Keeps the parameters that change logits, per row of the request table. Knows no logits.

A row's lists are packed behind one another only when a row with such lists comes or goes, so a
step with unchanged requests does no work here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.types import SamplingParams
from octavo_kernels.sampling import LogitParams

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class _Lists:
    """One row's token lists."""

    bias: tuple[tuple[int, float], ...]
    allowed: tuple[int, ...]
    bad_words: tuple[tuple[int, ...], ...]
    stop: tuple[int, ...]  # not to be drawn while the output is too short


_NO_LISTS = _Lists(bias=(), allowed=(), bad_words=(), stop=())


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
        lists = _Lists(
            bias=params.logit_bias,
            allowed=params.allowed_token_ids or (),
            bad_words=tuple(word for word in params.bad_words_token_ids if word),
            stop=(*params.eos_token_ids, *params.stop_token_ids) if params.min_tokens else (),
        )
        has_penalty = (
            params.repetition_penalty != 1.0
            or params.frequency_penalty != 0.0
            or params.presence_penalty != 0.0
        )
        self.is_active[row] = has_penalty or lists != _NO_LISTS
        self._set_lists(row, lists)

    def clear(self, row: int) -> None:
        """Forgets the row's request."""
        self.is_active[row] = False
        self._set_lists(row, _NO_LISTS)

    def _set_lists(self, row: int, lists: _Lists) -> None:
        if lists != self._lists[row]:
            self._lists[row] = lists
            self._packed = None

    def packed(self) -> LogitParams:
        """All rows' parameters as the kernel reads them."""
        if self._packed is None:
            words = [word for lists in self._lists for word in lists.bad_words]
            self._packed = LogitParams(
                token_ids=self._token_ids,
                num_prompt_tokens=self._num_prompt_tokens,
                num_tokens=self._num_tokens,
                repetition_penalty=torch.from_numpy(self._repetition),
                frequency_penalty=torch.from_numpy(self._frequency),
                presence_penalty=torch.from_numpy(self._presence),
                min_tokens=torch.from_numpy(self._min_tokens),
                bias_starts=self._starts(lambda lists: len(lists.bias)),
                bias_ids=_ints(i for lists in self._lists for i, _ in lists.bias),
                bias_values=_floats(v for lists in self._lists for _, v in lists.bias),
                allowed_starts=self._starts(lambda lists: len(lists.allowed)),
                allowed_ids=_ints(i for lists in self._lists for i in lists.allowed),
                bad_starts=self._starts(lambda lists: len(lists.bad_words)),
                word_starts=_running_sums(len(word) for word in words),
                bad_ids=_ints(i for word in words for i in word),
                stop_starts=self._starts(lambda lists: len(lists.stop)),
                stop_ids=_ints(i for lists in self._lists for i in lists.stop),
            )
        return self._packed

    def _starts(self, size: Callable[[_Lists], int]) -> Tensor:
        return _running_sums(size(lists) for lists in self._lists)


def _running_sums(sizes: Iterable[int]) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *sizes], dtype=np.int32))


def _ints(values: Iterable[int]) -> Tensor:
    return torch.from_numpy(np.fromiter(values, np.int32))


def _floats(values: Iterable[float]) -> Tensor:
    return torch.from_numpy(np.fromiter(values, np.float32))
