"""What must not be answered: each a clear error in OpenAI's envelope, and the server unharmed."""

from __future__ import annotations

import gzip
import json
import math
from typing import Any

import httpx
import openai
import pytest

from octavo.api.schemas import CompletionRequest
from octavo.engine.options import GenerationOptions
from octavo.engine.protocols import EngineDeadError
from octavo.text.tokenizer import Tokenizer
from octavo.types import EngineOutput, EngineRequest, FinishReason
from tests.api.serving import ScriptedEngine, wait_until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and isinstance(error["type"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    return error


# field, wrong value, what the message says besides the field's name
WRONG: list[tuple[str, Any, str]] = [
    ("temperature", "hot", "number"),
    ("temperature", -1, "0"),
    ("temperature", 1e9, "2"),
    ("temperature", math.nan, "finite"),
    ("temperature", math.inf, "finite"),
    ("temperature", [], "number"),
    ("top_p", 1.5, "1"),
    ("top_p", -0.1, "0"),
    ("top_k", -2, "-1"),
    ("top_k", 1.5, "integer"),
    ("top_k", "5", "integer"),
    ("min_p", 2, "1"),
    ("presence_penalty", 2.5, "2"),
    ("frequency_penalty", -3, "-2"),
    ("repetition_penalty", 0, "0"),
    ("repetition_penalty", 1e-300, "0.001"),
    ("repetition_penalty", 1e30, "100"),
    ("n", 0, "1"),
    ("n", 129, "128"),
    ("n", True, "integer"),
    ("max_tokens", -5, "got -5"),
    ("max_tokens", "7", "integer"),
    ("max_tokens", 10**30, "2147483647"),
    ("max_tokens", 1000, "256"),
    ("min_tokens", -1, "0"),
    ("min_tokens", 17, "max_tokens"),
    ("seed", 2**64, "64-bit"),
    ("seed", 0.5, "integer"),
    ("stop", "", "1 to"),
    ("stop", ["a"] * 33, "32"),
    ("stop", [1], "strings"),
    ("stop", {"a": 1}, "strings"),
    ("stop_token_ids", [99999], "got 99999"),
    ("stop_token_ids", ["a"], "integers"),
    ("logit_bias", {"99999": 1}, "got 99999"),
    ("logit_bias", {"-1": 1}, "got -1"),
    ("logit_bias", {"a": 1}, "token ids"),
    ("logit_bias", {" 5": 1}, "token ids"),
    ("logit_bias", {"٥": 1}, "token ids"),
    ("logit_bias", {"5": 200}, "100"),
    ("allowed_token_ids", [], "1"),
    ("allowed_token_ids", [99999], "got 99999"),
    ("bad_words", [""], "1"),
    ("prompt_logprobs", 21, "20"),
    ("prompt_logprobs", -1, "0"),
    ("truncate_prompt_tokens", 0, "at least 1"),
    ("truncate_prompt_tokens", 257, "256"),
    ("stream", "yes", "boolean"),
    ("stream_options", {"include_usage": True}, "stream=true"),
    ("priority", 1, "fcfs"),
    ("request_id", "a b", "pattern"),
    ("cache_salt", "", "1"),
    ("ignore_eos", 1, "boolean"),
    ("no_such_thing", 1, "known"),
    ("use_beam_search", True, "not supported"),
    ("structured_outputs", {"json": {}}, "not supported"),
]


@pytest.mark.parametrize(("name", "value", "says"), WRONG)
@pytest.mark.parametrize("url", [TEXT, CHAT])
def test_wrong_values(http: httpx.Client, url: str, name: str, value: Any, says: str) -> None:
    body: dict[str, Any] = {"max_tokens": 16, name: value}
    body |= {"prompt": "one"} if url == TEXT else {"messages": HELLO}
    response = http.post(url, content=json.dumps(body))
    error = error_of(response)
    assert name in error["message"] and says in error["message"], error
    assert error["param"] is not None and error["param"].startswith(name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("response_format", {"type": "json_object"}),
        ("audio", {"voice": "x", "format": "wav"}),
        ("modalities", ["text", "audio"]),
        ("web_search_options", {}),
        ("prediction", {"type": "content", "content": "x"}),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("chat_template", "{{ messages }}"),
        ("top_logprobs", 3),
        ("max_completion_tokens", 5),
    ],
)
def test_chat_refuses_by_name(http: httpx.Client, name: str, value: Any) -> None:
    body = {"messages": HELLO, "max_tokens": 16, name: value}
    assert name in error_of(http.post(CHAT, json=body))["message"]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ([{"role": "user"}], "messages[0]"),
        ([{"role": "user", "content": None}], "messages[0]"),
        ([{"role": "tool", "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content"),
        ([*HELLO, {"role": "user", "content": "x", "colour": 1}], "messages[1].colour"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "messages[0].tool_calls"),
    ],
)
def test_wrong_messages(http: httpx.Client, messages: Any, param: str) -> None:
    assert error_of(http.post(CHAT, json={"messages": messages}))["param"] == param


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], [[], [5]], ["a", 5], [99999], [-1], [[5], [99999]], None, 5, [5.5]]
)
def test_wrong_prompts(http: httpx.Client, prompt: Any) -> None:
    error = error_of(http.post(TEXT, json={"prompt": prompt}))
    assert "prompt" in error["message"] and error["param"] == "prompt"


def test_suffix_and_logprobs(http: httpx.Client) -> None:
    body = {"prompt": "one"}
    for extra in ({"suffix": "x"}, {"logprobs": 21}, {"best_of": 1, "n": 2}, {"logprobs": True}):
        error = error_of(http.post(TEXT, json=body | extra))
        assert next(iter(extra)) in error["message"]
    error = error_of(http.post(TEXT, json={"prompt": [[5]] * 100, "n": 100}))
    assert error["param"] == "n" and "4096" in error["message"]
    error_of(http.post(TEXT, json={"prompt": [[5]] * 1025}))
    error = error_of(http.post(TEXT, json=body | {"best_of": 3, "stream": True}))
    assert error["param"] == "best_of"
    error = error_of(http.post(CHAT, json={"messages": HELLO, "logprobs": 1}))
    assert error["param"] == "logprobs"


@pytest.mark.parametrize("url", [TEXT, CHAT])
def test_over_the_context(http: httpx.Client, engine: ScriptedEngine, url: str) -> None:
    long = "one two three " * 200
    body = {"prompt": long} if url == TEXT else {"messages": [{"role": "user", "content": long}]}
    error = error_of(http.post(url, json=body))
    assert error["code"] == "context_length_exceeded"
    assert "256" in error["message"] and error["param"] in ("prompt", "messages")
    assert not engine.requests


def test_far_over_the_context(
    http: httpx.Client, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused without being encoded; /tokenize and truncation do encode it."""
    long = "one two three " * 10_000
    body = {"prompt": long, "max_tokens": 1}
    assert http.post("/tokenize", json={"prompt": long}).json()["count"] > 10_000
    cut = http.post(TEXT, json=body | {"truncate_prompt_tokens": 5})
    assert cut.json()["usage"]["prompt_tokens"] == 5
    monkeypatch.setattr(Tokenizer, "encode", None)
    for url in (TEXT, CHAT):
        chat = {"messages": [{"role": "user", "content": long}]}
        error = error_of(http.post(url, json=body if url == TEXT else chat))
        assert error["code"] == "context_length_exceeded"
        assert "256" in error["message"] and "at least" in error["message"]


def test_prompt_and_max_tokens_over_the_context(http: httpx.Client) -> None:
    body = {"prompt": list(range(10, 210)), "max_tokens": 57}
    error = error_of(http.post(TEXT, json=body))
    assert error["code"] == "context_length_exceeded"
    assert all(number in error["message"] for number in ("256", "200", "57"))
    assert http.post(TEXT, json=body | {"max_tokens": 56}).status_code == 200


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"prompt": "a",}',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
        b'"text"',
        b"[1]",
        b"null",
        b"1e999",
    ],
)
@pytest.mark.parametrize("url", [TEXT, CHAT, "/tokenize", "/detokenize"])
def test_malformed_bodies(http: httpx.Client, url: str, content: bytes) -> None:
    error_of(http.post(url, content=content))


def test_over_long_bodies(http: httpx.Client) -> None:
    too_long = b'{"prompt": "' + b"a" * (16 * 2**20) + b'"}'
    error = error_of(http.post(TEXT, content=too_long), 413)
    assert "16777216" in error["message"]

    def parts() -> Any:  # without a Content-Length
        for _ in range(17):
            yield b"a" * 2**20

    error_of(http.post(TEXT, content=parts()), 413)
    assert http.get("/health").status_code == 200


def test_urls_and_methods(http: httpx.Client) -> None:
    error = error_of(http.get("/no/such"), 404)
    assert error["code"] == "unknown_url" and "/no/such" in error["message"]
    error = error_of(http.get(TEXT), 405)
    assert error["code"] == "method_not_allowed" and "POST" in error["message"]
    assert http.head("/health").status_code == 200
    error_of(http.delete("/v1/models"), 405)
    assert error_of(http.get("/v1/models/other"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize("url", [TEXT, CHAT, "/tokenize", "/detokenize"])
def test_unknown_model(http: httpx.Client, url: str) -> None:
    bodies: dict[str, dict[str, Any]] = {CHAT: {"messages": HELLO}, "/detokenize": {"tokens": [5]}}
    body = bodies.get(url, {"prompt": "x"})
    error = error_of(http.post(url, json={"model": "gpt-9", **body}), 404)
    assert error["code"] == "model_not_found" and error["param"] == "model"
    assert "org/tiny" in error["message"]


def test_errors_of_one_request(http: httpx.Client, engine: ScriptedEngine) -> None:
    def fail(request: EngineRequest, step: int) -> EngineOutput | None:
        if request.prompt_token_ids[0] != 7 or step < 2:
            return None
        return EngineOutput(
            request_id=request.request_id,
            finish_reason=FinishReason.ERROR,
            error="the sampler failed",
            is_bad_request=request.params.seed == 1,
        )

    engine.fail = fail
    bad = {"prompt": [7], "seed": 1}
    assert error_of(http.post(TEXT, json=bad))["message"] == "the sampler failed"
    assert error_of(http.post(TEXT, json=bad | {"seed": 2}), 500)["type"] == "server_error"
    streamed = http.post(TEXT, json=bad | {"seed": 2, "stream": True})
    last = streamed.text.strip().split("\n\n")[-1]
    assert streamed.status_code == 200
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the sampler failed"
    many = {"prompt": [[8], [7], [9]], "seed": 2, "max_tokens": 50}
    error_of(http.post(TEXT, json=many), 500)
    wait_until(lambda: engine.num_unfinished == 0)
    assert http.post(TEXT, json={"prompt": [8]}).status_code == 200


def test_errors_in_a_stream_reach_the_client(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.fail = lambda request, step: (
        EngineOutput(
            request_id=request.request_id, finish_reason=FinishReason.ERROR, error="broken"
        )
        if step == 3
        else None
    )
    stream = client.completions.create(model="org/tiny", prompt="x", stream=True, temperature=0)
    with pytest.raises(openai.APIError, match="broken"):
        list(stream)


def test_requests_that_the_server_ends(http: httpx.Client, engine: ScriptedEngine) -> None:
    engine.fail = lambda request, step: (
        EngineOutput(request_id=request.request_id, finish_reason=FinishReason.ABORT)
        if step == 3
        else None
    )
    body = {"prompt": [7], "temperature": 0}
    assert error_of(http.post(TEXT, json=body), 503)["code"] == "aborted"
    engine.script = [100] * 20
    assert '"code":"aborted"' in http.post(TEXT, json=body | {"stream": True}).text


def test_unexpected_errors_tell_nothing(http: httpx.Client, engine: ScriptedEngine) -> None:
    def fail(request: EngineRequest, step: int) -> EngineOutput | None:
        raise RuntimeError("secret")

    engine.fail = fail
    response = http.post(TEXT, json={"prompt": [7]})
    assert error_of(response, 500)["code"] == "internal_error"
    assert "secret" not in response.text


def test_dead_engine(http: httpx.Client, engine: ScriptedEngine) -> None:
    assert http.get("/health").status_code == 200
    engine.dead = "it ran out of memory"
    error = error_of(http.post(TEXT, json={"prompt": [7]}), 503)
    assert error["code"] == "engine_dead"
    for url in ("/health", "/ready", "/ping"):
        error_of(http.get(url), 503)
    assert EngineDeadError("x").args == ("x",)


def test_options_that_leave_no_token(http: httpx.Client, tokenizer: Tokenizer) -> None:
    (comma,) = tokenizer.encode(",", add_special_tokens=False)
    for other in ({"bad_words": [","]}, {"min_tokens": 1, "stop_token_ids": [comma]}):
        body = {"prompt": "hello", "allowed_token_ids": [comma], **other}
        error = error_of(http.post(TEXT, json=body))
        assert error["param"] == "allowed_token_ids" and "no token" in error["message"]


def test_too_many_logprobs_name_the_endpoints_field(http: httpx.Client) -> None:
    error = error_of(http.post(TEXT, json={"prompt": "a", "logprobs": 21}))
    assert error["param"] == "logprobs"
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": 21}
    assert error_of(http.post(CHAT, json=body))["param"] == "top_logprobs"


# Both sides of each limit.
LIMITS: list[tuple[str, list[Any], list[Any]]] = [
    ("temperature", [0, 2], [-0.1, 2.1, math.nan]),
    ("top_p", [0, 1], [-0.1, 1.1]),
    ("top_k", [-1, 0, 5], [-2]),
    ("min_p", [0, 1], [-0.1, 1.1]),
    ("presence_penalty", [-2, 2], [-2.1, 2.1]),
    ("frequency_penalty", [-2, 2], [-2.1, 2.1]),
    ("repetition_penalty", [1e-3, 1e3], [0, 9e-4, 1001]),
    ("seed", [-(2**63), 2**64 - 1], [-(2**63) - 1, 2**64]),
    ("n", [1, 128], [0, 129]),
    ("max_tokens", [0], [-1]),
    ("min_tokens", [0], [-1]),
    ("logprobs", [0], [-1]),
    ("prompt_logprobs", [0], [-1]),
    ("allowed_token_ids", [[5]], [[]]),
    ("stop", ["a", ["a"]], ["", [""]]),
    ("bad_words", [["a"]], [[""]]),
]


@pytest.mark.parametrize(("name", "right", "wrong"), LIMITS, ids=lambda value: str(value)[:20])
def test_limits_are_those_of_the_offline_engine(
    name: str, right: list[Any], wrong: list[Any]
) -> None:
    for value in right:
        CompletionRequest.model_validate({"prompt": "a", name: value})
        GenerationOptions.from_mapping({name: value})
    for value in wrong:
        with pytest.raises(ValueError):
            CompletionRequest.model_validate({"prompt": "a", name: value})
        with pytest.raises(ValueError):
            GenerationOptions.from_mapping({name: value})


def test_compressed_bodies_are_refused(http: httpx.Client) -> None:
    body = gzip.compress(b'{"prompt": "a"}')
    error = error_of(http.post(TEXT, content=body, headers={"Content-Encoding": "gzip"}), 415)
    assert "gzip" in error["message"]
    plain = {"Content-Encoding": "identity"}
    assert http.post(TEXT, json={"prompt": "a", "max_tokens": 1}, headers=plain).status_code == 200


@pytest.mark.parametrize("body", [None, [], "text"])
def test_bodies_that_are_no_object(http: httpx.Client, body: Any) -> None:
    assert "JSON object" in error_of(http.post(TEXT, content=json.dumps(body)))["message"]
    chat = {"messages": [body]}
    assert "JSON object" in error_of(http.post(CHAT, json=chat))["message"]
