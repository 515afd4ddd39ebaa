"""What tests and benchmarks need to know of drafting on a GPU; runs nothing."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from octavo_kernels.drafting.gpu import accept, propose
from octavo_kernels.drafting.reference import accept_reference, propose_reference
from octavo_kernels.op import Case, OpSpec, Tol

_EXACT = {torch.float32: Tol(0.0, 0.0)}


def _random(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)


def _propose_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    """R requests of rows of up to L tokens out of few; every third is told its length by the host,
    every fifth has no row. A sample for each draft of the others."""
    num_rows = case.R + 2
    rows = torch.randperm(num_rows, generator=generator)[: case.R].to(torch.int32)
    rows[4::5] = -1
    drafts = _random(0, case.K + 1, (case.R,), generator)
    words = -1 - drafts
    words[2::3] = 7
    each = [1 + int(draft) for draft in drafts]
    depths = [depth for size in each for depth in range(size)]
    depths_given = torch.tensor(depths, dtype=torch.int32)
    found = {
        "batch_rows": rows,
        "seq_lens": words,
        "sample_rows": rows.repeat_interleave(torch.tensor(each, dtype=torch.int64)),
        "sample_positions": torch.where(depths_given % 5 == 4, depths_given, -1 - depths_given),
        "token_table": _random(0, case.V, (num_rows, case.L + case.K), generator),
        "num_tokens": _random(1, case.L + 1, (num_rows,), generator),
        "num_found": torch.full((case.R,), -7, dtype=torch.int32),
    }
    return {name: tensor.to(device) for name, tensor in found.items()}


def _propose(**inputs: Any) -> tuple[Tensor, ...]:
    propose(**inputs, min_length=2, max_length=5)
    return (inputs["num_found"],)


def _propose_reference(**inputs: Any) -> tuple[Tensor, ...]:
    propose_reference(**inputs, min_length=2, max_length=5)
    return (inputs["num_found"],)


def _accept_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    """R rows, every fourth of padding, with up to K drafts each, two thirds of which were drawn;
    some draws failed, and a row is full to the last."""
    num_rows = case.R + 1
    rows = torch.randperm(num_rows, generator=generator)[: case.R].to(torch.int32)
    rows[3::4] = -1
    each = [1 + size for size in _random(0, case.K + 1, (case.R,), generator).tolist()]
    table = _random(0, case.V, (num_rows, case.L), generator)
    num_tokens = _random(0, case.L - case.K, (num_rows,), generator)
    num_tokens[int(rows[0]) if case.R else 0] = case.L - 1
    tokens = torch.randint(0, case.V, (sum(each),), generator=generator)
    starts = [0, *itertools.accumulate(each)]
    for row, start, size in zip(rows.tolist(), starts, each, strict=False):
        for depth in range(size if row >= 0 else 0):
            place = int(num_tokens[row]) + depth
            if place < case.L and (row + depth) % 3:
                tokens[start + depth] = table[row, place]
    tokens[5::11] = -1
    found = {
        "sample_rows": rows.repeat_interleave(torch.tensor(each, dtype=torch.int64)),
        "tokens": tokens,
        "token_table": table,
        "num_tokens": num_tokens,
        "counts": _random(0, 4, (num_rows, case.V), generator),
        "num_drawn": torch.full((sum(each),), -7, dtype=torch.int32),
    }
    return {name: tensor.to(device) for name, tensor in found.items()}


def _accept(**inputs: Any) -> tuple[Tensor, ...]:
    accept(**inputs, max_drafts=9)
    return (inputs["num_drawn"],)


def _accept_reference(**inputs: Any) -> tuple[Tensor, ...]:
    accept_reference(**inputs)
    return (inputs["num_drawn"],)


SPECS = (
    OpSpec(
        name="propose_drafts",
        op=_propose,
        reference=_propose_reference,
        cases=(
            Case("one", R=1, K=1, L=9, V=2),
            Case("none", R=3, K=0, L=30, V=3),
            Case("many", R=23, K=7, L=90, V=6),
            Case("long", R=2, K=9, L=2600, V=9),
        ),
        make_inputs=_propose_inputs,
        tolerance=_EXACT,
        devices=("cuda",),
        mutated=("seq_lens", "sample_positions", "token_table"),
        bench_cases=(
            Case("1 x 4k", R=1, K=7, L=4096, V=300),
            Case("1 x 64k", R=1, K=7, L=65536, V=300),
            Case("128 x 2k", R=128, K=3, L=2048, V=300),
        ),
        bytes_moved=lambda case, itemsize: 2.0 * case.R * case.L,
    ),
    OpSpec(
        name="accept_drafts",
        op=_accept,
        reference=_accept_reference,
        cases=(
            Case("one", R=1, K=0, L=9, V=7),
            Case("few", R=3, K=3, L=20, V=5),
            Case("many", R=70, K=7, L=40, V=30),
        ),
        make_inputs=_accept_inputs,
        tolerance=_EXACT,
        devices=("cuda",),
        mutated=("token_table", "num_tokens", "counts"),
        bench_cases=(Case("256", R=256, K=1, L=2048, V=300),),
        bytes_moved=lambda case, itemsize: 30.0 * case.R * (1 + case.K),
    ),
)
