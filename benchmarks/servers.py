"""Servers under test as processes, and the load client that measures them; knows no server's kind.

A server that is not being measured is frozen, so it cannot disturb the others.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.processes import send_all, tree


@dataclass(frozen=True, slots=True)
class Server:
    """One server under test, whose processes are those it has started."""

    label: str
    port: int
    process: subprocess.Popen[bytes]
    start_seconds: float

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def freeze(self) -> None:
        send_all(tree(self.process.pid), signal.SIGSTOP)

    def thaw(self) -> None:
        send_all(tree(self.process.pid), signal.SIGCONT)

    def kill(self) -> None:
        end(self.process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills a process with its descendants, frozen or not."""
    send_all(reversed(tree(process.pid)), signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # of a leader that ended before its children
    process.wait()


def start(
    label: str,
    port: int,
    command: str,
    *,
    timeout: float,
    model: str = "m",
    extra_env: Mapping[str, str] | None = None,
) -> Server:
    """Starts a server and waits for its first streamed token, which ends its ``start_seconds``.

    Raises RuntimeError, with what the server said last, if none comes.
    """
    with tempfile.TemporaryFile() as said:
        began = time.monotonic()
        process = subprocess.Popen(
            shlex.split(command),
            start_new_session=True,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(extra_env or {})},
        )
        try:
            while time.monotonic() - began < timeout and process.poll() is None:
                if streams_a_token(port, model=model, timeout=timeout):
                    return Server(label, port, process, round(time.monotonic() - began, 2))
                time.sleep(0.02)
        except BaseException:
            end(process)
            raise
        code = process.poll()
        end(process)
        said.seek(max(0, said.seek(0, os.SEEK_END) - 1000))
        last = said.read().decode(errors="replace")
    how = f"was not ready in {timeout:.0f} s" if code is None else f"ended with code {code}"
    raise RuntimeError(f"{label} {how}: {command}\n{last}")


def streams_a_token(port: int, *, model: str, timeout: float) -> bool:
    """Whether the server answers a completion with some text; False while it cannot yet.

    Raises RuntimeError where it says that the request is wrong.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 4, "stream": True}
    try:
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        if response.status in (400, 401, 422):
            raise RuntimeError(f"port {port} refuses a completion: {response.read()[:500]!r}")
        return response.status == 200 and any(map(_has_text, response))
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _has_text(line: bytes) -> bool:
    head, _, data = line.strip().partition(b"data:")
    if head or not data.strip().startswith(b"{"):
        return False
    return any(choice.get("text") for choice in json.loads(data).get("choices") or ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The load client; ``quiet``: it waits for less than this many busy other cores."""

    script: str
    tokenizer: str
    model: str
    quiet: float

    def measure(
        self, server: Server, *, workloads: str, concurrency: str, requests: str, rep: int
    ) -> list[dict[str, Any]]:
        """One turn of one server: the rows that the client printed. RuntimeError if none."""
        command = [sys.executable, self.script, "--base-url", server.base_url]
        command += ["--model", self.model, "--tokenizer", self.tokenizer]
        command += ["--label", server.label, "--server-pid", str(server.process.pid)]
        command += ["--workloads", workloads, "--concurrency", concurrency]
        command += ["--requests", requests, "--reps", "1", "--rep0", str(rep)]
        command += ["--quiet", str(self.quiet)]
        output = subprocess.run(command, capture_output=True, text=True, check=False)
        rows = [json.loads(line) for line in output.stdout.splitlines() if line.startswith("{")]
        if not rows:
            raise RuntimeError(f"the load client measured nothing: {output.stdout}{output.stderr}")
        for row in rows:
            row.pop("sample", None)
        return rows
