"""A draft head after EAGLE-3 (2503.01840): one layer that guesses from a target's hidden states.

At place p it reads the token behind it, x[p + 1], and a feature of p: three hidden states of the
target brought to one, or its own output where the target has not computed p. It guesses x[p + 2].
Knows no device (a platform stands between), no request and no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from octavo.attention.base import AttentionLayer, AttentionMetadata, KVLayer
from octavo.checkpoint.draft_head import NUM_TAPS, DraftHeadSpec
from octavo.layers import GatedMLP, Linear, RMSNorm, SelfAttention, TokenEmbedding, WeightSlot
from octavo.models.base import Model
from octavo.models.rope import rotary_tables
from octavo.platforms.base import Platform

LAYER = "midlayer."


class _Vectors(Protocol):
    """Whoever has token vectors."""

    def embed(self, token_ids_T: Tensor, /) -> Tensor: ...


class DraftHead:
    """The layer, the maps before and behind it, and the tokens that its logits stand for.

    ``has_embedding``: with token vectors of its own; else the target's serve. ``max_model_len``:
    the length of the rotary tables.
    """

    def __init__(
        self,
        spec: DraftHeadSpec,
        *,
        target: Model,
        platform: Platform,
        dtype: torch.dtype,
        max_model_len: int,
        has_embedding: bool = False,
    ) -> None:
        self.spec, self.platform = spec, platform
        self.max_len = max_model_len  # places of a sequence
        layer, size = spec.layer, spec.layer.hidden_size

        def norm() -> RMSNorm:
            return RMSNorm(size, eps=layer.rms_norm_eps, platform=platform, dtype=dtype)

        self._fc = Linear(
            NUM_TAPS * size,
            prefix="",
            parts={"fc": size},
            bias=False,
            platform=platform,
            dtype=dtype,
        )
        self._token_norm, self._feature_norm, self._mlp_norm, self._norm = (
            norm() for _ in range(4)
        )
        self._attention = _attention(spec, platform, dtype=dtype, max_len=max_model_len)
        self._mlp = GatedMLP(
            size,
            prefix=f"{LAYER}mlp.",
            intermediate_size=layer.intermediate_size,
            bias=layer.mlp_bias,
            platform=platform,
            dtype=dtype,
        )

        def table(rows: int, name: str) -> TokenEmbedding:
            return TokenEmbedding(rows, name=name, hidden_size=size, platform=platform, dtype=dtype)

        self._head = table(spec.draft_vocab_size, "lm_head")
        self._own_vectors = table(layer.vocab_size, "embed_tokens") if has_embedding else None
        self._vectors: _Vectors = self._own_vectors or target
        # [3 D]: in place of hidden states of a token that is not known yet; None = it can do no
        # more than one draft in a pass.
        self.mask_taps: Tensor | None = None
        # Of each of its logits the target's token.
        self.token_ids = torch.arange(spec.draft_vocab_size)

    def features(self, taps: Tensor) -> Tensor:
        """[T, 3 D] hidden states of the target -> [T, D]."""
        return self._fc(taps)

    def forward(
        self, token_ids: Tensor, features: Tensor, attn: AttentionMetadata, kv: KVLayer
    ) -> Tensor:
        """[T] tokens behind each place and features [T, D] -> [T, D], features of what comes next.
        Writes this pass's K/V."""
        tokens = self._token_norm(self._vectors.embed(token_ids))
        normed = self._feature_norm(features)
        x = self._attention(
            self.platform.side_by_side(tokens, normed),
            residual=normed if self.spec.norm_before_residual else features,
            attn=attn,
            kv=kv,
        )
        return self._mlp(self._mlp_norm(x), residual=x)

    def compute_logits(self, features: Tensor) -> Tensor:
        """[S, D] that `forward` gave -> [S, Vd] float32."""
        return self._head.logits(self._norm(features))

    @property
    def num_bytes(self) -> int:
        norms = (self._token_norm, self._feature_norm, self._mlp_norm, self._norm)
        vectors = 0 if self._own_vectors is None else self._own_vectors.num_bytes
        parts = self._fc.num_bytes + self._attention.num_bytes + self._mlp.num_bytes
        return parts + self._head.num_bytes + vectors + sum(norm.num_bytes for norm in norms)

    def slots(self) -> dict[str, WeightSlot]:
        """Checkpoint tensor name -> where it goes."""
        norms = {
            f"{LAYER}input_layernorm": self._token_norm,
            f"{LAYER}hidden_norm": self._feature_norm,
            f"{LAYER}post_attention_layernorm": self._mlp_norm,
            "norm": self._norm,
        }
        slots = {**self._fc.slots(), **self._attention.slots(), **self._mlp.slots()}
        for name, norm in norms.items():
            slots |= norm.slots(name)
        slots |= self._head.slots()
        return slots if self._own_vectors is None else {**slots, **self._own_vectors.slots()}


def _attention(
    spec: DraftHeadSpec, platform: Platform, *, dtype: torch.dtype, max_len: int
) -> SelfAttention:
    layer = spec.layer
    cos, sin = rotary_tables(layer.rope, max_positions=max_len)
    return SelfAttention(
        layer.hidden_size,
        prefix=f"{LAYER}self_attn.",
        layer=AttentionLayer(
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            scale=layer.head_dim**-0.5,
            sliding_window=spec.window,
            cos=cos.to(platform.device),
            sin=sin.to(platform.device),
            eps=layer.rms_norm_eps,
        ),
        qk_norm=False,
        qkv_bias=layer.qkv_bias,
        output_bias=layer.output_bias,
        platform=platform,
        dtype=dtype,
        input_size=2 * layer.hidden_size,
    )


class TapPass:
    """`Pass` over places that the target computed, whose taps lie in ``taps`` [T_max, 3 D]."""

    def __init__(self, head: DraftHead, taps: Tensor) -> None:
        self._head, self._taps = head, taps

    def forward(
        self, token_ids: Tensor, attn: AttentionMetadata, kv_caches: Sequence[KVLayer]
    ) -> Tensor:
        features = self._head.features(self._taps[: token_ids.shape[0]])
        return self._head.forward(token_ids, features, attn, kv_caches[0])

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self._head.compute_logits(hidden)


class OwnPass:
    """`Pass` over places of drafts, whose features are what it gave before: [T_max, D]."""

    def __init__(self, head: DraftHead, features: Tensor) -> None:
        self._head, self._features = head, features

    def forward(
        self, token_ids: Tensor, attn: AttentionMetadata, kv_caches: Sequence[KVLayer]
    ) -> Tensor:
        features = self._features[: token_ids.shape[0]]
        return self._head.forward(token_ids, features, attn, kv_caches[0])

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self._head.compute_logits(hidden)
