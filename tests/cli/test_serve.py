"""``octavo serve`` as a process, with a made-up model: start, answers, signals, bad starts."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from octavo.cli.chat import RemotePartner, converse

DEADLINE = 30.0
COMMAND = [sys.executable, "-c", "import sys; from octavo.cli import main; sys.exit(main())"]


def environment() -> dict[str, str]:
    roots = os.pathsep.join(path for path in sys.path if path)
    return {**os.environ, "PYTHONPATH": roots}


class Server:
    def __init__(self, process: subprocess.Popen[str], lines: list[str]) -> None:
        self.process = process
        self.lines = lines
        self.url = lines[-1].split(": ", 1)[1].strip()
        self.port = int(self.url.rpartition(":")[2]) if "unix" not in self.url else 0

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)

    def get(self, path: str) -> tuple[int, str]:
        connection = self.connect()
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read().decode()
        connection.close()
        return response.status, body

    def stream(self, *, max_tokens: int) -> http.client.HTTPResponse:
        """An open stream whose first event has come."""
        connection = self.connect()
        body = {"prompt": [5, 6, 7], "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        connection.request(
            "POST",
            "/v1/completions",
            json.dumps(body),
            {"Content-Type": "application/json", "Connection": "close"},
        )
        response = connection.getresponse()
        assert response.status == 200
        assert response.readline().startswith(b"data: ")
        return response

    def until_status(self, path: str, status: int) -> None:
        deadline = time.monotonic() + DEADLINE
        while self.get(path)[0] != status:
            assert time.monotonic() < deadline


@contextmanager
def serving(
    model_dir: Path, *flags: str, stderr: int | IO[str] = subprocess.DEVNULL
) -> Iterator[Server]:
    process = subprocess.Popen(
        [
            *COMMAND,
            *("serve", str(model_dir), "--load-format", "dummy", "--fake-executor"),
            *("--host", "127.0.0.1", "--max-model-len", "200000", *flags),
        ],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )
    watchdog = threading.Timer(DEADLINE, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        lines: list[str] = []
        while not lines or not lines[-1].startswith("ready in"):
            lines.append(process.stdout.readline())
            assert lines[-1], f"ended without being ready: {lines}"
        watchdog.cancel()
        yield Server(process, lines)
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def last_reason(response: http.client.HTTPResponse) -> str | None:
    reasons: list[Any] = []
    for line in response:
        if line.startswith(b"data: {"):
            reasons += [c["finish_reason"] for c in json.loads(line[6:]).get("choices", ())]
    return next((r for r in reversed(reasons) if r), None)


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[Server]:
    with serving(model_dir, "--port", "0", "--served-model-name", "tiny") as running:
        yield running


def test_says_what_was_decided(server: Server) -> None:
    text = "".join(server.lines)
    for part in (
        "FakeForCausalLM",
        "blocks of 16 tokens",
        "200,000 tokens",
        "at most 256 requests",
    ):
        assert part in text
    assert re.search(r"ready in \d+\.\d s: http://127\.0\.0\.1:\d+\n", text)


def test_answers_and_counts(server: Server) -> None:
    assert server.get("/health")[0] == 200
    assert server.get("/ready")[0] == 200
    assert json.loads(server.get("/v1/models")[1])["data"][0]["id"] == "tiny"
    assert last_reason(server.stream(max_tokens=5)) == "length"
    deadline = time.monotonic() + DEADLINE
    text, counted = "", 'http_requests_total{handler="/v1/completions",method="POST",status="2xx"}'
    while counted not in text:  # which is when the answer's last byte has gone
        assert time.monotonic() < deadline
        text = server.get("/metrics")[1]
    for series in (
        'vllm:num_requests_running{engine="0",model_name="tiny"} 0.0',
        'vllm:generation_tokens_total{engine="0",model_name="tiny"}',
        "octavo:kv_blocks",
    ):
        assert series in text


def test_a_taken_port(server: Server, model_dir: Path) -> None:
    words = ["serve", str(model_dir), "--host", "127.0.0.1", "--port", str(server.port)]
    ended = subprocess.run(
        [*COMMAND, *words], env=environment(), capture_output=True, text=True, timeout=DEADLINE
    )
    assert ended.returncode == 1
    assert ended.stderr == (
        f"octavo serve: error: cannot listen on 127.0.0.1:{server.port}: Address already in use\n"
    )


def test_chat_with_the_server(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    partner = RemotePartner(f"{server.url}/v1", model=None, options={"max_tokens": 4})
    assert partner.name == "tiny"
    lines = iter(["/help", "", "hello", "/exit"])
    converse(partner, system="Be brief.", read=lambda: next(lines))
    captured = capsys.readouterr()
    # This model has no chat template: the server says so, and the conversation goes on.
    assert "chat template" in captured.err


def test_a_model_that_is_not_there() -> None:
    ended = subprocess.run(
        [*COMMAND, "serve", "/no/such/model", "--port", "0"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert ended.returncode == 2
    assert "/no/such/model" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_signal_drains(model_dir: Path) -> None:
    with serving(model_dir, "--port", "0") as server:
        stream = server.stream(max_tokens=8000)
        server.process.send_signal(signal.SIGTERM)
        server.until_status("/ready", 503)
        assert server.get("/health")[0] == 200
        assert last_reason(stream) == "length"  # the whole answer
        assert server.process.wait(DEADLINE) == 0


def test_a_second_signal_aborts(model_dir: Path) -> None:
    with serving(model_dir, "--port", "0") as server:
        stream = server.stream(max_tokens=150_000)
        server.process.send_signal(signal.SIGINT)
        server.until_status("/ready", 503)
        server.process.send_signal(signal.SIGINT)
        num_events = 0
        with contextlib.suppress(http.client.IncompleteRead, OSError):
            num_events = sum(line.startswith(b"data: {") for line in stream)
        assert num_events < 150_000
        assert server.process.wait(DEADLINE) == 0


def test_a_dead_engine_ends_the_server(model_dir: Path) -> None:
    with serving(model_dir, "--port", "0") as server:
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        (engine,) = (int(pid) for pid in children.read_text().split())
        os.kill(engine, signal.SIGKILL)
        assert server.process.wait(DEADLINE) == 1


def test_unix_socket(model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "octavo.sock"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))  # left by a server that was killed
    left.close()
    with serving(model_dir, "--uds", str(path)) as server:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(DEADLINE)
            client.connect(str(path))
            client.sendall(b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 200")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(DEADLINE) == 0
    assert not path.exists()
