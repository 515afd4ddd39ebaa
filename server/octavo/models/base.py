"""What the worker may ask of a model. Knows tensors; knows no request, file or schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from octavo.attention.base import AttentionBackend, AttentionMetadata, KVCacheSpec, KVLayer
from octavo.checkpoint import ModelSpec
from octavo.layers.slot import WeightSlot
from octavo.platforms.base import Platform


@dataclass(frozen=True, slots=True, kw_only=True)
class Taps:
    """Hidden states that a forward pass also leaves behind, for whoever drafts or learns from them.

    Of token t what goes into layer ``layers[j]`` is ``out[t, j * D : (j + 1) * D]``. Layers count
    as `eagle_aux_hidden_state_layer_ids` do: 0 is the embedding, the number of layers is the last
    one's output before the final norm.
    """

    layers: tuple[int, ...]  # rising
    out: Tensor  # [at least T, len(layers) * D] float32


class Pass(Protocol):
    """What can be run over a batch again and again, and recorded: a model, or a part of one."""

    def forward(
        self, token_ids: Tensor, attn: AttentionMetadata, kv_caches: Sequence[KVLayer]
    ) -> Tensor:
        """[T] -> [T, D] rows."""

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[S, D] rows -> [S, V] float32."""


class TappedPass:
    """A model's forward pass that leaves taps behind each time."""

    def __init__(self, model: Model, taps: Taps) -> None:
        self._model, self._taps = model, taps
        self.compute_logits = model.compute_logits

    def forward(
        self, token_ids: Tensor, attn: AttentionMetadata, kv_caches: Sequence[KVLayer]
    ) -> Tensor:
        return self._model.forward(token_ids, attn, kv_caches, taps=self._taps)


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
        taps: Taps | None = None,
    ) -> Tensor:
        """[T] int32 or int64 -> [T, D] activations after the final norm, into out if given.
        Writes this step's K/V, and the taps."""

    def compute_logits(self, hidden: Tensor, *, out: Tensor | None = None) -> Tensor:
        """[S, D] activations -> [S, V] float32, into out if given."""

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] int32 or int64 -> [T, D] token vectors, as the first layer gets them."""

    def head_rows(self, token_ids: Tensor) -> Tensor:
        """[S] int32 or int64 -> [S, D]: the rows that hidden rows are multiplied with for logits
        of these tokens."""

    def norms(self) -> Sequence[Tensor]:
        """The weights of all norms of hidden rows, [D] each, by depth."""

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
