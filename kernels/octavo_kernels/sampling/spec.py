"""The sampling ops described for tests and benchmarks. Knows sizes, not how they are computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from octavo_kernels.op import Case, OpSpec, Tol
from octavo_kernels.sampling import (
    sample,
    sample_reference,
    topn_logprobs,
    topn_logprobs_reference,
)

_FILTERS = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "plain": (1.0, 0, 1.0, 0.0),
    "top_p": (0.8, 0, 0.95, 0.0),
    "top_k": (1.3, 20, 1.0, 0.0),
    "all": (0.7, 40, 0.9, 0.02),
}


def _sample_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    temperature, top_k, top_p, min_p = _FILTERS[case.filters]
    rows: int = case.S
    return {
        "logits": torch.randn(rows, case.V, generator=generator, dtype=dtype, device=device) * 3,
        "temperature": torch.full((rows,), temperature, device=device),
        "top_k": torch.full((rows,), top_k, dtype=torch.int32, device=device),
        "top_p": torch.full((rows,), top_p, device=device),
        "min_p": torch.full((rows,), min_p, device=device),
        "seeds": torch.randint(-(2**62), 2**62, (rows,), generator=generator).to(device),
        "positions": torch.randint(0, 2**20, (rows,), generator=generator).to(device),
    }


def _sample_tokens(logits: Tensor, **columns: Any) -> Tensor:
    return sample(logits, **columns)[0]


def _torch_sample(logits: Tensor, *, temperature: Tensor, top_p: Tensor, **_: Tensor) -> Tensor:
    """The usual torch way: full sort, cumulative sum, multinomial."""
    if not bool(temperature.any()):
        return logits.argmax(1)
    values, order = (logits / temperature[:, None]).sort(dim=1, descending=True)
    probs = values.softmax(1)
    probs = torch.where(probs.cumsum(1) - probs < top_p[:, None], probs, 0.0)
    return order.gather(1, probs.multinomial(1))[:, 0]


def _logprob_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    logits = torch.randn(case.S, case.V, generator=generator, dtype=dtype, device=device) * 4
    logits[:, case.V // 2] = logits[:, 0]  # a tie
    return {
        "logits": logits,
        "chosen": torch.randint(0, case.V, (case.S,), generator=generator).to(device),
        "num_best": case.n,
    }


def _logprobs(logits: Tensor, *, chosen: Tensor, num_best: int) -> tuple[Tensor, ...]:
    found = topn_logprobs(logits, chosen=chosen, num_best=num_best)
    return found.chosen, found.ranks, found.ids, found.logprobs


_COLUMNS = ("logits", "temperature", "top_k", "top_p", "min_p", "seeds", "positions")
_TOL = {torch.float32: Tol(atol=2e-6, rtol=1e-6)}

SPECS = (
    OpSpec(
        name="sample",
        op=_sample_tokens,
        reference=sample_reference,
        cases=(
            *(Case(f"{name}_odd", S=5, V=1531, filters=name) for name in _FILTERS),
            Case("one_token", S=3, V=1, filters="plain"),
            Case("tiny", S=9, V=7, filters="all"),
            Case("none", S=0, V=300, filters="plain"),
        ),
        make_inputs=_sample_inputs,
        tolerance=_TOL,
        rows=_COLUMNS,
        bytes_moved=lambda case, itemsize: float(case.S * case.V * itemsize),
        baselines={"torch": _torch_sample},
        bench_cases=(
            Case("greedy_256", S=256, V=49152, filters="greedy"),
            Case("top_p_32", S=32, V=49152, filters="top_p"),
            Case("plain_32", S=32, V=49152, filters="plain"),
        ),
    ),
    OpSpec(
        name="topn_logprobs",
        op=_logprobs,
        reference=topn_logprobs_reference,
        cases=(
            Case("odd", S=5, V=1531, n=5),
            Case("one_token", S=2, V=1, n=1),
            Case("whole", S=3, V=300, n=300),
            Case("chosen_only", S=4, V=777, n=0),
            Case("none", S=0, V=300, n=2),
        ),
        make_inputs=_logprob_inputs,
        tolerance=_TOL,
        rows=("logits", "chosen"),
        bytes_moved=lambda case, itemsize: float(case.S * case.V * itemsize),
        baselines={"torch": lambda logits, chosen, num_best: logits.log_softmax(1).topk(num_best)},
        bench_cases=(Case("best20_32", S=32, V=49152, n=20),),
    ),
)
