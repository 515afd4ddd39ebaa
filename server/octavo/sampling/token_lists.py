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
    places = [row for row, lists in enumerate(rows) if lists is not NO_LISTS]
    held = [NO_LISTS, *(rows[place] for place in places)]  # the empty one gives the types

    def column(name: str) -> tuple[Ints, npt.NDArray[Any]]:
        """Where each row's part starts, and all parts."""
        parts = [getattr(lists, name) for lists in held]
        lengths = [len(part) for part in parts[1:]]
        sizes = np.zeros(len(rows), np.int32)
        sizes[places] = lengths
        return _running_sums(sizes), np.concatenate(parts) if any(lengths) else parts[0]

    bias_starts, bias_ids = column("bias_ids")
    allowed_starts, allowed_ids = column("allowed")
    bad_starts, word_sizes = column("word_sizes")
    stop_starts, stop_ids = column("stop")
    return {
        "bias_starts": bias_starts,
        "bias_ids": bias_ids,
        "bias_values": column("bias_values")[1],
        "allowed_starts": allowed_starts,
        "allowed_ids": allowed_ids,
        "bad_starts": bad_starts,
        "word_starts": _running_sums(word_sizes),
        "bad_ids": column("bad_ids")[1],
        "stop_starts": stop_starts,
        "stop_ids": stop_ids,
    }


def _running_sums(sizes: Ints) -> Ints:
    sums = np.zeros(len(sizes) + 1, np.int32)
    np.cumsum(sizes, out=sums[1:])
    return sums
