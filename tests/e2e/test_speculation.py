"""Speculation with the real model: the same tokens as without, alone and in a batch."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.llm import LLM

METHODS = ("auto", "ngram", "suffix")
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.8, "seed": 11},
}


def engine(method: str) -> LLM:
    return LLM(
        device="cpu",
        max_model_len=1024,
        num_gpu_blocks_override=1200,
        speculative_config={"method": method, "num_speculative_tokens": 5},
    )


def answers(llm: LLM, prompts: list[str], kind: str, *, alone: bool) -> list[Any]:
    params = {"max_tokens": 32, "logprobs": 1, **KINDS[kind]}
    groups = [[prompt] for prompt in prompts] if alone else [prompts]
    found = [answer for group in groups for answer in llm.generate(group, **params)]
    return [(answer.token_ids, answer.logprobs) for answer in found]


@pytest.fixture(scope="module")
def prompts(real_prompts: list[str]) -> list[str]:
    """News to be told again, code, conversation and mathematics."""
    texts = [text[:700] for text in real_prompts[::5]]
    return [f"{text}\n\nAgain, word for word:\n{text[:60]}" for text in texts]


def test_tokens_and_logprobs_are_those_without_drafts(prompts: list[str]) -> None:
    plain = engine("off")
    want = {
        (kind, alone): answers(plain, prompts if not alone else prompts[:3], kind, alone=alone)
        for kind in KINDS
        for alone in (False, True)
    }
    lines = []
    for method in METHODS:
        llm = engine(method)
        assert llm.info.speculation == method and llm.info.max_drafts == 5
        for (kind, alone), expected in want.items():
            chosen = prompts[:3] if alone else prompts
            found = answers(llm, chosen, kind, alone=alone)
            assert found == expected, (method, kind, alone)
            where = "alone" if alone else "together"
            lines.append(f"{method:7} {kind:7} {where:9} {len(found)} of {len(expected)} equal")
    print("\n" + "\n".join(lines))
