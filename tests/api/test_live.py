"""Streams that are written as the engine tells: the same bytes by every path, and slow clients."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from octavo.api.chat import _ChatEvents
from octavo.api.completions import _CompletionEvents
from octavo.cli.http_protocol import HttpProtocol
from octavo.text.tokenizer import Tokenizer
from octavo.types import EngineOutput, FinishReason
from tests.api.serving import Server, serving, wait_until

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
USAGE = {"stream_options": {"include_usage": True}}
CONTINUOUS = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
MESSAGES = {"messages": [{"role": "user", "content": "Hello \U0001f600"}]}
PLAIN: dict[str, Any] = {"stream": True, "max_tokens": 60, "seed": 5, "ignore_eos": True}

BODIES: list[tuple[str, dict[str, Any]]] = [
    (path, PLAIN | prompt | more)
    for path, prompt in ((TEXT, {"prompt": "Hello there"}), (CHAT, MESSAGES))
    for more in (
        {},
        {"n": 3},
        USAGE,
        CONTINUOUS,
        {"n": 2, "stop": ["e", "zz"]},
        {"stop": ["a"], "include_stop_str_in_output": True} | USAGE,
        {"logprobs": 2} if path == TEXT else {"logprobs": True, "top_logprobs": 2},
        {"return_token_ids": True},
        {"skip_special_tokens": False},
        {"echo": True} if path == TEXT else {"prompt_logprobs": 1},
        {"prompt": ["one", "two"], "n": 2} if path == TEXT else {"ignore_eos": False},
    )
]


@pytest.fixture(scope="module")
def direct(tokenizer: Tokenizer) -> Iterator[Server]:
    with serving(tokenizer=tokenizer, http=HttpProtocol, max_model_len=40_000) as server:
        yield server


@pytest.fixture(scope="module")
def plain(tokenizer: Tokenizer) -> Iterator[Server]:
    """Behind an HTTP server that offers ASGI alone."""
    with serving(tokenizer=tokenizer, max_model_len=40_000) as server:
        yield server


def events(server: Server, path: str, body: dict[str, Any]) -> list[str]:
    """The events, sorted: choices of one answer may come in any order."""
    response = httpx.post(server.url + path, json=body, headers={"X-Request-Id": "x"}, timeout=30)
    assert response.status_code == 200, response.text
    assert response.text.endswith("data: [DONE]\n\n")
    text = re.sub(r'"created":\d+', '"created":0', response.text)
    return sorted(text.split("\n\n"))


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_every_path_has_the_same_bytes(
    direct: Server, plain: Server, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = events(direct, path, body)
    assert written == events(plain, path, body)
    for kind in (_ChatEvents, _CompletionEvents):
        monkeypatch.setattr(kind, "has_short_form", False)
    assert written == events(direct, path, body)
    assert len(written) > 20 or "stop" in body


@pytest.mark.parametrize("kind", ["direct", "plain"])
def test_a_failure_in_the_middle_is_an_event(kind: str, request: pytest.FixtureRequest) -> None:
    server: Server = request.getfixturevalue(kind)
    server.engine.fail = lambda asked, step: (
        EngineOutput(request_id=asked.request_id, finish_reason=FinishReason.ERROR, error="broken")
        if step == 7
        else None
    )
    try:
        body = PLAIN | {"prompt": [5, 6]}
        text = httpx.post(server.url + TEXT, json=body, timeout=30).text
        last = json.loads(text.rstrip().rpartition("data: ")[2])
        assert last["error"]["message"] == "broken"
        assert "[DONE]" not in text and text.count("data: ") > 3
        server.engine.fail = lambda asked, step: EngineOutput(
            request_id=asked.request_id, finish_reason=FinishReason.ERROR, error="at once"
        )
        response = httpx.post(server.url + TEXT, json=body, timeout=30)
        assert response.status_code == 500
        assert response.json()["error"]["message"] == "at once"
    finally:
        server.engine.fail = lambda asked, step: None
    wait_until(lambda: server.app.state.front.lifecycle.num_active == 0)


@pytest.mark.parametrize("kind", ["direct", "plain"])
def test_a_client_that_does_not_read(kind: str, request: pytest.FixtureRequest) -> None:
    """It costs no more memory than its tokens, holds up nobody, and misses nothing."""
    server: Server = request.getfixturevalue(kind)
    num_tokens = 30_000  # over five megabytes of events
    engine = server.engine
    before = len(engine.requests)
    body = PLAIN | {"prompt": [5, 6], "max_tokens": num_tokens, "temperature": 0}
    payload = json.dumps(body).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(payload)}\r\n\r\n"
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        slow.connect(("127.0.0.1", server.port))
        slow.sendall(head.encode() + payload)
        wait_until(lambda: len(engine.requests) > before and not engine.live)
        assert server.num_buffered < 1_000_000
        assert events(server, TEXT, PLAIN | {"prompt": [7]})  # others are answered meanwhile
        slow.settimeout(30)
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            data += slow.recv(1 << 16)
    expected = events(server, TEXT, body)
    chunks = re.findall(rb"data: (\{.*?\})\n\n", re.sub(rb"\r\n[0-9a-f]+\r\n", b"", data))
    texts = [json.loads(chunk)["choices"][0]["text"] for chunk in chunks]
    assert len(texts) == len(expected) - 2  # without [DONE], and what follows it


def test_short_forms_have_their_texts_alone(direct: Server) -> None:
    """Texts that look like the frame around them."""
    said = '"text":"a"\\u0000\x01é😀\n'
    direct.engine.script = direct.app.state.front.tokenizer.encode(said)
    body = PLAIN | {"prompt": [5], "max_tokens": len(direct.engine.script), "temperature": 0}
    try:
        shown = events(direct, TEXT, body)
    finally:
        direct.engine.script = None
    texts = [json.loads(e[6:])["choices"][0]["text"] for e in shown if e.startswith("data: {")]
    assert sorted("".join(texts)) == sorted(said)


def test_leaving_a_written_stream_frees_it(direct: Server) -> None:
    engine = direct.engine
    engine.hold_after = 3
    before = len(engine.aborted)
    try:
        with connected(direct, PLAIN | {"prompt": [5, 6], "n": 2}) as client:
            assert client.recv(100).startswith(b"HTTP/1.1 200")
            wait_until(lambda: engine.num_unfinished == 2)
        wait_until(lambda: engine.num_unfinished == 0)
    finally:
        engine.hold_after = None
    assert len(engine.aborted) == before + 2
    wait_until(lambda: direct.app.state.front.lifecycle.num_active == 0)


def test_streams_that_follow_each_other_on_a_connection(direct: Server) -> None:
    """Sent at once, each begins when the one before it has ended, and none loses a byte."""
    bodies = [PLAIN | {"prompt": [5, 6, n], "max_tokens": 2000} for n in range(3)]
    with connected(direct, *bodies) as client:
        data = b""
        while data.count(b"\r\n0\r\n\r\n") < len(bodies):
            data += client.recv(1 << 16)
    answers = data.split(b"HTTP/1.1 200")[1:]
    assert [a.count(b"data: {") for a in answers] == [
        len(events(direct, TEXT, body)) - 2 for body in bodies
    ]


def connected(server: Server, *bodies: dict[str, Any]) -> socket.socket:
    """A connection on which requests for completions have been sent."""
    client = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    for body in bodies:
        payload = json.dumps(body).encode()
        head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(payload)}\r\n\r\n"
        client.sendall(head.encode() + payload)
    return client
