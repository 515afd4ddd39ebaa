"""Sampling of a whole batch beside what it costs to sort in torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_recorder import Recorder, times_to_fill
from octavo_kernels.sampling import gpu

VOCAB = 128256
# name -> temperature, top_k, top_p, min_p
FILTERS = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "no filter": (1.0, 0, 1.0, 0.0),
    "top-k 50, top-p 0.9": (0.8, 50, 0.9, 0.0),
    "top-p 0.9": (1.0, 0, 0.9, 0.0),
    "min-p 0.05": (1.0, 0, 1.0, 0.05),
}


def run_sampling(recorder: Recorder, *, is_short: bool) -> None:
    seconds = 0.2 if is_short else 0.5
    for rows in (256,) if is_short else (256, 8, 1):
        for name, filters in FILTERS.items():
            case = f"{rows}x128k {name}"
            with recorder.case("sampling", case):
                sets = [_logits(rows) for _ in range(times_to_fill(4 * rows * VOCAB))]
                columns = _columns(rows, *filters)
                baselines: dict[str, list[Callable[[], Any]]] = {
                    "torch sort": [partial(sort_in_torch, x, *filters) for x in sets]
                }
                if name == "greedy":
                    baselines = {"torch argmax": [partial(torch.argmax, x, -1) for x in sets]}
                recorder.measure(
                    "sampling",
                    case,
                    [partial(gpu.sample, x, **columns) for x in sets],
                    baselines=baselines,
                    bytes_moved=sets[0].nbytes,
                    seconds=seconds,
                )
                del sets, baselines


def _logits(rows: int) -> Tensor:
    return 3 * torch.randn(rows, VOCAB, device="cuda")


def _columns(
    rows: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> dict[str, Tensor]:
    def column(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device="cuda")

    return {
        "temperature": column(temperature, torch.float32),
        "top_k": column(top_k, torch.int32),
        "top_p": column(top_p, torch.float32),
        "min_p": column(min_p, torch.float32),
        "seeds": torch.arange(rows, device="cuda"),
        "positions": column(7, torch.int64),
    }


def sort_in_torch(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """The usual way: sort the vocabulary, mask by rank, by mass before and by share, then draw."""
    scaled, order = torch.sort(logits / temperature, dim=-1, descending=True)
    probs = scaled.softmax(-1)
    gone = probs.cumsum(-1) - probs > top_p
    if top_k:
        gone[:, top_k:] = True
    gone |= probs < min_p * probs[:, :1]
    drawn = torch.multinomial(probs.masked_fill(gone, 0.0), 1)
    return order.gather(-1, drawn)
