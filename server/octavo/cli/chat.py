"""``octavo chat``: a conversation in the terminal, with a server or with an engine of its own."""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from octavo.cli.options import (
    add_engine_flags,
    add_sampling_flags,
    engine_options,
    environment_api_key,
    sampling_options,
)

HELP = "talk to a model in the terminal"
_COMMANDS = "/reset forgets the conversation, /exit leaves; Ctrl-C stops an answer"

Message = dict[str, str]


class ChatError(RuntimeError):
    """An answer could not be had; the conversation may go on."""


class Partner(Protocol):
    """Who answers."""

    name: str

    def reply(self, messages: list[Message]) -> Iterator[str]:
        """The answer's text, piece by piece. Raises `ChatError`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base-url", help="a server, such as http://127.0.0.1:8000; default none")
    parser.add_argument("--system", help="system message")
    add_sampling_flags(parser)
    add_engine_flags(parser, skip=("seed",))


def run(args: argparse.Namespace) -> int:
    options = sampling_options(args)
    if options.get("n", 1) != 1:
        raise ValueError("--n must be 1 in a conversation")
    try:
        partner: Partner = (
            RemotePartner(args.base_url, model=getattr(args, "model", None), options=options)
            if args.base_url is not None
            else LocalPartner(engine_options(args), options=options)
        )
    except ChatError as error:
        print(f"octavo chat: error: {error}", file=sys.stderr)
        return 1
    if sys.stdin.isatty():
        import readline  # noqa: F401  (lazy: gives input() line editing, terminals only)
    print(f"{partner.name}. {_COMMANDS}", file=sys.stderr)
    converse(partner, system=args.system, read=lambda: input("> " if sys.stdin.isatty() else ""))
    return 0


def converse(partner: Partner, *, system: str | None, read: Callable[[], str]) -> None:
    """Reads lines and prints answers until the input ends or says /exit."""
    start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            messages = list(start)
            continue
        if line == "/help":
            print(_COMMANDS, file=sys.stderr)
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        answer = _answer(partner, messages)
        if answer is None:
            messages.pop()  # as if it had not been asked
        else:
            messages.append({"role": "assistant", "content": answer})


def _answer(partner: Partner, messages: list[Message]) -> str | None:
    """Prints the answer as it comes; None if there was none."""
    pieces: list[str] = []
    try:
        for piece in partner.reply(messages):
            print(piece, end="", flush=True)
            pieces.append(piece)
    except KeyboardInterrupt:
        pieces.append("")
    except ChatError as error:
        print(f"error: {error}", file=sys.stderr)
        return None
    print()
    return "".join(pieces)


class LocalPartner:
    """An engine in this process."""

    def __init__(self, engine: dict[str, Any], *, options: dict[str, Any]) -> None:
        # Lazy: torch; not needed to talk to a server.
        from octavo.llm import LLM

        self._llm = LLM(**engine)
        self._options = options
        self.name = self._llm.info.model

    def reply(self, messages: list[Message]) -> Iterator[str]:
        try:
            prompt = self._llm.render_chat(messages)
            for delta in self._llm.stream(prompt, self._options):
                yield delta.text
        except (ValueError, RuntimeError) as error:
            raise ChatError(str(error)) from error


class RemotePartner:
    """A server with the OpenAI API."""

    def __init__(self, base_url: str, *, model: str | None, options: dict[str, Any]) -> None:
        self._base = base_url.rstrip("/").removesuffix("/v1") + "/v1"
        self._options = options
        if not self._base.startswith(("http://", "https://")):
            raise ValueError(f"--base-url must begin with http:// or https://, got {base_url!r}")
        if model is None:
            with self._open("/models") as response:
                model = json.load(response)["data"][0]["id"]
        self.name: str = model

    def _open(self, path: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json"}
        if (key := environment_api_key()) is not None:
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data=data, headers=headers)
        try:
            response: http.client.HTTPResponse = urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            with error:
                raise ChatError(f"HTTP {error.code}: {_message(error.read())}") from None
        except (OSError, http.client.HTTPException) as error:
            raise ChatError(f"no answer from {self._base}: {error}") from None
        return response

    def reply(self, messages: list[Message]) -> Iterator[str]:
        body = {"model": self.name, "messages": messages, "stream": True, **self._options}
        with self._open("/chat/completions", body) as response:
            try:
                yield from _stream_text(response)
            except (OSError, http.client.HTTPException) as error:
                raise ChatError(f"the answer broke off: {error}") from None


def _stream_text(response: http.client.HTTPResponse) -> Iterator[str]:
    for line in response:
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:"):
            continue
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise ChatError(event["error"].get("message", str(event["error"])))
        for choice in event.get("choices", ()):
            if text := choice["delta"].get("content"):
                yield text


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:500].decode("utf-8", "replace")
