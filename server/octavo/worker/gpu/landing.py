"""Pinned memory for what steps in flight bring back to the host. Knows words, not their meaning."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.worker.gpu.runtime import Runtime

_LEAST = 1 << 10  # words


class Landings:
    """Host tensors of int32 words, lent from a copy's launch until its words have been read.

    There come to be as many as were ever lent at a time; for one thread.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._free: list[Tensor] = []

    def fetch(self, words: Tensor) -> Tensor:
        """Launches the copy of device words [n] to the host: the first n of the tensor returned,
        from when an event recorded after this call has passed, until `give_back`."""
        size = words.shape[0]
        fitting = [place for place, host in enumerate(self._free) if host.shape[0] >= size]
        if fitting:
            place = min(fitting, key=lambda place: self._free[place].shape[0])
            host = self._free.pop(place)
        else:
            capacity = max(_LEAST, 1 << max(size - 1, 0).bit_length())
            host = self._runtime.host_tensor(capacity, torch.int32)
        host[:size].copy_(words, non_blocking=True)
        return host

    def give_back(self, host: Tensor) -> None:
        self._free.append(host)
