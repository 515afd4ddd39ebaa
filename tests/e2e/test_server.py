"""``octavo serve`` with the real model, through the openai client and through rude clients."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import openai
import pytest
import torch

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

MODEL = "SmolLM2-135M-Instruct"
QUESTION = [{"role": "user", "content": "Tell me the capital of France."}]


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"not within 60 s: {what}"
        time.sleep(0.05)  # between polls of another process; nothing depends on its length


def test_capital_of_france(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=32,
    )
    text = answer.choices[0].message.content
    assert text is not None and "Paris" in text
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    pieces = []
    with client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=32,
        stream=True,
    ) as stream:
        for chunk in stream:
            pieces.append(chunk.choices[0].delta.content or "")
    assert "".join(pieces) == text
    assert len(pieces) > 1  # drafts that were accepted come together


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU keeps no blocks")
def test_the_weights_are_told(server: Server, client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    told = "int8 (q8_64)"
    assert card.model_dump()["quantization"] == told
    reason = "the fastest that holds its quality"
    line = f"  weights  {told}, {reason}; exact with --quantization none\n"
    assert line in server.log.read_text()


def test_echo_with_logprobs_agrees_with_decoding(client: openai.OpenAI) -> None:
    """A text scored as a prompt has the log-probabilities it had when it was generated."""
    prompt = "The three primary colours are"
    generated = client.completions.create(
        model=MODEL, prompt=prompt, temperature=0, max_tokens=8, logprobs=1
    ).choices[0]
    scored = client.completions.create(
        model=MODEL, prompt=prompt + generated.text, max_tokens=0, echo=True, logprobs=1
    ).choices[0]
    assert generated.logprobs is not None and scored.logprobs is not None
    assert scored.logprobs.tokens is not None and scored.logprobs.token_logprobs is not None
    assert scored.logprobs.tokens[-8:] == generated.logprobs.tokens
    assert scored.logprobs.token_logprobs[-8:] == generated.logprobs.token_logprobs


def test_an_answer_tells_what_speculation_did(server: Server, client: openai.OpenAI) -> None:
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")

    def counted() -> dict[str, float]:
        return {name: server.metric(f"vllm:spec_decode_{name}_total") for name in names}

    before = counted()
    answer = client.completions.create(
        model=MODEL,
        prompt="one two three, one two three, one two three,",
        temperature=0,
        max_tokens=80,
        extra_body={"return_spec_stats": True},
    )
    stats = answer.model_dump()["spec_stats"]
    wait_until(lambda: server.metric("vllm:num_requests_running") == 0, "no request runs")
    after = counted()
    # A step that began before the end was known has drafts of which the answer knows nothing.
    for name in names:
        assert 0 <= stats[name] <= after[name] - before[name] <= stats[name] + 8
    assert sum(stats["num_accepted_tokens_per_pos"]) == stats["num_accepted_tokens"]
    for name in ("gain", "guarded_total", "drafting_seconds_total", "seconds_without_total"):
        server.metric(f"octavo:spec_decode_{name}")


def test_64_streams_with_random_disconnects(server: Server, real_prompts: list[str]) -> None:
    """Every stream that stays gets all its tokens; nothing is left of those that went away."""
    rng = random.Random(5)
    errors_before = server.metric("vllm:request_success_total")

    async def one(client: openai.AsyncOpenAI, i: int) -> bool:
        leave_after = rng.choice([None, 0, 1, 3, 10])
        stream = await client.completions.create(
            model=MODEL,
            prompt=real_prompts[i % len(real_prompts)][: rng.randrange(40, 900)],
            max_tokens=24,
            temperature=0.8,
            seed=i,
            stream=True,
            n=2 if i % 8 == 0 else 1,
            extra_body={"ignore_eos": True},
            stream_options={"include_usage": True},
        )
        count, usage = 0, None
        async for chunk in stream:
            if chunk.usage is not None:
                usage = chunk.usage
            count += 1
            if leave_after is not None and count > leave_after:
                await stream.close()
                return False
        assert usage is not None
        assert usage.completion_tokens == (48 if i % 8 == 0 else 24)
        return True

    async def all_of_them() -> list[bool]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300
        ) as client:
            return await asyncio.gather(*(one(client, i) for i in range(64)))

    stayed = asyncio.run(all_of_them())
    assert 0 < sum(stayed) < 64
    wait_until(lambda: server.metric("vllm:num_requests_running") == 0, "no request runs")
    wait_until(
        lambda: server.metric("octavo:kv_blocks", 'state="owned"') == 0, "all blocks are free"
    )
    assert server.metric("vllm:num_requests_waiting") == 0
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    assert server.metric("vllm:request_success_total") > errors_before
    assert server.process.poll() is None
    assert "Traceback" not in server.log.read_text()


def test_bad_requests_leave_the_server_unharmed(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model=MODEL, prompt="word " * 5000, max_tokens=5)
    assert too_long.value.code == "context_length_exceeded"
    assert "2048" in str(too_long.value)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt=[1, 2, 10**6], max_tokens=5)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-17", prompt="Hello", max_tokens=5)
    assert client.completions.create(model=MODEL, prompt="Hello", max_tokens=2).choices[0].text
    assert server.get("/health") is not None
