"""What to measure of sampling: how the first pass and the cut are spread over a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from octavo_kernels.sampling.gpu import (
    FEW_ROWS,
    GpuWorkspace,
    cut_default,
    cut_rows,
    read_all,
    survey_default,
    survey_key,
)
from octavo_kernels.tuning import Choice, Tunable

_VOCAB = 128256
_ROWS = {"few": 1, "many": 256}
_DTYPES = (torch.float32, torch.bfloat16)
# Groups of 1024 tokens and warps
_SURVEYS = ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 2), (4, 4), (4, 8), (8, 4), (8, 8))
# Warps, subtiles gathered at a time, candidates of a pass
_CUTS = ((4, 2, 512), (4, 4, 512), (4, 2, 1024), (8, 2, 1024), (8, 4, 1024), (8, 4, 2048))


def _dtype(key: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, key.split("-")[-1])
    return found


def _surveys(key: str) -> Iterable[Choice]:
    rows = _ROWS[key.split("-")[0]]
    first = survey_default(rows)
    others = [{"group": group, "num_warps": warps} for group, warps in _SURVEYS]
    return [first, *(choice for choice in others if choice != first)]


def _columns(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Temperature, and seeds that serve as positions too."""
    ones = torch.ones(rows, device="cuda")
    return ones, torch.arange(rows, dtype=torch.int64, device="cuda")


def _make_survey(key: str, choice: Choice) -> Callable[[], Any]:
    rows = _ROWS[key.split("-")[0]]
    logits = (torch.randn(rows, _VOCAB, device="cuda") * 3).to(_dtype(key))
    work = GpuWorkspace.create(rows, vocab_size=_VOCAB, dtype=logits.dtype, device="cuda")
    ones, numbers = _columns(rows)
    no_k = torch.zeros(rows, dtype=torch.int32, device="cuda")

    def run() -> Any:
        read_all(logits, work.peaks, (ones, no_k, numbers, numbers), work.bounds, choice)
        return work.peaks, work.bounds

    return run


def _cuts(key: str) -> Iterable[Choice]:
    first = cut_default()
    others = [{"num_warps": w, "group": group, "block": block} for w, group, block in _CUTS]
    return [first, *(choice for choice in others if choice != first)]


def _make_cut(key: str, choice: Choice) -> Callable[[], Any]:
    rows = _ROWS["many"]
    logits = (torch.randn(rows, _VOCAB, device="cuda") * 3).to(_dtype(key))
    work = GpuWorkspace.create(rows, vocab_size=_VOCAB, dtype=logits.dtype, device="cuda")
    ones, numbers = _columns(rows)
    top_k = torch.full((rows,), 50, dtype=torch.int32, device="cuda")
    read_all(logits, work.peaks, (ones, top_k, numbers, numbers), work.bounds)

    def run() -> Any:
        cut_rows(logits, (ones, top_k, ones * 0.9, ones * 0.0), work, choice)
        return work.cuts

    return run


assert _ROWS["few"] < FEW_ROWS <= _ROWS["many"]

TUNABLES = (
    Tunable(
        op="sampling_survey",
        keys=tuple(survey_key(rows, dtype) for rows in _ROWS.values() for dtype in _DTYPES),
        candidates=_surveys,
        make=_make_survey,
        rotate=4,
    ),
    Tunable(
        op="sampling_cut",
        keys=tuple(str(dtype).removeprefix("torch.") for dtype in _DTYPES),
        candidates=_cuts,
        make=_make_cut,
    ),
)
