"""All rows' token lists (biases, allowed ids, bad words, stops) on the device. Knows no logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from octavo.sampling.token_lists import NO_LISTS, TokenLists, pack
from octavo.worker.gpu.buffers import padded
from octavo.worker.gpu.runtime import Event, Runtime

_NUM_STAGES = 3  # the step being prepared, and two whose copies may not have run
_FIRST_WORDS = 1 << 14


@dataclass(slots=True)
class _Stage:
    words: Tensor  # pinned
    copied: Event


class LogitLists:
    """The lists of N rows, packed into one tensor, sent again only after one of them changed.

    Lists may have any length: the tensor grows to what live requests hold at a time, and then has
    another address, so nothing captured may read it. A request is kept to bounds by the front
    end: a bias, an allowed id and a stop for each token of the vocabulary at most, and 128 bad
    words.
    """

    def __init__(self, *, num_rows: int, runtime: Runtime) -> None:
        self._runtime = runtime
        self._rows = [NO_LISTS] * num_rows
        self._has_changed = True
        self._device_words = _ints_on(runtime.device, _FIRST_WORDS)
        self._stages = [
            _Stage(runtime.host_tensor(_FIRST_WORDS, torch.int32), runtime.event())
            for _ in range(_NUM_STAGES)
        ]
        self._next = 0
        self._columns: Mapping[str, Tensor] = {}

    def set(self, row: int, lists: TokenLists) -> None:
        """Takes over a row's lists, for launches after the next `columns`."""
        if lists is not self._rows[row]:
            self._rows[row] = lists
            self._has_changed = True

    def columns(self) -> Mapping[str, Tensor]:
        """The list columns of `LogitParams`, as launches after this call will find them."""
        if self._has_changed:
            self._columns = self._send()
            self._has_changed = False
        return self._columns

    def _send(self) -> Mapping[str, Tensor]:
        packed = pack(self._rows)
        # An empty list keeps a word, as its tensor must have an address.
        sizes = {name: padded(max(len(values), 1)) for name, values in packed.items()}
        total = sum(sizes.values())
        stage = self._stage(total)
        if self._device_words.shape[0] < total:
            self._device_words = _ints_on(self._runtime.device, _grown(total))
        staged, columns, start = stage.words.numpy(), {}, 0
        for name, values in packed.items():
            end = start + sizes[name]
            staged[start : start + len(values)] = values.view(np.int32)
            words = self._device_words[start:end]
            columns[name] = words.view(torch.float32) if name == "bias_values" else words
            start = end
        self._device_words[:total].copy_(stage.words[:total], non_blocking=True)
        stage.copied.record()
        for name in ("bias_starts", "allowed_starts", "bad_starts", "stop_starts"):
            columns[name] = columns[name][: len(packed[name])]
        return columns

    def _stage(self, num_words: int) -> _Stage:
        """A stage of at least so many words, whose last copy has run."""
        stage = self._stages[self._next]
        self._next = (self._next + 1) % _NUM_STAGES
        stage.copied.wait()
        if stage.words.shape[0] < num_words:
            stage.words = self._runtime.host_tensor(_grown(num_words), torch.int32)
        return stage


def _ints_on(device: torch.device, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)


def _grown(num_words: int) -> int:
    return 1 << (num_words - 1).bit_length()
