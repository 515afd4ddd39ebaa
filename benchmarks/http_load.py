"""A closed-loop streaming client that is cheap enough not to be what it measures.

    python -m benchmarks.http_load --port 8000 --streams 256 --requests 512

One thread, one `epoll`, no HTTP library and no JSON: an answer's events are counted by the bytes
that begin them, and an answer ends where its last chunk does. Each stream keeps its connection and
sends a request when the one before it has ended. Prints one JSON row.
"""

from __future__ import annotations

import argparse
import json
import random
import select
import socket
import time
from collections.abc import Sequence
from typing import Any

EVENT = b"data: {"
LAST = b"data: [DONE]\n\n\r\n0\r\n\r\n"


class Stream:
    """One connection and the request that runs on it."""

    __slots__ = ("first", "last", "num_events", "sent", "socket", "tail")

    def __init__(self, host: str, port: int) -> None:
        self.socket = socket.create_connection((host, port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, request: bytes) -> None:
        self.num_events = 0
        self.tail = b""
        self.first = 0.0
        self.sent = self.last = time.perf_counter()
        self.socket.sendall(request)

    def read(self, now: float, gaps: list[float]) -> bool:
        """Takes what has come; whether the answer has ended. Raises RuntimeError."""
        data = self.socket.recv(1 << 16)
        if not data:
            raise RuntimeError(f"the server closed a stream after {self.num_events} events")
        if not self.tail and not data.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the server answered {data[:600]!r}")
        seen = self.tail + data
        num_new = seen.count(EVENT, max(0, len(self.tail) - len(EVENT) + 1))
        self.tail = seen[-len(LAST) :]
        if num_new:
            if self.num_events == 0:
                self.first = now
            else:
                gaps.append(now - self.last)
                gaps.extend([0.0] * (num_new - 1))  # they came together
            self.num_events += num_new
            self.last = now
        return seen.endswith(LAST)


def requests_of(args: argparse.Namespace) -> list[bytes]:
    """The bytes of every request; prompts are random token ids that share no beginning."""
    rng = random.Random(args.seed)
    requests = []
    for i in range(args.requests):
        prompt = [rng.randrange(1000, args.vocab) for _ in range(args.input_len)]
        body = {
            "prompt": prompt,
            "max_tokens": args.output_len,
            "ignore_eos": True,
            "seed": i,
            "stream": True,
        }
        payload = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {args.host}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
        )
        requests.append(head.encode() + payload)
    return requests


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Sends all requests over ``args.streams`` connections. Raises RuntimeError."""
    waiting = requests_of(args)
    poll = select.epoll()
    streams = {}
    for _ in range(args.streams):
        stream = Stream(args.host, args.port)
        streams[stream.socket.fileno()] = stream
        poll.register(stream.socket, select.EPOLLIN)
    ttfts: list[float] = []
    gaps: list[float] = []
    num_events = 0
    cpu, began = time.process_time(), time.perf_counter()
    for stream in streams.values():
        stream.send(waiting.pop())
    num_running = len(streams)
    while num_running:
        ready = poll.poll(20)
        if not ready:
            raise RuntimeError("nothing came for 20 s")
        for descriptor, _ in ready:
            stream = streams[descriptor]
            if not stream.read(time.perf_counter(), gaps):
                continue
            ttfts.append(stream.first - stream.sent)
            num_events += stream.num_events
            if waiting:
                stream.send(waiting.pop())
            else:
                num_running -= 1
                poll.unregister(stream.socket)
                stream.socket.close()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {
        "streams": args.streams,
        "requests": args.requests,
        "events": num_events,
        "seconds": round(seconds, 3),
        "events_per_s": round(num_events / seconds, 1),
        "out_tok_per_s": round(args.requests * args.output_len / seconds, 1),
        "ttft_p50_ms": milliseconds(ttfts, 0.5),
        "ttft_p99_ms": milliseconds(ttfts, 0.99),
        "itl_p50_ms": milliseconds(gaps, 0.5),
        "itl_p99_ms": milliseconds(gaps, 0.99),
        "client_us_per_tok": round(cpu * 1e6 / (args.requests * args.output_len), 2),
    }


def milliseconds(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of them lie; 0 if there are none."""
    if not values:
        return 0.0
    return round(sorted(values)[min(len(values) - 1, int(share * len(values)))] * 1e3, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--host", default="127.0.0.1")
    add("--port", type=int, required=True)
    add("--streams", type=int, default=1)
    add("--requests", type=int, default=1, help="in all; at least one per stream")
    add("--input-len", type=int, default=256)
    add("--output-len", type=int, default=256)
    add("--vocab", type=int, default=49000, help="prompt token ids are below it")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.requests < args.streams:
        parser.error(f"--requests must be at least --streams, got {args.requests}")
    print(json.dumps(run(args)))


if __name__ == "__main__":
    main()
