"""A `ModelRunner` behind the HTTP API in one process: what a client gets of a tiny real model.

Scheduler, cache and executor are the real ones; the event loop itself turns the engine's.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from octavo.api.app import create_app
from octavo.clock import MonotonicClock
from octavo.config import SchedulerConfig
from octavo.engine.core import EngineCore
from octavo.kvcache.manager import KVCacheManager
from octavo.scheduler.scheduler import Scheduler
from octavo.text.tokenizer import Tokenizer
from octavo.types import EngineInfo, EngineOutput, EngineRequest
from octavo.worker.executor import InlineExecutor, ThreadExecutor
from octavo.worker.model_runner import ModelRunner
from tests.api.serving import EOS, Pumped

MAX_MODEL_LEN = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How an engine is set up; by default as simply as can be."""

    num_blocks: int = 200
    block_size: int = 16
    num_host_slots: int = 0
    has_prefix_cache: bool = True
    step_tokens: int = 512
    max_inflight: int = 1
    policy: Any = "fcfs"
    max_drafts: int = 0


class ServedRunner(Pumped):
    """Implements `octavo.engine.protocols.Engine`, for one event loop."""

    def __init__(self, runner: ModelRunner, setup: Setup, *, vocab_size: int) -> None:
        self.setup = setup
        self._kv = KVCacheManager(
            setup.num_blocks,
            block_size=setup.block_size,
            enable_prefix_caching=setup.has_prefix_cache,
            num_host_slots=setup.num_host_slots,
            check_invariants=True,
        )
        self.config = SchedulerConfig(max_num_seqs=16, scheduling_policy=setup.policy)
        scheduler = Scheduler(
            self.config,
            kv=self._kv,
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=setup.step_tokens,
            max_drafts=setup.max_drafts,
        )
        executor = (ThreadExecutor if setup.max_inflight > 1 else InlineExecutor)(runner)
        self._core = EngineCore(
            scheduler, executor, MonotonicClock(), max_inflight=setup.max_inflight
        )
        self.info = EngineInfo(
            model="tiny",
            architecture="LlamaForCausalLM",
            device="cpu",
            dtype="float32",
            kv_cache_dtype="float32",
            vocab_size=vocab_size,
            max_model_len=MAX_MODEL_LEN,
            block_size=setup.block_size,
            num_blocks=setup.num_blocks,
            max_num_seqs=16,
            max_num_batched_tokens=setup.step_tokens,
            eos_token_ids=(EOS,),
        )
        self._pumps = {}
        self._queues: dict[str, asyncio.Queue[EngineOutput]] = {}
        self._stepping: asyncio.Task[None] | None = None
        self.aborts: dict[str, int] = {}  # requests of `add` that end after so many outputs
        self.tokens: dict[str, list[int]] = {}  # all that the engine told, by request
        self.spec_stats: list[dict[str, Any]] = []  # of all answers that told them
        self.num_preemptions = self.num_loaded_blocks = 0

    @property
    def num_unfinished(self) -> int:
        return len(self._queues)

    def check_health(self) -> None:
        pass

    async def close(self) -> None:
        self._core.close()

    def abort(self, request_ids: Sequence[str]) -> None:
        self._core.abort(request_ids)
        self._go()

    def add(self, request: EngineRequest) -> None:
        """A request that nobody reads, but for its `tokens`."""
        self._core.add_request(request)
        self._go()

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        queue = self._queues[request.request_id] = asyncio.Queue()
        self.add(request)
        has_ended = False
        try:
            while not has_ended:
                output = await queue.get()
                has_ended = output.finish_reason is not None
                yield output
        finally:
            del self._queues[request.request_id]
            if not has_ended:
                self.abort([request.request_id])

    async def rest(self) -> None:
        """Until nothing runs; every block must be free then."""
        while self._core.has_work:
            self._go()
            assert self._stepping is not None
            await self._stepping
        assert self._kv.num_available == self.setup.num_blocks

    def _go(self) -> None:
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while self._core.has_work:
            turn = self._core.step()
            assert turn.stats is not None
            self.num_preemptions += turn.stats.preemptions
            self.num_loaded_blocks += turn.stats.loaded_blocks
            for output in turn.outputs:
                self._tell(output)
            await asyncio.sleep(0)

    def _tell(self, output: EngineOutput) -> None:
        name = output.request_id
        self.tokens.setdefault(name, []).extend(output.new_token_ids)
        if name in self.aborts:
            self.aborts[name] -= 1
            if self.aborts[name] == 0:
                self._core.abort([name])
        if (queue := self._queues.get(name)) is not None:
            queue.put_nowait(output)


async def ask(engine: ServedRunner, body: Mapping[str, Any], *, tokenizer: Tokenizer) -> Any:
    """The answer to ``POST /v1/completions``, or of a body with messages to that of chats: a
    stream's chunks are put together."""
    app = create_app(engine, tokenizer=tokenizer, scheduler=engine.config)  # type: ignore[arg-type]
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        route = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        response = await http.post(route, json=dict(body))
    assert response.status_code == 200, response.text
    found = re.findall(r'"spec_stats":(\{.*?\})', response.text)
    assert len(found) == (1 if body.get("return_spec_stats") else 0)
    engine.spec_stats += map(json.loads, found)
    if not body.get("stream"):
        return essence(response.json())
    lines = [line for line in response.text.splitlines() if line]
    assert lines.pop() == "data: [DONE]"
    return joined([json.loads(line.removeprefix("data: ")) for line in lines])


def essence(answer: Mapping[str, Any]) -> dict[str, Any]:
    """An answer without its time and id, and what the cache and speculation served of it."""
    kept = {k: v for k, v in answer.items() if k not in ("id", "created", "spec_stats")}
    if kept.get("usage"):
        kept["usage"] = {k: v for k, v in kept["usage"].items() if k != "prompt_tokens_details"}
    return kept


def joined(chunks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a client makes of a stream: texts and lists go on, other fields are as last told."""
    whole: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in map(essence, chunks):
        for choice in chunk.pop("choices"):
            _extend(choices.setdefault(choice["index"], {}), choice)
        whole |= {k: v for k, v in chunk.items() if v is not None}
    return {**whole, "choices": [choices[i] for i in sorted(choices)]}


def _extend(whole: dict[str, Any], piece: Mapping[str, Any]) -> None:
    for key, value in piece.items():
        if isinstance(value, str) and key in ("text", "content") or isinstance(value, list):
            whole[key] = whole[key] + value if key in whole else value
        elif isinstance(value, dict):
            _extend(whole.setdefault(key, {}), value)
        elif value is not None:
            whole[key] = value
