"""Quantised weights on the CPU: what they cost in quality, and that bits still hang on nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest

from octavo.llm import LLM

PARAMS: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 24, "logprobs": 3},
    {"temperature": 0.9, "top_p": 0.95, "seed": 7, "max_tokens": 24, "logprobs": 3},
]
KINDS = {
    "auto": "int8 (q8_64)",
    "gguf": "gguf (q4_1, q8_0)",
    "int8": "int8 (q8_64)",
    "int4": "int4 (q4_1, q8_0)",
}


def engine(**options: Any) -> LLM:
    settings: dict[str, Any] = {"max_model_len": 1024, "num_gpu_blocks_override": 1024, **options}
    return LLM(device="cpu", **settings)


def perplexity(llm: LLM, texts: list[str]) -> float:
    answers = llm.generate(texts, temperature=0, max_tokens=1, prompt_logprobs=0)
    scores = [s.logprob for answer in answers for s in answer.prompt_logprobs or ()]
    return math.exp(-sum(scores) / len(scores))


@pytest.fixture(scope="module")
def texts(real_prompts: list[str]) -> list[str]:
    return [text[:1500] for text in real_prompts[::4]]


@pytest.fixture(scope="module")
def exact(texts: list[str]) -> float:
    return perplexity(engine(quantization="none"), texts)


@pytest.mark.parametrize("mode", ["auto", "gguf"])
def test_perplexity_is_that_of_the_whole_weights(mode: str, exact: float, texts: list[str]) -> None:
    llm = engine(quantization=mode)
    assert llm.info.quantization == KINDS[mode] and llm.info.kv_cache_dtype == "int8"
    rounded = perplexity(llm, texts)
    print(
        f"\nperplexity {exact:.4f} in float32, {rounded:.4f} in {mode}: {rounded / exact - 1:+.2%}"
    )
    assert rounded < 1.01 * exact


@pytest.mark.parametrize("mode", ["gguf", "int8", "int4"])
def test_same_request_same_bits(mode: str, real_prompts: list[str]) -> None:
    """The default mode has the whole table, in test_same_bits.py."""
    subject = real_prompts[33][:600]
    crowd = [text[:300] for text in real_prompts if not text.startswith(subject)][:12]

    def bits(llm: LLM, others: list[str]) -> list[Any]:
        mates = [{"temperature": 1.0, "seed": i, "max_tokens": 8 + i} for i in range(len(others))]
        answers = llm.generate([*others, subject, subject], [*mates, *PARAMS])
        return [(answer.token_ids, answer.logprobs) for answer in answers[len(others) :]]

    alone = bits(engine(quantization=mode, enable_prefix_caching=False), [])
    shared = engine(quantization=mode)
    assert shared.info.quantization == KINDS[mode]
    assert bits(shared, crowd) == alone
    assert bits(shared, crowd) == alone  # warm
    assert bits(engine(quantization=mode, long_prefill_token_threshold=7), []) == alone
    assert bits(engine(quantization=mode, num_threads=1), crowd[:3]) == alone


def test_what_it_does_not_go_with() -> None:
    with pytest.raises(ValueError, match="int8 takes dtype auto or float32, got bfloat16"):
        engine(quantization="int8", dtype="bfloat16")
    with pytest.raises(ValueError, match="must be one of auto, none, int8, int4, gguf, got 'int3'"):
        engine(quantization="int3")
