"""What tests and benchmarks need to know of the step's own ops; runs nothing."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from octavo_kernels.op import Case, OpSpec, Tol
from octavo_kernels.step_inputs.gpu import (
    SamplingColumns,
    build_step_inputs,
    gather_rows,
    gather_sampling,
    scatter_words,
)
from octavo_kernels.step_inputs.reference import (
    build_step_inputs_reference,
    gather_rows_reference,
    gather_sampling_reference,
    scatter_words_reference,
)

_EXACT = {torch.float32: Tol(0.0, 0.0)}


def _ints(values: Any, device: torch.device) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32).to(device)


def _random(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)


def _scatter_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    """U ranges of 0 to n words between gaps; the first three lead outside, negative or beyond."""
    counts = _random(0, case.n + 1, (case.U,), generator).tolist()
    starts = list(itertools.accumulate((count + 3 for count in counts), initial=9))
    places = torch.randperm(case.U, generator=generator).tolist()
    ranges = [[starts[places[i]], starts[i], counts[i]] for i in range(case.U)]
    for index, wrong in enumerate([[-1, 2, 3], [2, -1, 3], [2, 3, -1]][: case.U // 4]):
        ranges[index] = wrong
    num_words = starts[-1]
    return {
        "words": _random(0, 10**6, (num_words,), generator).to(device),
        "ranges": _ints(ranges, device).reshape(case.U, 3),
        "arena": _random(-9, 0, (num_words - 7,), generator).to(device),
    }


def _scatter(words: Tensor, *, ranges: Tensor, arena: Tensor) -> Tensor:
    scatter_words(words, ranges=ranges, arena=arena, max_len=600)
    return arena


def _scatter_reference(words: Tensor, *, ranges: Tensor, arena: Tensor) -> Tensor:
    scatter_words_reference(words, ranges=ranges, arena=arena)
    return arena


def _build_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    """R requests of 0 to Q tokens, every fifth without a row, and `pad` tokens of padding."""
    num_rows = 2 * case.R + 1
    rows = torch.randperm(num_rows, generator=generator)[: case.R].to(torch.int32)
    rows[4::5] = -1
    query_lens = _random(0 if case.Q > 1 else 1, case.Q + 1, (case.R,), generator)
    starts = [0, *itertools.accumulate(query_lens.tolist())]
    before = _random(0, case.L - case.Q + 1, (case.R,), generator)
    blocks = -(-case.L // case.B)
    tables = torch.randperm(num_rows * blocks, generator=generator).to(torch.int32)
    num_tokens = starts[-1] + case.pad
    outs = ("token_ids", "positions", "slots")
    return {
        "batch_rows": rows.to(device),
        "query_start_loc": _ints(starts, device),
        "seq_lens": (before + query_lens).to(device),
        "token_table": _random(0, 10**5, (num_rows, case.L), generator).to(device),
        "block_table": tables.reshape(num_rows, blocks).to(device),
        "block_size": case.B,
        "num_tokens": num_tokens,
        "block_tables": torch.full((case.R, blocks), -7, dtype=torch.int32, device=device),
    } | {name: torch.full((num_tokens,), -7, dtype=torch.int32, device=device) for name in outs}


def _build(**inputs: Any) -> tuple[Tensor, ...]:
    build_step_inputs(max_query_len=inputs["num_tokens"], **inputs)
    return tuple(inputs[name] for name in ("token_ids", "positions", "slots", "block_tables"))


def _build_reference(**inputs: Any) -> tuple[Tensor, ...]:
    build_step_inputs_reference(**inputs)
    return tuple(inputs[name] for name in ("token_ids", "positions", "slots", "block_tables"))


def _sampling_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    columns = {name: torch.rand(case.N, generator=generator) for name in ("temperature", "top_p")}
    columns["min_p"] = torch.rand(case.N, generator=generator)
    columns["top_k"] = _random(0, 100, (case.N,), generator)
    columns["seeds"] = torch.randint(-(2**62), 2**62, (case.N,), generator=generator)
    rows = _random(-2, case.N + 2, (case.S,), generator)
    positions = _random(0, 2**31 - 1, (case.S,), generator)
    found = {"rows": rows, "positions": positions, **columns}
    return {name: tensor.to(device) for name, tensor in found.items()}


def _sampling(rows: Tensor, **columns: Tensor) -> tuple[Tensor, ...]:
    out = SamplingColumns.create(rows.shape[0], device=rows.device)
    gather_sampling(rows, out=out, **columns)
    found = out.arguments()
    return tuple(found[name] for name in sorted(found))


def _sampling_reference(rows: Tensor, **columns: Tensor) -> tuple[Tensor, ...]:
    found = gather_sampling_reference(rows, **columns)
    return tuple(found[name] for name in sorted(found))


def _rows_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    return {
        "hidden": torch.randn(case.T, case.D, generator=generator).to(device, dtype),
        "index": _random(-1, case.T + 1, (case.S,), generator).to(device),
    }


def _rows(hidden: Tensor, index: Tensor, *, out: Tensor | None = None) -> Tensor:
    if out is None:
        out = hidden.new_empty(index.shape[0], hidden.shape[1])
    return gather_rows(hidden, index, out=out)


def _index_select(hidden: Tensor, index: Tensor) -> Tensor:
    return hidden.index_select(0, index)


SPECS = (
    OpSpec(
        name="scatter_words",
        op=_scatter,
        reference=_scatter_reference,
        cases=(
            Case("none", U=0, n=4),
            Case("one", U=1, n=1),
            Case("many", U=37, n=9),
            Case("long", U=3, n=9000),
        ),
        make_inputs=_scatter_inputs,
        tolerance=_EXACT,
        devices=("cuda",),
        mutated=("arena",),
        bench_cases=(Case("decode", U=256, n=1), Case("prompts", U=8, n=2048)),
        bytes_moved=lambda case, itemsize: 4.0 * case.U * case.n,
    ),
    OpSpec(
        name="build_step_inputs",
        op=_build,
        reference=_build_reference,
        cases=(
            Case("one", R=1, Q=1, L=3, B=16, pad=0),
            Case("decode", R=9, Q=1, L=130, B=16, pad=7),
            Case("mixed", R=7, Q=40, L=97, B=32, pad=3),
            Case("prompt", R=1, Q=700, L=701, B=128, pad=0),
            Case("empty", R=0, Q=1, L=16, B=64, pad=5),
        ),
        make_inputs=_build_inputs,
        tolerance=_EXACT,
        devices=("cuda",),
        mutated=("token_ids", "positions", "slots", "block_tables"),
        bench_cases=(
            Case("decode", R=256, Q=1, L=2048, B=16, pad=0),
            Case("mixed", R=256, Q=64, L=2048, B=16, pad=0),
        ),
        bytes_moved=lambda case, itemsize: 4.0 * case.R * case.L / case.B,
    ),
    OpSpec(
        name="gather_sampling",
        op=_sampling,
        reference=_sampling_reference,
        cases=(Case("none", N=3, S=0), Case("one", N=1, S=1), Case("many", N=70, S=200)),
        make_inputs=_sampling_inputs,
        tolerance=_EXACT,
        devices=("cuda",),
        rows=("rows", "positions"),
        bench_cases=(Case("256", N=256, S=256),),
        bytes_moved=lambda case, itemsize: 68.0 * case.S,
    ),
    OpSpec(
        name="gather_rows",
        op=_rows,
        reference=gather_rows_reference,
        cases=(
            Case("none", T=2, D=8, S=0),
            Case("one", T=1, D=1, S=1),
            Case("odd", T=19, D=77, S=23),
            Case("wide", T=5, D=1500, S=4),
        ),
        make_inputs=_rows_inputs,
        tolerance={d: Tol(0.0, 0.0) for d in (torch.float32, torch.bfloat16)},
        devices=("cuda",),
        takes_out=True,
        rows=("index",),
        bench_cases=(Case("256", T=512, D=4096, S=256),),
        bytes_moved=lambda case, itemsize: 2.0 * case.S * case.D * itemsize,
        baselines={"torch": _index_select},
    ),
)
