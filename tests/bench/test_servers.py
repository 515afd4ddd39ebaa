"""Servers as processes: trees, what they cost, starting, freezing and ending them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from benchmarks import processes, servers

NESTED = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE,
    start_new_session=True)
print(child.pid, flush=True)
input()
"""


@pytest.fixture
def nested() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process, and the one it started in a session of its own."""
    with subprocess.Popen(
        [sys.executable, "-c", NESTED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        yield parent, int(parent.stdout.readline())
        parent.kill()


def state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return processes.stat_fields(file.read())[0]


def wait_for(pid: int, states: str) -> None:
    end = time.monotonic() + 10
    while time.monotonic() < end and os.path.exists(f"/proc/{pid}") and state(pid) not in states:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{pid}") or state(pid) in states


def test_names_with_brackets_do_not_shift_the_fields() -> None:
    assert processes.stat_fields("7 (a ) b) S 1 2") == ["S", "1", "2"]


def test_a_tree_holds_what_left_the_session(nested: tuple[subprocess.Popen[str], int]) -> None:
    parent, child = nested
    assert processes.tree(parent.pid) == [parent.pid, child]
    assert processes.pss_bytes(parent.pid) > processes.pss_bytes(child) > 1_000_000
    assert {name.partition("/")[0] for name in processes.cpu_seconds(parent.pid)} == {
        str(parent.pid),
        str(child),
    }


def test_a_frozen_server_stands_still_and_ends_whole(
    nested: tuple[subprocess.Popen[str], int],
) -> None:
    parent, child = nested
    server = servers.Server("x", 1, parent, 0.0)  # type: ignore[arg-type]
    server.freeze()
    wait_for(child, "T")
    server.thaw()
    wait_for(child, "SR")
    server.freeze()
    server.kill()
    assert parent.returncode is not None
    wait_for(child, "Z")


def test_a_server_that_ends_says_why() -> None:
    command = f"{sys.executable} -c 'import sys; sys.exit(\"out of luck\")'"
    with pytest.raises(RuntimeError, match=r"(?s)x ended with code 1.*out of luck"):
        servers.start("x", 1, command, timeout=60)


def test_a_server_that_says_nothing_is_given_up() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(RuntimeError, match="was not ready in 0 s"):
            servers.start("x", free.getsockname()[1], "sleep 60", timeout=0.1)


@pytest.mark.parametrize(
    ("line", "has_text"),
    [
        (b'data: {"choices": [{"text": "a"}]}\n', True),
        (b'data:{"choices": [{"text": "a"}]}\r\n', True),
        (b'data: {"choices": [{"text": ""}]}\n', False),
        (b'data: {"choices": [], "usage": {}}\n', False),
        (b"data: [DONE]\n", False),
        (b": ping\n", False),
        (b"\n", False),
    ],
)
def test_the_first_token_is_the_first_text(line: bytes, has_text: bool) -> None:
    assert servers._has_text(line) is has_text
