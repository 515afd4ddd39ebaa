"""What the worker may ask of a model. Knows tensors; knows no request, file or schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from octavo.attention.base import AttentionBackend, AttentionMetadata, KVCacheSpec, KVLayer
from octavo.checkpoint import ModelSpec
from octavo.layers.slot import WeightSlot
from octavo.platforms.base import Platform


class Model(Protocol):
    """A decoder: packed tokens in, hidden rows and logits out. Every row's bits depend on its own
    request alone."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def platform(self) -> Platform: ...

    @property
    def backend(self) -> AttentionBackend:
        """The platform's attention."""

    @property
    def weight_bytes(self) -> int:
        """Memory of all that a model keeps: weights, biases, norms, rotary tables."""

    def forward(
        self,
        token_ids: Tensor,
        attn: AttentionMetadata,
        kv_caches: Sequence[KVLayer],
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """[T] int32 or int64 -> [T, D] activations after the final norm, into out if given.
        Writes this step's K/V."""

    def compute_logits(self, hidden: Tensor, *, out: Tensor | None = None) -> Tensor:
        """[S, D] activations -> [S, V] float32, into out if given."""

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
