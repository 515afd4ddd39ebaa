"""Drafts on a GPU: what may come next of rows of tokens, and what of it was drawn. Checks and
launches; knows rows, not what a request is.

How many tokens a row has, only the device knows while steps are in flight. So a batch says what
depends on it as "~n", n more than the row's own count, which `propose` replaces. Nothing is read
back, and no number on the device leads outside a tensor: what does not fit is passed over.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo_kernels.columns import check_column, refusal
from octavo_kernels.drafting.gpu_kernel import PLACES, accept_runs, propose_rows
from octavo_kernels.launch import launch

MAX_DRAFTS = 64  # of a row at a time
_CHUNK = 1024  # places of a row that are compared at a time
_BLOCK = 128


def propose(
    batch_rows: Tensor,
    seq_lens: Tensor,
    *,
    sample_rows: Tensor,
    sample_positions: Tensor,
    token_table: Tensor,
    num_tokens: Tensor,
    num_found: Tensor,
    min_length: int,
    max_length: int,
) -> None:
    """Prompt lookup: of the longest run of last tokens that a row has had before, the continuation
    of its latest occurrence, again and again where that meets the row's end. A row gets as many
    drafts as it is to have: where there was no such run, its last token is repeated.

    batch_rows [R]: rows of token_table [N, L], whose rows may lie apart, and of num_tokens [N].
    seq_lens [R]: where it is ~d, d drafts are written behind the row's tokens and it becomes
    num_tokens + d; sample_positions [S] of sample_rows [S]: ~i becomes num_tokens + i. What is not
    negative stays. num_found [R]: out, a row's drafts if the run has min_length tokens at least (up
    to max_length are compared), else 0.
    All tensors are int32. Raises ValueError for other dtypes, shapes or strides.
    """
    num_requests, num_samples = batch_rows.shape[0], sample_rows.shape[0]
    for name, tensor, size in (
        ("batch_rows", batch_rows, num_requests),
        ("seq_lens", seq_lens, num_requests),
        ("num_found", num_found, num_requests),
        ("sample_rows", sample_rows, num_samples),
        ("sample_positions", sample_positions, num_samples),
    ):
        check_column(name, tensor, size, torch.int32, beside=batch_rows)
    _check_table(token_table, num_tokens)
    if not 1 <= min_length <= max_length:
        raise ValueError(f"min_length must be 1 to max_length={max_length}, got {min_length}")
    if token_table.shape[1] >= PLACES.value:
        raise ValueError(f"a row has less than {PLACES.value} tokens, got {token_table.shape[1]}")
    launch(
        propose_rows,
        (num_requests + -(-num_samples // _CHUNK),),
        batch_rows, seq_lens, sample_rows, sample_positions, token_table, num_tokens, num_found,
        num_requests, num_samples, token_table.shape[0], token_table.shape[1],
        token_table.stride(0), min_length, max_length,
        CHUNK=_CHUNK, MOST=MAX_DRAFTS, num_warps=8,
    )  # fmt: skip


def accept(
    sample_rows: Tensor,
    tokens: Tensor,
    *,
    token_table: Tensor,
    num_tokens: Tensor,
    counts: Tensor,
    num_drawn: Tensor,
    max_drafts: int,
) -> None:
    """Appends to each row what was drawn for it, up to the first token that is not the draft there.

    sample_rows [S]: a row's samples lie side by side, 1 + max_drafts of them at most. The first is
    of the token behind its num_tokens [N], each other one of the token behind the draft that lies
    there in token_table [N, L]. tokens [S] int64; a negative one could not be drawn and ends its
    row's run. num_tokens and counts [N, V], 2 for each time in the output, are brought up to date.
    num_drawn [S]: out, tokens appended, at the first sample of each row; 0 at all others.
    All but tokens are int32. Raises ValueError for other dtypes or shapes.
    """
    num_samples = sample_rows.shape[0]
    check_column("sample_rows", sample_rows, num_samples, torch.int32, beside=sample_rows)
    check_column("tokens", tokens, num_samples, torch.int64, beside=sample_rows)
    check_column("num_drawn", num_drawn, num_samples, torch.int32, beside=sample_rows)
    _check_table(token_table, num_tokens)
    if counts.dtype != torch.int32 or counts.dim() != 2 or not counts.is_contiguous():
        raise refusal("counts", counts, "contiguous int32 [N, V]")
    if counts.shape[0] != token_table.shape[0]:
        raise refusal("counts", counts, f"of {token_table.shape[0]} rows")
    if max_drafts < 0:
        raise ValueError(f"max_drafts must be at least 0, got {max_drafts}")
    launch(
        accept_runs,
        (-(-num_samples // _BLOCK),),
        sample_rows, tokens, token_table, num_tokens, counts, num_drawn,
        num_samples, token_table.shape[0], token_table.shape[1], token_table.stride(0),
        1 + max_drafts,
        VOCAB=counts.shape[1], BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def _check_table(token_table: Tensor, num_tokens: Tensor) -> None:
    if token_table.dtype != torch.int32 or token_table.dim() != 2 or token_table.stride(1) != 1:
        raise refusal("token_table", token_table, "int32 [N, L] without gaps in its rows")
    check_column("num_tokens", num_tokens, token_table.shape[0], torch.int32, beside=token_table)
