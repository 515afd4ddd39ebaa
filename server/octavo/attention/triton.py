"""Attention on GPUs: ties the Triton kernels together. Knows the kernels' layouts, no model."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from octavo.attention.base import AttentionLayer, AttentionMetadata, KVCacheSpec, KVLayer
from octavo_kernels.block_copy.gpu import block_copy
from octavo_kernels.paged_attention.gpu import (
    AttentionPlan,
    kv_cache_shape,
    make_plan,
    paged_attention,
)
from octavo_kernels.paged_attention.shared_prefix import (
    PrefixGroups,
    attend_shared_prefix,
    group_prefixes,
)
from octavo_kernels.rotary_kv_write.gpu import rotary_kv_write


@dataclass(frozen=True, slots=True)
class _Plan:
    """How a batch is divided, and what of it is done for several requests at once."""

    division: AttentionPlan
    groups: PrefixGroups | None


@dataclass(slots=True, kw_only=True)
class _Pass:
    """One run of a batch through the layers, and the plans its layers share."""

    attn: weakref.ref[AttentionMetadata]
    plans: dict[tuple[object, ...], _Plan] = field(default_factory=dict)
    served: set[int] = field(default_factory=set)  # addresses of the caches seen


class TritonAttention:
    """`AttentionBackend` of CUDA devices. A token's bits depend on its own request's tokens alone.

    Nothing is read back from the device. Layers of one pass share their plan, made by the first of
    them: a pass ends when its metadata is gone, when other comes, or a layer's cache a second time.
    So a CUDA graph captures its own plan even if the same metadata ran before, and no plan lies in
    the way when the next step takes its memory.

    use_pdl: kernels that can start while their predecessors still run, where the GPU can.
    """

    def __init__(self, device: torch.device | str = "cuda", *, use_pdl: bool = False) -> None:
        self._device = torch.device(device)
        self._use_pdl = use_pdl
        self._pass: _Pass | None = None

    def allocate(self, spec: KVCacheSpec, *, num_blocks: int) -> list[KVLayer]:
        shape = _shape(spec, num_blocks=num_blocks)

        def cache() -> Tensor:
            return torch.empty(shape, dtype=spec.dtype, device=self._device)

        return [KVLayer(cache(), cache()) for _ in range(spec.num_layers)]

    def block_bytes(self, spec: KVCacheSpec) -> int:
        elements = 2 * torch.Size(_shape(spec, num_blocks=1)).numel()
        return spec.num_layers * elements * spec.dtype.itemsize

    def forward(
        self, qkv_TC: Tensor, *, layer: AttentionLayer, attn: AttentionMetadata, kv: KVLayer
    ) -> Tensor:
        q_TNH = rotary_kv_write(
            qkv_TC,
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            positions=attn.positions,
            cos=layer.cos,
            sin=layer.sin,
            slots=attn.slots,
            k_cache=kv.k,
            v_cache=kv.v,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=layer.eps,
            use_pdl=self._use_pdl,
        )
        plan = self._plan(layer, attn, kv)
        if plan.groups is not None:
            attend_shared_prefix(
                q_TNH,
                kv.k,
                kv.v,
                plan=plan.division,
                groups=plan.groups,
                block_tables=attn.block_tables,
                scale=layer.scale,
            )
        return paged_attention(
            q_TNH,
            kv.k,
            kv.v,
            block_tables=attn.block_tables,
            query_start_loc=attn.query_start_loc,
            seq_lens=attn.seq_lens,
            scale=layer.scale,
            sliding_window=layer.sliding_window,
            plan=plan.division,
        )

    def copy_blocks(self, kv_caches: Sequence[KVLayer], *, src: Tensor, dst: Tensor) -> None:
        """As the protocol; in no order, so a block written is not a later source."""
        block_copy([cache for kv in kv_caches for cache in kv], src=src, dst=dst)

    def _plan(self, layer: AttentionLayer, attn: AttentionMetadata, kv: KVLayer) -> _Plan:
        address = kv.k.data_ptr()
        if self._pass is None or self._pass.attn() is not attn or address in self._pass.served:
            self._pass = None  # its memory may serve the next one
            self._pass = _Pass(attn=weakref.ref(attn, self._end_pass))
        self._pass.served.add(address)
        sizes = (layer.num_heads, layer.num_kv_heads, layer.head_dim)
        key = (*sizes, layer.sliding_window, kv.k.dtype, kv.k.shape[2])
        if key not in self._pass.plans:
            self._pass.plans[key] = _make_plan(layer, attn, kv)
        return self._pass.plans[key]

    def _end_pass(self, attn: weakref.ref[AttentionMetadata]) -> None:
        if self._pass is not None and self._pass.attn is attn:
            self._pass = None


def _make_plan(layer: AttentionLayer, attn: AttentionMetadata, kv: KVLayer) -> _Plan:
    num_tokens, prefixes = attn.positions.shape[0], attn.prefixes
    division = make_plan(
        attn.query_start_loc,
        attn.seq_lens,
        num_tokens=num_tokens,
        max_query_len=attn.max_query_len or num_tokens,
        max_seq_len=attn.block_tables.shape[1] * kv.k.shape[2],
        num_heads=layer.num_heads,
        num_kv_heads=layer.num_kv_heads,
        head_dim=layer.head_dim,
        cache_dtype=kv.k.dtype,
        sliding_window=layer.sliding_window,
        shared_partitions=None if prefixes is None else prefixes.request_partitions,
    )
    if prefixes is None:
        return _Plan(division, None)
    groups = group_prefixes(
        division,
        group_start_loc=prefixes.group_start_loc,
        members=prefixes.members,
        group_partitions=prefixes.group_partitions,
        max_partitions=prefixes.max_partitions,
        max_query_len=1,
    )
    return _Plan(division, groups)


def _shape(spec: KVCacheSpec, *, num_blocks: int) -> tuple[int, int, int, int]:
    return kv_cache_shape(
        num_blocks,
        block_size=spec.block_size,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
    )
