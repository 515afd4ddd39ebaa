"""Chat completions, through the openai client."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from octavo.text.tokenizer import Tokenizer
from tests.api.serving import ScriptedEngine

M = "org/tiny"
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def prompt_of(engine: ScriptedEngine, tokenizer: Tokenizer) -> str:
    ids = engine.requests[-1].prompt_token_ids
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_answer(client: openai.OpenAI, engine: ScriptedEngine, tokenizer: Tokenizer) -> None:
    engine.script = tokenizer.encode("Paris.")
    messages: list[Any] = [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": [{"type": "text", "text": "The capital"}]},
    ]
    answer = client.chat.completions.create(model=M, messages=messages)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "Paris.")
    assert choice.finish_reason == "stop" and choice.logprobs is None
    assert prompt_of(engine, tokenizer) == (
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nThe capital<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    used = len(engine.requests[0].prompt_token_ids)
    assert engine.requests[0].params.max_tokens == engine.info.max_model_len - used
    assert answer.usage is not None and answer.usage.prompt_tokens == used
    message = answer.model_dump(exclude_unset=True)["choices"][0]["message"]
    assert set(message) == {"role", "content", "refusal"}  # no null keys the API does not allow


@pytest.mark.parametrize("n", [1, 3])
def test_stream(
    client: openai.OpenAI, engine: ScriptedEngine, tokenizer: Tokenizer, n: int
) -> None:
    engine.script = tokenizer.encode("naïve 日本語 😀")
    stream = client.chat.completions.create(
        model=M, messages=HELLO, stream=True, n=n, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert [c.choices[0].index for c in chunks[:n]] == list(range(n))
    assert all(c.choices[0].delta.role == "assistant" for c in chunks[:n])
    for i in range(n):
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == i]
        assert "".join(c.delta.content or "" for c in mine) == "naïve 日本語 😀"
        assert [c.finish_reason for c in mine][-1] == "stop"
        assert all(c.finish_reason is None for c in mine[:-1])
    assert chunks[-1].usage is not None and not chunks[-1].choices
    assert chunks[-1].usage.completion_tokens == n * (len(engine.script) + 1)


def test_continuous_usage(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    stream = client.chat.completions.create(
        model=M, messages=HELLO, stream=True, stream_options=options, max_tokens=5, temperature=0
    )
    counts = [c.usage.completion_tokens for c in stream if c.usage]
    assert counts[-1] == 5 and counts == sorted(counts)


def test_raw_stream(http: httpx.Client, engine: ScriptedEngine) -> None:
    body = {"messages": HELLO, "stream": True, "max_tokens": 3}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        text = response.read().decode()
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(e.startswith("data: {") for e in events[:-2])
    assert '"usage"' not in text


def test_logprobs(client: openai.OpenAI, engine: ScriptedEngine, tokenizer: Tokenizer) -> None:
    engine.script = tokenizer.encode("café 😀")
    answer = client.chat.completions.create(
        model=M, messages=HELLO, logprobs=True, top_logprobs=3, max_tokens=len(engine.script)
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    joined = b"".join(bytes(t.bytes or []) for t in logprobs.content)
    assert joined.decode() == "café 😀" == answer.choices[0].message.content
    assert all(len(t.top_logprobs) == 3 for t in logprobs.content)
    stream = client.chat.completions.create(
        model=M,
        messages=HELLO,
        logprobs=True,
        top_logprobs=3,
        max_tokens=len(engine.script),
        stream=True,
    )
    streamed = [
        t
        for c in stream
        if c.choices[0].logprobs is not None
        for t in c.choices[0].logprobs.content or []
    ]
    assert [t.model_dump() for t in streamed] == [t.model_dump() for t in logprobs.content]


def test_going_on(client: openai.OpenAI, engine: ScriptedEngine, tokenizer: Tokenizer) -> None:
    messages: list[Any] = [*HELLO, {"role": "assistant", "content": "The capital "}]
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    client.chat.completions.create(model=M, messages=messages, extra_body=extra, max_tokens=1)
    assert prompt_of(engine, tokenizer).endswith("<|im_start|>assistant\nThe capital ")
    client.chat.completions.create(
        model=M, messages=messages, extra_body={"add_generation_prompt": False}, max_tokens=1
    )
    assert prompt_of(engine, tokenizer).endswith("The capital <|im_end|>\n")


def test_answers_can_be_sent_back(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    answer = client.chat.completions.create(model=M, messages=HELLO, max_tokens=3)
    sent: Any = [*HELLO, answer.choices[0].message.model_dump(), *HELLO]
    client.chat.completions.create(model=M, messages=sent, max_tokens=3)


def test_values_that_ask_for_nothing(http: httpx.Client) -> None:
    nothing = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "functions": None,
        "reasoning_effort": None,
        "modalities": ["text"],
        "user": "me",
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "safety_identifier": "x",
        "prompt_cache_key": "y",
    }
    nullable = "temperature top_p n stop seed max_tokens logprobs stream stream_options logit_bias"
    nullable += " presence_penalty frequency_penalty max_completion_tokens top_logprobs top_k min_p"
    nulls = dict.fromkeys(nullable.split())
    body = {"messages": HELLO, "max_tokens": 2, **nothing, **(nulls | {"max_tokens": 2})}
    assert http.post("/v1/chat/completions", json=body).status_code == 200


def test_token_ids_and_prompt_logprobs(http: httpx.Client, engine: ScriptedEngine) -> None:
    body = {"messages": HELLO, "max_tokens": 3, "return_token_ids": True, "prompt_logprobs": 1}
    answer = http.post("/v1/chat/completions", json=body).json()
    ids = list(engine.requests[0].prompt_token_ids)
    assert answer["prompt_token_ids"] == ids
    assert len(answer["prompt_logprobs"]) == len(ids)
    assert len(answer["choices"][0]["token_ids"]) == 3
    text = http.post("/v1/chat/completions", json={**body, "stream": True}).text
    assert text.count('"prompt_token_ids"') == 1 and text.count('"prompt_logprobs"') == 1
