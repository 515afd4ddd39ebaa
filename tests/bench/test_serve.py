"""``octavo bench serve`` against a scripted server: what it sends, counts and writes."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from octavo.cli import main


class Script:
    """A server whose answers are `num_tokens` chunks; one prompt in `fails_every` gets a 500."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.num_running = 0
        self.max_running = 0
        self.fails_from: int | None = None
        self.base_url = ""

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "scripted", "root": "scripted"}]})

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append({k.lower(): v for k, v in request.headers.items()})
        if self.fails_from is not None and len(self.bodies) > self.fails_from:
            return web.json_response({"error": {"message": "scripted failure"}}, status=500)
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        is_chat = request.path.endswith("chat/completions")
        count = body.get("max_completion_tokens" if is_chat else "max_tokens")
        if is_chat:
            await self._event(response, {"choices": [{"delta": {"role": "assistant"}}]})
        for i in range(count):
            await asyncio.sleep(0)
            choice = {"delta": {"content": f" {i}"}} if is_chat else {"text": f" {i}"}
            await self._event(response, {"choices": [choice]})
        await self._event(response, {"choices": [], "usage": {"completion_tokens": count}})
        await response.write(b"data: [DONE]\n\n")
        self.num_running -= 1
        return response

    async def _event(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


@pytest.fixture
def server() -> Iterator[Script]:
    script = Script()
    started, stop = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        app = web.Application()
        app.router.add_get("/v1/models", script.models)
        app.router.add_post("/v1/completions", script.answer)
        app.router.add_post("/v1/chat/completions", script.answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        script.base_url = f"http://{host}:{port}"
        loops.append(asyncio.get_running_loop())
        started.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(30)
    yield script
    loops[0].call_soon_threadsafe(stop.set)
    thread.join()


def bench(server: Script, tokenizer_dir: Path, *words: str) -> int:
    return main(
        [
            *("bench", "serve", "--base-url", server.base_url, "--tokenizer", str(tokenizer_dir)),
            *("--num-prompts", "12", "--random-input-len", "8", "--random-output-len", "5"),
            *("--disable-tqdm", *words),
        ]
    )


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_a_whole_run(
    server: Script,
    tokenizer_dir: Path,
    tmp_path: Path,
    backend: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = bench(
        server,
        tokenizer_dir,
        *("--backend", backend, "--max-concurrency", "3", "--num-warmups", "4", "--ignore-eos"),
        *("--top-k", "5", "--extra-body", '{"min_tokens": 2}', "--request-id-prefix", "id-"),
        *("--save-result", "--save-detailed", "--result-dir", str(tmp_path)),
        *("--result-filename", "r.json", "--metadata", "commit=abc", "--percentile-metrics"),
        *("ttft,itl,e2el", "--metric-percentiles", "50,99", "--goodput", "ttft:60000"),
    )
    assert code == 0
    assert len(server.bodies) == 1 + 4 + 12  # the check, the warm-ups, the measured
    assert server.max_running <= 3
    body = server.bodies[-1]
    assert body["model"] == "scripted"
    assert body["stream_options"] == {"include_usage": True}
    assert (body["ignore_eos"], body["top_k"], body["min_tokens"]) == (True, 5, 2)
    assert body["temperature"] == 0.0
    assert {h["x-request-id"] for h in server.headers[-12:]} == {f"id-{i}" for i in range(12)}
    result = json.loads((tmp_path / "r.json").read_text())
    expected = {
        "backend": backend,
        "model_id": "scripted",
        "commit": "abc",
        "num_prompts": 12,
        "request_rate": "inf",
        "max_concurrency": 3,
        "completed": 12,
        "failed": 0,
        "total_input_tokens": 96,
        "total_output_tokens": 60,
        "output_lens": [5] * 12,
        "generated_texts": [" 0 1 2 3 4"] * 12,
    }
    assert {name: result[name] for name in expected} == expected
    assert result["request_goodput"] == pytest.approx(result["request_throughput"])
    assert [len(itls) for itls in result["itls"]] == [4] * 12
    assert result["p50_ttft_ms"] > 0
    assert "mean_tpot_ms" not in result
    assert "Total generated tokens:                  60 " in capsys.readouterr().out


def test_failures_are_counted_and_told(
    server: Script, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fails_from = 5
    assert bench(server, tokenizer_dir) == 0
    captured = capsys.readouterr()
    assert "Successful requests:                     4 " in captured.out
    assert "Failed requests:                         8 " in captured.out
    assert "8 failed: HTTP 500" in captured.err
    assert "scripted failure" in captured.err


def test_a_first_failure_ends_it(
    server: Script, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fails_from = 0
    assert bench(server, tokenizer_dir) == 2
    assert "the first request failed" in capsys.readouterr().err


def test_rate_and_append(server: Script, tokenizer_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    for _ in range(2):
        words = ["--request-rate", "400", "--burstiness", "2", "--append-result"]
        words += ["--result-filename", str(path)]
        assert bench(server, tokenizer_dir, *words) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["request_rate"] for row in rows] == [400.0, 400.0]
    assert all(row["duration"] >= 12 / 400 for row in rows)
    # Waiting inside the client counts: never less than from the send.
    assert all(row["mean_ttft_ms"] >= row["mean_ttft_from_send_ms"] for row in rows)


@pytest.mark.parametrize(
    "words",
    [
        ["--percentile-metrics", "ttft,speed"],
        ["--metric-percentiles", "101"],
        ["--metric-percentiles", "x"],
        ["--goodput", "itl:5"],
        ["--goodput", "ttft=5"],
        ["--metadata", "novalue"],
        ["--request-rate", "0"],
        ["--max-concurrency", "0"],
        ["--extra-body", "[]"],
        ["--model", "m", "--ready-check-timeout-sec", "0"],
    ],
)
def test_wrong_flags(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["bench", "serve", "--base-url", "http://127.0.0.1:9", *words])
    assert code == 2
    assert "octavo bench serve: error: " in capsys.readouterr().err
