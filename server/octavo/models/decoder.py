"""The decoder of Llama, Mistral, Qwen2 and Qwen3: layer wiring and weight names.

The four differ in what `ModelSpec` says (biases, norms of q and k, windows), not in wiring. Knows
no device and no file.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.attention.base import AttentionBackend, AttentionLayer, AttentionMetadata, KVLayer
from octavo.checkpoint import ModelSpec
from octavo.layers import GatedMLP, RMSNorm, SelfAttention, TokenEmbedding, WeightSlot
from octavo.models.rope import rotary_tables


class DecoderLayer:
    """Pre-norm attention and feed-forward, each added to the stream."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        index: int,
        backend: AttentionBackend,
        tables: tuple[Tensor, Tensor],
        dtype: torch.dtype,
    ) -> None:
        cos, sin = tables
        self.input_norm = RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)
        self.attention = SelfAttention(
            spec.hidden_size,
            layer=AttentionLayer(
                num_heads=spec.num_heads,
                num_kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
                scale=spec.head_dim**-0.5,
                sliding_window=spec.layer_windows[index],
                cos=cos,
                sin=sin,
                eps=spec.rms_norm_eps,
            ),
            backend=backend,
            qk_norm=spec.qk_norm,
            qkv_bias=spec.qkv_bias,
            output_bias=spec.output_bias,
            dtype=dtype,
        )
        self.mlp_norm = RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)
        self.mlp = GatedMLP(
            spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            bias=spec.mlp_bias,
            dtype=dtype,
        )

    def __call__(self, x_TD: Tensor, *, attn: AttentionMetadata, kv: KVLayer) -> Tensor:
        x_TD = self.attention(self.input_norm(x_TD), residual=x_TD, attn=attn, kv=kv)
        return self.mlp(self.mlp_norm(x_TD), residual=x_TD)

    def slots(self, prefix: str) -> dict[str, WeightSlot]:
        return {
            **self.input_norm.slots(f"{prefix}input_layernorm"),
            **self.attention.slots(f"{prefix}self_attn."),
            **self.mlp_norm.slots(f"{prefix}post_attention_layernorm"),
            **self.mlp.slots(f"{prefix}mlp."),
        }


class Decoder:
    """`Model` of every architecture in `octavo.models.registry`.

    ``max_model_len`` is the longest request it will see: the length of the rotary tables.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        backend: AttentionBackend,
        dtype: torch.dtype,
        max_model_len: int,
    ) -> None:
        self.spec = spec
        self.backend = backend
        self._tables = rotary_tables(spec.rope, max_positions=max_model_len)
        self.embedding = TokenEmbedding(spec.vocab_size, hidden_size=spec.hidden_size, dtype=dtype)
        self.head = (
            self.embedding
            if spec.tie_word_embeddings
            else TokenEmbedding(spec.vocab_size, hidden_size=spec.hidden_size, dtype=dtype)
        )
        self.layers = [
            DecoderLayer(spec, index=i, backend=backend, tables=self._tables, dtype=dtype)
            for i in range(spec.num_layers)
        ]
        self.norm = RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)

    def forward(
        self, token_ids: Tensor, attn: AttentionMetadata, kv_caches: Sequence[KVLayer]
    ) -> Tensor:
        x_TD = self.embedding.embed(token_ids)
        for layer, kv in zip(self.layers, kv_caches, strict=True):
            x_TD = layer(x_TD, attn=attn, kv=kv)
        return self.norm(x_TD)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self.head.logits(hidden)

    def slots(self) -> dict[str, WeightSlot]:
        slots = self.embedding.slots("model.embed_tokens")
        if self.head is not self.embedding:
            slots.update(self.head.slots("lm_head"))
        for i, layer in enumerate(self.layers):
            slots.update(layer.slots(f"model.layers.{i}."))
        slots.update(self.norm.slots("model.norm"))
        return slots

    def set_frequency_factors(self, factors: Tensor) -> None:
        cos, sin = self._tables
        tables = rotary_tables(
            self.spec.rope, max_positions=cos.shape[0], frequency_factors=factors
        )
        for mine, new in zip((cos, sin), tables, strict=True):
            mine.copy_(new)  # in place: all layers share these two
