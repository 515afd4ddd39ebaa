"""The sampling ops on a GPU described for tests and benchmarks. Knows sizes and references."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from octavo_kernels.op import Case, OpSpec, Tol
from octavo_kernels.sampling.gpu import sample, topn_logprobs
from octavo_kernels.sampling.reference import sample_reference, topn_logprobs_reference

# name -> temperature, top_k, top_p, min_p
_FILTERS = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "plain": (1.0, 0, 1.0, 0.0),
    "top_p": (0.8, 0, 0.95, 0.0),
    "top_k": (1.3, 3, 1.0, 0.0),
    "many_k": (1.3, 60, 0.9, 0.0),
    "min_p": (1.0, 0, 1.0, 0.05),
    "all": (0.7, 3, 0.9, 0.02),
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _sample_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    temperature, top_k, top_p, min_p = _FILTERS[case.filters]
    rows: int = case.S
    return {
        "logits": (torch.randn(rows, case.V, generator=generator) * 3).to(device, dtype),
        "temperature": torch.full((rows,), temperature, device=device),
        "top_k": torch.full((rows,), top_k, dtype=torch.int32, device=device),
        "top_p": torch.full((rows,), top_p, device=device),
        "min_p": torch.full((rows,), min_p, device=device),
        "seeds": torch.randint(-(2**62), 2**62, (rows,), generator=generator).to(device),
        "positions": torch.randint(0, 2**20, (rows,), generator=generator).to(device),
    }


def _tokens(logits: Tensor, **columns: Any) -> Tensor:
    return sample(logits, **columns)[0]


def _tokens_reference(logits: Tensor, **columns: Tensor) -> Tensor:
    found = sample_reference(logits.cpu(), **{name: x.cpu() for name, x in columns.items()})
    lowest = torch.tensor([int((row == row.max()).nonzero()[0]) for row in logits.cpu()])
    is_greedy = columns["temperature"].cpu() == 0
    return torch.where(is_greedy, lowest.to(torch.int64), found).to(logits.device)


def _torch_sample(
    logits: Tensor, *, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, **_: Tensor
) -> Tensor:
    """The usual torch way, without a look at any value: full sort, cumulative sum, multinomial."""
    scale = temperature.clamp(min=1e-5)[:, None]
    probs, order = (logits.float() / scale).softmax(1).sort(dim=1, descending=True)
    places = torch.arange(logits.shape[1], device=logits.device)
    limit = torch.where(top_k > 0, top_k, logits.shape[1])[:, None]
    stays = (places < limit) & (probs.cumsum(1) - probs < top_p[:, None])
    stays &= probs >= min_p[:, None] * probs[:, :1]
    drawn = torch.where(stays, probs, 0.0).multinomial(1)
    return order.gather(1, drawn)[:, 0]


def _torch_argmax(logits: Tensor, **_: Tensor) -> Tensor:
    return logits.argmax(1)


def _logprob_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    logits = torch.randn(case.S, case.V, generator=generator) * 4
    logits[:, case.V // 2] = logits[:, 0]  # a tie
    return {
        "logits": logits.to(device, dtype),
        "chosen": torch.randint(0, case.V, (case.S,), generator=generator).to(device),
        "num_best": case.n,
    }


def _scores(logits: Tensor, *, chosen: Tensor, num_best: int) -> tuple[Tensor, ...]:
    found = topn_logprobs(logits, chosen=chosen, num_best=num_best)
    return found.chosen, found.ranks, found.ids, found.logprobs


def _read_once(case: Case, itemsize: int) -> float:
    return float(case.S * case.V * itemsize)


_COLUMNS = ("logits", "temperature", "top_k", "top_p", "min_p", "seeds", "positions")
_TOL = dict.fromkeys(_DTYPES, Tol(atol=2e-6, rtol=1e-6))


def _sample_spec(
    name: str, dtypes: tuple[torch.dtype, ...], cases: tuple[Case, ...], bench: tuple[Case, ...]
) -> OpSpec:
    return OpSpec(
        name=name,
        op=_tokens,
        reference=_tokens_reference,
        cases=cases,
        make_inputs=_sample_inputs,
        tolerance={dtype: _TOL[dtype] for dtype in dtypes},
        devices=("cuda",),
        rows=_COLUMNS,
        bytes_moved=_read_once,
        baselines={"torch sort": _torch_sample, "torch argmax": _torch_argmax},
        bench_cases=bench,
    )


SPECS = (
    _sample_spec(
        "sample",
        _DTYPES[:1],
        (
            *(Case(name, S=2, V=1100, filters=name) for name in _FILTERS),
            Case("one_token", S=2, V=1, filters="plain"),
            Case("tiny", S=2, V=7, filters="all"),
            Case("whole_subtiles", S=2, V=1024, filters="top_p"),
            Case("none", S=0, V=300, filters="plain"),
        ),
        tuple(
            Case(f"{name}_{rows}", S=rows, V=128256, filters=name)
            for rows in (1, 256)
            for name in _FILTERS
        ),
    ),
    _sample_spec(
        "sample_16_bit",
        _DTYPES[1:],
        tuple(Case(name, S=1, V=1100, filters=name) for name in ("greedy", "plain", "all")),
        tuple(
            Case(f"{name}_256", S=256, V=128256, filters=name)
            for name in ("greedy", "plain", "all")
        ),
    ),
    OpSpec(
        name="topn_logprobs",
        op=_scores,
        reference=topn_logprobs_reference,
        cases=(
            Case("odd", S=3, V=1100, n=5),
            Case("one_token", S=2, V=1, n=1),
            Case("whole", S=2, V=40, n=40),
            Case("chosen_only", S=3, V=777, n=0),
            Case("none", S=0, V=300, n=2),
        ),
        make_inputs=_logprob_inputs,
        tolerance=_TOL,
        devices=("cuda",),
        rows=("logits", "chosen"),
        bytes_moved=_read_once,
        baselines={"torch": lambda logits, chosen, num_best: logits.log_softmax(1).topk(num_best)},
        bench_cases=(
            Case("best20_256", S=256, V=128256, n=20),
            Case("best1_2048", S=2048, V=128256, n=1),
        ),
    ),
)
