"""Connections to ``octavo serve``: TLS, and clients whose bytes are no request."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo.cli.http_protocol import MAX_HEAD_BYTES
from tests.cli.test_serve import DEADLINE, Server, serving


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[Server]:
    with serving(model_dir, "--port", "0") as running:
        yield running


def answer_to(server: Server, *parts: bytes) -> tuple[int, str]:
    """Status and error code of what the server says before it closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE) as client:
        received = b""
        for part in parts:
            client.sendall(part)
        while piece := client.recv(65536):
            received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower()
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(head.split()[1]), error["code"]


def test_bytes_that_are_no_request(server: Server) -> None:
    start = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
    for wrong in (
        b"\x00\x01\x02\r\n\r\n",
        b"FOO /health HTTP/1.1\r\n\r\n",
        start + b"Content-Length: -5\r\n\r\n",
        start + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
    ):
        assert answer_to(server, wrong) == (400, "invalid_http")
    assert server.get("/health")[0] == 200


def test_heads_are_bounded(server: Server) -> None:
    start = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
    chunk = b"a" * (MAX_HEAD_BYTES // 4)
    too_large = (431, "request_too_large")
    assert answer_to(server, start, b"X-Long: ", *[chunk] * 40) == too_large
    assert answer_to(server, start, *[b"X-%d: a\r\n" % i * 1000 for i in range(20)]) == too_large
    assert answer_to(server, b"GET /", *[chunk] * 40) == too_large
    trailers = b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nX-Long: "
    assert answer_to(server, start + trailers, *[chunk] * 40)[0] in (400, 431)
    assert server.get("/health?" + "a" * (MAX_HEAD_BYTES // 2))[0] == 200


def test_clients_that_go_on_sending_still_read_the_answer(server: Server) -> None:
    too_large = (431, "request_too_large")
    for _ in range(50):
        assert answer_to(server, b"GET /", *[b"a" * MAX_HEAD_BYTES] * 40) == too_large


def test_long_bodies_in_small_chunks_are_no_heads(server: Server) -> None:
    body = b'{"prompt": [5], "max_tokens": 1' + b" " * MAX_HEAD_BYTES + b"}"
    start = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    chunks = b"".join(b"2\r\n%b\r\n" % body[i : i + 2] for i in range(0, len(body) - 1, 2))
    rest = b"1\r\n%b\r\n" % body[-1:] if len(body) % 2 else b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE) as client:
        client.sendall(start + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + rest)
        client.sendall(b"0\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_clients_that_do_nothing_do_not_hold_up_the_end(model_dir: Path, tmp_path: Path) -> None:
    body = b'{"prompt": [5], "max_tokens": 100000, "ignore_eos": true, "stream": true}'
    start = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    log = tmp_path / "log"
    with (
        log.open("w") as stderr,
        serving(model_dir, "--port", "0", "--shutdown-timeout", "0", stderr=stderr) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE) as half,
        socket.socket() as deaf,
    ):
        half.sendall(start + body[:5])
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.settimeout(DEADLINE)
        deaf.connect(("127.0.0.1", server.port))
        deaf.sendall(start + body)
        assert deaf.recv(9) == b"HTTP/1.1 "
        server.process.terminate()
        assert server.process.wait(DEADLINE) == 0
    assert "Traceback" not in log.read_text()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls(model_dir: Path, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -noenc -days 2 "
    make += "-subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1 "
    make += f"-keyout {key} -out {certificate}"
    subprocess.run(make.split(), check=True, capture_output=True)
    flags = ("--ssl-keyfile", str(key), "--ssl-certfile", str(certificate), "--port", "0")
    trusting = ssl.create_default_context(cafile=str(certificate))
    with serving(model_dir, *flags) as server:
        assert server.url.startswith("https://127.0.0.1:")
        body = json.dumps({"prompt": [5, 6], "max_tokens": 3, "stream": True}).encode()
        request = urllib.request.Request(server.url + "/v1/completions", data=body)
        with urllib.request.urlopen(request, timeout=DEADLINE, context=trusting) as response:
            events = response.read().split(b"\n\n")
        assert events[0].startswith(b"data: {") and events[-2:] == [b"data: [DONE]", b""]
        with pytest.raises(urllib.error.URLError, match="certificate verify failed"):
            urllib.request.urlopen(server.url + "/health", timeout=DEADLINE)
        with (
            socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE) as plain,
            pytest.raises(ConnectionError),
        ):
            plain.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            if not plain.recv(100):
                raise ConnectionError
