"""What the worker may ask of a model. Knows tensors; knows no request, file or schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from octavo.attention.base import AttentionBackend, AttentionMetadata, KVCacheSpec, KVLayer
from octavo.checkpoint import ModelSpec
from octavo.layers.slot import WeightSlot


class Model(Protocol):
    """A decoder: packed tokens in, hidden rows and logits out. Every row's bits depend on its own
    request alone."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def backend(self) -> AttentionBackend: ...

    def forward(
        self, token_ids: Tensor, attn: AttentionMetadata, kv_caches: Sequence[KVLayer]
    ) -> Tensor:
        """[T] int32 or int64 -> [T, D] float32 after the final norm. Writes this step's K/V."""

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[S, D] float32 -> [S, V] float32."""

    def slots(self) -> dict[str, WeightSlot]:
        """Checkpoint tensor name -> where it goes."""

    def set_frequency_factors(self, factors: Tensor) -> None:
        """Divides the rotary frequencies by [rotary_dim / 2] factors that came as a tensor."""


def kv_cache_spec(spec: ModelSpec, *, block_size: int, dtype: torch.dtype) -> KVCacheSpec:
    """The K/V cache that a model of this shape needs."""
    return KVCacheSpec(
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        block_size=block_size,
        dtype=dtype,
    )
