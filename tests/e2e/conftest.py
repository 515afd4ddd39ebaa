"""The real default model, shared by the tests of this folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def real_prompts() -> list[str]:
    """40 real prompts: conversation, mathematics, code, news."""
    lines = (ROOT / "tests" / "data" / "prompts.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


@dataclass(frozen=True, slots=True)
class Server:
    """A running ``octavo serve``."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    seconds_to_ready: float

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return str(answer.read().decode())

    def metric(self, name: str, label: str = "") -> float:
        """Sum of one series over its labels, or over those with ``label`` (``state="owned"``)."""
        values = [
            float(line.rpartition(" ")[2])
            for line in self.get("/metrics").splitlines()
            if line.startswith((f"{name} ", f"{name}{{")) and label in line
        ]
        assert values, f"no metric {name}"
        return sum(values)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_server(log: Path, *flags: str) -> Server:
    port = free_port()
    command = [sys.executable, "-m", "octavo", "serve", "--host", "127.0.0.1"]
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("server", "kernels"))
    began = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port), *flags],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": paths},
        )
    url = f"http://127.0.0.1:{port}"
    deadline = began + 300  # the first start on a machine fetches the model and compiles kernels
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url + "/ready", timeout=5):
                return Server(url, process, log, time.monotonic() - began)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)  # between polls of another process; nothing depends on its length
    process.kill()
    raise AssertionError(f"not ready in 300 s\n{log.read_text()}")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = start_server(
        tmp_path_factory.mktemp("server") / "log",
        "--max-model-len",
        "2048",
        "--kv-cache-memory-bytes",
        "256MiB",
        "--check-kv-invariants",
    )
    yield running
    running.process.terminate()
    running.process.wait(timeout=60)
