"""Answers against OpenAI's own description of its API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from octavo.api.schemas import NO_MEANING, REFUSED, ChatCompletionRequest, CompletionRequest
from octavo.text.tokenizer import Tokenizer
from tests.api.serving import ScriptedEngine

SCHEMAS: dict[str, Any] = json.loads(
    Path(__file__).with_name("openai_schemas.json").read_text("utf-8")
)
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
HELLO = [{"role": "user", "content": "hello"}]


def faults(value: Any, schema: dict[str, Any], at: str = "$") -> list[str]:
    """What is wrong with ``value``. As strict as JSON schema; unknown keys are allowed."""
    if value is None and schema.get("nullable"):
        return []
    if "$ref" in schema:
        return faults(value, SCHEMAS[schema["$ref"].rsplit("/", 1)[-1]], at)
    found: list[str] = []
    for part in schema.get("allOf", ()):
        found += faults(value, part, at)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            tried = [faults(value, part, at) for part in schema[key]]
            if all(tried):
                found.append(f"{at}: none of {key}: {tried}")
    if "type" in schema:
        is_bool = isinstance(value, bool) and schema["type"] != "boolean"
        if is_bool or not isinstance(value, TYPES[schema["type"]]):
            return [*found, f"{at}: {value!r} is no {schema['type']}"]
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{at}: {value!r} is none of {schema['enum']}")
    if isinstance(value, list):
        for i, item in enumerate(value):
            found += faults(item, schema.get("items", {}), f"{at}[{i}]")
    if isinstance(value, dict):
        found += [f"{at}.{k}: missing" for k in schema.get("required", ()) if k not in value]
        named = schema.get("properties", {})
        others = schema.get("additionalProperties")
        for key, item in value.items():
            if key in named:
                found += faults(item, named[key], f"{at}.{key}")
            elif isinstance(others, dict):
                found += faults(item, others, f"{at}.{key}")
    return found


def check(value: Any, name: str) -> None:
    assert faults(value, SCHEMAS[name]) == []


def events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.fixture(autouse=True)
def script(engine: ScriptedEngine, tokenizer: Tokenizer) -> None:
    engine.script = tokenizer.encode("naïve 日本 one two")


def test_the_checker_finds_faults() -> None:
    assert faults({"object": "model"}, SCHEMAS["Model"])
    assert faults({"error": {"message": 1}}, SCHEMAS["ErrorResponse"])


@pytest.mark.parametrize(
    "extra", [{}, {"n": 3}, {"logprobs": True, "top_logprobs": 2}, {"stop": "one"}], ids=str
)
def test_chat(http: httpx.Client, extra: dict[str, Any]) -> None:
    body = {"messages": HELLO, **extra}
    check(http.post("/v1/chat/completions", json=body).json(), "CreateChatCompletionResponse")
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(http.post("/v1/chat/completions", json=body))
    assert len(chunks) > 3
    for chunk in chunks:
        check(chunk, "CreateChatCompletionStreamResponse")


@pytest.mark.parametrize("extra", [{}, {"n": 3, "best_of": 4}, {"logprobs": 2}], ids=str)
def test_completions(http: httpx.Client, extra: dict[str, Any]) -> None:
    body = {"prompt": ["hello", "one"], **extra}
    check(http.post("/v1/completions", json=body).json(), "CreateCompletionResponse")
    body.pop("best_of", None)
    for chunk in events(http.post("/v1/completions", json=body | {"stream": True})):
        for choice in chunk["choices"]:  # the description knows no unfinished choices
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        check(chunk, "CreateCompletionResponse")


def test_models_and_errors(http: httpx.Client) -> None:
    check(http.get("/v1/models").json(), "ListModelsResponse")
    check(http.get("/v1/models/org/tiny").json(), "Model")
    for response in (
        http.get("/nothing"),
        http.get("/v1/completions"),
        http.post("/v1/completions", content=b"\xff"),
        http.post("/v1/completions", json={"prompt": ""}),
        http.post("/v1/completions", json={"prompt": "x", "model": "y"}),
    ):
        check(response.json(), "ErrorResponse")


def test_every_known_field_has_one_fate() -> None:
    """Of OpenAI's request fields none is merely unknown, and no field has two fates."""
    chat = """messages model frequency_penalty logit_bias logprobs top_logprobs max_tokens
        max_completion_tokens n modalities prediction audio presence_penalty response_format seed
        service_tier stop store stream stream_options temperature top_p tools tool_choice
        parallel_tool_calls user function_call functions metadata reasoning_effort verbosity
        web_search_options safety_identifier prompt_cache_key prompt_cache_retention
        prompt_cache_options moderation"""
    text = """model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n
        presence_penalty seed stop stream stream_options suffix temperature top_p user"""
    for schema, names in ((ChatCompletionRequest, chat), (CompletionRequest, text)):
        acting = set(schema.model_fields)
        assert not acting & NO_MEANING and not acting & set(REFUSED)
        assert set(names.split()) <= acting | NO_MEANING | set(REFUSED)
    assert not NO_MEANING & set(REFUSED)
