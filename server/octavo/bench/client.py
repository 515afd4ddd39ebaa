"""Sends one request to an OpenAI-compatible server and times its stream. Knows HTTP and clocks;
nothing of datasets or statistics.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from octavo.bench.datasets import Prompt

# Who may be sent to: name of the benchmark backend -> path.
ENDPOINTS = {
    "openai": "/v1/completions",
    "vllm": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
}
_decode = msgspec.json.Decoder().decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where and how requests are sent; the same for every request of a run."""

    url: str
    is_chat: bool
    model: str
    body: Mapping[str, Any] = field(default_factory=dict)  # sampling options, extra body
    ignore_eos: bool = False
    logprobs: int | None = None
    request_id_prefix: str = ""

    def payload(self, prompt: Prompt) -> dict[str, Any]:
        """The JSON body for `prompt`."""
        payload: dict[str, Any] = {"model": self.model}
        if self.is_chat:
            payload["messages"] = [{"role": "user", "content": prompt.text}]
            payload["max_completion_tokens"] = prompt.output_len
        else:
            payload["prompt"] = prompt.text
            payload["max_tokens"] = prompt.output_len
        payload |= {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0.0}
        if self.ignore_eos:
            payload["ignore_eos"] = True
        if self.logprobs is not None:
            payload |= (
                {"logprobs": True, "top_logprobs": self.logprobs}
                if self.is_chat
                else {"logprobs": self.logprobs}
            )
        return payload | dict(self.body)


@dataclass(slots=True, kw_only=True)
class Result:
    """What became of one request. Seconds of the monotonic clock."""

    prompt_len: int
    intended: float  # when the schedule said to send it
    sent: float = 0.0  # when a connection was free for it
    first: float = 0.0
    last: float = 0.0
    itls: list[float] = field(default_factory=list)
    output_len: int = 0
    text: str = ""
    error: str = ""

    @property
    def is_success(self) -> bool:
        return not self.error

    @property
    def ttft(self) -> float:
        """From the intended send time: waiting inside the client is waiting too."""
        return self.first - self.intended

    @property
    def ttft_from_send(self) -> float:
        return self.first - self.sent

    @property
    def latency(self) -> float:
        return self.last - self.intended

    @property
    def tpot(self) -> float | None:
        """Mean seconds per token after the first; None with fewer than two tokens."""
        return (self.last - self.first) / (self.output_len - 1) if self.output_len > 1 else None


def open_session(
    headers: Mapping[str, str], *, verify_tls: bool = True, timeout: float = 6 * 3600
) -> aiohttp.ClientSession:
    """A session with as many connections as are asked for, each kept for reuse."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60, ssl=verify_tls),
        timeout=aiohttp.ClientTimeout(total=timeout),
        headers=dict(headers),
        trust_env=True,
    )


async def send(
    session: aiohttp.ClientSession,
    target: Target,
    prompt: Prompt,
    *,
    intended: float,
    index: int = 0,
) -> Result:
    """Sends `prompt` now and reads its stream to the end; never raises for a failed request."""
    result = Result(prompt_len=prompt.num_tokens, intended=intended)
    headers = {}
    if target.request_id_prefix:
        headers["X-Request-Id"] = f"{target.request_id_prefix}{index}"
    result.sent = result.last = time.monotonic()
    try:
        async with session.post(
            target.url, json=target.payload(prompt), headers=headers
        ) as response:
            if response.status != 200:
                body = (await response.text())[:500]
                result.error = f"HTTP {response.status}: {body}"
                return result
            await _read(response, result)
    except (aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
        result.error = f"{type(error).__name__}: {error}"
    return result


async def _read(response: aiohttp.ClientResponse, result: Result) -> None:
    pieces: list[str] = []
    num_chunks = 0
    is_done = False
    async for data, now in _events(response):
        if data == b"[DONE]":
            is_done = True
            break
        event = _decode(data)
        if "error" in event:
            result.error = json.dumps(event["error"])
            return
        if usage := event.get("usage"):
            result.output_len = usage.get("completion_tokens") or 0
        piece = _text_of(event)
        if piece is None:
            continue
        num_chunks += 1
        if num_chunks == 1:
            result.first = now
        else:
            result.itls.append(now - result.last)
        result.last = now
        pieces.append(piece)
    result.text = "".join(pieces)
    result.output_len = result.output_len or num_chunks
    if num_chunks == 0:
        result.error = "the stream held no token"
    elif not is_done:
        result.error = "the stream ended before [DONE]"


def _text_of(event: Any) -> str | None:
    """The text of a token event; None for one without tokens (role, usage)."""
    choices = event.get("choices")
    if not choices:
        return None
    choice = choices[0]
    if "delta" in choice:
        delta = choice["delta"]
        text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
        is_role_only = "role" in delta and not text
        is_end_only = choice.get("finish_reason") is not None and not text
        return None if is_role_only or is_end_only else (text or "")
    return choice.get("text") or ""


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[bytes, float]]:
    """(data, when it came) of each server-sent event."""
    buffer = b""
    async for chunk in response.content.iter_any():
        now = time.monotonic()
        buffer = (buffer + chunk).replace(b"\r\n", b"\n")
        *events, buffer = buffer.split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    yield line[5:].strip(), now
