"""Same request, same bits: one set of requests, answered in every way that must not matter.

A request's answer is its tokens and their log-probabilities, compared as the floats they are.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine_figures import equality
from benchmarks.offline_engine import Answer, OfflineEngine, Prompt
from octavo.types import SamplingParams

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is asked."""

    prompt_lens: tuple[int, ...]
    output_len: int
    num_others: int
    other_len: int
    options: dict[str, Any]  # of every engine
    chunk: int  # tokens of a step, where chunks are small
    few_seqs: int  # requests at once there
    few_blocks: int  # of a cache that holds all prompts, but not all that is drawn after them


_FULL = Scale(
    prompt_lens=(17, 64, 100, 333, 512, 700, 1000, 1500),
    output_len=48,
    num_others=248,
    other_len=600,
    options={"max_model_len": 2048, "max_num_seqs": 256, "gpu_memory_utilization": 0.4},
    chunk=128,
    few_seqs=16,
    few_blocks=275,
)
_TINY = Scale(
    prompt_lens=(5, 14, 30),
    output_len=4,
    num_others=2,
    other_len=10,
    options={"max_model_len": 64, "max_num_seqs": 6, "max_num_batched_tokens": 32},
    chunk=8,
    few_seqs=3,
    few_blocks=4,
)


def measure_bits(shape: str, folder: Path, emit: Emit, *, is_short: bool = False) -> None:
    """A row for each way: how many requests had the answers that each has alone, launched kernel
    by kernel."""
    scale = _TINY if shape == "tiny" else _FULL
    rng = random.Random(1)

    def prompt(length: int) -> Prompt:
        return tuple(rng.randrange(2, 290) for _ in range(length))

    prompts = [prompt(length) for length in scale.prompt_lens]
    others = [prompt(rng.randint(1, scale.other_len)) for _ in range(scale.num_others)]
    params = [_params(i, scale.output_len) for i in range(len(prompts))]
    fillers = [_params(100 + i, scale.output_len) for i in range(len(others))]

    with _engine(folder, scale, enforce_eager=True) as engine:
        want = [_alone(engine, *each) for each in zip(prompts, params, strict=True)]

        def compare(case: str, got: Sequence[Answer], **extra: Any) -> None:
            num_equal = sum(a == b for a, b in zip(want, got, strict=True))
            emit(equality(f"{shape}, {case}", num_equal=num_equal, num_all=len(want), **extra))

        def crowd(engine: OfflineEngine) -> list[Answer]:
            engine.core.reset_prefix_cache()
            answers = engine.answer([*others, *prompts], [*fillers, *params])
            return answers[len(others) :]

        compare("together", _together(engine, prompts, params))
        compare("warm prefix", engine.answer(prompts, params))
        if not is_short:
            compare(f"among {len(others)} others", crowd(engine))
    graphs = {"cudagraph_capture_sizes": (4, 8, 16)} if shape == "tiny" else {}
    with _engine(folder, scale, **graphs) as engine:
        captured = engine.capture_all()
        alone = [_alone(engine, *each) for each in zip(prompts, params, strict=True)]
        compare("captured graphs, alone", alone, graphs=captured, counts=dict(engine.counts))
        compare(f"captured graphs, among {len(others)} others", crowd(engine))
    few = {"max_num_batched_tokens": scale.chunk, "max_num_seqs": scale.few_seqs}
    with _engine(folder, scale, **few) as engine:
        compare(f"chunks of {scale.chunk}", _together(engine, prompts, params))
    with _engine(folder, scale, num_gpu_blocks_override=scale.few_blocks) as engine:
        answers = _together(engine, prompts, params)
        preemptions = engine.counts.get("preemptions", 0)
        case = "preempted" if preemptions else "preempted (nobody was)"
        compare(case, answers, preemptions=preemptions)


def _params(number: int, output_len: int) -> SamplingParams:
    """Greedy and drawn by turns, some with penalties; with scores."""
    drawn = {"temperature": 0.8, "top_p": 0.9, "top_k": 40} if number % 2 else {"temperature": 0.0}
    penalty = 1.2 if number % 4 == 3 else 1.0
    return SamplingParams(
        max_tokens=output_len,
        ignore_eos=True,
        seed=number,
        repetition_penalty=penalty,
        logprobs=2 if number % 3 == 0 else None,
        **drawn,  # type: ignore[arg-type]
    )


def _alone(engine: OfflineEngine, prompt: Prompt, params: SamplingParams) -> Answer:
    return _together(engine, [prompt], [params])[0]


def _together(
    engine: OfflineEngine, prompts: Sequence[Prompt], params: Sequence[SamplingParams]
) -> list[Answer]:
    engine.core.reset_prefix_cache()
    return engine.answer(prompts, params)


@contextmanager
def _engine(folder: Path, scale: Scale, **options: Any) -> Iterator[OfflineEngine]:
    """An engine that leaves nothing behind for the next one to stumble over."""
    import torch

    engine = OfflineEngine(folder, **{**scale.options, **options})
    try:
        yield engine
    finally:
        engine.close()
        del engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
