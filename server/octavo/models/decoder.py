"""The decoder of Llama, Mistral, Qwen2 and Qwen3: layer wiring and weight names.

The four differ in what `ModelSpec` says (biases, norms of q and k, windows), not in wiring. Knows
no device (a platform stands between) and no file.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.attention.base import AttentionBackend, AttentionLayer, AttentionMetadata, KVLayer
from octavo.checkpoint import ModelSpec
from octavo.layers import GatedMLP, RMSNorm, SelfAttention, TokenEmbedding, WeightSlot
from octavo.models.base import Taps
from octavo.models.rope import rotary_tables
from octavo.platforms.base import Platform


class DecoderLayer:
    """Pre-norm attention and feed-forward, each added to the stream."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        index: int,
        platform: Platform,
        tables: tuple[Tensor, Tensor],
        dtype: torch.dtype,
    ) -> None:
        cos, sin = tables
        self._prefix = f"model.layers.{index}."

        def norm() -> RMSNorm:
            return RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps, platform=platform, dtype=dtype)

        self.input_norm = norm()
        self.attention = SelfAttention(
            spec.hidden_size,
            prefix=f"{self._prefix}self_attn.",
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
            qk_norm=spec.qk_norm,
            qkv_bias=spec.qkv_bias,
            output_bias=spec.output_bias,
            platform=platform,
            dtype=dtype,
        )
        self.mlp_norm = norm()
        self.mlp = GatedMLP(
            spec.hidden_size,
            prefix=f"{self._prefix}mlp.",
            intermediate_size=spec.intermediate_size,
            bias=spec.mlp_bias,
            platform=platform,
            dtype=dtype,
        )

    def __call__(self, x_TD: Tensor, *, attn: AttentionMetadata, kv: KVLayer) -> Tensor:
        x_TD = self.attention(self.input_norm(x_TD), residual=x_TD, attn=attn, kv=kv)
        return self.mlp(self.mlp_norm(x_TD), residual=x_TD)

    @property
    def num_bytes(self) -> int:
        parts = (self.input_norm, self.attention, self.mlp_norm, self.mlp)
        return sum(part.num_bytes for part in parts)

    def slots(self) -> dict[str, WeightSlot]:
        return {
            **self.input_norm.slots(f"{self._prefix}input_layernorm"),
            **self.attention.slots(),
            **self.mlp_norm.slots(f"{self._prefix}post_attention_layernorm"),
            **self.mlp.slots(),
        }


class Decoder:
    """`Model` of every architecture in `octavo.models.registry`.

    ``max_model_len`` is the longest request it will see: the length of the rotary tables.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        platform: Platform,
        dtype: torch.dtype,
        max_model_len: int,
    ) -> None:
        self.spec = spec
        self.platform = platform
        cos, sin = rotary_tables(spec.rope, max_positions=max_model_len)
        self._tables = cos.to(platform.device), sin.to(platform.device)

        def token_table(name: str) -> TokenEmbedding:
            return TokenEmbedding(
                spec.vocab_size,
                name=name,
                hidden_size=spec.hidden_size,
                platform=platform,
                dtype=dtype,
            )

        self.embedding = token_table("model.embed_tokens")
        self.head = self.embedding if spec.tie_word_embeddings else token_table("lm_head")
        self.layers = [
            DecoderLayer(spec, index=i, platform=platform, tables=self._tables, dtype=dtype)
            for i in range(spec.num_layers)
        ]
        self.norm = RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps, platform=platform, dtype=dtype)

    @property
    def backend(self) -> AttentionBackend:
        return self.platform.attention

    @property
    def weight_bytes(self) -> int:
        layers = sum(layer.num_bytes for layer in self.layers) + self.norm.num_bytes
        token_tables = sum(table.num_bytes for table in {self.embedding, self.head})
        return layers + token_tables + sum(table.nbytes for table in self._tables)

    def forward(
        self,
        token_ids: Tensor,
        attn: AttentionMetadata,
        kv_caches: Sequence[KVLayer],
        *,
        out: Tensor | None = None,
        taps: Taps | None = None,
    ) -> Tensor:
        tapped = () if taps is None else taps.layers
        x_TD = self.embedding.embed(token_ids)
        for index, (layer, kv) in enumerate(zip(self.layers, kv_caches, strict=True)):
            if taps is not None and index in tapped:
                self._tap(x_TD, taps, index)
            x_TD = layer(x_TD, attn=attn, kv=kv)
        if taps is not None and len(self.layers) in tapped:
            self._tap(x_TD, taps, len(self.layers))
        return self.norm(x_TD, out=out)

    def _tap(self, x_TD: Tensor, taps: Taps, index: int) -> None:
        num_tokens, size = x_TD.shape
        start = taps.layers.index(index) * size
        self.platform.copy_rows(x_TD, out=taps.out[:num_tokens, start : start + size])

    def compute_logits(self, hidden: Tensor, *, out: Tensor | None = None) -> Tensor:
        return self.head.logits(hidden, out=out)

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.embedding.embed(token_ids)

    def head_rows(self, token_ids: Tensor) -> Tensor:
        return self.head.embed(token_ids)

    def norms(self) -> list[Tensor]:
        pairs = [(layer.input_norm.weight, layer.mlp_norm.weight) for layer in self.layers]
        return [*(weight for pair in pairs for weight in pair), self.norm.weight]

    def slots(self) -> dict[str, WeightSlot]:
        slots = {**self.embedding.slots(), **self.head.slots()}  # one and the same if tied
        for layer in self.layers:
            slots.update(layer.slots())
        slots.update(self.norm.slots("model.norm"))
        return slots

    def set_frequency_factors(self, factors: Tensor) -> None:
        cos, sin = self._tables
        tables = rotary_tables(
            self.spec.rope, max_positions=cos.shape[0], frequency_factors=factors
        )
        for mine, new in zip((cos, sin), tables, strict=True):
            mine.copy_(new)  # in place: all layers share these two
