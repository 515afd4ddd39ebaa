"""A client that goes away frees its requests, streamed or not, whatever they are doing."""

from __future__ import annotations

import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.api.serving import ScriptedEngine, Server, wait_until

TEXT = "/v1/completions"
HELD: dict[str, Any] = {"prompt": [5, 6], "max_tokens": 100, "temperature": 0, "ignore_eos": True}


def send_raw(server: Server, body: dict[str, Any]) -> socket.socket:
    payload = json.dumps(body).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(payload)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(head.encode() + payload)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("held_after", [0, 3])
@pytest.mark.parametrize("n", [1, 4])
def test_leaving(server: Server, *, stream: bool, held_after: int, n: int) -> None:
    engine = server.engine
    engine.hold_after = held_after
    connection = send_raw(server, HELD | {"stream": stream, "n": n})
    wait_until(lambda: engine.num_unfinished == n)
    if stream and held_after:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    connection.close()
    wait_until(lambda: engine.num_unfinished == 0)
    wait_until(lambda: server.app.state.front.lifecycle.num_active == 0)
    assert len(engine.aborted) == n


def test_leaving_in_the_middle_of_the_body(server: Server, http: httpx.Client) -> None:
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
    connection.close()
    assert http.get("/health").status_code == 200
    assert not server.engine.requests


def test_a_crowd_that_comes_and_goes(server: Server, engine: ScriptedEngine) -> None:
    engine.script = [10 + i % 50 for i in range(100)]

    def visit(number: int) -> str:
        choose = random.Random(number)
        body = HELD | {"stream": True, "max_tokens": 40}
        leave_after = choose.choice([1, 5, None])
        lines = []
        with (
            httpx.Client(base_url=server.url, timeout=60) as http,
            http.stream("POST", TEXT, json=body) as response,
        ):
            assert response.status_code == 200
            for line in response.iter_lines():
                lines.append(line)
                if leave_after is not None and len(lines) >= leave_after:
                    return "left"
        assert lines[-2] == "data: [DONE]", lines[-3:]
        return "stayed"

    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(visit, range(64)))
    assert set(outcomes) == {"left", "stayed"}
    wait_until(lambda: engine.num_unfinished == 0)
    assert len(engine.requests) == 64
