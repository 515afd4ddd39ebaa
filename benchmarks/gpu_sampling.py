"""Sampling, scores and penalties of a whole batch beside what they cost in torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_recorder import Recorder, times_to_fill
from octavo_kernels.sampling import gpu, gpu_params

VOCAB = 128256
# name -> temperature, top_k, top_p, min_p
FILTERS = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "no filter": (1.0, 0, 1.0, 0.0),
    "top-k 50, top-p 0.9": (0.8, 50, 0.9, 0.0),
    "top-p 0.9": (1.0, 0, 0.9, 0.0),
    "min-p 0.05": (1.0, 0, 1.0, 0.05),
}


# name -> spread of the logits, and how high twenty tokens stand out
LOGITS = {"": (3.0, 0.0), " peaked": (3.0, 12.0), " flat": (0.5, 0.0)}


def run_sampling(recorder: Recorder, *, is_short: bool) -> None:
    seconds = 0.2 if is_short else 0.5
    for rows in (256,) if is_short else (256, 8, 1):
        for kind in LOGITS if rows == 256 else ("",):
            for name, filters in FILTERS.items():
                if kind and name in ("greedy", "min-p 0.05"):
                    continue
                _run_filters(recorder, rows, kind, f"{name}{kind}", filters, seconds)
    _run_scores(recorder, seconds)
    _run_penalties(recorder, 256, seconds)


def _run_filters(
    recorder: Recorder,
    rows: int,
    kind: str,
    name: str,
    filters: tuple[float, int, float, float],
    seconds: float,
) -> None:
    case = f"{rows}x128k {name}"
    with recorder.case("sampling", case):
        sets = [_logits(rows, kind) for _ in range(times_to_fill(4 * rows * VOCAB))]
        columns = _columns(rows, *filters)
        baselines: dict[str, list[Callable[[], Any]]] = {
            "torch sort": [partial(sort_in_torch, x, *filters) for x in sets]
        }
        if filters[0] == 0.0:
            baselines = {"torch argmax": [partial(torch.argmax, x, -1) for x in sets]}
        recorder.measure(
            "sampling",
            case,
            [partial(gpu.sample, x, **columns) for x in sets],
            baselines=baselines,
            bytes_moved=sets[0].nbytes,
            seconds=seconds,
        )


def _run_scores(recorder: Recorder, seconds: float) -> None:
    for rows, num_best in ((256, 20), (2048, 1)):
        case = f"{rows}x128k best {num_best}"
        with recorder.case("topn_logprobs", case):
            sets = [_logits(rows, "") for _ in range(2)]
            chosen = torch.arange(rows, device="cuda")
            recorder.measure(
                "topn_logprobs",
                case,
                [partial(gpu.topn_logprobs, x, chosen=chosen, num_best=num_best) for x in sets],
                baselines={"torch": [partial(_scores_in_torch, x, chosen, num_best) for x in sets]},
                bytes_moved=2 * sets[0].nbytes,
                seconds=seconds,
            )


def _run_penalties(recorder: Recorder, rows: int, seconds: float) -> None:
    """Every row repeats 1000 tokens; the logits change in place, again and again."""
    case = f"{rows}x128k penalties"
    with recorder.case("apply_logit_params", case):
        sets = [_logits(rows, "") for _ in range(2)]
        params = gpu_params.GpuLogitParams.create(
            num_slots=rows, vocab_size=VOCAB, max_tokens=1000, list_capacity=64, device="cuda"
        )
        lists = params.lists
        lists.token_ids.random_(0, VOCAB)
        lists.num_prompt_tokens.fill_(500)
        lists.num_tokens.fill_(1000)
        lists.repetition_penalty.fill_(1.1)
        lists.frequency_penalty.fill_(0.1)
        lists.presence_penalty.fill_(0.1)
        slots = torch.arange(rows, dtype=torch.int32, device="cuda")
        gpu_params.load_slots(params, slots)
        apply = partial(gpu_params.apply_logit_params, params=params, rows=slots, slots=slots)
        recorder.measure(
            "apply_logit_params",
            case,
            [partial(apply, x) for x in sets],
            baselines={"torch": [partial(_penalise_in_torch, x, params.counts) for x in sets]},
            bytes_moved=3 * sets[0].nbytes,
            seconds=seconds,
        )


def _logits(rows: int, kind: str) -> Tensor:
    spread, lead = LOGITS[kind]
    found = spread * torch.randn(rows, VOCAB, device="cuda")
    found[:, 100 : 100 + 20] += lead
    return found


def _columns(
    rows: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> dict[str, Any]:
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


def _scores_in_torch(logits: Tensor, chosen: Tensor, num_best: int) -> tuple[Tensor, Any]:
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(-1, chosen[:, None]), logprobs.topk(num_best)


def _penalise_in_torch(logits: Tensor, counts: Tensor) -> Tensor:
    repeated = torch.where(logits > 0, logits / 1.1, logits * 1.1)
    logits = torch.where(counts != 0, repeated, logits)
    return logits - 0.1 * (counts >> 1) - 0.1 * (counts >= 2)
