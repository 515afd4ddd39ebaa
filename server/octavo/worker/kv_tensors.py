"""The memory of the K/V cache. Knows blocks and layers; which request owns a block it does not."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from octavo.attention.base import AttentionBackend, KVCacheSpec, KVLayer
from octavo.types import BlockCopy


class KVTensors:
    """One cache per layer, all with the same block ids.

    Memory is reserved, not filled: the system gives a page when a block is first written. Slots
    that were never written hold anything; attention reads [0, seq_len) of a request alone.
    """

    def __init__(self, backend: AttentionBackend, spec: KVCacheSpec, *, num_blocks: int) -> None:
        self._backend = backend
        self.layers: list[KVLayer] = backend.allocate(spec, num_blocks=num_blocks)

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copies whole blocks in every layer; no block is both source and destination."""
        if copies:
            src = torch.tensor([copy.src for copy in copies], dtype=torch.int32)
            dst = torch.tensor([copy.dst for copy in copies], dtype=torch.int32)
            self._backend.copy_blocks(self.layers, src=src, dst=dst)
