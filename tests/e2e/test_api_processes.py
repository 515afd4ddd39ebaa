"""The real model behind several HTTP processes: the same answers, and nothing is kept."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.conftest import Server, start_server


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--max-model-len", "512", "--kv-cache-memory-bytes", "64MiB", "--check-kv-invariants")
    running = start_server(
        tmp_path_factory.mktemp("two") / "log", *flags, "--api-server-count", "2"
    )
    yield running
    running.process.terminate()
    assert running.process.wait(timeout=60) == 0


def ask(server: Server, prompt: str, *, stream: bool) -> str:
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "stream": stream}
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        data = answer.read().decode()
    shown = [e[6:] for e in data.split("\n\n") if e.startswith("data: {")] if stream else [data]
    events: list[Any] = [json.loads(event) for event in shown]
    return "".join(event["choices"][0]["text"] for event in events)


def test_both_answer_the_same(two: Server) -> None:
    prompt = "The capital of France is"
    alone = ask(two, prompt, stream=False)
    assert "Paris" in alone
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: ask(two, prompt, stream=i % 2 == 0), range(16)))
    assert set(answers) == {alone}
    assert two.metric("vllm:request_success_total") == 17
    assert two.metric("octavo:kv_blocks", 'state="owned"') == 0
