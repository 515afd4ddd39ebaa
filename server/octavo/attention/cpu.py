"""Attention on CPU: ties the kernels together. Knows the kernels' layouts, no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.attention.base import AttentionLayer, AttentionMetadata, KVCacheSpec, KVLayer
from octavo_kernels.block_copy import block_copy
from octavo_kernels.paged_attention import (
    AttentionPlan,
    kv_cache_shapes,
    paged_attention,
    plan_attention,
)
from octavo_kernels.rotary_kv_write import check_status, rotary_kv_write


@dataclass(frozen=True, slots=True, kw_only=True)
class _LayersPlan:
    """A `StepPlan`: what layers of the same sizes share, and what their checks will need."""

    attention: AttentionPlan
    status: Tensor
    positions: Tensor
    slots: Tensor
    cos: Tensor
    k_cache: Tensor

    def check(self) -> None:
        self.attention.check()
        check_status(
            self.status,
            positions=self.positions,
            slots=self.slots,
            cos=self.cos,
            k_cache=self.k_cache,
        )


class CPUAttention:
    """`AttentionBackend` of the CPU. A token's bits depend on its own request's tokens alone."""

    def allocate(self, spec: KVCacheSpec, *, num_blocks: int) -> list[KVLayer]:
        k_shape, v_shape = _shapes(spec, num_blocks=num_blocks)
        return [
            KVLayer(torch.empty(k_shape, dtype=spec.dtype), torch.empty(v_shape, dtype=spec.dtype))
            for _ in range(spec.num_layers)
        ]

    def block_bytes(self, spec: KVCacheSpec) -> int:
        elements = sum(torch.Size(shape).numel() for shape in _shapes(spec, num_blocks=1))
        return spec.num_layers * elements * spec.dtype.itemsize

    def forward(
        self, qkv_TC: Tensor, *, layer: AttentionLayer, attn: AttentionMetadata, kv: KVLayer
    ) -> Tensor:
        plan = _plan(layer, attn, kv)
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
            status=plan.status,
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
            plan=plan.attention,
        )

    def copy_blocks(self, kv_caches: Sequence[KVLayer], *, src: Tensor, dst: Tensor) -> None:
        block_copy([cache for kv in kv_caches for cache in kv], src=src, dst=dst)


def _plan(layer: AttentionLayer, attn: AttentionMetadata, kv: KVLayer) -> _LayersPlan:
    """The step's plan for layers like this one, made by the first of them."""
    num_blocks, _, _, block_size = kv.k.shape
    sizes = (layer.num_heads, layer.num_kv_heads, layer.head_dim, block_size, num_blocks)
    key = (*sizes, layer.sliding_window, len(layer.cos))
    plan = attn.plans.get(key)
    if plan is None:
        attention = plan_attention(
            attn.block_tables,
            attn.query_start_loc,
            attn.seq_lens,
            num_tokens=attn.positions.shape[0],
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            block_size=block_size,
            num_blocks=num_blocks,
            sliding_window=layer.sliding_window,
            num_requests=attn.num_requests,
        )
        plan = attn.plans[key] = _LayersPlan(
            attention=attention,
            status=attention.status,
            positions=attn.positions,
            slots=attn.slots,
            cos=layer.cos,
            k_cache=kv.k,
        )
    assert isinstance(plan, _LayersPlan), "one metadata, two kinds of device"
    return plan


def _shapes(spec: KVCacheSpec, *, num_blocks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return kv_cache_shapes(
        num_blocks,
        block_size=spec.block_size,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=spec.dtype,
    )
