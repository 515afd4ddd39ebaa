"""Completions, through the openai client."""

from __future__ import annotations

import openai
import pytest

from octavo.text.tokenizer import Tokenizer
from tests.api.serving import ScriptedEngine

M = "org/tiny"


def test_text(client: openai.OpenAI, engine: ScriptedEngine, tokenizer: Tokenizer) -> None:
    engine.script = tokenizer.encode(" is Paris.")
    answer = client.completions.create(model=M, prompt="The capital of France", max_tokens=50)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == (" is Paris.", "stop")
    assert answer.id.startswith("cmpl-") and answer.model == M
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(engine.script) + 1  # EOS counts
    assert answer.usage.prompt_tokens == len(tokenizer.encode("The capital of France"))
    assert choice.logprobs is None
    (request,) = engine.requests
    assert list(request.prompt_token_ids) == tokenizer.encode("The capital of France")
    assert request.params.max_tokens == 50
    assert request.params.eos_token_ids == (2,)


def test_default_max_tokens_is_16(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    answer = client.completions.create(model=M, prompt="one", temperature=0)
    assert answer.usage is not None and answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("chunk", [1, 3])
def test_stream_is_the_whole(
    client: openai.OpenAI, engine: ScriptedEngine, tokenizer: Tokenizer, chunk: int
) -> None:
    text = " naïve 日本語 😀 👩‍👩‍👧 end"
    engine.script = tokenizer.encode(text)
    engine.tokens_per_output = chunk
    stream = client.completions.create(
        model=M, prompt="x", max_tokens=200, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [c.choices[0].text for c in chunks if c.choices]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(engine.script) + 1
    assert all(c.usage is None for c in chunks[:-1])
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_several_prompts_and_choices(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    prompts = ["one two", "three"]
    answer = client.completions.create(model=M, prompt=prompts, n=2, seed=5, max_tokens=4)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert len({c.text for c in answer.choices}) == 4
    first, fork, second, other = engine.requests
    assert first.fork_of is None and fork.fork_of == first.request_id
    assert second.fork_of is None and other.fork_of == second.request_id
    assert answer.usage is not None and answer.usage.completion_tokens == 16
    alone = client.completions.create(model=M, prompt="three", seed=5, max_tokens=4)
    assert alone.choices[0].text == answer.choices[2].text
    again = client.completions.create(model=M, prompt=prompts, n=2, seed=5, max_tokens=4)
    assert [c.text for c in again.choices] == [c.text for c in answer.choices]


def test_unseeded_requests_differ(client: openai.OpenAI) -> None:
    texts = {
        client.completions.create(model=M, prompt="one", max_tokens=8).choices[0].text
        for _ in range(3)
    }
    assert len(texts) == 3


def test_n_is_legal_when_greedy(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=M, prompt="one", n=3, temperature=0, max_tokens=4)
    assert len({c.text for c in answer.choices}) == 1 and len(answer.choices) == 3


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7]], [[5, 6, 7], [8, 9]]])
def test_token_prompts(client: openai.OpenAI, engine: ScriptedEngine, prompt: list[int]) -> None:
    client.completions.create(model=M, prompt=prompt, max_tokens=1)
    assert engine.requests[0].prompt_token_ids == (5, 6, 7)
    assert len(engine.requests) == (2 if len(prompt) == 2 else 1)


def test_echo(client: openai.OpenAI, engine: ScriptedEngine, tokenizer: Tokenizer) -> None:
    engine.script = tokenizer.encode(" Paris")
    prompt = "The capital is"
    answer = client.completions.create(model=M, prompt=prompt, echo=True, logprobs=2)
    choice = answer.choices[0]
    assert choice.text == "The capital is Paris"
    lists = choice.logprobs
    assert lists is not None and lists.tokens and lists.text_offset
    assert lists.token_logprobs is not None and lists.token_logprobs[0] is None
    assert all(isinstance(v, float) for v in lists.token_logprobs[1:])
    shown = zip(lists.tokens[:-1], lists.text_offset[:-1], strict=True)  # but for EOS
    for token, offset in shown:
        assert choice.text[offset : offset + len(token)] == token
    assert lists.top_logprobs is not None
    assert [len(t) for t in lists.top_logprobs[1:] if t] == [2] * (len(lists.tokens) - 1)


def test_echo_streams_first(
    client: openai.OpenAI, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    whole = client.completions.create(model=M, prompt="one two", echo=True, logprobs=1, seed=1)
    stream = client.completions.create(
        model=M, prompt="one two", echo=True, logprobs=1, seed=1, stream=True
    )
    chunks = [c.choices[0] for c in stream]
    assert "".join(c.text for c in chunks) == whole.choices[0].text
    assert chunks[0].text.startswith("one two")
    tokens = [t for c in chunks if c.logprobs for t in c.logprobs.tokens or []]
    offsets = [t for c in chunks if c.logprobs for t in c.logprobs.text_offset or []]
    expected = whole.choices[0].logprobs
    assert expected is not None
    assert tokens == expected.tokens and offsets == expected.text_offset


def test_scoring_a_prompt(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    answer = client.completions.create(
        model=M, prompt="one two three", echo=True, logprobs=0, max_tokens=0
    )
    choice = answer.choices[0]
    assert choice.text == "one two three" and choice.finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 0
    assert choice.logprobs is not None and choice.logprobs.tokens is not None
    assert "".join(choice.logprobs.tokens) == "one two three"


def test_best_of(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    answer = client.completions.create(
        model=M, prompt="one", n=2, best_of=5, seed=3, max_tokens=4, extra_body={"logprobs": 0}
    )
    every = client.completions.create(model=M, prompt="one", n=5, seed=3, max_tokens=4, logprobs=0)

    def score(choice: openai.types.CompletionChoice) -> float:
        assert choice.logprobs is not None
        return sum(choice.logprobs.token_logprobs or [])

    best = sorted(every.choices, key=score, reverse=True)[:2]
    assert [c.text for c in answer.choices] == [c.text for c in best]
    assert [c.index for c in answer.choices] == [0, 1]
    assert answer.usage is not None and answer.usage.completion_tokens == 20


def test_stop_strings(client: openai.OpenAI, engine: ScriptedEngine, tokenizer: Tokenizer) -> None:
    engine.script = tokenizer.encode(" one two three four five")
    kwargs = {"model": M, "prompt": "x", "max_tokens": 50, "stop": ["zzz", "two thr"]}
    answer = client.completions.create(**kwargs)  # type: ignore[call-overload]
    assert answer.choices[0].text == " one "
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == "two thr"
    assert engine.num_unfinished == 0 and len(engine.aborted) == 1
    assert answer.usage.completion_tokens < len(engine.script)
    stream = client.completions.create(**kwargs, stream=True)  # type: ignore[call-overload]
    assert "".join(c.choices[0].text for c in stream) == " one "
    kept = client.completions.create(  # type: ignore[call-overload]
        **kwargs, extra_body={"include_stop_str_in_output": True}
    )
    assert kept.choices[0].text == " one two thr"
    late = client.completions.create(  # type: ignore[call-overload]
        **kwargs, extra_body={"min_tokens": len(engine.script) - 1}
    )
    assert late.choices[0].text == " one two three four five"


def test_near_miss_still_comes_out(
    client: openai.OpenAI, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    engine.script = tokenizer.encode(" hello the")
    stream = client.completions.create(
        model=M, prompt="x", max_tokens=50, stream=True, stop=["there"]
    )
    assert "".join(c.choices[0].text for c in stream) == " hello the"


def test_stop_token_ids(
    client: openai.OpenAI, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    engine.script = tokenizer.encode(" one two three")
    stop_id = engine.script[-1]
    answer = client.completions.create(
        model=M, prompt="x", max_tokens=50, extra_body={"stop_token_ids": [stop_id]}
    )
    choice = answer.choices[0]
    assert choice.text == tokenizer.decode(engine.script[:-1])
    assert choice.stop_reason == stop_id  # type: ignore[attr-defined]
    kept = client.completions.create(
        model=M,
        prompt="x",
        max_tokens=50,
        extra_body={"stop_token_ids": [stop_id], "include_stop_str_in_output": True},
    )
    assert kept.choices[0].text == " one two three"


def test_special_tokens_are_skipped_or_not(
    client: openai.OpenAI, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    engine.script = [*tokenizer.encode(" one"), 1, *tokenizer.encode(" two")]
    plain = client.completions.create(model=M, prompt="x", max_tokens=50)
    assert plain.choices[0].text == " one two"
    shown = client.completions.create(
        model=M, prompt="x", max_tokens=50, extra_body={"skip_special_tokens": False}
    )
    assert shown.choices[0].text == " one<|im_start|> two"


def test_token_ids_and_prompt_logprobs(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    extra = {"return_token_ids": True, "prompt_logprobs": 2, "return_tokens_as_token_ids": True}
    answer = client.completions.create(
        model=M, prompt=[5, 6, 7], max_tokens=3, logprobs=1, extra_body=extra
    )
    choice = answer.choices[0].model_dump()
    assert choice["prompt_token_ids"] == [5, 6, 7]
    assert len(choice["token_ids"]) == 3
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]
    first, second, third = choice["prompt_logprobs"]
    assert first is None
    assert list(second) == ["6", "7"] and list(third) == ["7", "8"]  # the prompt's own first
    assert set(second["6"]) == {"logprob", "rank", "decoded_token"}
    stream = client.completions.create(
        model=M, prompt=[5, 6, 7], max_tokens=3, logprobs=1, stream=True, extra_body=extra
    )
    chunks = [c.choices[0].model_dump() for c in stream]
    assert chunks[0]["prompt_logprobs"] == choice["prompt_logprobs"]
    assert chunks[0]["prompt_token_ids"] == [5, 6, 7]
    assert "prompt_token_ids" not in chunks[1]


def test_parameters_reach_the_engine(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    client.completions.create(
        model=M,
        prompt="x",
        temperature=0.5,
        top_p=0.25,
        presence_penalty=1,
        frequency_penalty=-1.5,
        logit_bias={"5": 10, "4": -100},
        seed=-1,
        user="me",
        extra_body={
            "top_k": 7,
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "min_tokens": 2,
            "ignore_eos": True,
            "allowed_token_ids": [5, 6, 5],
            "bad_words": ["Paris"],
            "cache_salt": "pepper",
            "request_id": "mine",
        },
    )
    (request,) = engine.requests
    p = request.params
    assert (p.temperature, p.top_p, p.top_k, p.min_p) == (0.5, 0.25, 7, 0.125)
    assert (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) == (1, -1.5, 1.5)
    assert p.logit_bias == ((4, -100.0), (5, 10.0)) and p.allowed_token_ids == (5, 6)
    assert p.min_tokens == 2 and p.ignore_eos and p.seed == 2**64 - 1
    assert len(p.bad_words_token_ids) == 2
    assert request.cache_salt == "pepper" and "mine" in request.request_id


def test_truncation_keeps_the_end(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    prompt = list(range(10, 200)) * 2
    for keep, expected in ((3, prompt[-3:]), (-1, prompt[-(256 - 8) :])):
        client.completions.create(
            model=M, prompt=prompt, max_tokens=8, extra_body={"truncate_prompt_tokens": keep}
        )
        assert list(engine.requests[-1].prompt_token_ids) == expected


def test_cached_tokens(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.num_cached = 1
    answer = client.completions.create(model=M, prompt=["one two", "two"], n=2)
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
