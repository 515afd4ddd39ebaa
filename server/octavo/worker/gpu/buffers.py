"""The tensors that every step on a GPU works in. Knows their sizes, not who fills them.

They lie at addresses that never change, so that a captured graph reads and writes them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.attention.base import AttentionMetadata

_ALIGNMENT = 4  # words: kernels are compiled for pointers to multiples of 16 bytes
# Tokens drawn in a step of drafts: beyond it a step is bound by arithmetic, where none pays.
_MOST_SAMPLES = 512


def padded(num_words: int) -> int:
    """Words that a part of an upload takes, so that the next one starts at 16 bytes again."""
    return -(-num_words // _ALIGNMENT) * _ALIGNMENT


def max_samples(max_num_seqs: int, max_drafts: int) -> int:
    """Tokens drawn in a step: one for each request, and behind drafts where there is room."""
    return max(max_num_seqs, min(max_num_seqs * (1 + max_drafts), _MOST_SAMPLES))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSizes:
    """Bounds of one engine, fixed at start."""

    max_num_seqs: int  # rows of the request table, and requests of a step
    max_num_tokens: int  # of a step
    max_model_len: int
    block_size: int
    num_blocks: int  # of the K/V cache
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype  # of activations
    max_drafts: int = 0  # of a request in a step; 0 = no speculation

    @property
    def max_samples(self) -> int:
        return max_samples(self.max_num_seqs, self.max_drafts)

    @property
    def max_blocks(self) -> int:
        """Width of a block table: a token drawn after a full context is dropped later."""
        return -(-(self.max_model_len + 1) // self.block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchWords:
    """The batch as it is uploaded: int32 tensors at fixed places of one staging tensor.

    Unused places, for graphs that are captured for larger batches: row and slots -1, lengths 0,
    query_start_loc the number of tokens, sampled token place 0.

    Where there is speculation the device alone knows how many tokens a request has. So of requests
    that draw, seq_lens is ~d, and the position of the sample behind i drafts is ~i: d and i more
    than the row's tokens, which `GpuDrafts.propose` replaces before anything reads them.
    """

    rows: Tensor  # [R] of the request table
    query_start_loc: Tensor  # [R + 1]
    seq_lens: Tensor  # [R]
    sample_tokens: Tensor  # [S]: place in [0, T) of the token after which one is drawn
    sample_rows: Tensor  # [S] of the request table; a request's samples lie side by side
    sample_positions: Tensor  # [S]: index of the token to draw in its request

    @staticmethod
    def num_words(max_num_seqs: int, *, max_samples: int | None = None) -> int:
        """``max_samples``: S, where it is not R."""
        num_samples = max_samples or max_num_seqs
        return 2 * padded(max_num_seqs) + padded(max_num_seqs + 1) + 3 * padded(num_samples)

    @classmethod
    def of(cls, words: Tensor, *, max_num_seqs: int, max_samples: int | None = None) -> BatchWords:
        """Views of the first ``num_words(max_num_seqs, ...)`` of words, host's or device's."""
        sizes = dict.fromkeys(cls.__slots__, max_num_seqs)
        sizes["query_start_loc"] += 1
        if max_samples is not None:
            sizes |= dict.fromkeys(_OF_SAMPLES, max_samples)
        parts, at = {}, 0
        for name, size in sizes.items():
            parts[name] = words[at : at + size]
            at += padded(size)
        return cls(**parts)


_OF_SAMPLES = ("sample_tokens", "sample_rows", "sample_positions")


class Results(NamedTuple):
    """What a step tells the host: parts of one tensor of words, the device's or a copy of it."""

    tokens: Tensor  # [S] int64
    status: Tensor  # [S] int32
    # With speculation, else [0]: tokens that a request got, at the first of its samples.
    num_drawn: Tensor  # [S] int32
    num_found: Tensor  # [R] int32, of a request's drafts those that were looked up

    @staticmethod
    def num_words(sizes: StepSizes) -> int:
        of_drafts = padded(sizes.max_samples) + sizes.max_num_seqs if sizes.max_drafts else 0
        return padded(2 * sizes.max_samples) + padded(sizes.max_samples) + of_drafts

    @classmethod
    def of(cls, words: Tensor, *, sizes: StepSizes) -> Results:
        """Views of the first ``num_words(sizes)`` of words."""
        num_samples, has_drafts = sizes.max_samples, bool(sizes.max_drafts)
        status = padded(2 * num_samples)
        drawn = status + padded(num_samples)
        found = drawn + padded(num_samples)
        return cls(
            tokens=words[: 2 * num_samples].view(torch.int64),
            status=words[status : status + num_samples],
            num_drawn=words[drawn : drawn + num_samples * has_drafts],
            num_found=words[found : found + sizes.max_num_seqs * has_drafts],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBuffers:
    """Device tensors of a step. T, R and S (samples) are the engine's bounds; a step uses the first
    of each."""

    sizes: StepSizes
    words: Tensor  # int32: `batch`, then whatever else this step uploads
    batch: BatchWords
    token_ids: Tensor  # [T] int32
    positions: Tensor  # [T] int32
    slots: Tensor  # [T] int32, -1 = keep no K/V
    block_tables: Tensor  # [R, max_blocks] int32, in the order of the batch
    hidden: Tensor  # [T, D]
    logits: Tensor  # [S, V] float32
    results: Tensor  # int32: what `found` are views of; one copy brings all to the host
    found: Results

    @classmethod
    def create(cls, sizes: StepSizes, *, num_words: int, device: torch.device) -> StepBuffers:
        """``num_words``: the largest upload, batch included."""
        num_tokens, num_requests = sizes.max_num_tokens, sizes.max_num_seqs
        num_samples = sizes.max_samples

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        words = ints(num_words)
        results = ints(Results.num_words(sizes))
        return cls(
            sizes=sizes,
            words=words,
            batch=BatchWords.of(words, max_num_seqs=num_requests, max_samples=num_samples),
            token_ids=ints(num_tokens),
            positions=ints(num_tokens),
            slots=ints(num_tokens),
            block_tables=ints(num_requests, sizes.max_blocks),
            hidden=torch.zeros(num_tokens, sizes.hidden_size, dtype=sizes.dtype, device=device),
            logits=torch.zeros(num_samples, sizes.vocab_size, device=device),
            results=results,
            found=Results.of(results, sizes=sizes),
        )

    @property
    def sampled(self) -> Tensor:
        """[S] int64."""
        return self.found.tokens

    @property
    def status(self) -> Tensor:
        """[S] int32."""
        return self.found.status

    def blank_batch(self) -> None:
        """Makes all of the batch padding, as if a step of no request had been uploaded."""
        for name in BatchWords.__slots__:
            no_row = name in ("rows", "sample_rows")
            getattr(self.batch, name).fill_(-1 if no_row else 0)

    def attention(
        self, *, num_tokens: int, num_requests: int, max_query_len: int
    ) -> AttentionMetadata:
        """Of the first so many tokens and requests; equal arguments give views of equal memory."""
        return AttentionMetadata(
            positions=self.positions[:num_tokens],
            slots=self.slots[:num_tokens],
            block_tables=self.block_tables[:num_requests],
            query_start_loc=self.batch.query_start_loc[: num_requests + 1],
            seq_lens=self.batch.seq_lens[:num_requests],
            max_query_len=max_query_len,
        )
