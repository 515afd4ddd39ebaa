"""The tensors that every step on a GPU works in. Knows their sizes, not who fills them.

They lie at addresses that never change, so that a captured graph reads and writes them again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.attention.base import AttentionMetadata

_ALIGNMENT = 4  # words: kernels are compiled for pointers to multiples of 16 bytes


def padded(num_words: int) -> int:
    """Words that a part of an upload takes, so that the next one starts at 16 bytes again."""
    return -(-num_words // _ALIGNMENT) * _ALIGNMENT


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

    @property
    def max_blocks(self) -> int:
        """Width of a block table: a token drawn after a full context is dropped later."""
        return -(-(self.max_model_len + 1) // self.block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchWords:
    """The batch as it is uploaded: int32 tensors at fixed places of one staging tensor.

    Unused places, for graphs that are captured for larger batches: row and slots -1, lengths 0,
    query_start_loc the number of tokens, sampled token place 0.
    """

    rows: Tensor  # [R] of the request table
    query_start_loc: Tensor  # [R + 1]
    seq_lens: Tensor  # [R]
    sample_tokens: Tensor  # [R]: place in [0, T) of the token after which one is drawn
    sample_rows: Tensor  # [R] of the request table
    sample_positions: Tensor  # [R]: index of the token to draw in its request

    @staticmethod
    def num_words(max_num_seqs: int) -> int:
        return 5 * padded(max_num_seqs) + padded(max_num_seqs + 1)

    @classmethod
    def of(cls, words: Tensor, *, max_num_seqs: int) -> BatchWords:
        """Views of the first ``num_words(max_num_seqs)`` of words, host's or device's."""
        sizes = dict.fromkeys(cls.__slots__, max_num_seqs)
        sizes["query_start_loc"] += 1
        parts, at = {}, 0
        for name, size in sizes.items():
            parts[name] = words[at : at + size]
            at += padded(size)
        return cls(**parts)


def split_results(results: Tensor, *, max_num_seqs: int) -> tuple[Tensor, Tensor]:
    """Tokens [R] int64 and status [R] int32 of `StepBuffers.results`, or of a copy of it."""
    return results[: 2 * max_num_seqs].view(torch.int64), results[padded(2 * max_num_seqs) :]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBuffers:
    """Device tensors of a step. T and R are the engine's bounds; a step uses the first of each."""

    sizes: StepSizes
    words: Tensor  # int32: `batch`, then whatever else this step uploads
    batch: BatchWords
    token_ids: Tensor  # [T] int32
    positions: Tensor  # [T] int32
    slots: Tensor  # [T] int32, -1 = keep no K/V
    block_tables: Tensor  # [R, max_blocks] int32, in the order of the batch
    hidden: Tensor  # [T, D]
    logits: Tensor  # [R, V] float32
    results: Tensor  # int32: `sampled`, then `status`; one copy brings both to the host
    sampled: Tensor  # [R] int64
    status: Tensor  # [R] int32

    @classmethod
    def create(cls, sizes: StepSizes, *, num_words: int, device: torch.device) -> StepBuffers:
        """``num_words``: the largest upload, batch included."""
        num_tokens, num_requests = sizes.max_num_tokens, sizes.max_num_seqs

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        words = ints(num_words)
        results = ints(padded(2 * num_requests) + num_requests)
        sampled, status = split_results(results, max_num_seqs=num_requests)
        return cls(
            sizes=sizes,
            words=words,
            batch=BatchWords.of(words, max_num_seqs=num_requests),
            token_ids=ints(num_tokens),
            positions=ints(num_tokens),
            slots=ints(num_tokens),
            block_tables=ints(num_requests, sizes.max_blocks),
            hidden=torch.zeros(num_tokens, sizes.hidden_size, dtype=sizes.dtype, device=device),
            logits=torch.zeros(num_requests, sizes.vocab_size, device=device),
            results=results,
            sampled=sampled,
            status=status,
        )

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
