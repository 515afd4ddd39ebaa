"""A real HTTP server over a scripted engine, for tests of the front end."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any

import uvicorn
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from octavo.api.app import create_app
from octavo.engine.protocols import EngineDeadError, Sink
from octavo.text.tokenizer import Tokenizer
from octavo.types import (
    EngineInfo,
    EngineOutput,
    EngineRequest,
    FinishReason,
    TokenLogprobs,
)

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "The capital of France is Paris. Hello world, hello there! Stop here and there.",
    "one two three four five six seven eight nine ten, a quick brown fox jumps over",
    "naïve café übergroß 日本語 emoji 😀 👩‍👩‍👧 and so on",
]


def small_tokenizer(*, vocab_size: int = 600) -> Tokenizer:
    """A byte-level BPE of 600 tokens or so, trained on the spot."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    config = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "chat_template": CHATML}
    return Tokenizer(backend, config=config)


EOS = 2


class Pumped:
    """`attach` and `detach` for engines that have `generate`."""

    _pumps: dict[str, tuple[Sink, asyncio.Task[None]]]

    def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        raise NotImplementedError

    def attach(self, request: EngineRequest, sink: Sink) -> None:
        async def pump() -> None:
            try:
                async with aclosing(self.generate(request)) as outputs:
                    async for output in outputs:
                        sink.put(output)
            except EngineDeadError as error:
                sink.fail(str(error))

        self._pumps[request.request_id] = sink, asyncio.create_task(pump())

    def detach(self, request_id: str, sink: Sink) -> None:
        if request_id in self._pumps and self._pumps[request_id][0] is sink:
            self._pumps.pop(request_id)[1].cancel()


class ScriptedEngine(Pumped):
    """Says what `script` says, or a function of (prompt, seed, position); ends as an engine does.

    ``hold_after``: produces that many tokens, then nothing until aborted.
    """

    def __init__(self, *, vocab_size: int, max_model_len: int = 256) -> None:
        self.info = EngineInfo(
            model="tiny",
            architecture="Fake",
            device="cpu",
            dtype="float32",
            kv_cache_dtype="float32",
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            block_size=16,
            num_blocks=64,
            max_num_seqs=4,
            max_num_batched_tokens=256,
            eos_token_ids=(EOS,),
        )
        self.requests: list[EngineRequest] = []
        self.live: set[str] = set()
        self.aborted: list[str] = []
        self.script: Sequence[int] | None = None
        self.hold_after: int | None = None
        self.tokens_per_output = 1
        self.num_cached = 0
        self.num_drafts = 0  # that each output tells to have been verified
        self.dead: str | None = None
        self._pumps = {}
        self.on_request: Callable[[EngineRequest], None] = lambda request: None
        self.fail: Callable[[EngineRequest, int], EngineOutput | None] = lambda request, step: None

    @property
    def num_unfinished(self) -> int:
        return len(self.live)

    def check_health(self) -> None:
        if self.dead:
            raise EngineDeadError(self.dead)

    def abort(self, request_ids: Sequence[str]) -> None:
        self.live.difference_update(request_ids)

    async def close(self) -> None:
        self.dead = "closed"

    def token_at(self, request: EngineRequest, position: int) -> int:
        if self.script is not None:
            return self.script[position] if position < len(self.script) else EOS
        if request.params.is_greedy:
            key = f"{request.prompt_token_ids} {position}"
        else:
            key = f"{request.prompt_token_ids} {request.params.seed} {position}"
        digest = hashlib.sha256(key.encode()).digest()
        return 3 + int.from_bytes(digest[:4], "little") % (self.info.vocab_size - 3)

    def logprobs(self, token_id: int, count: int | None) -> TokenLogprobs:
        top = tuple(((token_id + i) % self.info.vocab_size, -0.5 - i) for i in range(count or 0))
        return TokenLogprobs(token_id=token_id, logprob=-0.5 - token_id / 1e4, rank=1, top=top)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        if self.dead:
            raise EngineDeadError(self.dead)
        assert request.request_id not in self.live
        self.requests.append(request)
        self.on_request(request)
        self.live.add(request.request_id)
        try:
            async for output in self._run(request):
                yield output
        finally:
            if request.request_id in self.live:
                self.aborted.append(request.request_id)
                self.live.discard(request.request_id)

    async def _run(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        params = request.params
        prompt = request.prompt_token_ids
        prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        if params.prompt_logprobs is not None:
            prompt_logprobs = tuple(self.logprobs(t, params.prompt_logprobs) for t in prompt[1:])
        limit = min(params.max_tokens, self.info.max_model_len - len(prompt))
        position = 0
        while True:
            await asyncio.sleep(0)
            if (failure := self.fail(request, position)) is not None:
                self.live.discard(request.request_id)
                yield failure
                return
            if self.hold_after is not None and position >= self.hold_after:
                await asyncio.Event().wait()
            tokens: list[int] = []
            reason = FinishReason.LENGTH if limit == 0 else None
            while reason is None and len(tokens) < self.tokens_per_output:
                token = self.token_at(request, position)
                tokens.append(token)
                position += 1
                may_stop = position > params.min_tokens
                ends = set(params.stop_token_ids)
                if not params.ignore_eos:
                    ends.update(params.eos_token_ids)
                if may_stop and token in ends:
                    reason = FinishReason.STOP
                elif position >= limit:
                    reason = FinishReason.LENGTH
            if reason is not None:
                self.live.discard(request.request_id)
            listed = params.logprobs is not None
            by_id = reason is FinishReason.STOP and tokens[-1] in params.stop_token_ids
            yield EngineOutput(
                request_id=request.request_id,
                new_token_ids=tuple(tokens),
                new_logprobs=tuple(self.logprobs(t, params.logprobs) for t in tokens)
                if listed
                else (),
                new_prompt_logprobs=prompt_logprobs,
                num_cached_tokens=self.num_cached,
                drafts=(self.num_drafts, len(tokens) - 1) if self.num_drafts else None,
                finish_reason=reason,
                stop_reason=tokens[-1] if by_id else None,
            )
            prompt_logprobs = ()
            if reason is not None:
                return


class Server:
    """uvicorn in a thread."""

    def __init__(self, app: Any, engine: ScriptedEngine, *, http: Any = "auto") -> None:
        self.app = app
        self.engine = engine
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(app, http=http, log_level="error", ws="none", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self._server.run(sockets=[self._socket])

    def start(self) -> None:
        self._thread.start()
        wait_until(lambda: self._server.started)

    @property
    def num_buffered(self) -> int:
        """Bytes that the connections' clients have not taken yet."""
        connections = list(self._server.server_state.connections)
        return sum(c.transport.get_write_buffer_size() for c in connections)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()


def wait_until(condition: Callable[[], bool], *, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


@contextlib.contextmanager
def serving(
    *, tokenizer: Tokenizer, max_model_len: int = 256, http: Any = "auto", **options: Any
) -> Iterator[Server]:
    """A running server; ``http`` is uvicorn's protocol, ``options`` go to `create_app`."""
    engine = ScriptedEngine(vocab_size=tokenizer.vocab_size, max_model_len=max_model_len)
    app = create_app(engine, tokenizer=tokenizer, **options)
    server = Server(app, engine, http=http)
    server.start()
    try:
        yield server
    finally:
        server.stop()
