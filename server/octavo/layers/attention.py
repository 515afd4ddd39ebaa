"""Self-attention of one decoder layer: projections around a backend. Knows no device, no cache."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from octavo.attention.base import AttentionLayer, AttentionMetadata, KVLayer
from octavo.layers.linear import Linear
from octavo.layers.slot import WeightSlot, vector_slot
from octavo.platforms.base import Platform


class SelfAttention:
    """q, k and v in one projection, the backend's attention, and the output projection.

    ``qk_norm`` gives each head of q and k an RMS norm of its own before it rotates.
    ``input_size``: of the rows that come in, if not ``hidden_size``.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        prefix: str,
        layer: AttentionLayer,
        qk_norm: bool,
        qkv_bias: bool,
        output_bias: bool,
        platform: Platform,
        dtype: torch.dtype,
        input_size: int | None = None,
    ) -> None:
        q_size, kv_size = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        if qk_norm:
            q_norm, k_norm = (
                platform.vector(layer.head_dim, dtype=dtype, value=1.0) for _ in range(2)
            )
            layer = replace(layer, q_norm=q_norm, k_norm=k_norm)
        self._prefix = prefix
        self.layer = layer
        self.backend = platform.attention
        self.qkv = Linear(
            input_size or hidden_size,
            prefix=prefix,
            parts={"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size},
            bias=qkv_bias,
            platform=platform,
            dtype=dtype,
        )
        self.output = Linear(
            q_size,
            prefix=prefix,
            parts={"o_proj": hidden_size},
            bias=output_bias,
            platform=platform,
            dtype=dtype,
        )

    def __call__(
        self, x_TD: Tensor, *, residual: Tensor, attn: AttentionMetadata, kv: KVLayer
    ) -> Tensor:
        """[T, input_size] -> residual [T, D] + attention of it, [T, D]."""
        context = self.backend.forward(self.qkv(x_TD), layer=self.layer, attn=attn, kv=kv)
        return self.output(context, residual=residual)

    @property
    def num_bytes(self) -> int:
        norms = (self.layer.q_norm, self.layer.k_norm)
        return (
            self.qkv.num_bytes
            + self.output.num_bytes
            + sum(norm.nbytes for norm in norms if norm is not None)
        )

    def slots(self) -> dict[str, WeightSlot]:
        slots = {**self.qkv.slots(), **self.output.slots()}
        for name, weight in (("q_norm", self.layer.q_norm), ("k_norm", self.layer.k_norm)):
            if weight is not None:
                slots[f"{self._prefix}{name}.weight"] = vector_slot(weight, kind="norm")
        return slots
