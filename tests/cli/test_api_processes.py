"""``octavo serve --api-server-count``: several HTTP processes are one server to everybody."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from octavo.cli.siblings import Counts
from tests.cli.test_serve import DEADLINE, Server, last_reason, serving

COUNT = 3
MANY = 24  # connections: that one process has none of them is one in ten thousand
# Slow enough that a stream of a few thousand tokens outlives what a test does meanwhile.
SLOW = ("--fake-device", "1000,0,0")


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[Server]:
    flags = ("--port", "0", "--served-model-name", "tiny", "--max-num-queued-reqs", "0")
    with serving(model_dir, *flags, *SLOW, "--api-server-count", str(COUNT)) as running:
        yield running


def family(pid: int) -> dict[str, list[int]]:
    """Pids of a server's other processes: ``engine`` and ``api``."""
    found: dict[str, list[int]] = {"engine": [], "api": []}
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            words = Path(f"/proc/{child}/cmdline").read_bytes()
            found["engine" if b"octavo.engine.process" in words else "api"].append(child)
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)  # between polls of other processes; nothing depends on its length


def metric(server: Server, name: str) -> float:
    lines = server.get("/metrics")[1].splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def answer(server: Server, **body: Any) -> tuple[int, dict[str, Any]]:
    connection = server.connect()
    payload = {"prompt": [5, 6, 7], "ignore_eos": True} | body
    headers = {"Content-Type": "application/json", "X-Request-Id": "the-same"}
    connection.request("POST", "/v1/completions", json.dumps(payload), headers)
    response = connection.getresponse()
    data = json.loads(response.read())
    connection.close()
    return response.status, data


def test_one_server_to_its_clients(server: Server) -> None:
    assert len(family(server.process.pid)["api"]) == COUNT - 1
    with ThreadPoolExecutor(MANY) as pool:
        # Ids that clients repeat are no matter, whichever process they reach.
        answers = list(pool.map(lambda seed: answer(server, max_tokens=20, seed=3), range(MANY)))
    assert {status for status, _ in answers} == {200}
    assert len({data["choices"][0]["text"] for _, data in answers}) == 1
    with ThreadPoolExecutor(MANY) as pool:
        unseeded = list(pool.map(lambda i: answer(server, max_tokens=20), range(MANY)))
    assert len({data["choices"][0]["text"] for _, data in unseeded}) == MANY


def test_metrics_are_the_servers_whoever_answers(server: Server) -> None:
    # Each process hears of a step by itself: the one that counts steps may hear of it after the one
    # that answers. What is counted with the answers is there when they are.
    before = metric(server, "vllm:request_generation_tokens_sum")
    texts = 'vllm:request_success_total{engine="0",finished_reason="length"'
    ended = metric(server, texts)
    for _ in range(MANY):
        assert answer(server, max_tokens=10)[0] == 200
    wait_until(lambda: metric(server, "vllm:generation_tokens_total") >= before + 10 * MANY)
    for _ in range(MANY):
        assert metric(server, "vllm:generation_tokens_total") == before + 10 * MANY
        assert metric(server, texts) == ended + MANY
        assert metric(server, "vllm:request_generation_tokens_count") == ended + MANY
        assert metric(server, "vllm:time_to_first_token_seconds_count") == ended + MANY
        assert metric(server, "octavo:build{") == 1
        assert metric(server, "vllm:cache_config_info{") == 1
    assert metric(server, "vllm:inter_token_latency_seconds_count") == before + 9 * MANY - ended


def test_load_and_limits_are_the_servers(model_dir: Path) -> None:
    flags = ("--port", "0", "--max-num-seqs", "4", "--max-num-queued-reqs", "0", *SLOW)
    with serving(model_dir, *flags, "--api-server-count", "2") as server:
        streams = [server.stream(max_tokens=100_000) for _ in range(4)]
        loads = {json.loads(server.get("/load")[1])["server_load"] for _ in range(MANY)}
        assert loads == {4}
        statuses = {answer(server, max_tokens=1)[0] for _ in range(MANY)}
        assert statuses == {503}
        assert metric(server, "vllm:admission_rejections_total") == MANY
        assert metric(server, "vllm:num_requests_running") == 4
        for stream in streams:
            stream.close()
        wait_until(lambda: metric(server, "vllm:num_requests_running") == 0)
        assert answer(server, max_tokens=1)[0] == 200
        others = family(server.process.pid)
        assert all(map(is_alive, others["api"] + others["engine"]))
        os.kill(server.process.pid, signal.SIGKILL)  # the others leave with it
    wait_until(lambda: not any(map(is_alive, others["api"] + others["engine"])))


def test_a_signal_drains_all(model_dir: Path) -> None:
    with serving(model_dir, "--port", "0", *SLOW, "--api-server-count", "2") as server:
        streams = [server.stream(max_tokens=1500) for _ in range(12)]
        server.process.send_signal(signal.SIGTERM)
        for _ in range(4):
            server.until_status("/ready", 503)
        assert [last_reason(stream) for stream in streams] == ["length"] * 12
        assert server.process.wait(DEADLINE) == 0


def test_a_dead_http_process_takes_only_its_own_requests(model_dir: Path) -> None:
    with serving(model_dir, "--port", "0", *SLOW, "--api-server-count", "2") as server:
        streams = [server.stream(max_tokens=3000) for _ in range(16)]
        (child,) = family(server.process.pid)["api"]
        os.kill(child, signal.SIGKILL)
        wait_until(lambda: readiness(server) == 503)
        # Nobody waits for the dead: while the living end their answers, the others know at once.
        assert {readiness(server) for _ in range(MANY)} <= {503, None}
        reasons = [reason_of(stream) for stream in streams]
        assert server.process.wait(DEADLINE) == 1
    assert set(reasons) == {"length", None}  # those of the living were answered whole


def readiness(server: Server) -> int | None:
    with contextlib.suppress(http.client.HTTPException, ConnectionError):
        return server.get("/ready")[0]
    return None


def reason_of(stream: http.client.HTTPResponse) -> str | None:
    with contextlib.suppress(http.client.HTTPException, OSError):
        return last_reason(stream)
    return None


def test_a_dead_engine_ends_all(model_dir: Path) -> None:
    with serving(model_dir, "--port", "0", "--api-server-count", "2") as server:
        others = family(server.process.pid)
        os.kill(others["engine"][0], signal.SIGKILL)
        assert server.process.wait(DEADLINE) == 1
    wait_until(lambda: not any(map(is_alive, others["api"])))


def test_counts_are_shared(tmp_path: Path) -> None:
    path = str(tmp_path / "counts")
    counts = [Counts(path, number=number, num_processes=2) for number in range(2)]
    counts[0].set_choices(3)
    counts[1].set_choices(4)
    counts[1].set_requests(1)
    assert [c.num_choices for c in counts] == [7, 7]
    assert [c.num_requests for c in counts] == [1, 1]
    counts[0].clear(1)
    assert [(c.num_choices, c.num_requests) for c in counts] == [(3, 0), (3, 0)]
