"""``return_spec_stats``: the answer's own counts of drafts, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.api.serving import ScriptedEngine

ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": [5, 6, 7]},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
}
NONE = {
    "num_drafts": 0,
    "num_draft_tokens": 0,
    "num_accepted_tokens": 0,
    "num_accepted_tokens_per_pos": [],
    "mean_accepted_length": 0.0,
}
# Eight tokens in steps of three, each with four drafts: the last step yields two.
OF_EIGHT = {
    "num_drafts": 3,
    "num_draft_tokens": 12,
    "num_accepted_tokens": 5,
    "num_accepted_tokens_per_pos": [3, 2, 0, 0],
    "mean_accepted_length": 2.6667,
}


def body_of(route: str, **more: Any) -> dict[str, Any]:
    return {**ROUTES[route], "max_tokens": 8, "seed": 1, "ignore_eos": True, **more}


def chunks_of(http: httpx.Client, route: str, **more: Any) -> list[dict[str, Any]]:
    lines = http.post(route, json=body_of(route, stream=True, **more)).text.split("\n\n")
    data = [line.removeprefix("data: ") for line in lines if line]
    assert data.pop() == "[DONE]"
    return [json.loads(each) for each in data]


@pytest.fixture
def drafting(engine: ScriptedEngine) -> ScriptedEngine:
    engine.tokens_per_output, engine.num_drafts = 3, 4
    return engine


@pytest.mark.parametrize("route", ROUTES)
def test_a_whole_answer_has_them_if_asked(
    route: str, drafting: ScriptedEngine, http: httpx.Client
) -> None:
    answer = http.post(route, json=body_of(route, return_spec_stats=True)).json()
    assert answer["spec_stats"] == OF_EIGHT
    for given in (False, None):
        answer = http.post(route, json=body_of(route, return_spec_stats=given)).json()
        assert "spec_stats" not in answer


@pytest.mark.parametrize("route", ROUTES)
def test_a_stream_has_them_in_its_last_chunk(
    route: str, drafting: ScriptedEngine, http: httpx.Client
) -> None:
    *others, last = chunks_of(http, route, return_spec_stats=True)
    assert (last["choices"], last["spec_stats"]) == ([], OF_EIGHT)
    assert "usage" not in last
    assert all("spec_stats" not in chunk for chunk in others)
    usage = {"stream_options": {"include_usage": True}}
    *others, last = chunks_of(http, route, return_spec_stats=True, **usage)
    assert (last["choices"], last["spec_stats"]) == ([], OF_EIGHT)
    assert last["usage"]["completion_tokens"] == 8
    assert all("spec_stats" not in chunk and chunk["usage"] is None for chunk in others)
    plain = chunks_of(http, route)
    assert "spec_stats" not in json.dumps(plain) and plain[-1]["choices"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_they_are_of_all_choices(
    route: str, is_streamed: bool, drafting: ScriptedEngine, http: httpx.Client
) -> None:
    if is_streamed:
        found = chunks_of(http, route, return_spec_stats=True, n=3)[-1]["spec_stats"]
    else:
        body = body_of(route, return_spec_stats=True, n=3)
        found = http.post(route, json=body).json()["spec_stats"]
    times = {name: 3 * value for name, value in OF_EIGHT.items() if isinstance(value, int)}
    mean = OF_EIGHT["mean_accepted_length"]
    want = {**times, "num_accepted_tokens_per_pos": [9, 6, 0, 0], "mean_accepted_length": mean}
    assert found == want


@pytest.mark.parametrize("tokens", [1, 3])
def test_choices_that_are_dropped_count_as_in_usage(
    tokens: int, drafting: ScriptedEngine, http: httpx.Client
) -> None:
    drafting.tokens_per_output = tokens
    body = body_of("/v1/completions", return_spec_stats=True, best_of=3)
    answer = http.post("/v1/completions", json=body).json()
    assert answer["usage"]["completion_tokens"] == 24
    assert answer["spec_stats"]["num_drafts"] == 3 * -(-8 // tokens)


@pytest.mark.parametrize("route", ROUTES)
def test_without_speculation_they_are_zero(
    route: str, engine: ScriptedEngine, http: httpx.Client
) -> None:
    body = body_of(route, return_spec_stats=True)
    assert http.post(route, json=body).json()["spec_stats"] == NONE
    assert chunks_of(http, route, return_spec_stats=True)[-1]["spec_stats"] == NONE


@pytest.mark.parametrize("is_streamed", [False, True])
def test_drafts_of_a_step_that_a_stop_string_ends_count(
    is_streamed: bool, drafting: ScriptedEngine, http: httpx.Client
) -> None:
    """The step was run, whatever of it the client sees."""
    plain = http.post("/v1/completions", json=body_of("/v1/completions")).json()
    stop = plain["choices"][0]["text"][0]
    more = {"return_spec_stats": True, "stop": stop}
    if is_streamed:
        found = chunks_of(http, "/v1/completions", **more)[-1]["spec_stats"]
    else:
        body = body_of("/v1/completions", **more)
        found = http.post("/v1/completions", json=body).json()["spec_stats"]
    assert found["num_drafts"] == 1 and found["num_accepted_tokens_per_pos"] == [1, 1, 0, 0]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("value", [1, 0, "true", [], {}, 0.5])
def test_another_type_is_refused(route: str, value: Any, http: httpx.Client) -> None:
    response = http.post(route, json=body_of(route, return_spec_stats=value))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "return_spec_stats" and "return_spec_stats" in error["message"]
