"""Speculation with the real model: the same tokens as without, alone and in a batch.

A small share of what ``python -m benchmarks.spec_identity`` compares.
"""

from __future__ import annotations

import pytest

from benchmarks.spec_identity import METHODS, Config, Level, compare, engine
from octavo.engine.outputs import DraftStats
from octavo.llm import LLM


@pytest.fixture(scope="module")
def talks(real_prompts: list[str]) -> list[str]:
    """News to be told again, code, conversation and mathematics."""
    texts = [text[:700] for text in real_prompts[::5]]
    return [f"{text}\n\nAgain, word for word:\n{text[:60]}" for text in texts]


def test_tokens_and_logprobs_are_those_without_drafts(talks: list[str]) -> None:
    levels = [Level(batch=1, num_prompts=3), Level(batch=8, num_prompts=8)]
    drafts = dict.fromkeys(METHODS, DraftStats())

    def make(config: Config) -> LLM:
        llm = engine(config)
        most = 0 if config["method"] == "off" else config.get("num_speculative_tokens", 8)
        name = config["method"]
        if name in ("auto", "eagle3"):
            name += " with Octavo's head for SmolLM2-135M-Instruct"
        assert (llm.info.speculation, llm.info.max_drafts) == (name, most)
        return llm

    print()
    for cell in compare(talks, METHODS, levels=levels, max_tokens=32, make=make):
        print(cell)
        assert cell.is_right, str(cell)
        drafts[cell.method] += cell.drafts
    for method, stats in drafts.items():
        if method != "auto":  # which follows the clock
            assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens, method
