"""Health, readiness, metrics, keys, CORS, request ids, tokenisation, models, /docs."""

from __future__ import annotations

import json
import logging
from typing import Any

import httpx
import openai
import pytest

from octavo import __version__
from octavo.api.lifecycle import Lifecycle
from octavo.config import ModelConfig, SchedulerConfig, ServerConfig
from octavo.observability.metrics import Metrics
from octavo.text.tokenizer import Tokenizer
from octavo.types import EngineOutput, EngineOutputs, FinishReason
from tests.api.serving import EOS, ScriptedEngine, serving, wait_until

TEXT = "/v1/completions"


def test_models(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert (card.id, card.object, card.owned_by) == ("org/tiny", "model", "octavo")
    fields = card.model_dump()
    assert fields["max_model_len"] == 256 and fields["root"] == "org/tiny"
    assert fields["quantization"] == "none"
    assert client.models.retrieve("org/tiny") == card
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other")


def test_tokenize(http: httpx.Client, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one 日本")
    answer = http.post("/tokenize", json={"prompt": "one 日本", "model": "org/tiny"}).json()
    assert answer == {"count": len(ids), "max_model_len": 256, "tokens": ids, "token_strs": None}
    body = {"prompt": "one 日本", "return_token_strs": True}
    strings = http.post("/tokenize", json=body).json()["token_strs"]
    assert strings == [tokenizer.token(i) for i in ids]
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "one 日本"}
    chat = {"messages": [{"role": "user", "content": "one"}]}
    ids = http.post("/tokenize", json=chat).json()["tokens"]
    text = http.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    assert text.endswith("<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n")
    without = http.post("/tokenize", json=chat | {"add_generation_prompt": False}).json()
    assert without["count"] < len(ids)
    assert http.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []
    assert http.post("/tokenize", json={"prompt": "x", "messages": []}).status_code == 400
    assert http.post("/detokenize", json={"tokens": [10**6]}).status_code == 400


def test_probes(http: httpx.Client) -> None:
    for url in ("/health", "/ready", "/ping", "/docs", "/openapi.json"):
        assert http.get(url).status_code == 200, url
    assert http.get("/version").json() == {"version": __version__}
    assert http.get("/load").json() == {"server_load": 0}


def test_docs_describe_the_bodies(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    content = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]
    assert "messages" in content["application/json"]["schema"]["properties"]
    assert "$ref" not in json.dumps(paths)


def test_request_ids(http: httpx.Client, engine: ScriptedEngine) -> None:
    mine = {"X-Request-Id": "trace-1"}
    response = http.post(TEXT, json={"prompt": [5], "max_tokens": 1}, headers=mine)
    assert response.headers["x-request-id"] == "trace-1"
    assert response.json()["id"] == "cmpl-trace-1"
    made = http.post(TEXT, json={"prompt": [5], "max_tokens": 1})
    assert made.json()["id"] == "cmpl-" + made.headers["x-request-id"]
    assert http.get("/nothing", headers=mine).headers["x-request-id"] == "trace-1"
    unsafe = http.get("/health", headers={"X-Request-Id": "x" * 200}).headers["x-request-id"]
    assert len(unsafe) == 32
    assert len({request.request_id for request in engine.requests}) == 2


def test_keys(tokenizer: Tokenizer) -> None:
    options = ServerConfig(api_key=("alpha", "beta"), enable_request_id_headers=False)
    with serving(tokenizer=tokenizer, server=options) as server:
        for key in ("alpha", "beta"):
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
                assert client.models.list().data
                assert client.completions.create(model="tiny", prompt=[5], max_tokens=1).choices
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError) as caught,
        ):
            client.models.list()
        assert caught.value.code == "invalid_api_key"
        with httpx.Client(base_url=server.url) as http:
            assert http.post(TEXT, json={}).status_code == 401
            assert http.get("/v1/nothing").status_code == 401
            assert http.get("/v1/models", headers={"Authorization": "alpha"}).status_code == 401
            odd: Any = {"Authorization": b"Bearer \xff"}
            assert http.get("/v1/models", headers=odd).status_code == 401
            for url in ("/health", "/ready", "/ping", "/version", "/load"):
                response = http.get(url)
                assert response.status_code == 200 and "x-request-id" not in response.headers


def test_no_root_path_opens_a_way_past_the_keys(tokenizer: Tokenizer) -> None:
    for root in ("/v", "/v1", "/proxy"):
        options = ServerConfig(api_key=("schlüssel",), root_path=root)
        with (
            serving(tokenizer=tokenizer, server=options) as server,
            httpx.Client(base_url=server.url) as http,
        ):
            for url in ("/v1/models", root + "/v1/models"):
                assert http.get(url).status_code in (401, 404)
            key = {"Authorization": "Bearer schlüssel".encode()}
            assert http.get(root + "/v1/models", headers=key).status_code == 200


def test_cors_and_names(tokenizer: Tokenizer) -> None:
    options = ServerConfig(
        allowed_origins=("https://a.example",),
        served_model_name=("nice", "other"),
        disable_fastapi_docs=True,
        root_path="/proxy",
    )
    with (
        serving(tokenizer=tokenizer, server=options) as server,
        httpx.Client(base_url=server.url) as http,
    ):
        origin = {"Origin": "https://a.example"}
        asked = {**origin, "Access-Control-Request-Method": "POST"}
        assert http.options(TEXT, headers=asked).status_code == 200
        response = http.get("/v1/models", headers=origin)
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        assert [card["id"] for card in response.json()["data"]] == ["nice", "other"]
        assert http.get("/docs").status_code == 404 == http.get("/openapi.json").status_code
        body = {"prompt": [5], "max_tokens": 1}
        assert http.post(TEXT, json=body).json()["model"] == "nice"
        assert http.post(TEXT, json={**body, "model": "other"}).json()["model"] == "other"
        assert http.get("/proxy/v1/models").status_code == 200
        other = http.get("/v1/models", headers={"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_metrics(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(vocab_size=tokenizer.vocab_size)
    metrics = Metrics(engine.info, model_name="tiny")
    with (
        serving(tokenizer=tokenizer, metrics=metrics) as server,
        httpx.Client(base_url=server.url) as http,
    ):
        http.post(TEXT, json={"prompt": [5], "max_tokens": 1})
        http.post(TEXT, json={"prompt": 5})
        http.get("/v1/models/org/other")
        http.get("/nothing")
        wait_until(lambda: 'handler="none"' in http.get("/metrics").text)
        response = http.get("/metrics")
    assert response.headers["content-type"] == Metrics.content_type
    lines = [x for x in response.text.splitlines() if x.startswith("http_requests_total")]
    assert sorted(lines) == [
        'http_requests_total{handler="/v1/completions",method="POST",status="2xx"} 1.0',
        'http_requests_total{handler="/v1/completions",method="POST",status="4xx"} 1.0',
        'http_requests_total{handler="/v1/models/{model_id:path}",method="GET",status="4xx"} 1.0',
        'http_requests_total{handler="none",method="GET",status="4xx"} 1.0',
    ]


def test_a_stop_string_is_no_abort(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(vocab_size=tokenizer.vocab_size)
    metrics = Metrics(engine.info, model_name="tiny")
    with (
        serving(tokenizer=tokenizer, metrics=metrics) as server,
        httpx.Client(base_url=server.url) as http,
    ):
        server.engine.script = tokenizer.encode("one two three")
        server.engine.on_request = metrics.on_request
        http.post(TEXT, json={"prompt": [5], "stop": "two"})
        (request,) = server.engine.requests
        ended = EngineOutput(request_id=request.request_id, finish_reason=FinishReason.ABORT)
        metrics.on_outputs(EngineOutputs(outputs=(ended,)), 1.0)
        text = http.get("/metrics").text
    assert 'finished_reason="stop",model_name="tiny"} 1.0' in text
    assert 'finished_reason="abort",model_name="tiny"} 0.0' in text


def test_starting_draining_and_a_full_queue(tokenizer: Tokenizer) -> None:
    lifecycle = Lifecycle()
    metrics = Metrics(ScriptedEngine(vocab_size=tokenizer.vocab_size).info, model_name="tiny")
    with (
        serving(
            tokenizer=tokenizer,
            lifecycle=lifecycle,
            metrics=metrics,
            scheduler=SchedulerConfig(max_num_queued_reqs=1),
        ) as server,
        httpx.Client(base_url=server.url, timeout=30) as http,
    ):
        body: dict[str, Any] = {"prompt": [5], "max_tokens": 1}

        def refused(code: str) -> None:
            response = http.post(TEXT, json=body)
            assert response.status_code == 503
            assert response.json()["error"]["code"] == code
            assert int(response.headers["retry-after"]) >= 1

        assert http.get("/ready").status_code == 503 and http.get("/health").status_code == 200
        refused("starting")
        lifecycle.ready()
        assert http.get("/ready").status_code == 200
        assert http.post(TEXT, json=body).status_code == 200

        server.engine.hold_after, server.engine.script = 1, [100] * 9
        held = {"prompt": [[5]] * 5, "max_tokens": 9, "stream": True, "temperature": 0}
        with http.stream("POST", TEXT, json=held) as stream:
            lines = stream.iter_lines()  # kept: dropping it would close the stream
            next(lines)
            wait_until(lambda: server.engine.num_unfinished == 5)
            assert http.get("/load").json() == {"server_load": 1}
            refused("queue_full")
            refusals = 'vllm:admission_rejections_total{engine="0",model_name="tiny",'
            assert refusals + 'reason="max_num_queued_reqs"} 1.0' in http.get("/metrics").text
            lifecycle.drain()
            assert http.get("/ready").status_code == 503
            refused("draining")
            assert lifecycle.num_active == 1
        wait_until(lambda: lifecycle.num_active == 0)
        assert server.engine.num_unfinished == 0


def test_defaults_of_the_model(tokenizer: Tokenizer) -> None:
    chosen = {"temperature": 0.3, "top_k": 9, "top_p": None, "eos_token_id": 2}
    for source, temperature, top_k in (("auto", 0.3, 9), ("vllm", 1.0, 0)):
        model = ModelConfig(model="tiny", generation_config=source)  # type: ignore[arg-type]
        with (
            serving(tokenizer=tokenizer, model=model, generation_config=chosen) as server,
            httpx.Client(base_url=server.url) as http,
        ):
            http.post(TEXT, json={"prompt": [5], "max_tokens": 1})
            http.post(TEXT, json={"prompt": [5], "max_tokens": 1, "temperature": 0, "top_k": -1})
            first, second = (request.params for request in server.engine.requests)
        assert (first.temperature, first.top_k) == (temperature, top_k)
        assert (second.temperature, second.top_k) == (0, 0)


def test_seeds_of_a_seeded_server(tokenizer: Tokenizer) -> None:
    drawn = []
    for _ in range(2):
        with (
            serving(tokenizer=tokenizer, model=ModelConfig(model="tiny", seed=7)) as server,
            httpx.Client(base_url=server.url) as http,
        ):
            http.post(TEXT, json={"prompt": [[5], [6]], "max_tokens": 1})
            drawn.append([request.params.seed for request in server.engine.requests])
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 2


def test_requests_can_be_logged(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="octavo")
    with (
        serving(tokenizer=tokenizer, server=ServerConfig(enable_log_requests=True)) as server,
        httpx.Client(base_url=server.url) as http,
    ):
        http.post(TEXT, json={"prompt": [5], "max_tokens": 1})
    assert "max_tokens=1" in caplog.text and f"eos_token_ids=({EOS},)" in caplog.text
