"""A choice reads the same however the engine groups its tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine.outputs import (
    Choice,
    ChoiceReader,
    ChoiceResult,
    DraftStats,
    RequestFailedError,
    best_choices,
    read_choices,
)
from octavo.text.detokenizer import TextParams
from octavo.types import (
    EngineOutput,
    EngineRequest,
    FinishReason,
    SamplingParams,
    TokenLogprobs,
)
from tests.api.serving import EOS, small_tokenizer

TOKENIZER = small_tokenizer()
PARAMS = SamplingParams(logprobs=0, prompt_logprobs=0, max_tokens=100)


def choice_of(text: TextParams, *, index: int = 0) -> Choice:
    request = EngineRequest(request_id=f"r{index}", prompt_token_ids=(5, 6), params=PARAMS)
    return Choice(index=index, prompt_index=0, request=request, text=text)


def entry(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id=token_id, logprob=-token_id / 7, rank=1)


def outputs_of(tokens: list[int], cuts: list[int], reason: FinishReason) -> list[EngineOutput]:
    edges = sorted({0, len(tokens), *(c % (len(tokens) + 1) for c in cuts)})
    outputs = [
        EngineOutput(
            request_id="r0",
            new_token_ids=tuple(tokens[a:b]),
            new_logprobs=tuple(entry(t) for t in tokens[a:b]),
            new_prompt_logprobs=(entry(6),) if a == 0 else (),
            num_cached_tokens=1,
            finish_reason=reason if b == len(tokens) else None,
        )
        for a, b in pairwise(edges)
    ]
    return outputs or [EngineOutput(request_id="r0", finish_reason=reason)]


def read(text: TextParams, outputs: list[EngineOutput]) -> ChoiceResult:
    reader = ChoiceReader(choice_of(text), tokenizer=TOKENIZER)
    result = ChoiceResult(index=0)
    for output in outputs:
        delta = reader.read(output)
        assert len(delta.token_ids) == len(delta.logprobs) == len(delta.text_offsets)
        result.add(delta)
        if delta.finish_reason is not None:
            break
    return result


def essence(result: ChoiceResult) -> Any:
    return (
        result.text,
        result.token_ids,
        result.logprobs,
        result.text_offsets,
        result.stop_reason,
        result.finish_reason,
    )


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(max_size=30),
    cuts=st.lists(st.integers(0, 200), max_size=10),
    stop=st.lists(st.text(min_size=1, max_size=3), max_size=3),
    include=st.booleans(),
    min_tokens=st.integers(0, 5),
    ends_by_eos=st.booleans(),
)
def test_grouping_changes_nothing(
    text: str, cuts: list[int], stop: list[str], include: bool, min_tokens: int, ends_by_eos: bool
) -> None:
    tokens = TOKENIZER.encode("x" + text) + ([EOS] if ends_by_eos else [])
    reason = FinishReason.STOP if ends_by_eos else FinishReason.LENGTH
    params = TextParams(stop=tuple(stop), include_stop_str_in_output=include, min_tokens=min_tokens)
    whole = read(params, outputs_of(tokens, [], reason))
    grouped = read(params, outputs_of(tokens, cuts, reason))
    single = read(params, outputs_of(tokens, list(range(len(tokens))), reason))
    assert essence(whole) == essence(grouped) == essence(single)
    assert whole.prompt_logprobs == grouped.prompt_logprobs == (entry(6),)
    if not stop:
        assert whole.text == "x" + text and whole.finish_reason is reason


def test_the_best() -> None:
    results = []
    for index, logprobs in enumerate([[-3.0], [-1.0, -1.0], [-0.5], [-2.0]]):
        entries = [TokenLogprobs(token_id=5, logprob=value, rank=1) for value in logprobs]
        results.append(ChoiceResult(index=index, logprobs=entries))
    assert [r.index for r in best_choices(results, n=3)] == [2, 1, 3]


class OneByOne:
    """Gives one token a turn, for ever; remembers who was closed."""

    info: Any = None
    num_unfinished = 0

    def __init__(self) -> None:
        self.closed: list[str] = []

    def check_health(self) -> None: ...

    def abort(self, request_ids: Any) -> None: ...

    async def close(self) -> None: ...

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        try:
            for turn in range(10**6):
                await asyncio.sleep(0)
                failed = request.request_id == "r1" and turn == 5
                yield EngineOutput(
                    request_id=request.request_id,
                    new_token_ids=(100,),
                    finish_reason=FinishReason.ERROR if failed else None,
                    error="it broke" if failed else None,
                )
        finally:
            self.closed.append(request.request_id)


@pytest.mark.parametrize("num_choices", [1, 3])
def test_leaving_closes_every_stream(num_choices: int) -> None:
    async def leave() -> list[str]:
        engine = OneByOne()
        choices = [choice_of(TextParams(), index=i * 2) for i in range(num_choices)]
        deltas = read_choices(engine, choices, tokenizer=TOKENIZER)
        for _ in range(4):
            await anext(deltas)
        await deltas.aclose()
        return engine.closed

    assert len(asyncio.run(leave())) == num_choices


def test_one_failure_ends_all() -> None:
    async def fail() -> list[str]:
        engine = OneByOne()
        choices = [choice_of(TextParams(), index=i) for i in range(3)]
        with pytest.raises(RequestFailedError, match="it broke"):
            async for _ in read_choices(engine, choices, tokenizer=TOKENIZER):
                pass
        return engine.closed

    assert sorted(asyncio.run(fail())) == ["r0", "r1", "r2"]


def test_text_alone_is_read_the_short_way() -> None:
    """Both ways may take turns; what is not one token of text is left to the long way."""
    ids = TOKENIZER.encode("naïve 日本語 😀 and so on")
    request = EngineRequest(request_id="r", prompt_token_ids=(5,), params=SamplingParams())
    choice = Choice(index=0, prompt_index=0, request=request, text=TextParams())
    reader = ChoiceReader(choice, tokenizer=TOKENIZER)
    texts, num_long = [], 0
    for position, token_id in enumerate(ids):
        output = EngineOutput(
            request_id="r",
            new_token_ids=(token_id,),
            num_cached_tokens=16,
            finish_reason=FinishReason.LENGTH if position == len(ids) - 1 else None,
        )
        text = reader.read_text(output)
        if text is None:
            num_long += 1
            delta = reader.read(output)
            assert delta.num_cached_tokens == 16
            text = delta.text
        texts.append(text)
    assert "".join(texts) == "naïve 日本語 😀 and so on"
    assert num_long == 2  # the first tells what was cached, the last the end


def test_drafts_are_added_up_by_position() -> None:
    assert DraftStats.of_step(None) == DraftStats()
    steps = [DraftStats.of_step(drafts) for drafts in ((4, 0), (1, 1), (3, 2))]
    total = sum(steps, start=DraftStats())
    assert total == DraftStats(
        num_drafts=3, num_draft_tokens=8, num_accepted_tokens_per_pos=(2, 1, 0, 0)
    )
    assert (total.num_accepted_tokens, total.mean_accepted_length) == (3, 2.0)
    assert DraftStats().mean_accepted_length == 0.0
