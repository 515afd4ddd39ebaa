"""What a step on a GPU reads, made there from persistent tables: checks and launches.

Knows rows, tokens and blocks, not what a request is. One launch each; nothing is read back, and no
number on the device leads outside a tensor: what does not fit is passed over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo_kernels.columns import check_column, refusal
from octavo_kernels.launch import launch
from octavo_kernels.step_inputs.gpu_kernel import (
    build_rows,
    gather_columns,
    gather_matrix_rows,
    scatter_ranges,
)

_CHUNK = 512  # words or tokens of a program at a time
_MAX_PARTS = 16  # programs of one range or request
_SAMPLES = 128
_COLUMNS = 1024
_MAX_WORDS = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingColumns:
    """What `sampling.gpu.sample` takes beside logits, under its names; all [S]."""

    temperature: Tensor  # float32
    top_k: Tensor  # int32
    top_p: Tensor  # float32
    min_p: Tensor  # float32
    seeds: Tensor  # int64
    positions: Tensor  # int64

    @classmethod
    def create(cls, num_rows: int, *, device: torch.device | str) -> SamplingColumns:
        """Zeros: greedy rows."""
        return cls(**{n: torch.zeros(num_rows, dtype=d, device=device) for n, d in _DTYPES.items()})

    def first(self, num_rows: int) -> SamplingColumns:
        """Views of the first rows."""
        return SamplingColumns(**{name: getattr(self, name)[:num_rows] for name in _DTYPES})

    def arguments(self) -> dict[str, Tensor]:
        """By name, for `sample(logits, **columns.arguments())`."""
        return {name: getattr(self, name) for name in _DTYPES}


_DTYPES = {
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "seeds": torch.int64,
    "positions": torch.int64,
}


def scatter_words(words: Tensor, *, ranges: Tensor, arena: Tensor, max_len: int) -> None:
    """arena[dst : dst + n] = words[src : src + n] for every row (src, dst, n) of ranges [U, 3].

    words [W], arena [A] and ranges are int32 and contiguous, all offsets are in words and of any
    alignment; ranges may be a view of words. Targets of one call must not overlap. A negative src,
    dst or n copies nothing, what leaves either tensor is cut off. max_len, the longest n, decides
    the number of programs and nothing else. Raises ValueError for other dtypes or shapes, and an
    arena that int32 offsets cannot reach (8 GiB).
    """
    for name, tensor, num_dims in (("words", words, 1), ("arena", arena, 1), ("ranges", ranges, 2)):
        _check(name, tensor, num_dims=num_dims, beside=words)
        if not tensor.is_contiguous() or tensor.numel() > _MAX_WORDS:
            raise refusal(name, tensor, f"contiguous and of at most {_MAX_WORDS} words")
    if ranges.shape[1] != 3:
        raise refusal("ranges", ranges, "[U, 3]")
    parts = _parts(max_len)
    launch(
        scatter_ranges,
        (ranges.shape[0] * parts,),
        words,
        ranges,
        arena,
        words.shape[0],
        arena.shape[0],
        parts,
        CHUNK=_CHUNK,
        num_warps=4,
    )


def build_step_inputs(
    batch_rows: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    *,
    token_table: Tensor,
    block_table: Tensor,
    block_size: int,
    num_tokens: int,
    max_query_len: int,
    token_ids: Tensor,
    positions: Tensor,
    slots: Tensor,
    block_tables: Tensor,
) -> None:
    """Packed tokens of R requests, from tables by row. All tensors are int32.

    batch_rows [R]: rows of token_table [N, L] and block_table [N, MB], whose rows may lie apart.
    query_start_loc [R + 1], ascending, and seq_lens [R], where request r's last token is number
    seq_lens[r] - 1 of its row. Writes the first num_tokens of token_ids, positions and slots, and
    for each request the blocks that hold its seq_lens[r] tokens in block_tables [R, M]; the rest
    of a row, and rows of a negative batch_rows, are left as they are.
    Tokens at and past query_start_loc[R], of a row outside the tables or beyond their width are
    padding: token 0, position 0, slot -1. A negative block gives slot -1.
    max_query_len decides the number of programs and nothing else.
    Raises ValueError for other dtypes, shapes or strides.
    """
    num_requests = batch_rows.shape[0]
    for name, tensor, size in (
        ("batch_rows", batch_rows, num_requests),
        ("query_start_loc", query_start_loc, num_requests + 1),
        ("seq_lens", seq_lens, num_requests),
        ("token_ids", token_ids[:num_tokens], num_tokens),
        ("positions", positions[:num_tokens], num_tokens),
        ("slots", slots[:num_tokens], num_tokens),
    ):
        check_column(name, tensor, size, torch.int32, beside=batch_rows)
    num_rows = token_table.shape[0]
    for name, tensor, size in (
        ("token_table", token_table, num_rows),
        ("block_table", block_table, num_rows),
        ("block_tables", block_tables[:num_requests], num_requests),
    ):
        _check(name, tensor, num_dims=2, beside=batch_rows)
        if tensor.shape[0] != size or tensor.stride(1) != 1:
            raise refusal(name, tensor, f"of {size} rows without gaps in them")
    max_blocks = min(block_table.shape[1], block_tables.shape[1])
    parts = _parts(max(min(max_query_len, num_tokens), max_blocks))
    launch(
        build_rows,
        ((num_requests + 1) * parts,),
        batch_rows, query_start_loc, seq_lens, token_table, block_table,
        token_ids, positions, slots, block_tables, num_requests, num_tokens, num_rows,
        min(token_table.shape[1], block_table.shape[1] * block_size),
        token_table.stride(0), block_table.stride(0), max_blocks, block_tables.stride(0), parts,
        BLOCK_SIZE=block_size, CHUNK=_CHUNK, num_warps=4,
    )  # fmt: skip


def gather_sampling(
    rows: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    out: SamplingColumns,
) -> None:
    """Fills out [S] from the table columns [N] at rows [S] int32, and with positions [S] int32.

    temperature, top_p, min_p are float32, top_k int32, seeds int64. A row outside the table
    becomes a greedy one without filters, at position 0. Raises ValueError for other dtypes or
    sizes.
    """
    num_samples = rows.shape[0]
    table = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    table["seeds"] = seeds
    for name, tensor in (("rows", rows), ("positions", positions)):
        check_column(name, tensor, num_samples, torch.int32, beside=rows)
    for name, tensor in table.items():
        check_column(name, tensor, temperature.shape[0], _DTYPES[name], beside=rows)
    for name, tensor in out.arguments().items():
        check_column(f"out.{name}", tensor, num_samples, _DTYPES[name], beside=rows)
    launch(
        gather_columns,
        (-(-num_samples // _SAMPLES),),
        rows,
        *table.values(),
        positions,
        *out.arguments().values(),
        num_samples,
        temperature.shape[0],
        BLOCK=_SAMPLES,
        num_warps=4,
    )


def gather_rows(hidden: Tensor, index: Tensor, *, out: Tensor, use_pdl: bool = False) -> Tensor:
    """Rows index [S] int32 of hidden [T, D] -> out [S, D]; returns out.

    An index out of range takes the first or the last row. Unlike `embedding`, nothing is compiled
    for a T. use_pdl: starts while the kernel before it in the stream still runs. Raises
    ValueError for other shapes, dtypes or strides.
    """
    _check("index", index, num_dims=1, beside=hidden)
    if hidden.dim() != 2 or not hidden.is_contiguous() or not hidden.numel():
        raise refusal("hidden", hidden, "contiguous [T, D], not empty")
    if not index.is_contiguous():
        raise refusal("index", index, "contiguous [S]")
    shape = (index.shape[0], hidden.shape[1])
    if out.shape != shape or out.dtype != hidden.dtype or not out.is_contiguous():
        raise refusal("out", out, f"contiguous {list(shape)} of {hidden.dtype}")
    launch(
        gather_matrix_rows,
        (index.shape[0], -(-hidden.shape[1] // _COLUMNS)),
        hidden,
        index,
        out,
        hidden.shape[0],
        D=hidden.shape[1],
        BLOCK=_COLUMNS,
        PDL=use_pdl,
        num_warps=4,
        launch_pdl=use_pdl,
    )
    return out


def _parts(size: int) -> int:
    return min(max(-(-size // _CHUNK), 1), _MAX_PARTS)


def _check(name: str, tensor: Tensor, *, num_dims: int, beside: Tensor) -> None:
    if tensor.dtype != torch.int32 or tensor.dim() != num_dims or tensor.device != beside.device:
        raise refusal(name, tensor, f"int32 of {num_dims} dimensions on {beside.device}")
