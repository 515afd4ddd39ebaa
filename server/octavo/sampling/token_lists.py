"""The token lists among a request's parameters, and all rows' packed. Knows rows, no logits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.types import SamplingParams

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class TokenLists:
    """One row's token lists; arrays, as packing a few long ones must not hold up a step."""

    bias_ids: Ints  # no token twice
    bias_values: npt.NDArray[np.float32]
    allowed: Ints
    word_sizes: Ints  # of each bad word, in tokens
    bad_ids: Ints
    stop: Ints  # not to be drawn while the output is too short

    @classmethod
    def of(cls, params: SamplingParams) -> TokenLists:
        """Of a request; `NO_LISTS` itself if it has none."""
        words = [word for word in params.bad_words_token_ids if word]
        stop = (*params.eos_token_ids, *params.stop_token_ids) if params.min_tokens else ()
        if not (params.logit_bias or params.allowed_token_ids or words or stop):
            return NO_LISTS
        biases: dict[int, float] = {}
        for token, bias in params.logit_bias:
            biases[token] = biases.get(token, 0.0) + bias
        return cls(
            bias_ids=_ints(biases),
            bias_values=np.fromiter(biases.values(), np.float32),
            allowed=_ints(params.allowed_token_ids or ()),
            word_sizes=_ints(map(len, words)),
            bad_ids=_ints(chain.from_iterable(words)),
            stop=_ints(stop),
        )


def _ints(values: Iterable[int]) -> Ints:
    return np.fromiter(values, np.int32)


NO_LISTS = TokenLists(
    bias_ids=_ints(()),
    bias_values=np.zeros(0, np.float32),
    allowed=_ints(()),
    word_sizes=_ints(()),
    bad_ids=_ints(()),
    stop=_ints(()),
)


def pack(rows: Sequence[TokenLists]) -> dict[str, npt.NDArray[Any]]:
    """Every row's lists behind one another: the list columns of `octavo_kernels`' LogitParams."""
    held = [(row, lists) for row, lists in enumerate(rows) if lists is not NO_LISTS]

    def starts(name: str) -> Ints:
        sizes = np.zeros(len(rows), np.int32)
        for row, lists in held:
            sizes[row] = len(getattr(lists, name))
        return _running_sums(sizes)

    def joined(name: str) -> npt.NDArray[Any]:
        # The empty one gives the type where no row has a list.
        return np.concatenate([getattr(lists, name) for lists in (NO_LISTS, *(x for _, x in held))])

    return {
        "bias_starts": starts("bias_ids"),
        "bias_ids": joined("bias_ids"),
        "bias_values": joined("bias_values"),
        "allowed_starts": starts("allowed"),
        "allowed_ids": joined("allowed"),
        "bad_starts": starts("word_sizes"),
        "word_starts": _running_sums(joined("word_sizes")),
        "bad_ids": joined("bad_ids"),
        "stop_starts": starts("stop"),
        "stop_ids": joined("stop"),
    }


def _running_sums(sizes: Ints) -> Ints:
    sums = np.zeros(len(sizes) + 1, np.int32)
    np.cumsum(sizes, out=sums[1:])
    return sums
