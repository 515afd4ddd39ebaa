"""Same request, same bits: the real model on CPU, one row per way of running it.

Every cell compares tokens and the float values of all log-probabilities with ``==``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from octavo.llm import LLM, Generation

BLOCKS = 1024
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "max_tokens": 24, "logprobs": 3},
    "seeded": {"temperature": 0.9, "top_p": 0.95, "seed": 7, "max_tokens": 24, "logprobs": 3},
    "penalised": {
        "temperature": 0.7,
        "top_k": 50,
        "min_p": 0.02,
        "seed": 11,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "logit_bias": {198: -2.0},
        "max_tokens": 24,
        "logprobs": 2,
    },
    "scored prompt": {"temperature": 0, "max_tokens": 4, "logprobs": 0, "prompt_logprobs": 2},
}
Bits = dict[str, tuple[Any, ...]]


def engine_of(**options: Any) -> LLM:
    settings: dict[str, Any] = {
        "max_model_len": 1024,
        "num_gpu_blocks_override": BLOCKS,
        "max_num_seqs": 64,
        "check_kv_invariants": True,
        **options,
    }
    return LLM(**settings)


def bits(generation: Generation) -> tuple[Any, ...]:
    return (generation.token_ids, generation.logprobs, generation.prompt_logprobs)


def alone(llm: LLM, prompt: str) -> Bits:
    return {name: bits(llm.generate(prompt, params)[0]) for name, params in PARAMS.items()}


def in_a_crowd(llm: LLM, prompt: str, crowd: list[str]) -> Bits:
    """All of PARAMS at once among 32 other requests, in the middle of them."""
    others = [{"temperature": 1.0, "seed": i, "max_tokens": 8 + i} for i in range(32)]
    half = len(others) // 2
    prompts = [*crowd[:half], *[prompt] * len(PARAMS), *crowd[half : len(others)]]
    params = [*others[:half], *PARAMS.values(), *others[half:]]
    answers = llm.generate(prompts, params)
    return {name: bits(answers[half + i]) for i, name in enumerate(PARAMS)}


def preempted(llm: LLM, prompt: str, crowd: list[str]) -> Bits:
    """Too few blocks for all: requests are preempted and resumed."""
    before = llm.num_preemptions
    answers = llm.generate(
        [*[prompt] * len(PARAMS), *crowd[:6]],
        [*PARAMS.values(), *[{"temperature": 1.0, "seed": i, "max_tokens": 60} for i in range(6)]],
    )
    assert llm.num_preemptions > before, "the cache was not scarce"
    return {name: bits(answers[i]) for i, name in enumerate(PARAMS)}


@pytest.fixture(scope="module")
def subject(real_prompts: list[str]) -> str:
    return real_prompts[33][:1200]


# The default mode, and the exact one.
@pytest.mark.parametrize("quantization", ["auto", "none"])
def test_same_request_same_bits(quantization: str, subject: str, real_prompts: list[str]) -> None:
    def engine(**options: Any) -> LLM:
        return engine_of(quantization=quantization, **options)

    crowd = [text[:400] for text in real_prompts if text != subject][:32]
    reference = alone(engine(enable_prefix_caching=False, async_scheduling=False), subject)
    warm = engine()

    def warmed() -> Bits:
        warm.generate(subject, {"temperature": 0, "max_tokens": 1})
        answer = warm.generate(subject, PARAMS["greedy"])[0]
        assert answer.num_cached_tokens > 0, "the prefix cache was cold"
        return alone(warm, subject)

    def forked() -> Bits:
        """Choice 0 of n = 3 is the request itself; the others share its blocks."""
        answers = {
            name: bits(warm.generate(subject, {**params, "n": 3})[0])
            for name, params in PARAMS.items()
        }
        return answers

    def cold(run: Callable[[], Bits]) -> Bits:
        warm.reset_prefix_cache()
        return run()

    small = engine(max_num_batched_tokens=64, enable_prefix_caching=False)
    scarce = {"max_model_len": 512, "num_gpu_blocks_override": 36}
    rows: dict[str, Callable[[], Bits]] = {
        "alone, cold": lambda: cold(lambda: alone(warm, subject)),
        "warm prefix cache": warmed,
        "n = 3, copy on write": forked,
        "among 32 others, warm": lambda: in_a_crowd(warm, subject, crowd),
        "among 32 others, cold": lambda: cold(lambda: in_a_crowd(warm, subject, crowd)),
        "chunks of 64 tokens": lambda: alone(small, subject),
        "chunks, among 32 others": lambda: in_a_crowd(small, subject, crowd),
        "chunks of 7 tokens": lambda: alone(engine(long_prefill_token_threshold=7), subject),
        "preempted, resumed": lambda: preempted(engine(**scarce), subject, crowd),
        "one thread": lambda: alone(engine(num_threads=1), subject),
        "blocks of 32 tokens": lambda: alone(
            engine(block_size=32, num_gpu_blocks_override=BLOCKS // 2), subject
        ),
    }
    table = {row: run() for row, run in rows.items()}
    width = max(map(len, rows)) + 2
    print("\n" + " " * width + "  ".join(f"{name:>13}" for name in PARAMS))
    different = []
    for row, answer in table.items():
        same = {name: answer[name] == reference[name] for name in PARAMS}
        cells = ("same bits" if same[name] else "DIFFERENT" for name in PARAMS)
        print(f"{row:<{width}}" + "  ".join(f"{cell:>13}" for cell in cells))
        different += [f"{row}: {name}" for name, equal in same.items() if not equal]
    assert not different
