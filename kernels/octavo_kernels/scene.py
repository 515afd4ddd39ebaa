"""A model's tensors for a batch, as ops are run on them before any request; knows no op."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo_kernels.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's lengths: new tokens and tokens in the cache afterwards, of each request."""

    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens)

    @property
    def num_requests(self) -> int:
        return len(self.query_lens)


def decode(num_requests: int, seq_len: int) -> Batch:
    """One token each of equally long requests."""
    return Batch((1,) * num_requests, (seq_len,) * num_requests)


def prefill(*lengths: int) -> Batch:
    """Whole prompts."""
    return Batch(lengths, lengths)


def batches() -> tuple[Batch, ...]:
    """One for every bucket that decides what is compiled.

    Rows of a matmul, keys of one partition and of many, new tokens of a request that decodes
    (drafts to verify), and prompts.
    """
    found = [decode(rows, 100) for rows in (1, 8, 16, 32, 64, 128, 256, 512)]
    found += [Batch((new, 1), (40_000, 300)) for new in (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64)]
    found += [prefill(length) for length in (1, 60, 600, 5_000)]
    found += [Batch((500, 1), (2_500, 70)), decode(512, 40_000)]
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Scene:
    """A model's tensors for one batch on one device."""

    shape: ModelShape
    batch: Batch
    device: str

    def activations(self, *sizes: int) -> Tensor:
        return self._random(sizes, self.shape.activation_dtype)

    def floats(self, *sizes: int) -> Tensor:
        return self._random(sizes, torch.float32)

    def _random(self, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.device == "meta":  # nothing is drawn there, and to convert it imports sympy
            return torch.empty(*sizes, dtype=dtype, device=self.device)
        return torch.randn(*sizes, dtype=torch.float32, device=self.device).to(dtype)

    def ints(self, values: Iterable[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=self.device)

    @property
    def blocks_a_request(self) -> int:
        return max(1, -(-max(self.batch.seq_lens) // self.shape.block_size))

    def caches(self) -> tuple[Tensor, Tensor]:
        """K and V, each [B, K, BLOCK, H], with room for two requests; blocks are shared."""
        shape = self.shape
        sizes = (2 * self.blocks_a_request, shape.num_kv_heads, shape.block_size, shape.head_dim)
        k, v = (torch.zeros(sizes, dtype=shape.cache_dtype, device=self.device) for _ in range(2))
        return k, v

    def cache_scales(self) -> dict[str, Any]:
        """k_scale and v_scale [K] where the cache is FP8."""
        if self.shape.cache_dtype != torch.float8_e4m3fn:
            return {}
        heads = self.shape.num_kv_heads
        return {f"{name}_scale": torch.ones(heads, device=self.device) for name in ("k", "v")}

    def starts(self) -> Tensor:
        """query_start_loc [R + 1]."""
        return self.ints(itertools.accumulate(self.batch.query_lens, initial=0))

    def positions(self) -> Tensor:
        batch = self.batch
        lengths = zip(batch.query_lens, batch.seq_lens, strict=True)
        return self.ints(p for new, all_ in lengths for p in range(all_ - new, all_))
