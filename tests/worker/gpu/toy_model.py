"""A model in place of a transformer: causal, paged, quick where Triton's interpreter is slow.

Its rows are computed one by one in torch, so bits depend on a request's own tokens and positions
alone, and on every one of them. What it reads of the cache, it reads through the block tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from octavo.attention.base import AttentionMetadata, KVCacheSpec, KVLayer
from octavo.checkpoint import ModelSpec

POISONS, RAISES = 13, 14  # tokens: one makes NaN of what sees it, the other stops the step


class _Blocks:
    """The part of `AttentionBackend` that is asked for here."""

    def __init__(self, device: str) -> None:
        self._device = device

    def allocate(self, spec: KVCacheSpec, *, num_blocks: int) -> list[KVLayer]:
        shape = (num_blocks, spec.block_size, spec.head_dim)

        def cache() -> Tensor:
            return torch.empty(shape, device=self._device)

        return [KVLayer(cache(), cache()) for _ in range(spec.num_layers)]

    def copy_blocks(self, kv_caches: Sequence[KVLayer], *, src: Tensor, dst: Tensor) -> None:
        assert src.data_ptr() % 16 == dst.data_ptr() % 16 == 0
        for layer in kv_caches:
            layer.k[dst.long()] = layer.k[src.long()]


class ToyModel:
    def __init__(
        self,
        spec: ModelSpec,
        *,
        device: str = "cpu",
        vocab_size: int = 97,
        hidden_size: int = 16,
    ) -> None:
        self.spec = replace(
            spec,
            num_layers=1,
            num_kv_heads=1,
            head_dim=hidden_size,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
        )
        self.backend: Any = _Blocks(device)
        generator = torch.Generator().manual_seed(3)

        def table(size: int) -> Tensor:
            return torch.empty(size, hidden_size).normal_(generator=generator).to(device)

        self._embedding, self._head, self._turn = table(vocab_size), table(vocab_size), table(4096)
        self._embedding[POISONS] = float("nan")
        self.seen: list[tuple[list[int], list[int], list[int]]] = []  # tokens, positions, slots

    def forward(
        self,
        token_ids: Tensor,
        attn: AttentionMetadata,
        kv_caches: Sequence[KVLayer],
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        assert out is not None
        (kv,) = kv_caches
        tokens, positions = token_ids.tolist(), attn.positions.tolist()
        slots, starts = attn.slots.tolist(), attn.query_start_loc.tolist()
        lengths, block_size = attn.seq_lens.tolist(), kv.k.shape[1]
        self.seen.append((tokens, positions, slots))
        cache = kv.k.view(-1, kv.k.shape[2])
        for token, position, slot in zip(tokens, positions, slots, strict=True):
            if slot >= 0:
                cache[slot] = self._embedding[token] * self._turn[position]
        if RAISES in tokens[: starts[-1]]:
            raise RuntimeError("a kernel met a bad token")
        out.zero_()
        for request in range(len(lengths)):
            start, end = starts[request], starts[request + 1]
            blocks = attn.block_tables[request].long()
            for place in range(start, end):
                position = positions[place]
                assert position == lengths[request] - (end - place)
                past = torch.arange(position + 1, device=blocks.device)
                seen = cache[blocks[past // block_size] * block_size + past % block_size]
                near = 1.0 / (1.0 + (position - past))
                out[place] = self._embedding[tokens[place]] + (seen * near[:, None]).sum(0)
        return out

    def compute_logits(self, hidden: Tensor, *, out: Tensor | None = None) -> Tensor:
        assert out is not None
        for place in range(hidden.shape[0]):
            torch.mv(self._head, hidden[place], out=out[place])
            out[place, [POISONS, RAISES]] -= 100.0  # not drawn
        return out
