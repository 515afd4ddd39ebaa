"""What attention needs to know of a batch and of a layer. Knows shapes; computes nothing."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrefixes:
    """Groups of requests of one new token whose first K/V blocks are the same ones.

    A backend that can reads them once for a group: the same bits. Partitions are the kernels' own,
    each wholly before its members' tokens.
    """

    request_partitions: Tensor  # [R] int32, leading partitions shared, 0 = in no group
    group_start_loc: Tensor  # [G + 1] int32
    members: Tensor  # [M] int32, places in [0, R), a group's side by side
    group_partitions: Tensor  # [G] int32, 0 = an unused place
    max_partitions: int  # the host's bound on group_partitions


class StepPlan(Protocol):
    """What a backend made of a step's metadata, for its layers to share."""

    def check(self) -> None:
        """Raises ValueError for what kernels found wrong with the step's metadata."""


@dataclass(frozen=True, slots=True, weakref_slot=True, kw_only=True)
class AttentionMetadata:
    """Where the tokens of one step stand, and where their requests' K/V lie.

    Requests are packed one after the other: tokens ``[query_start_loc[r], query_start_loc[r + 1])``
    are request ``r``'s newest, the last of them at position ``seq_lens[r] - 1``.
    It describes one step: where its tensors' contents change, the next step has metadata of its
    own, unless all that the layers started is replayed as it was recorded.
    """

    positions: Tensor  # [T] int32
    slots: Tensor  # [T] int32, block * block_size + offset; -1 = keep no K/V
    block_tables: Tensor  # [R, max_blocks] int32
    query_start_loc: Tensor  # [R + 1] int32
    seq_lens: Tensor  # [R] int32, tokens with K/V once this step's are written
    max_query_len: int = 0  # the host's bound on one request's tokens; 0 = all T may be one's
    prefixes: SharedPrefixes | None = None
    # CPU only: [1] int64, the requests that there are, where the tensors have room for more
    num_requests: Tensor | None = None
    plans: dict[Hashable, StepPlan] = field(default_factory=dict, repr=False, compare=False)

    def check(self) -> None:
        """Raises ValueError for what the layers' kernels found wrong, once they have run.

        What they computed is not to be used then. A backend that checks nothing leaves no plan.
        """
        for plan in self.plans.values():
            plan.check()


class KVLayer(NamedTuple):
    """One layer's cached keys and values; their layout is the backend's own."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheSpec:
    """The K/V cache of a model: all its layers share block ids and have equal blocks."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayer:
    """What is fixed about one attention layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int  # position p sees (p - window, p]; 0 = everything
    cos: Tensor  # [P, rotary_dim / 2] float32
    sin: Tensor  # [P, rotary_dim / 2] float32
    eps: float  # of q_norm and k_norm
    q_norm: Tensor | None = None  # [H]: RMS norm of each head before it rotates
    k_norm: Tensor | None = None  # [H]


class AttentionBackend(Protocol):
    """Rotary embedding, cache and attention of one kind of device."""

    def allocate(self, spec: KVCacheSpec, *, num_blocks: int) -> list[KVLayer]:
        """Caches of all layers, not initialised: pages are touched when they are first written.
        Raises `ValueError` for a head or block size the kernels cannot read."""

    def block_bytes(self, spec: KVCacheSpec) -> int:
        """Bytes that one block takes over all layers."""

    def forward(
        self, qkv_TC: Tensor, *, layer: AttentionLayer, attn: AttentionMetadata, kv: KVLayer
    ) -> Tensor:
        """Rotates q and k, writes k and v to their slots, attends: [T, (N + 2K) H] -> [T, N H].

        ``qkv_TC`` is scratch afterwards.
        """

    def copy_blocks(self, kv_caches: Sequence[KVLayer], *, src: Tensor, dst: Tensor) -> None:
        """Copies whole blocks ``src[i]`` to ``dst[i]`` (int32 or int64) in every layer."""
